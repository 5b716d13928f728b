"""Attention against an oracle of loops, and the fast forms against the plain one."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.errors import UserError
from jaxlm.kernels.backend import AttentionBackend
from jaxlm.nn import attention as attention_module
from jaxlm.nn.attention import (
    KVCache,
    MaskSpec,
    attention,
    cached_attention,
    cudnn_attention,
    reference_attention,
    xla_attention,
)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 8 queries, so that short rows have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERY_BLOCK", 8)
        patch.setattr(attention_module, "MAX_BLOCKS", 4)
        yield


def tensors(batch: int, length: int, heads: int, kv: int, dim: int = 4, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, dim) for n in (heads, kv, kv)]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


# As the paper and BLOOM's code list them, by the number of heads.
SLOPES = {
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
}


def oracle(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segments: np.ndarray | None,
    window: int | None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi: bool = False,
) -> np.ndarray:
    """One query and one head at a time, float64; nothing masked is ever looked at."""
    out = np.zeros(q.shape)
    batch, length, heads, dim = q.shape
    for b in range(batch):
        for t in range(length):
            seen = [
                s
                for s in range(t + 1)
                if (window is None or t - s < window) and (segments is None or segments[b, s] == segments[b, t])
            ]
            for n in range(heads):
                kv = n // (heads // k.shape[2])
                scores = k[b, seen, kv].astype(np.float64) @ q[b, t, n] * (dim**-0.5 if scale is None else scale)
                scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
                if alibi:
                    scores = scores - SLOPES[heads][n] * (t - np.array(seen))
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


@functools.cache
def compiled(implementation: str, **mask: Any) -> Any:
    """(output, gradients of sum(output * cotangent))."""

    def run(q: Any, k: Any, v: Any, segments: Any, cotangent: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            out = attention(q, k, v, MaskSpec(segments, **mask), implementation)
            return jnp.sum(out * cotangent), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return jax.jit(run)


@st.composite
def segment_rows(draw: st.DrawFn, length: int) -> np.ndarray:
    """Documents of any length from 1 on, and padding (0) behind them."""
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=6)))
    row = np.zeros(length, np.int32)
    start = 0
    for number, cut in enumerate(cuts, 1):
        row[start:cut] = number
        start = cut
    return row


# Lengths: one, a block, ragged, a last block of two rows, one more than the window, more blocks than MAX_BLOCKS;
# every ratio of heads; windows below and above a block.
STATIC = [
    (1, (4, 2), None),
    (8, (4, 1), 64),
    (19, (1, 1), None),
    (19, (4, 2), 3),
    (18, (2, 2), None),
    (12, (2, 1), 11),
    (35, (6, 2), 11),
    (35, (4, 4), 1),
    (35, (4, 1), None),
]
SCORES = [(*each, {}) for each in STATIC] + [
    (19, (4, 2), None, dict(scale=0.7)),
    (19, (4, 2), 3, dict(soft_cap=1.5)),
    (35, (4, 1), None, dict(scale=0.7, soft_cap=1.5)),
    (19, (4, 2), None, dict(alibi=True)),
    (35, (6, 2), 11, dict(alibi=True, soft_cap=1.5)),
]


@pytest.mark.parametrize(("length", "heads", "window", "scores"), SCORES)
@settings(max_examples=12)
@given(data=st.data())
def test_against_loops(
    length: int, heads: tuple[int, int], window: int | None, scores: dict[str, Any], data: st.DataObject
) -> None:
    segments = np.stack([data.draw(segment_rows(length)), data.draw(segment_rows(length))])
    q, k, v = tensors(2, length, *heads)
    cotangent = tensors(2, length, *heads, seed=1)[0]
    expected = oracle(q, k, v, segments, window, **scores)
    reference = compiled("reference", window=window, **scores)(q, k, v, segments, cotangent)
    fast = compiled("xla", window=window, **scores)(q, k, v, segments, cotangent)
    np.testing.assert_allclose(reference[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(fast[0], expected, rtol=0, atol=1e-5)
    for a, b in zip(fast[1], reference[1], strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "mask", "lack"),
    [
        ("cudnn", MaskSpec(soft_cap=2.0), "soft cap on scores"),
        ("cudnn", MaskSpec(alibi=True), "ALiBi"),
    ],
)
def test_a_backend_that_would_compute_other_scores_is_refused(name: str, mask: MaskSpec, lack: str) -> None:
    q, k, v = tensors(1, 8, 2, 2)
    for backend in (name, AttentionBackend(name)):
        with pytest.raises(UserError, match=f"'{name}' cannot serve: has no {lack}; use 'auto' or 'xla'"):
            attention(q, k, v, mask, backend)
        cache = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2), np.arange(8, dtype=np.int32)[None])
        with pytest.raises(UserError, match=f"'{name}' cannot serve: has no {lack}"):
            cached_attention(q, k, v, cache, mask, backend)


def test_alibi_of_keys_on_both_sides_is_left_to_the_plain_forms() -> None:
    q, k, v = tensors(1, 8, 2, 2)
    with pytest.raises(UserError, match=r"causal is False; .* use attention 'xla'"):
        attention(q, k, v, MaskSpec(causal=False, alibi=True), "pallas_tpu")


def test_heads_over_devices_keep_their_slopes() -> None:
    """Over the tensor axis, with a cache too; and over the sequence axis, which moves heads."""
    q, k, v = tensors(2, 8, 4, 2)
    mask = MaskSpec(alibi=True)
    expected = reference_attention(q, k, v, mask)
    places = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    cache = KVCache(np.zeros((2, 2, 8, 4), np.float32), np.zeros((2, 2, 8, 4), np.float32), places)
    for sizes in (dict(data=1, fsdp=1, tensor=2), dict(data=1, fsdp=1, sequence=4)):
        config = MeshConfig(**sizes)
        with use_mesh(make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))])):
            out = jax.jit(lambda *args: attention(*args, mask, "xla"))(q, k, v)
            if "tensor" in sizes:
                cached, _ = jax.jit(lambda *args: cached_attention(*args, mask, "xla"))(q, k, v, cache)
                np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_one_segment(window: int | None) -> None:
    """No segment ids: where nothing is hidden, no mask is built at all."""
    q, k, v = tensors(1, 19, 4, 2)
    expected = oracle(q, k, v, None, window)
    for run in (reference_attention, xla_attention):
        out = jax.jit(lambda *a, run=run: run(*a, MaskSpec(window=window)))(q, k, v)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_not_causal() -> None:
    q, k, v = tensors(1, 19, 2, 1)
    mask = MaskSpec(causal=False)
    weights = jax.nn.softmax(np.einsum("bthd,bskd->bhts", q, k) / 2.0, axis=-1)
    expected = np.einsum("bhts,bskd->bthd", weights, v)
    for run in (reference_attention, xla_attention):
        np.testing.assert_allclose(jax.jit(lambda *a, run=run: run(*a, mask))(q, k, v), expected, rtol=0, atol=1e-5)


# Two rows: three documents, the second all prefix, padding behind; one document.
DOCUMENTS = np.stack([np.repeat([1, 2, 3, 0], [7, 5, 9, 3]), np.ones(24, int)]).astype(np.int32)
PREFIX = np.stack([np.isin(np.arange(24), [0, 1, 2, *range(7, 12), 12]), np.arange(24) < 17])


@pytest.mark.parametrize("packed", [True, False])
def test_a_prefix_is_seen_from_both_sides(packed: bool) -> None:
    """Values against the formula, gradients of the blocks against the plain form; over the sequence axis too."""
    q, k, v = tensors(2, 24, 4, 2)
    cotangent = tensors(2, 24, 4, 2, seed=1)[0]
    ids = DOCUMENTS if packed else np.ones_like(DOCUMENTS)
    visible = (np.tri(24, dtype=bool) | PREFIX[:, None]) & (ids[:, :, None] == ids[:, None])
    scores = np.einsum("btkgd,bskd->bkgts", q.reshape(2, 24, 2, 2, 4), k) / 2.0
    weights = jax.nn.softmax(np.where(visible[:, None, None], scores, -np.inf), axis=-1)
    expected = np.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)

    def run(q: Any, k: Any, v: Any, implementation: str) -> Any:
        out = attention(q, k, v, MaskSpec(jnp.asarray(ids) if packed else None, prefix=PREFIX), implementation)
        return jnp.sum(out * cotangent), out

    both = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True), static_argnums=3)
    (_, plain), plain_grads = both(q, k, v, "reference")
    (_, fast), grads = both(q, k, v, "xla")
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=1, sequence=2), jax.devices()[:2])):
        (_, split), _ = jax.jit(both.__wrapped__, static_argnums=3)(q, k, v, "xla")
    for out in (plain, fast, split):
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    for a, b in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_broken_keys_behind_a_prefix_do_not_reach_it() -> None:
    """Blocks look at all keys then, those of the answer among them."""
    q, k, v = tensors(2, 24, 4, 2)
    attend = jax.jit(lambda *a: xla_attention(*a, MaskSpec(prefix=PREFIX)))
    clean = attend(q, k, v)
    k[:, 20:], v[:, 20:] = np.nan, np.inf
    np.testing.assert_array_equal(attend(q, k, v)[1, :16], clean[1, :16])


@pytest.mark.parametrize("name", ["cudnn", "pallas_tpu", "pallas_gpu"])
def test_backends_without_a_prefix_say_so(name: str) -> None:
    q, k, v = tensors(1, 24, 2, 2)
    with pytest.raises(UserError, match=f"'{name}' cannot serve: has no prefix .*; use 'auto' or 'xla'"):
        attention(q, k, v, MaskSpec(prefix=PREFIX[:1]), name)


def test_bfloat16_scores_are_float32() -> None:
    """bfloat16 in and out costs the rounding of inputs, weights and output, 2^-9 relative each, and no more."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in tensors(2, 19, 4, 2, dim=16))
    exact = oracle(*(np.asarray(a, np.float32) for a in (q, k, v)), None, None)
    for run in (reference_attention, xla_attention):
        out = jax.jit(lambda *a, run=run: run(*a, MaskSpec()))(q, k, v)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=0, atol=4 * 2**-9 * np.abs(exact).max())


