"""Beams that share keys and values, beside rows that have their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.attention import KVCache, MaskSpec, cached_attention
from jaxlm.nn.beam_attention import BeamCache, Lineage

BEAMS, ROWS, KV_HEADS, HEADS, DIM, SLOTS = 3, 6, 2, 4, 8, 24


@pytest.mark.parametrize(
    "mask",
    [{}, {"window": 5, "alibi": True}, {"soft_cap": 2.0, "scale": 0.5, "bias": True}],
    ids=lambda mask: "-".join(mask) or "plain",
)
def test_beams_see_their_own_texts(mask: dict[str, Any]) -> None:
    """After some steps in which rows go on with one another's texts: as with caches that are reordered each time."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    spec = MaskSpec(causal=True, **(mask | ({"bias": normal(HEADS, SLOTS)} if "bias" in mask else {})))
    k, v = normal(ROWS, KV_HEADS, SLOTS, DIM), normal(ROWS, KV_HEADS, SLOTS, DIM)
    own, shared = KVCache(k, v, None), BeamCache(k, v, jnp.zeros((ROWS, 1), int), Lineage.new(ROWS, SLOTS, BEAMS))
    starts = np.repeat([7, 15], BEAMS)
    for step in range(SLOTS - 15 + 2):  # the last ones are beyond the slots of the longer texts
        places = jnp.asarray(starts + step)[:, None]
        q, new = normal(ROWS, 1, HEADS, DIM), (normal(ROWS, 1, KV_HEADS, DIM), normal(ROWS, 1, KV_HEADS, DIM))
        expected, own = cached_attention(q, *new, own.replace(places=places), spec, "xla")  # type: ignore[attr-defined]
        lineage = shared.lineage.written(places[:, 0])
        shared = shared.replace(places=places, lineage=lineage)  # type: ignore[attr-defined]
        found, shared = shared.attend(q, *new, spec, "xla")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        origin = jnp.asarray(np.concatenate([rng.integers(0, BEAMS, BEAMS), BEAMS + rng.integers(0, BEAMS, BEAMS)]))
        own = own.replace(k=own.k[origin], v=own.v[origin])  # type: ignore[attr-defined]
        shared = shared.replace(lineage=lineage.continued(origin))  # type: ignore[attr-defined]
    for found, expected in ((shared.k, own.k), (shared.v, own.v)):
        np.testing.assert_array_equal(shared.lineage.gathered(found), expected)
