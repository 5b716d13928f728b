"""Settings that are allowed and yet hardly ever meant: what is said about them at the start and the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxlm.config import OptimizerConfig
from jaxlm.models.shapes import LlamaConfig
from jaxlm.nn.lora import ATTENTION_LINEARS, LoraSpec
from jaxlm.training.optimizer import Schedule, warmup_steps

FAR = 0.5  # of the peak: a run that never comes so far has not trained as it was asked to


def schedule_warnings(config: OptimizerConfig, schedule: Schedule, total: int) -> list[str]:
    """Of a warm-up that takes most of the run.

    Args:
        schedule: of the run's learning rate.
        total: steps of the run.
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


def rank_warnings(model: LlamaConfig, adapters: Mapping[str, LoraSpec]) -> list[str]:
    """Of adapters with more rank than the matrix they adapt can have."""
    found = []
    for target, spec in adapters.items():
        heads = model.num_kv_heads if target in ("k_proj", "v_proj") else model.num_heads
        inner = heads * model.head_dim if target in ATTENTION_LINEARS else model.intermediate_size // spec.experts
        rank, limit = spec.rank // spec.experts, min(model.hidden_size, inner)
        if rank > limit:
            found.append(
                f"lora.rank: {rank} of {target} exceeds the smaller side of a matrix of {model.hidden_size} x {inner}: "
                f"above {limit} it adds parameters and no freedom"
            )
    return found


def final_warnings(config: OptimizerConfig, schedule: Schedule, total: int, all_gradients_zero: bool) -> list[str]:
    """What to know of a run that is done.

    Args:
        all_gradients_zero: no step had a gradient other than 0.
    """
    found = []
    highest = highest_rate(schedule, total)
    if highest < FAR * config.learning_rate:
        found.append(
            f"the learning rate never came above {highest:.3g}, {highest / config.learning_rate:.0%} of "
            f"optimizer.learning_rate {config.learning_rate:g}: the run of {total} steps ended in "
            "its warm-up, and the model has hardly changed"
        )
    if all_gradients_zero:
        found.append(
            "all gradients were 0: nothing has been learnt. Look at what is trained (lora.alpha, lora.targets, "
            "moe.router) and whether the records have an answer (--preview 1 shows the learnt tokens)"
        )
    if config.learning_rate == 0:
        found.append("optimizer.learning_rate is 0: nothing has been learnt")
    return found
