"""Attention over pages gives what attention over rows gives, however tokens and pages are divided."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import paged_attention as module
from jaxlm.nn.attention import MaskSpec, reference_attention
from jaxlm.nn.paged_attention import BLOCK, PagedCache, paged_attention, plain_attention
from jaxlm.nn.positions import alibi_slopes

MASKS = {
    "plain": MaskSpec(),
    "window and soft cap": MaskSpec(window=5, soft_cap=3.0, scale=0.4),
    "alibi": MaskSpec(alibi=True),
}
LENGTH, ROWS, PAGES, SLOTS = 150, 3, 24, 16


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pages_give_what_rows_give(mask: MaskSpec) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, LENGTH, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    expected = reference_attention(q, k, v, mask)
    order = rng.permutation(PAGES)
    tables = jnp.asarray(np.stack([order[:10], order[10:20], order[-10:]]), jnp.int32)
    empty = jnp.full((PAGES, 2, SLOTS, 8), 1e30)  # what others left behind

    @jax.jit
    def step(cache: PagedCache, *new: jax.Array) -> tuple[jax.Array, PagedCache]:
        return cache.attend(*new, mask, "xla")

    def tokens(x: jax.Array, texts: list[int], places: list[int]) -> jax.Array:
        return x[jnp.asarray(texts), jnp.asarray(places)][None]

    def run(chunks: list[int], seen: Any) -> None:
        """Text 0 by chunks, one token of text 1 with each; then the rest of both, token by token."""
        k_pages = v_pages = empty
        at = [0, 0]
        while at != [LENGTH, LENGTH]:
            count = chunks.pop(0) if chunks else 0
            place = [-1 if count or at[0] == LENGTH else at[0], at[1] if at[1] < LENGTH else -1, -1]
            chunk = [at[0] + i if i < count else -1 for i in range(70)] if count else []
            places = [*place, *chunk]
            new = (tokens(x, [0, 1, 1, *[0] * len(chunk)], places) for x in (q, k, v))
            rows = jnp.zeros(bool(count), jnp.int32)
            cache = PagedCache(k_pages, v_pages, tables, rows, jnp.asarray(places, jnp.int32), length=len(chunk))
            out, cache = step(cache, *new)
            k_pages, v_pages = cache.k, cache.v
            for index, where in enumerate(places):
                if where >= 0:
                    text = 1 if index == 1 else 0
                    seen[text, where] = out[0, index]
                    at[text] += 1

    results = [np.zeros(expected.shape, np.float32) for _ in range(2)]
    run([70, 70], results[0])
    run([3, 1, 40], results[1])
    np.testing.assert_allclose(results[0], expected, atol=2e-6)
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_texts_are_read_a_few_at_a_time(mask: MaskSpec, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits; seven texts of 1 to 160 slots, of which two have no token, three at a time."""
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.standard_normal(dims), jnp.float32) for dims in ((7, length, 4, 8), *[(80, 2, 16, 8)] * 2)
    )
    tables = jnp.asarray(rng.permutation(80)[:70].reshape(7, 10), jnp.int32)
    ends = np.array([0, 159, -1, 40, 130, -1, 15])[:, None]
    places = jnp.asarray(np.where(ends < 0, -1, np.maximum(ends - np.arange(length)[::-1], 0)), jnp.int32)
    slopes = jnp.asarray(alibi_slopes(4)) if mask.alibi else None
    whole = jax.jit(partial(paged_attention, mask=mask))(q, k, v, tables, places, slopes=slopes)
    monkeypatch.setattr(module, "COLLECTED", 3 * 2 * BLOCK * 8 * 4)
    parts = jax.jit(partial(plain_attention, mask=mask))(q, k, v, tables, places, slopes=slopes)
    np.testing.assert_array_equal(parts, whole)
