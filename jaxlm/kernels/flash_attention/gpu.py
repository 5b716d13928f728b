"""Forward kernel for Hopper GPUs (Mosaic GPU): softmax(q k^T) v with a running maximum.

After FlashAttention-3 (arXiv:2407.08608): of three warpgroups of a block one only copies (TMA), and two, with half of
the queries each, take turns at the tensor cores: while one forms its exponentials, the other multiplies. A block of
queries walks over the neighbouring blocks of keys that it can see; only those at a mask's edge compare positions and
segments.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim, S stages of a pipeline.
"""

from __future__ import annotations

import importlib.metadata
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
    LOWEST,
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


def stages(dim: int) -> int:
    """The number of blocks of keys and values that are on the chip at once."""
    return 4 if dim <= 64 else 2


def blocks(dim: int) -> tuple[int, int]:
    """Queries and keys of a block that fit on the chip: with h of 256 the result alone takes half of the registers."""
    return (128, 128) if dim <= 128 else (128, 64)


def broken_compiler() -> str | None:
    """CUDA 12.8 up to 12.9.0 assembles masked loops wrongly; JAX's own kernel is refused there for the same reason."""
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return None
    if (12, 8) <= tuple(int(part) for part in version.split(".")[:3]) < (12, 9, 86):
        return f"nvidia-cuda-nvcc-cu12 {version} miscompiles it; pip install 'nvidia-cuda-nvcc-cu12>=12.9.86'"
    return None


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
        q: [B, T, H, h]; k, v: [B, S, K, h], one 16-bit dtype, as `protect` returns them; T and S multiples of the
            blocks.
        q_ids, kv_ids: [B, T], [B, S] int32 segment ids, 0 = padding; None: one segment.
        slopes: [H] float32, ALiBi's; None: scores do not sink.

    Returns:
        out [B, T, H, h] in q's dtype; lse [B, H, T] float32, log2 of the sum of exp(score), -inf where a query sees
        nothing (out is 0 there).
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    n_q, slots = length // spec.block_q, stages(dim)
    rows, keys = spec.block_q // WARPGROUPS, spec.block_k
    tile = (rows, keys)
    ranges = make_ranges(spec, batch, q_ids, kv_ids, by_keys=False)
    arrays: tuple[jax.Array, ...] = (ranges, q, k, v)
    if q_ids is not None and kv_ids is not None:
        arrays = (*arrays, q_ids, kv_ids)
    segmented, sinking = q_ids is not None, slopes is not None
    arrays = (*arrays, *with_slopes(slopes, spec))

    def kernel(*refs: Any) -> None:
        ranges, q, k, v, *more, out, lse, smem, barriers = refs
        ids, alibi = (more[:2], more[2:]) if segmented else ([], more)
        q_smem, k_smem, v_smem, lse_smem, *kv_ids_smem = smem
        q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
        row, head, group = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
        block = in_order(lax.axis_index("block"), n_q, spec, reverse=True)
        first, whole, behind, end = (ranges[row, block, i] for i in range(4))

        def slot_of(i: Any) -> Any:
            return lax.rem(i - first, jnp.int32(slots))

        def take_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(group < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            start = block * spec.block_q + group * rows
            mine = q_smem.at[group]
            plgpu.copy_gmem_to_smem(q.at[row, pl.ds(start, rows), head], mine, q_ready.at[group])
            plgpu.barrier_wait(q_ready.at[group])
            own_ids = vector(ids[0].at[row, pl.ds(start, rows)], ROW, spec) if ids else None
            slope, index = (alibi[0][head], alibi[1]) if sinking else (None, None)

            def step(i: Any, carry: Any, masked: bool) -> Any:
                acc, largest, total = carry
                slot = slot_of(i)
                plgpu.barrier_wait(k_ready.at[slot])
                (raw,) = products(((mine, k_smem.at[slot]),), tile, spec, between=take_turn)
                s, _ = bent(raw, spec)
                if sinking:
                    s += across(places(slope, index, keys, COLUMN, spec, i * keys - start), tile, 1)
                if masked:
                    key_ids = vector(kv_ids_smem[0].at[slot], COLUMN, spec) if ids else None
                    seen = visible(spec, tile, start, i * keys, own_ids, key_ids)
                    s = jnp.where(seen, s, -jnp.inf)
                plgpu.barrier_arrive(k_free.at[slot])
                now = jnp.maximum(largest, s.max(axis=1))
                shrink = jnp.exp2(largest - now)
                weights = jnp.exp2(s - across(now, tile, 0))
                acc *= across(shrink, (rows, dim), 0)
                total = total * shrink + weights.sum(axis=1)
                narrow = weights.astype(q.dtype)
                # All of the softmax comes before the turn is passed on.
                acc, total, now, narrow = lax.optimization_barrier((acc, total, now, narrow))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                (acc,) = add_products(((acc, narrow, v_smem.at[slot]),), spec)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, now, total

            # The second warpgroup is half a step behind the first.
            pl.when(group == 1)(take_turn)
            carry = (
                full((rows, dim), 0, plgpu.Layout.WGMMA, spec),
                full((rows,), LOWEST, ROW, spec),
                full((rows,), 0, ROW, spec),
            )
            acc, largest, total = sections((first, whole, behind, end), step, carry)
            pl.when(group == 0)(take_turn)

            acc *= across(jnp.where(total == 0.0, 0.0, 1.0 / total), (rows, dim), 0)
            mine[...] = acc.astype(q.dtype)
            sums = largest + jnp.log(total) * LOG2_E
            if sinking:
                sums -= places(slope, index, rows, ROW, spec)
            lse_smem.at[group][...] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out.at[row, pl.ds(start, rows), head])
            plgpu.copy_smem_to_gmem(lse_smem.at[group], lse.at[row, head, pl.ds(start, rows)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(groups))

            @pl.loop(first, end)
            def _(i: Any) -> None:
                slot = slot_of(i)
                place = pl.ds(i * keys, keys)

                @pl.when(i - first >= slots)
                def _() -> None:
                    plgpu.barrier_wait(k_free.at[slot])

                plgpu.copy_gmem_to_smem(k.at[row, place, kv_head], k_smem.at[slot], k_ready.at[slot])
                if ids:
                    plgpu.copy_gmem_to_smem(ids[1].at[row, place], kv_ids_smem[0].at[slot], k_ready.at[slot])

                @pl.when(i - first >= slots)
                def _() -> None:
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(v.at[row, place, kv_head], v_smem.at[slot], v_ready.at[slot])

            @pl.loop(jnp.maximum(first, end - slots), end)
            def _(i: Any) -> None:
                plgpu.barrier_wait(k_free.at[slot_of(i)])
                plgpu.barrier_wait(v_free.at[slot_of(i)])

    smem = [
        buffer((WARPGROUPS, rows, dim), q.dtype),
        buffer((slots, keys, dim), q.dtype),
        buffer((slots, keys, dim), q.dtype),
        plgpu.SMEM((WARPGROUPS, rows), jnp.float32),
    ]
    if segmented:
        smem.append(plgpu.SMEM((slots, keys), jnp.int32))
    barriers = (
        plgpu.Barrier(num_barriers=WARPGROUPS),
        plgpu.Barrier(num_arrivals=2 if segmented else 1, num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        scratch_types=(tuple(smem), barriers),
        grid=(n_q, heads, batch),
        grid_names=("block", "head", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_attention_forward",
        interpret=spec.interpret or None,
    )(*arrays)
