"""Which linear layers of a model carry an adapter, at which rank and scale. No JAX here.

The linear layers and the modules that may be saved whole are those that the families' rows have.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES, family_of
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec

# The linear layers of all families, for checks before a model is known.
LINEARS = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in family.linears if "/" not in name)  # no encoder's
)
FEED_FORWARD_LINEARS = tuple(
    dict.fromkeys(
        name for family in FAMILIES.values() for name, row in family.linears.items() if row.path.startswith("mlp/")
    )
)
# Modules outside the layers that PEFT's modules_to_save may name, with their parameter.
SAVEABLE = {
    row.path.rpartition("/")[0]: row.path
    for row in sorted((row for family in FAMILIES.values() for row in family.rows), key=lambda row: row.path)
    if not row.in_layer
}


def _match(patterns: dict[str, float], module: str) -> float | None:
    # PEFT: a key matches a module when it equals it or a suffix after a dot; keys are regular expressions.
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return None


def as_one_adapter(model: DecoderSpec, lora: LoraConfig) -> LoraConfig:
    """The same adapter without `per_expert`.

    Adapters of E experts are one of E times the rank, whose factor on the neurons' side is zero between the ranks of
    one expert and the neurons of another.

    Raises:
        UserError: for a dense model, no feed-forward target, or patterns, which could not be told from these.
    """
    if not lora.per_expert:
        return lora
    targets = [target for target in lora.targets if target in FEED_FORWARD_LINEARS]
    if model.experts is None:
        raise UserError("lora.per_expert: the model is not divided into experts; `convert moefy` does that")
    if not targets:
        raise UserError(f"lora.per_expert: lora.targets has none of {', '.join(FEED_FORWARD_LINEARS)}")
    if lora.rank_pattern or lora.alpha_pattern:
        raise UserError("lora.per_expert: cannot be had together with rank_pattern or alpha_pattern")
    experts = model.experts.num_experts
    alpha = lora.alpha * (math.sqrt(experts) if lora.rslora else experts)
    return dataclasses.replace(
        lora,
        per_expert=False,
        rank_pattern=dict.fromkeys(targets, experts * lora.rank),
        alpha_pattern=dict.fromkeys(targets, alpha),
    )


def check_names(lora: LoraConfig) -> None:
    """Whether an adapter names layers and modules that there are; needs no model.

    Raises:
        UserError: for an unknown target or module, or a pattern that is not a regular expression.
    """
    for target in lora.targets:
        if target not in LINEARS:
            near = difflib.get_close_matches(target, LINEARS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"lora.targets: {target!r} is not a linear layer of the model ({', '.join(LINEARS)}){hint}")
    if not lora.targets:
        raise UserError("lora.targets is empty: name at least one linear layer, e.g. [q_proj, v_proj]")
    for module in lora.modules_to_save:
        if module not in SAVEABLE:
            raise UserError(f"lora.modules_to_save: {module!r} is not one of {', '.join(SAVEABLE)}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            try:
                re.compile(rf"(.*\.)?({pattern})")
            except re.error as error:
                raise UserError(f"lora.{key}: {pattern!r} is not a regular expression: {error}") from None


def resolve_lora(model: DecoderSpec, lora: LoraConfig, layers: tuple[int, ...] | None = None) -> dict[str, LoraSpec]:
    """The adapter of each targeted linear ('q_proj', ...), with PEFT's rank and alpha patterns applied.

    Args:
        model: the base model's shape.
        lora: what the user asked for.
        layers: only these layers carry an adapter (PEFT's layers_to_transform); None means all.

    Raises:
        UserError: for an unknown target, a pattern that matches nothing, or a rank below 1.
    """
    check_names(lora)
    model.refuse_encoder("lora")
    for module in lora.modules_to_save:
        if module == "lm_head" and model.tied_head:
            raise UserError("lora.modules_to_save: lm_head is tied to embed_tokens in this model; name embed_tokens")
    experts = model.experts.num_experts if lora.per_expert and model.experts is not None else 1
    lora = as_one_adapter(model, lora)
    used: set[str] = set()
    specs = {}
    rows = family_of(model).linears
    for target in rows:
        if target not in lora.targets:
            continue
        ranks, scales = [], []
        for layer in range(model.num_layers):
            if layers is not None and layer not in layers:
                ranks.append(0)
                scales.append(0.0)
                continue
            module = rows[target].hf_module.format(layer)
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
        specs[target] = LoraSpec(
            tuple(ranks), tuple(scales), lora.dropout, lora.dora, experts if target in FEED_FORWARD_LINEARS else 1
        )
    unused = sorted((set(lora.rank_pattern) | set(lora.alpha_pattern)) - used)
    if unused:
        raise UserError(f"lora.rank_pattern / alpha_pattern: {', '.join(unused)} match no targeted layer")
    return specs
