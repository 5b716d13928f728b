"""Attention of a few new tokens to a long cache of keys and values, on TPU in Pallas.

The plain twin is in `nn.attention`, which computes with all slots of a cache and hides those that a query may not
see. Here a row's blocks of slots are fetched from the first that a query of it can see to the last. Softmax is by
blocks, as in FlashAttention (arXiv:2205.14135).

All query heads of a kv head and all new tokens are one tile, and several kv heads one step, as a step has a price
whatever it does. A row's blocks are not divided over cores: where there are two (TPU v4, v5p), they take different
rows. Each slot that is seen takes 4 T H h FLOPs and 2 K h values, so memory sets the time, and must never be idle
(docs/kernels.md, "Decode attention").

Shapes: B rows, T new tokens, S slots, H query and K kv heads of h, G = H / K, R = G T.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# More new tokens than this (the next turn of a conversation) are a matrix product that needs no kernel.
MAX_TOKENS = 8
# Slots of a block: half a block more than needed is fetched on average.
BLOCK = 512
# Bytes of a step's keys, and of its values. Each is there twice, so that the next step's are fetched during this one.
STEP_BYTES = 2**20
NEGATIVE = -1e30


def heads_per_step(kv_heads: int, slots: int, dim: int, itemsize: int) -> int:
    """The largest divisor of the number of kv heads whose heads take at most STEP_BYTES; at least 1."""
    lanes = pl.cdiv(dim, 128) * 128  # what a head takes on the chip
    most = max(1, STEP_BYTES // (slots * lanes * itemsize))
    return max(count for count in range(1, kv_heads + 1) if kv_heads % count == 0 and count <= most)


def tpu_decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    places: jax.Array,
    window: int | None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
        q: [B, T, H, h], T at most MAX_TOKENS.
        keys, values: [B, K, S, h], those of the new tokens included; may hold anything where no query looks.
        places: [B, T] int32, the slot of each new token: it sees those up to its own. Beyond S: it sees all.
        window: number of slots that a query sees, up to its own; None: all.
        scale: of scores; None: 1/sqrt(h).
        soft_cap: scaled scores become cap * tanh(score / cap); None: they stay.
        slopes: [H] float32, ALiBi's: capped scores sink by slope * (place - slot); None: they stay.

    Returns:
        [B, T, H, h] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    groups, block = heads // kv_heads, min(BLOCK, slots)
    rows, together = groups * length, heads_per_step(kv_heads, block, dim, keys.dtype.itemsize)
    grouped = q.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, rows, dim).astype(keys.dtype)

    high = jnp.minimum(places.max(axis=1), slots - 1)
    low = jnp.zeros_like(high) if window is None else jnp.clip(places.min(axis=1) - window + 1, 0, high)
    steps = jnp.max(high // block - low // block) + 1

    def block_of(slot: Any) -> Any:
        return jax.lax.div(slot, jnp.int32(block))  # of what is not negative, `//` is the same, in more instructions

    def kernel(
        places: Any,
        low: Any,
        high: Any,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        *refs: Any,
    ) -> None:
        *slope_ref, out_ref, top, sum_, acc = refs
        row, step = pl.program_id(0), pl.program_id(2)
        at = block_of(low[row]) + step

        @pl.when(step == 0)
        def _() -> None:
            top[...] = jnp.full_like(top, NEGATIVE)
            sum_[...] = jnp.zeros_like(sum_)
            acc[...] = jnp.zeros_like(acc)

        @pl.when(at <= block_of(high[row]))
        def _() -> None:
            scores = _batched_dot(q_ref[...], k_ref[...], 2)
            scores = scores / math.sqrt(dim) if scale is None else scores * scale
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            slot = at * block + jax.lax.broadcasted_iota(jnp.int32, (1, rows, block), 2)
            token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (1, rows, block), 1), jnp.int32(length))
            place = jnp.full((1, rows, block), places[row * length])
            for number in range(1, length):
                place = jnp.where(token == number, places[row * length + number], place)
            if slopes is not None:
                scores = scores - slope_ref[0][...] * (place - slot).astype(jnp.float32)
            visible = (slot <= place) & (slot <= high[row])
            if window is not None:
                visible &= place - slot < window
            scores = jnp.where(visible, scores, NEGATIVE)
            largest = jnp.maximum(top[...], jnp.max(scores, axis=2, keepdims=True))
            # For a token that sees none of the blocks so far every score is the largest, and every weight 1. What comes
            # of that is shrunk to 0 in the block where it sees its own slot.
            weights = jnp.exp(scores - largest)
            shrink = jnp.exp(top[...] - largest)
            top[...] = largest
            sum_[...] = shrink * sum_[...] + jnp.sum(weights, axis=2, keepdims=True)
            # 0 * NaN is NaN: what nobody sees must be 0 itself.
            slot = at * block + jax.lax.broadcasted_iota(jnp.int32, v_ref.shape, 1)
            seen = (slot >= low[row]) & (slot <= high[row])
            held = jnp.where(seen, v_ref[...], jnp.zeros_like(v_ref))
            acc[...] = shrink * acc[...] + _batched_dot(weights.astype(held.dtype), held, 1)

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            out_ref[...] = (acc[...] / sum_[...]).astype(out_ref.dtype)

    def query(row: Any, head: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        return row, head, 0, 0

    def cached(row: Any, head: Any, step: Any, places: Any, low: Any, high: Any) -> tuple[Any, ...]:
        # Behind its last block a row names that one again, while rows with more go on: nothing is fetched.
        return row, head, jnp.minimum(block_of(low[row]) + step, block_of(high[row])), 0

    spec = pl.BlockSpec((None, together, rows, dim), query)
    held = pl.BlockSpec((None, together, block, dim), cached)
    moved = 2 * keys.size * keys.dtype.itemsize + 2 * q.size * keys.dtype.itemsize
    in_specs, arrays = [spec, held, held], [grouped, keys, values]
    if slopes is not None:  # one for each row of a tile
        in_specs.append(pl.BlockSpec((together, rows, 1), lambda row, head, step, *_: (head, 0, 0)))
        arrays.append(jnp.repeat(slopes.reshape(kv_heads, groups, 1), length, axis=1))
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads // together, steps),
            in_specs=in_specs,
            out_specs=spec,
            scratch_shapes=[
                pltpu.VMEM((together, rows, 1), jnp.float32),
                pltpu.VMEM((together, rows, 1), jnp.float32),
                pltpu.VMEM((together, rows, dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * length * heads * dim * slots,
            bytes_accessed=moved,
            transcendentals=batch * length * heads * slots,
        ),
        name="decode_attention",
    )(places.reshape(-1), low, high, *arrays)
    return out.reshape(batch, kv_heads, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _batched_dot(a: jax.Array, b: jax.Array, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((2,), (b_dim,)), ((0,), (0,))), preferred_element_type=jnp.float32)
