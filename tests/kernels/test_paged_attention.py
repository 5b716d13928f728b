"""Attention over pages in Pallas TPU against plain formulations, in interpret mode; and compiled for real TPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from jaxlm.kernels import paged_attention
from jaxlm.kernels.paged_attention import tpu_paged_attention, tpu_write_pages
from jaxlm.nn.attention import MaskSpec, reference_attention
from jaxlm.nn.paged_attention import PagedCache
from tests.kernels.ahead_of_time import compile_for_tpus

PAGE = 16


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are interpreted, in steps of two pages and at most two heads."""
    monkeypatch.setattr(paged_attention, "STEP_SLOTS", 2 * PAGE)
    monkeypatch.setattr(paged_attention, "CHUNK_SLOTS", 2 * PAGE)
    monkeypatch.setattr(paged_attention, "QUERY_ROWS", 12)
    monkeypatch.setattr(paged_attention, "STEP_BYTES", 2 * 2 * PAGE * 128 * 4)
    with pltpu.force_tpu_interpret_mode():
        yield


def problem(
    starts: list[int], lengths: list[int], tokens: int, heads: tuple[int, int], dim: int = 24, dtype: Any = np.float32
) -> dict[str, Any]:
    """Rows in pages that lie anywhere; what no row has is NaN."""
    rng = np.random.default_rng(0)
    ends = np.array(starts) + lengths
    num_pages = -(-int(ends.max()) // PAGE) + 1
    total = len(starts) * num_pages + 3
    tables = rng.permutation(total)[: len(starts) * num_pages].reshape(len(starts), num_pages).astype(np.int32)
    pages = np.full((2, total, heads[1], PAGE, dim), np.nan)
    for table, end in zip(tables, ends, strict=True):
        for slot in range(end):
            pages[:, table[slot // PAGE], :, slot % PAGE] = rng.normal(size=(2, heads[1], dim))
    keys, values = (jnp.asarray(each, dtype) for each in pages)
    q = jnp.asarray(rng.normal(size=(len(starts), tokens, heads[0], dim)), dtype)
    return dict(q=q, keys=keys, values=values, tables=tables, starts=np.int32(starts), lengths=np.int32(lengths))


def plain(q: Any, keys: Any, values: Any, tables: Any, starts: Any, lengths: Any, **scores: Any) -> list[np.ndarray]:
    """Each row's own tokens by the reference of attention over whole rows."""
    result = []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        end = int(start + length)
        k, v = (
            x[tables[row]].swapaxes(1, 2).reshape(-1, *x.shape[1::2])[:end].astype(np.float32)[None]
            for x in (keys, values)
        )
        padded = jnp.zeros((1, end, *q.shape[2:]), jnp.float32).at[0, int(start) :].set(q[row, :length])
        out = reference_attention(padded, k, v, MaskSpec(**scores))
        result.append(np.asarray(out[0, int(start) :]))
    return result


def check(made: dict[str, Any], slopes: Any = None, atol: float = 1e-5, **scores: Any) -> None:
    wanted = plain(**made, **scores)
    alibi = scores.pop("alibi", False)
    fast = jax.jit(lambda made: tpu_paged_attention(**made, **scores, slopes=slopes if alibi else None))(made)
    assert np.isfinite(np.asarray(fast, np.float32)).all()
    for row, out in zip(np.asarray(fast, np.float32), wanted, strict=True):
        np.testing.assert_allclose(row[: len(out)], out, rtol=0, atol=atol)


# Rows of one slot, at both edges of a page and of a step, and of several steps; every ratio of heads; windows below, of
# and above a page; chunks that begin inside a page, partly filled, and a row without tokens.
CASES: list[tuple[Any, ...]] = [
    ([0, 15, 16, 31, 32, 70], [1] * 6, 1, (6, 3), None),
    ([3, 60, 0], [8, 5, 0], 8, (4, 1), 9),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ([0, 15, 16, 31, 32, 70], [1] * 6, 1, (4, 4), 5),
            ([47, 63, 90], [1, 1, 1], 1, (4, 1), 33),
            ([0, 16, 41], [8, 8, 3], 8, (4, 2), None),
        )
    ),
]


@pytest.mark.parametrize(("starts", "lengths", "tokens", "heads", "window"), CASES)
def test_against_whole_rows(starts: Any, lengths: Any, tokens: int, heads: Any, window: int | None) -> None:
    check(problem(starts, lengths, tokens, heads), window=window)


@pytest.mark.slow
def test_scale_soft_cap_and_alibi_in_groups_and_windows() -> None:
    from jaxlm.nn.positions import alibi_slopes

    made = problem([30, 3], [4, 4], 4, (6, 2))
    check(made, scale=0.7, soft_cap=0.5)
    check(made, jnp.asarray(alibi_slopes(6)), alibi=True, soft_cap=0.5, window=30)


@pytest.mark.slow
def test_bfloat16_scores_are_float32() -> None:
    check(problem([30, 9], [1, 1], 1, (4, 2), dtype=jnp.bfloat16), atol=0.02)


def test_against_the_reference_of_jax() -> None:
    """JAX's has the heads of a slot side by side, keys and values in turn."""
    made = problem([30, 9, 64], [1, 1, 1], 1, (4, 2))
    pages = jnp.stack([jnp.nan_to_num(made[name]).swapaxes(1, 2) for name in ("keys", "values")], axis=3)
    pages = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
    theirs = ref_ragged_paged_attention(
        made["q"][:, 0], pages, made["starts"] + 1, made["tables"], jnp.arange(4, dtype=jnp.int32),
        jnp.array([3], jnp.int32), sm_scale=0.3, soft_cap=0.5,
    )  # fmt: skip
    ours = jax.jit(lambda made: tpu_paged_attention(**made, scale=0.3, soft_cap=0.5))(made)[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_new_tokens_are_written_in_place(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    keys, values = (jnp.asarray(rng.normal(size=(6, 2, 2 * PAGE, 24)), dtype) for _ in range(2))
    new_keys, new_values = (jnp.asarray(rng.normal(size=(4, 2, 24)), dtype) for _ in range(2))
    size = 2 * PAGE
    slots = np.int32([3 * size + 17, 6 * size, 5 * size, 2 * size - 1])  # the second writes nothing
    expected = []
    for pages, new in ((keys, new_keys), (values, new_values)):
        for row in (0, 2, 3):
            pages = pages.at[slots[row] // size, :, slots[row] % size].set(new[row])
        expected.append(pages)
    written = jax.jit(tpu_write_pages, donate_argnums=(0, 1))(keys, values, new_keys, new_values, slots)
    for ours, wanted in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(wanted, np.float32))


def test_a_step_of_the_engine_is_that_of_the_plain_form() -> None:
    """New tokens of two texts, a text without one, and a chunk of the third with padding behind it."""
    made = problem([30, 9, 17], [1, 1, 5], 8, (4, 2))
    rng = np.random.default_rng(2)
    tokens = 3 + 8
    q, k, v = (jnp.asarray(rng.normal(size=(1, tokens, heads, 24)), jnp.float32) for heads in (4, 2, 2))
    places = np.int32([30, 9, -1, *range(17, 22), -1, -1, -1])
    pages = (jnp.nan_to_num(made[name]) for name in ("keys", "values"))
    cache = PagedCache(*pages, jnp.asarray(made["tables"]), jnp.int32([2]), jnp.asarray(places), length=8)
    plain, fast = (
        jax.jit(lambda cache, name=name: cache.attend(q, k, v, MaskSpec(window=20), name))(cache)
        for name in ("xla", "pallas_tpu")
    )
    np.testing.assert_allclose(fast[0][:, places >= 0], plain[0][:, places >= 0], rtol=0, atol=1e-5)
    for ours, wanted in ((fast[1].k, plain[1].k), (fast[1].v, plain[1].v)):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.slow
def test_several_new_tokens_of_one_text_are_written_to_its_page() -> None:
    """Guesses stand in rows of their own, with the table of their text."""
    made = problem([29, 9], [3, 1], 1, (4, 2))
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, heads, 24)), jnp.float32) for heads in (4, 2, 2))
    pages = (jnp.nan_to_num(made[name]) for name in ("keys", "values"))
    places = jnp.int32([29, 30, 31, 9])
    cache = PagedCache(
        *pages, jnp.asarray(made["tables"][[0, 0, 0, 1]]), jnp.zeros(0, jnp.int32), places, 0, shared=True
    )
    plain, fast = (
        jax.jit(lambda cache, name=name: cache.attend(q, k, v, MaskSpec(), name))(cache)
        for name in ("xla", "pallas_tpu")
    )
    np.testing.assert_allclose(fast[0], plain[0], rtol=0, atol=1e-5)
    for ours, wanted in ((fast[1].k, plain[1].k), (fast[1].v, plain[1].v)):
        np.testing.assert_array_equal(ours, wanted)


