"""Which linear layers of a model carry an adapter, at which rank and scale. No JAX here."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.shapes import LlamaConfig

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
# Modules outside the layers that PEFT's modules_to_save may name, with their parameter.
SAVEABLE = {"embed_tokens": "embed_tokens/embedding", "lm_head": "lm_head/kernel", "norm": "norm/scale"}


@dataclass(frozen=True)
class LoraSpec:
    """The adapter of one kind of linear layer over all L layers.

    The factors of all layers are stacked, so they share the largest rank; a layer of a
    smaller rank (or none: 0) has zeros behind it in both factors. Their gradients are
    exactly zero, so they stay zero.
    """

    ranks: tuple[int, ...]  # [L]
    scales: tuple[float, ...]  # [L]
    dropout: float
    dora: bool

    @property
    def rank(self) -> int:
        return max(self.ranks)


def module_parent(linear: str) -> str:
    """'self_attn' or 'mlp'."""
    return "self_attn" if linear in ATTENTION_LINEARS else "mlp"


def _match(patterns: dict[str, float], module: str) -> float | None:
    # PEFT: a key matches a module when it equals it or a suffix after a dot; keys are regular expressions.
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return None


def resolve_lora(model: LlamaConfig, lora: LoraConfig, layers: tuple[int, ...] | None = None) -> dict[str, LoraSpec]:
    """The adapter of each targeted linear ('q_proj', ...), with PEFT's rank and alpha patterns applied.

    Args:
        model: the base model's shape.
        lora: what the user asked for.
        layers: only these layers carry an adapter (PEFT's layers_to_transform); None means all.

    Raises:
        UserError: for an unknown target, a pattern that matches nothing, or a rank below 1.
    """
    for target in lora.targets:
        if target not in LINEARS:
            near = difflib.get_close_matches(target, LINEARS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"lora.targets: {target!r} is no linear layer of the model ({', '.join(LINEARS)}){hint}")
    if not lora.targets:
        raise UserError("lora.targets is empty: name at least one linear layer, e.g. [q_proj, v_proj]")
    for module in lora.modules_to_save:
        if module not in SAVEABLE:
            raise UserError(f"lora.modules_to_save: {module!r} is not one of {', '.join(SAVEABLE)}")
        if module == "lm_head" and model.tie_word_embeddings:
            raise UserError("lora.modules_to_save: lm_head is tied to embed_tokens in this model; name embed_tokens")
    used: set[str] = set()
    specs = {}
    for target in LINEARS:
        if target not in lora.targets:
            continue
        ranks, scales = [], []
        for layer in range(model.num_layers):
            if layers is not None and layer not in layers:
                ranks.append(0)
                scales.append(0.0)
                continue
            module = f"model.layers.{layer}.{module_parent(target)}.{target}"
            for patterns in (lora.rank_pattern, lora.alpha_pattern):
                used |= {key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)}
            rank = _match(dict(lora.rank_pattern), module)
            alpha = _match(lora.alpha_pattern, module)
            rank = int(lora.rank if rank is None else rank)
            alpha = lora.alpha if alpha is None else alpha
            if rank < 1:
                raise UserError(f"lora.rank: {rank} for {module}; a rank is at least 1")
            ranks.append(rank)
            scales.append(alpha / (math.sqrt(rank) if lora.rslora else rank))
        specs[target] = LoraSpec(tuple(ranks), tuple(scales), lora.dropout, lora.dora)
    unused = sorted((set(lora.rank_pattern) | set(lora.alpha_pattern)) - used)
    if unused:
        raise UserError(f"lora.rank_pattern / alpha_pattern: {', '.join(unused)} match no targeted layer")
    return specs
