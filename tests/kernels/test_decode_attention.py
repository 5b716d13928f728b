"""Attention to a cache in Pallas TPU against the plain form, in interpret mode; and compiled for real TPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.kernels import decode_attention
from jaxlm.nn.attention import KVCache, MaskSpec, cached_attention
from tests.kernels.ahead_of_time import compile_for_tpus


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are interpreted, in blocks of 16 slots and steps of at most two heads."""
    monkeypatch.setattr(decode_attention, "BLOCK", 16)
    monkeypatch.setattr(decode_attention, "STEP_BYTES", 2 * 16 * 128 * 4)
    with pltpu.force_tpu_interpret_mode():
        yield


def problem(places: Any, heads: tuple[int, int], slots: int, dim: int = 24, dtype: Any = np.float32) -> Any:
    """q, k, v, and a cache whose slots behind each row's last token are NaN."""
    rng = np.random.default_rng(0)
    places = np.asarray(places, np.int32)
    q, k, v = (jnp.asarray(rng.normal(size=(*places.shape, n, dim)), dtype) for n in (heads[0], heads[1], heads[1]))
    cache = rng.normal(size=(2, len(places), heads[1], slots, dim))
    dead = np.arange(slots) > places.max(1)[:, None]
    cache[:, np.broadcast_to(dead[:, None], cache.shape[1:4])] = np.nan
    return q, k, v, KVCache(jnp.asarray(cache[0], dtype), jnp.asarray(cache[1], dtype), jnp.asarray(places))


def both(problem: Any, window: int | None, **scores: Any) -> tuple[Any, Any]:
    """The plain form's output, of a cache without NaN, and the kernel's."""
    q, k, v, cache = problem
    clean = KVCache(jnp.nan_to_num(cache.k), jnp.nan_to_num(cache.v), cache.places)
    run = jax.jit(cached_attention, static_argnums=(4, 5))
    mask = MaskSpec(window=window, **scores)
    plain, expected = run(q, k, v, clean, mask, "xla")
    fast, kept = run(q, k, v, cache, mask, "pallas_tpu")
    for a, b in ((kept.k, expected.k), (kept.v, expected.v)):
        np.testing.assert_array_equal(np.nan_to_num(np.asarray(a, np.float32)), np.asarray(b, np.float32))
    return plain, fast


# One token and several; a row with one slot, rows at both edges of a block, and a full one; every ratio of heads; slots
# of one block, of whole blocks, and not; windows below, of and above a block.
CASES = [
    ([[0], [15], [16], [39]], (4, 4), 40, None),
    ([[0], [15], [16], [39]], (6, 3), 40, 5),
    ([[3, 4, 5], [37, 38, 39]], (4, 1), 48, None),
    ([[14, 15, 16, 17], [36, 37, 38, 39]], (4, 2), 40, 3),
    ([[12, 13, 14, 15, 16, 17, 18, 19], [17, 18, 19, 20, 21, 22, 23, 24]], (2, 1), 40, 2),
    ([[7], [2]], (2, 2), 9, None),
    ([[47], [20]], (2, 1), 48, 33),
]


@pytest.mark.parametrize(("places", "heads", "slots", "window"), CASES)
def test_against_the_plain_form(places: Any, heads: tuple[int, int], slots: int, window: int | None) -> None:
    plain, fast = both(problem(places, heads, slots), window)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)


def test_scale_and_soft_cap_of_scores() -> None:
    made = problem([[14, 15, 16, 17], [36, 37, 38, 39]], (4, 2), 40)
    usual = both(made, None)[0]
    for scores in (dict(scale=0.7), dict(soft_cap=0.5), dict(scale=0.7, soft_cap=0.5)):
        plain, fast = both(made, None, **scores)
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)
        assert np.abs(plain - usual).max() > 0.05


def test_alibi_in_groups_and_windows() -> None:
    """Several tokens of 6 heads, which is no power of two, three to a kv head."""
    made = problem([[14, 15, 16, 17], [36, 37, 38, 39]], (6, 2), 40)
    plain, fast = both(made, 30, alibi=True, soft_cap=0.5)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)
    assert np.abs(plain - both(made, 30, soft_cap=0.5)[0]).max() > 0.05


def test_a_place_behind_the_last_slot() -> None:
    """Such a token is not written, and sees all that was."""
    plain, fast = both(problem([[38, 39, 40], [4, 5, 6]], (2, 1), 40), None)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)


def test_rows_and_heads_over_devices() -> None:
    q, k, v, cache = problem([[3], [30], [0], [39]], (4, 2), 40)
    for mask in (MaskSpec(), MaskSpec(alibi=True)):
        with use_mesh(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
            run = jax.jit(lambda *args, mask=mask: cached_attention(*args, mask, "pallas_tpu"))
            fast, _ = run(q, k, v, cache)
        plain = both((q, k, v, cache), None, alibi=mask.alibi)[0]
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)


def test_bfloat16_scores_are_float32() -> None:
    exact, _ = both(problem([[30], [9]], (4, 2), 40), None)
    _, fast = both(problem([[30], [9]], (4, 2), 40, dtype=jnp.bfloat16), None)
    assert fast.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(fast, np.float32), exact, rtol=0, atol=0.03)


AHEAD = """
from jaxlm.kernels.decode_attention import tpu_decode_attention

def problem(topology, rows, tokens, heads, kv_heads, slots, dim, dtype="bfloat16", alibi=False, **options):
    def run(q, k, v, places, slopes):
        window = options.pop("window", None)
        return tpu_decode_attention(q, k, v, places, window, slopes=slopes if alibi else None, **options)
    cache = dtype, rows, kv_heads, slots, dim
    shapes = (dtype, rows, tokens, heads, dim), cache, cache, ("int32", rows, tokens), ("float32", heads)
    compile("decode", topology, run, *shapes)

problem("v5e:2x2", 8, 1, 32, 32, 2048, 128)
problem("v6e:2x2", 8, 1, 64, 8, 8192, 128, alibi=True)
problem("v5p:2x2x1", 1, 8, 71, 1, 1100, 64, alibi=True, window=1000)
problem("v5e:2x2", 2, 2, 12, 4, 700, 80, "float32", alibi=True)
problem("v5e:2x2", 8, 1, 16, 8, 2048, 256, soft_cap=50.0, window=1024)
"""


def test_compiles_for_tpus() -> None:
    assert len(compile_for_tpus(AHEAD)) == 5
