"""Backward kernels for Hopper GPUs (Mosaic GPU): one for dq, one for dk and dv.

Seven products a pair where one kernel would need five: that one must add dq up in memory from many blocks, in an order
that differs from run to run, and a run that is resumed shall give the same numbers. Two warpgroups compute, with half
of a block's rows each; a third one copies.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlm.kernels.flash_attention.common import LOG2_E
from jaxlm.kernels.flash_attention.gpu_common import (
    COLUMN,
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    ROW,
    WARPGROUPS,
    across,
    add_products,
    bent,
    buffer,
    full,
    in_order,
    places,
    products,
    sections,
    vector,
    visible,
    with_slopes,
)
from jaxlm.kernels.flash_attention.schedule import Spec, make_ranges

# Rows of the blocks that are streamed past: with dq, or dk and dv, in registers there is room for no more.
STREAMED = 64


def _stages(dim: int) -> int:
    """The number of them that is on the chip at once: 64 KiB each, where h is 256, beside 128 KiB that stay."""
    return 2 if dim <= 128 else 1


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
        q: [B, T, H, h]; grad, of out, the same; both finite. k, v: [B, S, K, h] as given to `forward`.
        q_ids, kv_ids: as given to `forward`.
        lse: [B, H, T] float32, as `forward` returned it.
        delta: [B, H, T] float32, sum over h of grad * out.
        slopes: as given to `forward`.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.
    """
    small = min(STREAMED, spec.block_q, spec.block_k)
    arrays = q, k, v, grad, lse, delta, q_ids, kv_ids, slopes
    grad_q = _grad_q(*arrays, dataclasses.replace(spec, block_k=small))
    by_keys = dataclasses.replace(spec, block_q=small, block_k=spec.block_q)
    if q.shape[3] <= 128:
        grad_k, grad_v = _grad_kv(*arrays, by_keys, ("k", "v"))
    else:  # both do not fit in a warpgroup's registers
        (grad_k,), (grad_v,) = _grad_kv(*arrays, by_keys, ("k",)), _grad_kv(*arrays, by_keys, ("v",))
    return grad_q, grad_k, grad_v