AHEAD = """
from jaxlm.kernels.paged_attention import tpu_paged_attention, tpu_write_pages

def problem(topology, rows, tokens, heads, kv_heads, pages, size, dim, dtype="bfloat16", alibi=False, **options):
    def run(q, k, v, tables, starts, lengths, new, slots, slopes):
        if tokens == 1:
            k, v = tpu_write_pages(k, v, new, new, slots)
        out = tpu_paged_attention(q, k, v, tables, starts, lengths, slopes=slopes if alibi else None, **options)
        return out, k, v
    cache, number = (dtype, rows * pages, kv_heads, size, dim), ("int32", rows)
    shapes = (dtype, rows, tokens, heads, dim), cache, cache, ("int32", rows, pages), number, number
    compile("paged", topology, run, *shapes, (dtype, rows, kv_heads, dim), number, ("float32", heads),
            kernels=1 + (tokens == 1))

problem("v6e:2x2", 64, 1, 8, 2, 64, 128, 128)
problem("v5e:2x2", 16, 1, 32, 8, 32, 64, 128, window=1024, soft_cap=50.0)
problem("v5e:2x2", 1, 256, 32, 8, 64, 128, 128)
problem("v6e:2x2", 2, 128, 71, 1, 20, 64, 64, alibi=True)
problem("v5e:2x2", 8, 1, 12, 12, 20, 16, 64, "float32")
problem("v6e:2x2", 3, 5, 16, 4, 40, 32, 80, window=100)
"""


@pytest.mark.slow
def test_compiles_for_tpus() -> None:
    assert len(compile_for_tpus(AHEAD)) == 6
