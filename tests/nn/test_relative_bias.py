"""Trained biases by distance, and keys of other rows: values and gradients against transformers' T5."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.errors import UserError
from jaxlm.nn import attention as attention_module
from jaxlm.nn.attention import KVCache, MaskSpec, attention, cached_attention, cached_cross_attention
from jaxlm.nn.positions import relative_bias, relative_buckets
from jaxlm.nn.self_attention import SelfAttention
from jaxlm.spec import AttentionSpec, RelativeBiasSpec

torch = pytest.importorskip("torch")
t5 = pytest.importorskip("transformers.models.t5.modeling_t5")

D, H, DIM = 12, 3, 4
SPEC = RelativeBiasSpec(8, 20)
IMPLEMENTATIONS = ("reference", "xla")


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 8 queries, so that short rows have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERY_BLOCK", 8)
        patch.setattr(attention_module, "MAX_BLOCKS", 4)
        yield


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (4, 3), (64, 256), (20, 320)])
def test_buckets_are_those_of_t5(buckets: int, longest: int, bidirectional: bool) -> None:
    distances = np.arange(-1500, 1500)
    expected = t5.T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional, buckets, longest)
    np.testing.assert_array_equal(relative_buckets(distances, buckets, longest, bidirectional), expected)


def test_buckets_by_hand() -> None:
    """As T5 v1.1 has them; written down from transformers 5.24."""
    distances = np.array([-1000, -128, -64, -40, -33, -20, -17, -9, -8, -7, -1, 0, 1, 7, 8, 9, 15, 20, 64, 128, 200])
    both = [15, 15, 14, 12, 12, 10, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 30, 31, 31]
    behind = [31, 31, 26, 23, 21, 17, 16, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(relative_buckets(distances, 32, 128, True), both)
    np.testing.assert_array_equal(relative_buckets(distances, 32, 128, False), behind)


def segments(*lengths: int, size: int) -> np.ndarray:
    """Segments of these lengths, padding behind them."""
    return np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, size - sum(lengths)]).astype(np.int32)


# Two rows: several segments, and one; padding behind both. Sources of other lengths; the third has no answer, and the
# source of the last answer is missing.
TARGETS = np.stack([segments(7, 9, 2, size=21), segments(15, size=21)])
SOURCES = np.stack([segments(11, 3, size=27), segments(26, size=27)])
CASES = {
    "encoder": dict(queries=TARGETS, keys=None, causal=False, biased=True),
    "decoder": dict(queries=TARGETS, keys=None, causal=True, biased=True),
    "cross": dict(queries=TARGETS, keys=SOURCES, causal=False, biased=False),
    "cross with a bias": dict(queries=SOURCES, keys=TARGETS, causal=False, biased=True),
}


def seen(queries: np.ndarray, keys: np.ndarray | None, causal: bool) -> np.ndarray:
    """Which key is seen by which query, [B, T, S]."""
    same: np.ndarray = queries[:, :, None] == (queries if keys is None else keys)[:, None]
    return np.tril(same) if causal else same


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_t5(name: str) -> None:
    """Of rows with several segments and padding; with the gradient of the table."""
    case = CASES[name]
    config = t5.T5Config(
        d_model=D,
        d_kv=DIM,
        num_heads=H,
        relative_attention_num_buckets=SPEC.num_buckets,
        relative_attention_max_distance=SPEC.max_distance,
        is_decoder=case["causal"],
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    module = t5.T5Attention(config, has_relative_attention_bias=case["biased"], layer_idx=0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.5)
    rng = np.random.default_rng(0)
    x, y, cotangent = (
        rng.normal(size=(*ids.shape, D)).astype(np.float32)
        for ids in (case["queries"], case["queries"] if case["keys"] is None else case["keys"], case["queries"])
    )
    visible = seen(case["queries"], case["keys"], case["causal"])
    # What padding is given is nobody's business, nor what a query is given that sees nothing.
    cotangent *= ((case["queries"] != 0) & visible.any(2))[..., None]

    hidden, source = torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
    mask = torch.tensor(np.where(visible, 0, -1e30)[:, None].astype(np.float32))
    out = module(hidden, mask=mask, key_value_states=None if case["keys"] is None else source)[0]
    (out * torch.tensor(cotangent)).sum().backward()
    expected = [hidden.grad, source.grad, module.relative_attention_bias.weight.grad if case["biased"] else None]

    weights = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    q, k, v, o = (weights[f"{key}.weight"].T for key in "qkvo")
    table = jnp.asarray(weights.get("relative_attention_bias.weight", np.zeros((SPEC.num_buckets, H), np.float32)))

    def run(x: Any, y: Any, table: Any, implementation: str) -> Any:
        y = x if case["keys"] is None else y
        heads = [(a @ kernel).reshape(*a.shape[:2], H, DIM) for a, kernel in ((x, q), (y, k), (y, v))]
        bias = relative_bias(table, SPEC, x.shape[1], y.shape[1], not case["causal"]) if case["biased"] else None
        spec = MaskSpec(case["queries"], case["causal"], scale=1.0, key_segment_ids=case["keys"], bias=bias)
        out = attention(*heads, spec, implementation)
        out = out.reshape(*x.shape[:2], H * DIM) @ o
        return jnp.sum(out * cotangent), out

    for implementation in IMPLEMENTATIONS:
        total = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        (_, ours), grads = total(x, y, table, implementation)
        real = cotangent != 0
        np.testing.assert_allclose(np.where(real, ours, 0), np.where(real, out.detach(), 0), rtol=0, atol=2e-5)
        for a, b in zip(grads, expected, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
                assert np.abs(a).max() > 0.1


@functools.cache
def compiled(implementation: str, **static: Any) -> Any:
    """(output, gradients of sum(output * cotangent) by q, k, v and bias)."""

    def run(q: Any, k: Any, v: Any, bias: Any, ids: Any, key_ids: Any, cotangent: Any) -> Any:
        def total(q: Any, k: Any, v: Any, bias: Any) -> Any:
            mask = MaskSpec(ids, key_segment_ids=key_ids, bias=bias, **static)
            out = attention(q, k, v, mask, implementation)
            return jnp.sum(out * cotangent), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
        return out, *grads

    return jax.jit(run)


def tensors(length: int, kv_length: int, heads: int, kv_heads: int, batch: int = 2) -> tuple[np.ndarray, ...]:
    """q, k, v, a bias and a cotangent."""
    rng = np.random.default_rng(1)
    shapes: list[tuple[int, ...]] = [(batch, length, heads, DIM), *[(batch, kv_length, kv_heads, DIM)] * 2]
    shapes += [(heads, length + kv_length - 1), shapes[0]]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(
    ("kv_heads", "ids", "key_ids", "static"),
    [
        (2, TARGETS, None, dict(causal=False)),
        (1, TARGETS, None, dict(window=5, soft_cap=1.5, scale=0.7)),
        (4, None, None, dict(alibi=True)),
        (2, TARGETS, SOURCES, dict(causal=False, soft_cap=1.5)),
        (2, SOURCES, TARGETS, dict(causal=False)),
        (1, None, None, dict(causal=False)),
    ],
)
def test_xla_agrees_with_the_plain_form(
    kv_heads: int, ids: np.ndarray | None, key_ids: np.ndarray | None, static: dict[str, Any]
) -> None:
    length, kv_length = (21 if a is None else a.shape[1] for a in (ids, key_ids if key_ids is not None else ids))
    *arrays, cotangent = tensors(length, kv_length, 4, kv_heads)
    plain, fast = (compiled(name, **static)(*arrays, ids, key_ids, cotangent) for name in IMPLEMENTATIONS)
    for a, b in zip(fast, plain, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    if key_ids is not None:
        assert ids is not None
        nothing = ~(seen(ids, key_ids, False) & (ids != 0)[:, :, None]).any(2)
        assert nothing.any()
        for out, grad_q, *_ in (plain, fast):
            assert (np.asarray(out)[nothing] == 0).all() and (np.asarray(grad_q)[nothing] == 0).all()


def test_padding_of_a_source_stays_there() -> None:
    """NaN in padded keys and values reaches neither values nor gradients of xla's form."""
    q, k, v, bias, cotangent = tensors(21, 27, 4, 2)
    run = compiled("xla", causal=False)
    clean = run(q, k, v, bias, TARGETS, SOURCES, cotangent)
    k, v = (np.where((SOURCES == 0)[..., None, None], np.nan, x) for x in (k, v))
    for a, b in zip(run(q, k, v, bias, TARGETS, SOURCES, cotangent), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_of_a_bias_needs_no_square_of_scores() -> None:
    q, k, v, bias, cotangent = tensors(32, 32, 4, 2, batch=1)

    def total(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return jnp.sum(attention(q, k, v, MaskSpec(causal=False, bias=bias), "xla") * cotangent)

    program = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k, v, bias))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", program)}
    assert (1, 2, 2, 8, 32) in shapes  # a block of scores
    assert not any(shape[-2:] == (32, 32) for shape in shapes)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=1, tensor=2), dict(data=1, fsdp=1, sequence=2, tensor=2)])