def _grad_q(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    slopes: jax.Array | None,
    spec: Spec,
) -> jax.Array:
    batch, length, heads, dim = q.shape
    groups, n_q = heads // k.shape[2], length // spec.block_q
    rows, keys = spec.block_q // WARPGROUPS, spec.block_k
    tile, slots = (rows, keys), _stages(dim)
    arrays = [make_ranges(spec, batch, q_ids, kv_ids, by_keys=False), q, k, v, grad, lse, delta]
    segmented, sinking = q_ids is not None and kv_ids is not None, slopes is not None
    arrays += [q_ids, kv_ids] if q_ids is not None and kv_ids is not None else []
    arrays += with_slopes(slopes, spec)

    def kernel(*refs: Any) -> None:
        ranges, q, k, v, grad, lse, delta, *more, out, smem, (own_ready, ready, free) = refs
        ids, alibi = (more[:2], more[2:]) if segmented else ([], more)
        q_smem, grad_smem, k_smem, v_smem, *kv_ids_smem = smem
        row, head, group = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        block = in_order(lax.axis_index("block"), n_q, spec, reverse=True)
        limits = tuple(ranges[row, block, i] for i in range(4))
        first, end = limits[0], limits[3]

        @pl.when(group < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            start = block * spec.block_q + group * rows
            place = pl.ds(start, rows)
            mine, own_grad = q_smem.at[group], grad_smem.at[group]
            plgpu.copy_gmem_to_smem(q.at[row, place, head], mine, own_ready.at[group])
            plgpu.copy_gmem_to_smem(grad.at[row, place, head], own_grad, own_ready.at[group])
            own_lse = vector(lse.at[row, head, place], ROW, spec)
            own_delta = vector(delta.at[row, head, place], ROW, spec)
            own_ids = vector(ids[0].at[row, place], ROW, spec) if ids else None
            slope, index = (alibi[0][head], alibi[1]) if sinking else (None, None)
            if sinking:
                own_lse += places(slope, index, rows, ROW, spec)
            plgpu.barrier_wait(own_ready.at[group])

            def step(i: Any, acc: jax.Array, masked: bool) -> jax.Array:
                slot = lax.rem(i - first, jnp.int32(slots))
                plgpu.barrier_wait(ready.at[slot])
                keys_, values = k_smem.at[slot], v_smem.at[slot]
                s, back = products(((mine, keys_), (own_grad, values)), tile, spec)
                s, bend = bent(s, spec)
                if sinking:
                    s += across(places(slope, index, keys, COLUMN, spec, i * keys - start), tile, 1)
                back = jnp.exp2(s - across(own_lse, tile, 0)) * (back - across(own_delta, tile, 0))
                if bend is not None:
                    back *= bend
                if masked:
                    key_ids = vector(kv_ids_smem[0].at[slot], COLUMN, spec) if ids else None
                    back = jnp.where(visible(spec, tile, start, i * keys, own_ids, key_ids), back, 0.0)
                (acc,) = add_products(((acc, back.astype(q.dtype), keys_),), spec)
                plgpu.barrier_arrive(free.at[slot])
                return acc

            acc = sections(limits, step, full((rows, dim), 0, plgpu.Layout.WGMMA, spec))
            mine[...] = (acc * spec.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out.at[row, place, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(groups))

            @pl.loop(first, end)
            def _(i: Any) -> None:
                slot = lax.rem(i - first, jnp.int32(slots))
                place = pl.ds(i * keys, keys)

                @pl.when(i - first >= slots)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(k.at[row, place, kv_head], k_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(v.at[row, place, kv_head], v_smem.at[slot], ready.at[slot])
                if ids:
                    plgpu.copy_gmem_to_smem(ids[1].at[row, place], kv_ids_smem[0].at[slot], ready.at[slot])

            _drain(free, end - first, slots)

    smem = [buffer((WARPGROUPS, rows, dim), q.dtype)] * 2 + [buffer((slots, keys, dim), q.dtype)] * 2
    smem += [plgpu.SMEM((slots, keys), jnp.int32)] if segmented else []
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(tuple(smem), _barriers(slots, 3 if segmented else 2)),
        grid=(n_q, heads, batch),
        kernel_name="flash_attention_grad_q",
        **_launch(spec),
    )(*arrays)


def _grad_kv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    slopes: jax.Array | None,
    spec: Spec,
    wanted: Sequence[str],
) -> Sequence[jax.Array]:
    """Gradients of k, v or both; a block of keys sees every query head of its group, so they are summed in here."""
    batch, length, kv_heads, dim = k.shape
    groups, n_k = q.shape[2] // kv_heads, length // spec.block_k
    rows, queries = spec.block_k // WARPGROUPS, spec.block_q
    tile, slots = (rows, queries), _stages(dim)
    if slopes is not None:  # what a query gets, counted from its block's first, is read with lse
        lse = lse + (slopes * LOG2_E)[:, None] * (jnp.arange(lse.shape[2]) % queries)
    arrays = [make_ranges(spec, batch, q_ids, kv_ids, by_keys=True), q, k, v, grad, lse, delta]
    segmented, sinking = q_ids is not None and kv_ids is not None, slopes is not None
    arrays += [q_ids, kv_ids] if q_ids is not None and kv_ids is not None else []
    arrays += with_slopes(slopes, spec)

    def kernel(*refs: Any) -> None:
        ranges, q, k, v, grad, lse, delta = refs[:7]
        more, outs, (smem, (own_ready, ready, free)) = refs[7 : len(arrays)], refs[len(arrays) : -2], refs[-2:]
        ids, alibi = (more[:2], more[2:]) if segmented else ((), more)
        k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem, *q_ids_smem = smem
        row, head, group = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        block = in_order(lax.axis_index("block"), n_k, spec, reverse=False)
        limits = tuple(ranges[row, block, i] for i in range(4))
        first, end = limits[0], limits[3]

        @pl.when(group < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            start = block * spec.block_k + group * rows
            place = pl.ds(start, rows)
            keys, values = k_smem.at[group], v_smem.at[group]
            plgpu.copy_gmem_to_smem(k.at[row, place, head], keys, own_ready.at[group])
            plgpu.copy_gmem_to_smem(v.at[row, place, head], values, own_ready.at[group])
            own_ids = vector(ids[1].at[row, place], ROW, spec) if ids else None
            plgpu.barrier_wait(own_ready.at[group])

            def of_head(number: Any, carry: Any) -> Any:
                slope, index = (alibi[0][head * groups + number], alibi[1]) if sinking else (None, None)

                def step(i: Any, totals: Any, masked: bool) -> Any:
                    slot = lax.rem(number * (end - first) + i - first, jnp.int32(slots))
                    plgpu.barrier_wait(ready.at[slot])
                    queries_, grads = q_smem.at[slot], grad_smem.at[slot]
                    pairs = ((keys, queries_), (values, grads)) if "k" in wanted else ((keys, queries_),)
                    s, *back = products(pairs, tile, spec)
                    s, bend = bent(s, spec)
                    if sinking:
                        s += across(places(slope, index, rows, ROW, spec, start - i * queries), tile, 0)
                    weights = jnp.exp2(s - across(vector(lse_smem.at[slot], COLUMN, spec), tile, 1))
                    seen = None
                    if masked:
                        query_ids = vector(q_ids_smem[0].at[slot], COLUMN, spec) if ids else None
                        seen = visible(spec, tile, i * queries, start, query_ids, own_ids, by_keys=True)
                        weights = jnp.where(seen, weights, 0.0)
                    sums = []
                    if "k" in wanted:
                        of_scores = back[0] - across(vector(delta_smem.at[slot], COLUMN, spec), tile, 1)
                        of_scores = weights * (of_scores if bend is None else of_scores * bend)
                        if seen is not None:  # a weight of 0 times what is broken
                            of_scores = jnp.where(seen, of_scores, 0.0)
                        sums.append((totals[0], of_scores.astype(q.dtype), queries_))
                    if "v" in wanted:
                        sums.append((totals[-1], weights.astype(q.dtype), grads))
                    totals = add_products(tuple(sums), spec)
                    plgpu.barrier_arrive(free.at[slot])
                    return totals

                return sections(limits, step, carry)

            zeros = tuple(full((rows, dim), 0, plgpu.Layout.WGMMA, spec) for _ in wanted)
            totals = lax.fori_loop(0, groups, of_head, zeros)
            for name, total, out in zip(wanted, totals, outs, strict=True):
                own = keys if name == "k" else values
                own[...] = (total * spec.scale if name == "k" else total).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own, out.at[row, place, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            @pl.loop(0, groups * (end - first))
            def _(at: Any) -> None:
                slot = lax.rem(at, jnp.int32(slots))
                number, i = lax.div(at, end - first), lax.rem(at, end - first)
                q_head, place = head * groups + number, pl.ds((first + i) * queries, queries)

                @pl.when(at >= slots)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(q.at[row, place, q_head], q_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(grad.at[row, place, q_head], grad_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(lse.at[row, q_head, place], lse_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(delta.at[row, q_head, place], delta_smem.at[slot], ready.at[slot])
                if ids:
                    plgpu.copy_gmem_to_smem(ids[0].at[row, place], q_ids_smem[0].at[slot], ready.at[slot])

            _drain(free, groups * (end - first), slots)

    smem = [buffer((WARPGROUPS, rows, dim), q.dtype)] * 2 + [buffer((slots, queries, dim), q.dtype)] * 2
    smem += [plgpu.SMEM((slots, queries), jnp.float32)] * 2
    smem += [plgpu.SMEM((slots, queries), jnp.int32)] if segmented else []
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in wanted),
        scratch_types=(tuple(smem), _barriers(slots, 5 if segmented else 4)),
        grid=(n_k, kv_heads, batch),
        kernel_name="flash_attention_grad_" + "".join(wanted),
        **_launch(spec),
    )(*arrays)


def _barriers(slots: int, copies: int) -> tuple[Any, ...]:
    """A warpgroup's own two tensors have come; the copies of a stage have come; a stage is free."""
    return (
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    )


def _drain(free: Any, count: Any, slots: int) -> None:
    """Waits for the stages that no copy has waited for."""

    @pl.loop(jnp.maximum(0, count - slots), count)
    def _(at: Any) -> None:
        plgpu.barrier_wait(free.at[lax.rem(at, jnp.int32(slots))])


def _launch(spec: Spec) -> dict[str, Any]:
    return dict(
        grid_names=("block", "head", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=spec.interpret or None,
    )
