"""Backward kernel for TPUs (Mosaic): dq, dk and dv from one visit to each pair of blocks.

Five products a tile instead of the seven of two kernels: blocks of keys are outside, their dk and dv are summed in
on-chip memory as usual, and so is dq of ALL queries of a row (4 bytes * T * h a head, 2 MiB at 4,096 x 128), which is
written block by block when a block has seen its last key. Tiles are [keys, queries]: what belongs to a query is a row,
and two of the three products that are summed need no transposition.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.errors import UserError
from jaxlm.kernels.flash_attention.common import LANES, dot, finite, headroom, nbytes, places, scores, spread, visible
from jaxlm.kernels.flash_attention.schedule import (
    COMPUTE,
    K_FIRST,
    K_LAST,
    MASKED,
    Q_FIRST,
    Q_LAST,
    Spec,
    make_schedule,
)

# On-chip memory for the dq of all queries, from the 64 MiB (v5p, 7x) or 128 MiB (v5e, v6e) of the chip.
DQ_BYTES = 24 * 2**20


def _kernel(
    row: Any,
    q_block: Any,
    k_block: Any,
    flags: Any,
    done_row: Any,
    done_q: Any,
    *refs: Any,
    spec: Spec,
    segmented: bool,
    sinking: bool,
) -> None:
    del row, done_row, done_q
    q_ids, kv_ids = refs[:2] if segmented else (None, None)
    q, k, v, grad, lse, delta, *slopes, grad_q, grad_k, grad_v, acc_q, acc_k, acc_v = refs[2 if segmented else 0 :]
    step, head = pl.program_id(1), pl.program_id(2)
    slope = slopes[0][pl.program_id(0) * pl.num_programs(2) + head] if sinking else None
    flag = flags[step]
    queries = head, pl.ds(pl.multiple_of(q_block[step] * spec.block_q, spec.block_q), spec.block_q)

    @pl.when(((flag & K_FIRST) != 0) & (head == 0))
    def _() -> None:
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    @pl.when((flag & Q_FIRST) != 0)
    def _() -> None:
        acc_q[queries] = jnp.zeros_like(acc_q, shape=(spec.block_q, acc_q.shape[2]))

    def tile(masked: bool) -> None:
        queries_, keys, grads = q[...], k[...], grad[...]
        s, bend = scores(dot(keys, queries_, 1, 1), spec)
        lse_ = lse[...]
        if sinking:
            first = k_block[step] * spec.block_k - q_block[step] * spec.block_q
            s = s + spread(places(slope, (spec.block_k, LANES), 0, first), spec.block_q)
            lse_ = lse_ + places(slope, (1, spec.block_q), 1)
        weights = jnp.exp2(s - lse_)
        back = weights * (dot(v[...], grads, 1, 1) - delta[...])
        if bend is not None:
            back = back * bend
        if masked:
            seen = visible(spec, q_block[step], k_block[step], q_ids, kv_ids, by_keys=True)
            weights, back = jnp.where(seen, weights, 0.0), jnp.where(seen, back, 0.0)
            queries_, keys, grads = finite(queries_), finite(keys), finite(grads)
        back = back.astype(keys.dtype)
        acc_v[...] += dot(weights.astype(grads.dtype), grads, 1, 0)
        acc_k[...] += dot(back, queries_, 1, 0)
        acc_q[queries] += dot(back, keys, 0, 0)

    work = flag & (COMPUTE | MASKED)
    pl.when(work == COMPUTE)(partial(tile, False))
    pl.when(work == COMPUTE | MASKED)(partial(tile, True))

    @pl.when((flag & Q_LAST) != 0)
    def _() -> None:
        grad_q[head] = (acc_q[queries] * spec.scale).astype(grad_q.dtype)

    @pl.when(((flag & K_LAST) != 0) & (head == pl.num_programs(2) - 1))
    def _() -> None:
        grad_k[...] = (acc_k[...] * spec.scale).astype(grad_k.dtype)
        grad_v[...] = acc_v[...].astype(grad_v.dtype)


def _head_parts(groups: int, rows: int, dim: int) -> int:
    """The number of parts in which the query heads of a kv head are worked on, so that their dq fits."""
    one = 4 * rows * -(-dim // 128) * 128
    if one > DQ_BYTES:
        raise UserError(
            f"attention: gradients of rows of {rows} with head dim {dim} need {one} bytes of a TPU's on-chip memory, "
            f"{DQ_BYTES} are set aside; use shorter rows or attention 'xla'"
        )
    return next(parts for parts in range(1, groups + 1) if groups % parts == 0 and groups // parts * one <= DQ_BYTES)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    slopes: jax.Array | None,
    spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of one device.

    Args:
        q, k, v, q_ids, kv_ids: as given to `forward`; lse: as it returned it.
        delta: [B, H, 1, T] float32, sum over h of grad * out.
        grad: [B, H, T, h], of out.
        slopes: as given to `forward`.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.

    Raises:
        UserError: when rows are so long that one head's dq does not fit on the chip.
    """
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    rows = spec.blocks[0] * spec.block_q
    parts = _head_parts(heads // kv_heads, rows, dim)
    groups = heads // kv_heads // parts
    schedule = make_schedule(spec, batch, q_ids, kv_ids, by_keys=True)

    def of_q(n: Any, s: Any, g: Any, row: Any, q_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], n * groups + g, q_block[s], 0

    def of_query(n: Any, s: Any, g: Any, row: Any, q_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], n * groups + g, 0, q_block[s]

    def of_k(n: Any, s: Any, g: Any, row: Any, q_block: Any, k_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], jax.lax.div(n, parts), k_block[s], 0

    def of_grad_q(n: Any, s: Any, g: Any, *lists: Any) -> tuple[Any, ...]:
        return lists[4][s], n, lists[5][s], 0

    def of_grad_k(n: Any, s: Any, g: Any, row: Any, q_block: Any, k_block: Any, *_: Any) -> tuple[Any, ...]:
        return row[s], n, k_block[s], 0

    q_spec = pl.BlockSpec((None, None, spec.block_q, dim), of_q)
    k_spec = pl.BlockSpec((None, None, spec.block_k, dim), of_k)
    query_spec = pl.BlockSpec((None, None, 1, spec.block_q), of_query)
    in_specs = [q_spec, k_spec, k_spec, q_spec, query_spec, query_spec]
    arrays = [q, k, v, grad, lse, delta]
    if slopes is not None:
        in_specs, arrays = [*in_specs, pl.BlockSpec(memory_space=pltpu.SMEM)], [*arrays, slopes]
    if q_ids is not None and kv_ids is not None:
        in_specs = [
            pl.BlockSpec((None, 1, spec.block_q), lambda n, s, g, row, q_block, *_: (row[s], 0, q_block[s])),
            pl.BlockSpec((None, 1, spec.block_k), lambda n, s, g, row, q_block, k_block, *_: (row[s], 0, k_block[s])),
            *in_specs,
        ]
        arrays = [q_ids[:, None], kv_ids[:, None], *arrays]
    # Parts of a kv head are added up outside, so they come in float32.
    kv_shape = (batch, kv_heads * parts, *k.shape[2:])
    kv_dtype = k.dtype if parts == 1 else jnp.float32
    out_shape = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(kv_shape, kv_dtype),
        jax.ShapeDtypeStruct(kv_shape, kv_dtype),
    )
    grad_k_spec = pl.BlockSpec((None, None, spec.block_k, dim), of_grad_k)
    pairs = batch * heads * spec.visible_pairs()
    call = pl.pallas_call(
        partial(_kernel, spec=spec, segmented=q_ids is not None, sinking=slopes is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(kv_heads * parts, schedule.steps, groups),
            in_specs=in_specs,
            out_specs=(pl.BlockSpec((None, groups, spec.block_q, dim), of_grad_q), grad_k_spec, grad_k_spec),
            scratch_shapes=[
                pltpu.VMEM((groups, rows, dim), jnp.float32),
                pltpu.VMEM((spec.block_k, dim), jnp.float32),
                pltpu.VMEM((spec.block_k, dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=backward_vmem(spec, groups, rows, dim, q.dtype.itemsize),
        ),
        # Five products of a tile: 10 h FLOPs a pair; every array once.
        cost_estimate=pl.CostEstimate(
            flops=10 * dim * pairs,
            transcendentals=pairs,
            bytes_accessed=nbytes(q, k, v, grad, lse, delta, *out_shape),
        ),
        name="flash_attention_backward",
        interpret=spec.interpret,
    )
    lists = schedule.row, schedule.q, schedule.k, schedule.flags, schedule.done_row, schedule.done_q
    grad_q, grad_k, grad_v = call(*lists, *arrays)
    if parts > 1:
        grad_k, grad_v = (
            x.reshape(batch, kv_heads, parts, *k.shape[2:]).sum(axis=2).astype(k.dtype) for x in (grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v


def backward_vmem(spec: Spec, groups: int, rows: int, dim: int, itemsize: int) -> int:
    """A limit for on-chip memory, bytes."""
    lanes = -(-dim // 128) * 128
    tiles = spec.block_q * spec.block_k * 4 * 6
    blocks = 2 * lanes * ((2 + groups) * spec.block_q + 4 * spec.block_k) * itemsize
    return headroom(itemsize) + tiles + blocks + 4 * groups * rows * lanes