def test_heads_over_devices_keep_their_bias(sizes: dict[str, int]) -> None:
    """Values, and gradients of the bias; over the sequence axis too, which moves heads. Sources of other lengths."""
    ids, key_ids = np.pad(TARGETS, ((0, 0), (0, 3))), np.pad(SOURCES, ((0, 0), (0, 1)))
    *arrays, cotangent = tensors(24, 28, 4, 2)
    arguments = (*arrays, ids, key_ids, cotangent)
    expected = compiled("reference", causal=False)(*arguments)
    with use_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:4])):
        found = jax.jit(compiled("xla", causal=False).__wrapped__)(*arguments)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", [None, dict(data=2, fsdp=1, tensor=2)])
def test_a_cache_gives_what_whole_rows_give(sizes: dict[str, int] | None) -> None:
    """Several tokens at once, at another place in each row, in a cache that is longer than the texts."""
    length, slots, new = 21, 24, 3
    q, k, v, *_ = tensors(length, length, 4, 2)
    table = np.random.default_rng(2).normal(size=(SPEC.num_buckets, 4)).astype(np.float32)
    whole = MaskSpec(scale=1.0, bias=relative_bias(table, SPEC, length, length, False))
    expected = np.asarray(attention(q, k, v, whole, "reference"))
    starts = np.array([5, 18])
    places = (starts[:, None] + np.arange(new)).astype(np.int32)
    written = (np.arange(length) < starts[:, None])[:, None, :, None]
    cache = KVCache(
        *(np.pad(np.where(written, x.swapaxes(1, 2), 0), ((0, 0), (0, 0), (0, 3), (0, 0))) for x in (k, v)), places
    )
    q, k, v = (np.take_along_axis(x, places[..., None, None], axis=1) for x in (q, k, v))
    mask = MaskSpec(scale=1.0, bias=relative_bias(table, SPEC, slots, 1, False))
    run = jax.jit(lambda *args: cached_attention(*args, "xla")[0])
    if sizes is None:
        out = run(q, k, v, cache, mask)
    else:
        with use_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:4])):
            out = run(q, k, v, cache, mask)
    expected = np.take_along_axis(expected, places[..., None, None], axis=1)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, dict(data=2, fsdp=1, tensor=2)])