@pytest.mark.parametrize("run", [reference_attention, xla_attention])
def test_broken_keys_elsewhere_do_not_leak(run: Any) -> None:
    """A NaN or infinite KEY that a query may not see changes nothing for it."""
    q, k, v = tensors(1, 19, 2, 2)
    segments = jnp.asarray(np.repeat([1, 2, 0], [7, 9, 3])[None].astype(np.int32))
    attend = jax.jit(lambda *a: run(*a, MaskSpec(segments)))
    clean = attend(q, k, v)
    for bad in (np.nan, np.inf, -np.inf):
        broken = k.copy()
        broken[:, 10] = bad
        out = np.asarray(attend(q, broken, v))
        np.testing.assert_array_equal(out[:, :10], clean[:, :10])
        np.testing.assert_array_equal(out[:, 16:], clean[:, 16:])


LEAKS = pytest.mark.xfail(strict=True, reason="a masked weight is 0, and 0 * NaN is NaN")


@pytest.mark.parametrize("run", [pytest.param(reference_attention, marks=LEAKS), xla_attention])
@pytest.mark.parametrize("broken", ["k", "v"])
def test_broken_keys_and_values_stay_with_the_blocks_that_see_them(run: Any, broken: str) -> None:
    """Values and gradients of a segment in another block of queries. The plain form has no blocks."""
    q, k, v = tensors(1, 19, 2, 2)
    segments = jnp.asarray(np.repeat([1, 2, 0], [7, 9, 3])[None].astype(np.int32))

    def total(*args: Any) -> Any:
        out = run(*args, MaskSpec(segments))[:, 16:]
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, clean), clean_grads = both(q, k, v)
    k, v = k.copy(), v.copy()  # what was passed to JAX may be read later
    (k if broken == "k" else v)[:, 10] = np.nan
    (_, out), grads = both(q, k, v)
    np.testing.assert_array_equal(out, clean)
    for a, b in zip(grads, clean_grads, strict=True):
        np.testing.assert_array_equal(a[:, 16:], b[:, 16:])


