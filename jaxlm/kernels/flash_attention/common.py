"""What both TPU kernels do to a tile of scores."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.kernels.flash_attention.schedule import Spec

LOG2_E = math.log2(math.e)
LANES = 128  # of a register


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Product that sums over these dims, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((a_dim,), (b_dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def scores(raw: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array | None]:
    """From products q k^T: scores in units of log 2, and the derivative of the soft cap (None without one)."""
    # exp2 and not exp: the factor log2(e) is part of the scale.
    if spec.soft_cap is None:
        return raw * (spec.scale * LOG2_E), None
    bent = jnp.tanh(raw * (spec.scale / spec.soft_cap))
    return bent * (spec.soft_cap * LOG2_E), 1.0 - bent * bent


def places(slope: Any, shape: tuple[int, int], dim: int, start: Any = 0) -> jax.Array:
    """slope * (start + index along `dim`), float32, in units of log 2: what ALiBi gives a key at that place.

    A score's slope * (key - query) is what its key gets less what its query gets; both count from the block's first
    query, so that numbers stay small.
    """
    index = start + jax.lax.broadcasted_iota(jnp.int32, shape, dim)
    return (slope * LOG2_E) * index.astype(jnp.float32)


def spread(x: jax.Array, width: int) -> jax.Array:
    """[n, LANES] of equal columns -> [n, width]: free, whole registers are used again."""
    times = -(-width // LANES)
    return (x if times == 1 else jnp.tile(x, (1, times)))[:, :width]


def column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, LANES], equal columns."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def visible(
    spec: Spec, q_block: jax.Array, k_block: jax.Array, q_ids: Any | None, kv_ids: Any | None, by_keys: bool
) -> jax.Array:
    """Which key of a tile is seen by which query, bool: [keys, queries] if `by_keys`, else [queries, keys].

    Args:
        q_block, k_block: which tile.
        q_ids, kv_ids: references to the tile's segment ids, [1, queries] and [1, keys]; None: one segment.
    """
    size_q, size_k = spec.block_q, spec.block_k
    query = q_block * size_q + jax.lax.broadcasted_iota(jnp.int32, (1, size_q), 1)
    if by_keys:
        key = k_block * size_k + jax.lax.broadcasted_iota(jnp.int32, (size_k, size_q), 0)
    else:
        key = k_block * size_k + jax.lax.broadcasted_iota(jnp.int32, (1, size_k), 1)
    # What can be said of a query alone is said before there are keys: the last one that it sees.
    last = jnp.minimum(query, spec.kv_length - 1) if spec.causal else jnp.full_like(query, spec.kv_length - 1)
    if spec.q_length % size_q:
        last = jnp.where(query < spec.q_length, last, -1)
    if q_ids is not None:
        last = jnp.where(q_ids[...] != 0, last, -1)

    def of_query(row: jax.Array) -> jax.Array:
        return row if by_keys else spread(column(row), size_k)

    seen = key <= of_query(last)
    if spec.window is not None:
        seen &= key > of_query(query - spec.window)
    if q_ids is not None:
        assert kv_ids is not None
        ids = spread(column(kv_ids[...]), size_q) if by_keys else kv_ids[...]
        seen &= ids == of_query(q_ids[...])
    return seen


def finite(x: jax.Array) -> jax.Array:
    """x with 0 for what is not finite: a masked weight is 0, and 0 * NaN would be NaN."""
    wide = x.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0).astype(x.dtype)


def headroom(itemsize: int) -> int:
    """Bytes beyond what is counted. What a kernel may use, XLA keeps free of what it would rather have on the chip."""
    return (4 if itemsize <= 2 else 16) * 2**20


def nbytes(*arrays: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