def test_keys_and_values_of_a_source_serve_all_its_answers(sizes: dict[str, int] | None) -> None:
    """Computed once, laid out as in a cache; tokens of several answers side by side. A row without a source gets 0."""
    q, k, v, *_ = tensors(3, 27, 4, 2)
    source = np.stack([SOURCES[0] != 0, np.zeros(27, bool)])
    ones = np.ones((2, 3), np.int32)
    mask = MaskSpec(ones, False, scale=0.7, soft_cap=1.5, key_segment_ids=source.astype(np.int32))
    expected = attention(q, k, v, mask, "reference")
    mask = MaskSpec(causal=False, scale=0.7, soft_cap=1.5)
    run = jax.jit(lambda *args: cached_cross_attention(*args, mask))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if sizes is None:
        out = run(q, k, v, source)
        np.testing.assert_allclose(run(q[:1], k[:1, :, :14], v[:1, :, :14], None), expected[:1], rtol=0, atol=1e-5)
    else:
        with use_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:4])):
            out = run(q, k, v, source)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert (np.asarray(out[1]) == 0).all() and np.abs(out[0]).max() > 0.1


@pytest.mark.parametrize("name", ["cudnn", "pallas_tpu", "pallas_gpu"])
def test_backends_without_a_relative_bias_say_so(name: str) -> None:
    q, k, v, bias, _ = tensors(8, 8, 4, 2, batch=1)
    with pytest.raises(UserError, match=f"'{name}' cannot serve: has no relative bias; use 'auto' or 'xla'"):
        attention(q, k, v, MaskSpec(bias=bias), name)


def test_masks_that_make_no_sense_are_refused() -> None:
    q, k, v, bias, _ = tensors(8, 9, 4, 2, batch=1)
    for mask in (MaskSpec(), MaskSpec(np.ones((1, 8), np.int32), False), MaskSpec(causal=False, bias=bias[:, 1:])):
        with pytest.raises(AssertionError):
            attention(q, k, v, mask, "xla")


def test_a_layer_takes_the_bias_that_its_description_names() -> None:
    x = np.random.default_rng(0).normal(size=(2, 9, D)).astype(np.float32)
    spec = AttentionSpec(H, H, DIM, rope=None, scale=1.0, relative_bias=SPEC)
    layer = SelfAttention(D, 0.5, {}, jnp.float32, jnp.float32, spec, "xla")
    table = np.random.default_rng(1).normal(size=(SPEC.num_buckets, H)).astype(np.float32)
    bias, zeros = (relative_bias(t, SPEC, 9, 9, False) for t in (table, np.zeros_like(table)))
    arguments = (x, jnp.int32(0), None, None, None, True, None)
    params = layer.init(jax.random.key(0), *arguments, bias)
    out, cache = layer.apply(params, *arguments, bias)
    assert np.abs(out - layer.apply(params, *arguments, zeros)[0]).max() > 0.01
    places = np.full((2, 1), 8, np.int32)
    again, _ = layer.apply(
        params, x[:, 8:], *arguments[1:6], cache.replace(places=places), relative_bias(table, SPEC, 9, 1, False)
    )
    np.testing.assert_allclose(again[:, 0], out[:, 8], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="has no table of relative biases"):
        layer.apply(params, *arguments)