def test_blocks_skip_keys_out_of_reach() -> None:
    """The point of the blocked form: no T x T scores."""

    def tiles(window: int | None) -> list[tuple[int, ...]]:
        q, k, v = tensors(1, 32, 1, 1)
        jaxpr = jax.make_jaxpr(lambda *args: xla_attention(*args, MaskSpec(window=window)))(q, k, v)
        found = re.findall(r"f32\[1,1,1,(\d+),(\d+)\] = dot_general", str(jaxpr))
        return [(int(rows), int(cols)) for rows, cols in found if int(cols) != q.shape[-1]]

    assert tiles(None) == [(8, 8), (8, 16), (8, 24), (8, 32)]
    assert tiles(3) == [(8, 8), (8, 10), (8, 10), (8, 10)]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU (JAXLM_TEST_PLATFORMS=cuda,cpu)")
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("segmented", [False, True])
def test_cudnn(window: int | None, segmented: bool) -> None:
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in tensors(2, 256, 4, 2, dim=64))
    segments = jnp.asarray(np.repeat([[1, 2]], [100, 156], axis=1).repeat(2, 0)) if segmented else None
    mask = MaskSpec(segments, window=window)

    def total(run: Any) -> Any:
        return jax.value_and_grad(lambda q, k, v: jnp.sum(run(q, k, v, mask).astype(jnp.float32) ** 2), (0, 1, 2))

    for a, b in zip(
        jax.tree.leaves(total(cudnn_attention)(q, k, v)),
        jax.tree.leaves(total(reference_attention)(q, k, v)),
        strict=True,
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()
