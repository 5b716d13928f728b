"""What both TPU kernels do to a tile of scores.

Tiles are transposed, [keys, queries]: what belongs to a query (maximum, sum, log-sum-exp, segment) is then a row of
lanes, a whole vector register, and is spread over the keys for nothing. In the usual order it would be a column.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.kernels.flash_attention.schedule import Spec

LOG2_E = math.log2(math.e)


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Product that sums over these dims, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((a_dim,), (b_dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def scores(q: jax.Array, k: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a tile [keys, queries] in units of log 2, and the derivative of the soft cap (None without one)."""
    raw = dot(k, q, 1, 1)
    # exp2 and not exp: the factor log2(e) is part of the scale.
    if spec.soft_cap is None:
        return raw * (spec.scale * LOG2_E), None
    bent = jnp.tanh(raw * (spec.scale / spec.soft_cap))
    return bent * (spec.soft_cap * LOG2_E), 1.0 - bent * bent


def visible(spec: Spec, q_block: jax.Array, k_block: jax.Array, q_ids: Any | None, kv_ids: Any | None) -> jax.Array:
    """Which key of a tile is seen by which query, [keys, queries] bool.

    Args:
        q_block, k_block: which tile.
        q_ids, kv_ids: references to the tile's segment ids, [1, queries] and [1, keys]; None: one segment.
    """
    shape = spec.block_k, spec.block_q
    key = k_block * spec.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = q_block * spec.block_q + jax.lax.broadcasted_iota(jnp.int32, (1, spec.block_q), 1)
    # What can be said of a query alone is said in one row: the last key that it sees.
    last = jnp.minimum(query, spec.kv_length - 1) if spec.causal else jnp.full_like(query, spec.kv_length - 1)
    if spec.q_length % spec.block_q:
        last = jnp.where(query < spec.q_length, last, -1)
    if q_ids is not None:
        last = jnp.where(q_ids[...] != 0, last, -1)
    seen = key <= last
    if spec.window is not None:
        seen &= key > query - spec.window
    if q_ids is not None:
        assert kv_ids is not None
        column = jnp.broadcast_to(kv_ids[...], (128, spec.block_k)).T[:, :1]
        seen &= column == q_ids[...]
    return seen


def finite(x: jax.Array) -> jax.Array:
    """x with 0 for what is not finite: a masked weight is 0, and 0 * NaN would be NaN."""
    wide = x.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0).astype(x.dtype)


def nbytes(*arrays: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
