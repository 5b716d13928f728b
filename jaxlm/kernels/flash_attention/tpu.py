"""Forward kernel for TPUs (Mosaic): softmax(q k^T) v with a running maximum, one pair of blocks a step.

After FlashAttention (arXiv:2205.14135, arXiv:2307.08691); tiles are [queries, keys]. The
transposed order needs no columns, yet its schedule is a quarter longer: weights are then the operand that the matrix
unit holds, and the queries that stream past them only h rows.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.kernels.flash_attention.common import (
    LANES,
    dot,
    finite,
    headroom,
    nbytes,
    places,
    scores,
    spread,
    visible,
)
from jaxlm.kernels.flash_attention.schedule import COMPUTE, MASKED, Q_FIRST, Q_LAST, Spec, make_schedule

LOWEST = -1e30  # finite: the difference of a masked score (-inf) and a maximum is never NaN


def _kernel(
    row: Any, q_block: Any, k_block: Any, flags: Any, *refs: Any, spec: Spec, segmented: bool, sinking: bool
) -> None:
    del row
    q_ids, kv_ids = refs[:2] if segmented else (None, None)
    q, k, v, *slopes, out, lse, largest, total, acc = refs[2 if segmented else 0 :]
    step = pl.program_id(1)
    slope = slopes[0][pl.program_id(0)] if sinking else None
    flag = flags[step]
    width = acc.shape[1]

    @pl.when((flag & Q_FIRST) != 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def tile(masked: bool) -> None:
        keys, values = k[...], v[...]
        if masked:
            # A broken value breaks its key: queries that see it get NaN, others nothing of it.
            keys, values = (keys + values.astype(jnp.float32) * 0.0).astype(keys.dtype), finite(values)
        s, _ = scores(dot(q[...], keys, 1, 1), spec)
        if sinking:
            # What a query gets is the same for all its keys, which a softmax does not see; lse gets it at the end.
            first = k_block[step] * spec.block_k - q_block[step] * spec.block_q
            s = s + places(slope, (1, spec.block_k), 1, first)
        if masked:
            s = jnp.where(visible(spec, q_block[step], k_block[step], q_ids, kv_ids, by_keys=False), s, -jnp.inf)
        before = largest[...]
        now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        weights = jnp.exp2(s - spread(now, spec.block_k))
        shrink = jnp.exp2(before - now)
        largest[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc[...] = acc[...] * spread(shrink, width) + dot(weights.astype(values.dtype), values, 1, 0)

    work = flag & (COMPUTE | MASKED)
    pl.when(work == COMPUTE)(partial(tile, False))
    pl.when(work == COMPUTE | MASKED)(partial(tile, True))

    @pl.when((flag & Q_LAST) != 0)
    def _() -> None:
        sums = total[...]
        out[...] = (acc[...] * spread(jnp.where(sums == 0.0, 0.0, 1.0 / sums), width)).astype(out.dtype)
        lse[...] = largest[...].T[:1] + jnp.log2(sums.T[:1])
        if sinking:
            lse[...] -= places(slope, (1, spec.block_q), 1)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    slopes: jax.Array | None,
    spec: Spec,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one device.

    Args:
        q: [B, H, T, h]; k, v: [B, K, S, h], one dtype.
        q_ids, kv_ids: [B, T], [B, S] int32 segment ids, 0 = padding; None: one segment.
        slopes: [H] float32, ALiBi's; None: scores do not sink.

    Returns:
        out [B, H, T, h] in q's dtype; lse [B, H, 1, T] float32, log2 of the sum of exp(score), -inf where a query sees
        nothing (out is 0 there).
    """
    batch, heads, length, dim = q.shape
    groups = heads // k.shape[1]
    segmented = q_ids is not None
    schedule = make_schedule(spec, batch, q_ids, kv_ids, by_keys=False)

    def of_q(h: Any, s: Any, row: Any, q_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], h, q_block[s], 0

    def of_k(h: Any, s: Any, row: Any, q_block: Any, k_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], jax.lax.div(h, groups), k_block[s], 0

    q_spec = pl.BlockSpec((None, None, spec.block_q, dim), of_q)
    k_spec = pl.BlockSpec((None, None, spec.block_k, dim), of_k)
    in_specs, arrays = [q_spec, k_spec, k_spec], [q, k, v]
    if slopes is not None:
        in_specs, arrays = [*in_specs, pl.BlockSpec(memory_space=pltpu.SMEM)], [*arrays, slopes]
    if q_ids is not None and kv_ids is not None:
        in_specs = [
            pl.BlockSpec((None, 1, spec.block_q), lambda h, s, row, q_block, *_: (row[s], 0, q_block[s])),
            pl.BlockSpec((None, 1, spec.block_k), lambda h, s, row, q_block, k_block, *_: (row[s], 0, k_block[s])),
            *in_specs,
        ]
        arrays = [q_ids[:, None], kv_ids[:, None], *arrays]
    out_shape = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32))
    lse_spec = pl.BlockSpec((None, None, 1, spec.block_q), lambda h, s, row, q_block, *_: (row[s], h, 0, q_block[s]))
    pairs = batch * heads * spec.visible_pairs()
    call = pl.pallas_call(
        partial(_kernel, spec=spec, segmented=segmented, sinking=slopes is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(heads, schedule.steps),
            in_specs=in_specs,
            out_specs=(q_spec, lse_spec),
            scratch_shapes=[
                pltpu.VMEM((spec.block_q, LANES), jnp.float32),
                pltpu.VMEM((spec.block_q, LANES), jnp.float32),
                pltpu.VMEM((spec.block_q, dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=forward_vmem(spec, dim, q.dtype.itemsize)
        ),
        # Two products of a tile: 4 h FLOPs a pair; every array once.
        cost_estimate=pl.CostEstimate(
            flops=4 * dim * pairs, transcendentals=pairs, bytes_accessed=nbytes(q, k, v, *out_shape)
        ),
        name="flash_attention_forward",
        interpret=spec.interpret,
    )
    out, lse = call(schedule.row, schedule.q, schedule.k, schedule.flags, *arrays)
    return out, lse


def forward_vmem(spec: Spec, dim: int, itemsize: int) -> int:
    """A limit for on-chip memory, bytes: tiles of scores are what fills it."""
    lanes = -(-dim // 128) * 128
    tiles = spec.block_q * spec.block_k * 4 * 4
    return headroom(itemsize) + tiles + 2 * lanes * (2 * spec.block_q + 2 * spec.block_k) * itemsize
