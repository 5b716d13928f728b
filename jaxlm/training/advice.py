"""Warnings about settings that are allowed and hardly ever meant, for the start and the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.config import OptimizerConfig
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec
from jaxlm.training.optimizer import Schedule, warmup_steps
from jaxlm.weights.names import adapter_leaves

FAR = 0.5  # share of the peak; a run whose rate stays below it has not trained as its settings say


def schedule_warnings(config: OptimizerConfig, schedule: Schedule, total: int) -> list[str]:
    """Warns of a warm-up that takes most of the run.

    Args:
        schedule: the run's learning rate by step.
        total: number of steps of the run.
    """
    warmup = warmup_steps(config, total)
    if warmup <= 1 or 2 * warmup <= total:
        return []
    highest = highest_rate(schedule, total)
    key = "warmup_steps" if config.warmup_steps else "warmup_ratio"
    reached = "" if highest >= config.learning_rate else f", and the learning rate comes to {highest:.3g} at most"
    return [
        f"warm-up takes {min(warmup, total)} of the run's {total} step{'s' if total > 1 else ''}{reached} "
        f"(optimizer.learning_rate is {config.learning_rate:g}); lower optimizer.{key}, or train for longer"
    ]


def highest_rate(schedule: Schedule, total: int) -> float:
    """The largest learning rate of a run."""
    return float(np.max(np.asarray(schedule(jnp.arange(max(1, total))))))


def rank_warnings(model: DecoderSpec, adapters: Mapping[str, LoraSpec]) -> list[str]:
    """Warns of adapters with more rank than the matrix that they adapt can have."""
    warnings = []
    for target, spec in adapters.items():
        leaves = list(adapter_leaves(model, {target: spec}))
        shapes = [(leaf.path, leaf.layout.shape) for leaf in leaves if leaf.layers == leaves[0].layers]
        inputs = sum(math.prod(shape[:-1]) for path, shape in shapes if path.endswith("/lora_A"))
        outputs = sum(math.prod(shape[1:]) for path, shape in shapes if path.endswith("/lora_B"))
        # One side of every matrix is D; the other is divided among experts with adapters of their own.
        inner = inputs * outputs // model.hidden_size // spec.experts
        rank, limit = spec.rank // spec.experts, min(model.hidden_size, inner)
        if rank > limit:
            warnings.append(
                f"lora.rank: {rank} of {target} exceeds the smaller side of a matrix of {model.hidden_size} x {inner}: "
                f"above {limit} it adds parameters and no freedom"
            )
    return warnings


# What families call the share of activations that is dropped in training.
_DROPOUTS = ("dropout_rate", "dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "resid_pdrop")


def dropout_warnings(hf_config: Mapping[str, Any] | None) -> list[str]:
    """Says that the dropout of a model's config.json is not applied, which transformers does in training.

    Args:
        hf_config: the model's `config.json`; None: it came with none.
    """
    asked = {key: value for key in _DROPOUTS if (value := (hf_config or {}).get(key)) and type(value) is float}
    if not asked:
        return []
    words = ", ".join(f"{key} {value:g}" for key, value in asked.items())
    return [f"the model's config.json has {words}: activations are not dropped here (lora.dropout is an adapter's own)"]


def final_warnings(config: OptimizerConfig, schedule: Schedule, total: int, all_gradients_zero: bool) -> list[str]:
    """Warns, after the last step, of a run that cannot have trained.

    Args:
        all_gradients_zero: whether every gradient was 0.
    """
    warnings = []
    highest = highest_rate(schedule, total)
    if highest < FAR * config.learning_rate:
        warnings.append(
            f"the learning rate never came above {highest:.3g}, {highest / config.learning_rate:.0%} of "
            f"optimizer.learning_rate {config.learning_rate:g}: the run of {total} steps ended in "
            "its warm-up, and the model has hardly changed"
        )
    if all_gradients_zero:
        warnings.append(
            "all gradients were 0: nothing has been trained. Look at what is trained (lora.alpha, lora.targets, "
            "moe.router) and whether the records have an answer (--preview 1 marks the target tokens)"
        )
    if config.learning_rate == 0:
        warnings.append("optimizer.learning_rate is 0: nothing has been trained")
    return warnings
