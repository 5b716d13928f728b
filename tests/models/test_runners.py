"""Layers that differ, in a period: scanned, unrolled with caches and streamed give what plain layers in a row give."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.model import abstract_weights, unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.unrolled import extend, next_logits, prefill
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)

WINDOW = AttentionSpec(4, 2, 8, window=3, rope=RopeSpec(rope_theta=500.0))
GLOBAL = AttentionSpec(4, 1, 16, qk_norm=NormSpec(1e-6))
NO_POSITIONS = AttentionSpec(4, 2, 7, None)
EXPERTS = ExpertsSpec(4, "learned", ("text", "x"), ((40, 50),), (2, 1))
LOCAL = LayerSpec(WINDOW, FeedForwardSpec(48))
WHOLE = LayerSpec(GLOBAL, FeedForwardSpec(32, experts=EXPERTS))
UNORDERED = LayerSpec(NO_POSITIONS, FeedForwardSpec(48))


def decoder(num_layers: int, *period: LayerSpec, **options: Any) -> Decoder:
    return Decoder(DecoderSpec("made up", 64, 32, num_layers, period, initializer_range=0.2), **options)


def ids(length: int = 12) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (2, length)).astype(np.int32)


def fresh(model: Decoder) -> Any:
    """Random values in all parameters, norms and adapters too."""
    shapes = nn.unbox(abstract_variables(model))
    leaves, tree = jax.tree.flatten({name: shapes[name] for name in ("params", "lora") if name in shapes})
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


def place(model: Decoder, number: int) -> tuple[str, int]:
    return next((s.path, s.numbers.index(number)) for s in model.spec.stacks if number in s.numbers)


def in_a_row(model: Decoder, variables: Any, tokens: np.ndarray) -> jax.Array:
    """The plain twin: each layer by itself, with its own slice of its stack."""
    params = variables["params"]
    x = model.apply({"params": {"embed_tokens": params["embed_tokens"]}}, tokens, method="embed")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    angles = model.angles(positions)
    for number in range(model.spec.num_layers):
        path, index = place(model, number)
        layer = {}
        for name, tree in variables.items():
            for part in path.split("/"):
                tree = tree.get(part, {})
            layer[name] = jax.tree.map(lambda leaf, index=index: leaf[index], tree)
        own = angles[number % len(angles)]
        x, _ = model.block(number).apply(layer, x, jnp.int32(number), own, None, model.modality(jnp.asarray(tokens)))
    return model.apply({"params": {name: params[name] for name in ("norm", "lm_head")}}, x, method="head")


@pytest.mark.parametrize(
    ("remat", "num_layers"),
    [
        ("none", 1),
        ("none", 2),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("none", 4), ("none", 5), ("full", 1), ("full", 2), ("full", 4), ("full", 5)]
        ],
    ],
)
def test_a_period_of_two_scanned_equals_its_layers_in_a_row(remat: str, num_layers: int) -> None:
    model, tokens = decoder(num_layers, LOCAL, WHOLE, remat=remat), ids()
    variables = fresh(model)

    def logits(params: Any) -> jax.Array:
        return model.apply({"params": params}, tokens)

    def plain(params: Any) -> jax.Array:
        return in_a_row(model, {"params": params}, tokens)

    weight = np.random.default_rng(2).normal(0, 1, (2, 12, 64)).astype(np.float32)
    got, back = jax.vjp(jax.jit(logits), variables["params"])
    expected, plain_back = jax.vjp(jax.jit(plain), variables["params"])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for a, b in zip(jax.tree.leaves(back(weight)), jax.tree.leaves(plain_back(weight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max()))


def test_parameters_of_a_period_lie_where_the_spec_says() -> None:
    shapes = nn.unbox(abstract_variables(decoder(5, LOCAL, WHOLE)))["params"]
    assert set(shapes) == {"embed_tokens", "layers", "tail", "norm", "lm_head"}
    assert set(shapes["layers"]) == {"0", "1"} and set(shapes["tail"]) == {"0"}
    assert shapes["layers"]["0"]["self_attn"]["q_proj"]["kernel"].shape == (2, 32, 4, 8)
    assert shapes["layers"]["1"]["self_attn"]["k_norm"]["scale"].shape == (2, 16)
    assert shapes["layers"]["1"]["mlp"]["router"].shape == (2, 32, 4)
    assert shapes["tail"]["0"]["mlp"]["up_proj"]["kernel"].shape == (1, 32, 48)


def test_adapters_of_a_period_know_which_layer_they_are_of() -> None:
    spec = LoraSpec((4, 0, 2, 4, 1), (0.5, 0.0, 2.0, 1.0, 3.0), 0.0, False)
    model, tokens = decoder(5, LOCAL, WHOLE, adapters={"q_proj": spec, "down_proj": spec}), ids()
    variables = fresh(model)
    got = model.apply(variables, tokens)
    np.testing.assert_allclose(got, in_a_row(model, variables, tokens), rtol=2e-5, atol=2e-5)
    without = model.clone(adapters={}).apply({"params": variables["params"]}, tokens)
    assert np.abs(got - without).max() > 0.1


@pytest.mark.parametrize(
    "period",
    [
        (LOCAL, WHOLE),
        (UNORDERED,),
        *(pytest.param(period, marks=pytest.mark.slow) for period in [(LOCAL,), (WHOLE,), (LOCAL, UNORDERED)]),
    ],
)
def test_unrolled_with_caches_gives_the_logits_of_the_scanned_model(period: tuple[LayerSpec, ...]) -> None:
    model, tokens = decoder(5, *period), ids()
    variables = fresh(model)
    full = model.apply(variables, tokens)
    weights = unstack(variables, model.spec)
    shapes = nn.unbox(abstract_weights(model))
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, shapes)
    first, caches = prefill(model, weights, jnp.asarray(tokens[:, :5]), jnp.array([5, 5]), 16)
    np.testing.assert_allclose(first, full[:, 4], rtol=2e-5, atol=2e-5)
    more, caches = extend(model, weights, caches, jnp.asarray(tokens[:, 5:9]), jnp.array([5, 5]), jnp.array([4, 4]))
    np.testing.assert_allclose(more, full[:, 8], rtol=2e-5, atol=2e-5)
    for at in (9, 10, 11):
        step, caches = next_logits(model, weights, caches, jnp.asarray(tokens[:, at]), jnp.array([at, at]))
        np.testing.assert_allclose(step, full[:, at], rtol=2e-5, atol=2e-5)


def test_without_positions_the_last_token_sees_a_set() -> None:
    model, tokens = decoder(1, UNORDERED), ids()
    variables = fresh(model)
    turned = np.concatenate([tokens[:, -2::-1], tokens[:, -1:]], axis=1)
    logits, other = (model.apply(variables, each)[:, -1] for each in (tokens, turned))
    np.testing.assert_allclose(logits, other, rtol=1e-5, atol=1e-5)
    model = decoder(1, dataclasses.replace(UNORDERED, attention=dataclasses.replace(NO_POSITIONS, alibi=True)))
    assert np.abs(model.apply(variables, tokens)[:, -1] - model.apply(variables, turned)[:, -1]).max() > 0.01


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("period", [(LOCAL,), (LOCAL, WHOLE), (UNORDERED,)])
def test_streamed_gives_the_logits_of_the_scanned_model(
    period: tuple[LayerSpec, ...], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "HEAD_ROWS", 24)  # the last part is smaller
    model, tokens = decoder(5, *period), ids()
    model = model.clone(spec=dataclasses.replace(model.spec, tied_head=tied))
    variables = fresh(model)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    got = streamed.logits(model.spec, lambda path, index: leaves[path][index], tokens)
    np.testing.assert_allclose(got, model.apply(variables, tokens), rtol=2e-5, atol=2e-5)
