"""What a run asks of a model, held against what the model is. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jaxlm.config import MoeRunConfig
from jaxlm.errors import UserError
from jaxlm.spec import TEXT, DecoderSpec, ExpertsSpec


def resolve_experts(
    shape: DecoderSpec, run: MoeRunConfig | None, fresh: bool, ranges: Mapping[str, tuple[int, int]] | None = None
) -> DecoderSpec:
    """The shape with what a run says of experts.

    Args:
        run: the section `moe`; what is not given stays as it is.
        fresh: the model is new; otherwise its weights decide whether there are experts and a learned router.
        ranges: the tokenizer's modalities, which a new model has unless the run says otherwise.

    Raises:
        UserError: for a dense model, another number of experts, or numbers that do not fit each other.
    """
    if run is None:
        return shape
    old = shape.experts
    if old is None and not fresh:
        raise UserError("moe: the model's feed-forward layer is not divided into experts; `convert moefy` does that")
    if old is not None and run.experts not in (None, old.num_experts):
        raise UserError(f"moe.experts: {run.experts}, but the model has {old.num_experts}; leave it out")
    experts = run.experts or (old.num_experts if old else None)
    if experts is None:
        raise UserError("moe.experts: say into how many experts the feed-forward layer is divided")
    router = run.router or (old.router if old else "learned")
    if old is not None and router == "learned" != old.router:
        raise UserError(f"moe.router: the model has no trained router (it is {old.router}), so it cannot be 'learned'")
    if run.ranges:
        ranges = run.ranges
    else:
        ranges = dict(zip(old.modalities[1:], old.ranges, strict=True)) if old else dict(ranges or {})
    top_k = dict(zip(old.modalities, old.top_k, strict=True)) if old and not run.top_k else dict(run.top_k)
    names = (TEXT, *ranges)
    for name in top_k.keys() - set(names):
        raise UserError(f"moe.top_k: {name!r} is not a modality of this model; it has {', '.join(names)} (moe.ranges)")
    for name in names:
        if name not in top_k:
            raise UserError(f"moe.top_k: say how many experts tokens of the modality {name!r} use: {{{name}: K}}")
    shared = run.shared if run.shared is not None else (old.shared if old else 0)
    for name, (_, stop) in ranges.items():
        if stop > shape.vocab_size:
            raise UserError(f"moe.ranges: {name} ends at token {stop}, the model has {shape.vocab_size}")
    pairs = tuple((start, stop) for start, stop in ranges.values())
    kept = {} if old is None else {"layout": old.layout, "weights": old.weights}
    moe = ExpertsSpec(experts, router, names, pairs, tuple(top_k[name] for name in names), shared, **kept)
    if old is None:
        return shape.with_experts(moe)
    # A layer of a model that comes with experts in some of its layers stays dense where it is.
    return shape.with_layers(
        lambda layer: (
            layer
            if layer.feed_forward.experts is None
            else replace(layer, feed_forward=replace(layer.feed_forward, experts=moe))
        )
    )
