"""Grouped products for Hopper GPUs (Mosaic GPU), forward and both gradients; `grouped_matmul` has the plain twin.

A thread block computes one tile of the result: two warpgroups multiply, with 64 rows each, and a third one copies (TMA)
what comes next. A tile of rows lies in one block of `groups`, so it needs one matrix and no mask; tiles of unused
blocks end at once. XLA's `ragged_dot` multiplies every row with all matrices on a GPU (benchmarks/README.md).

M rows, I inputs, O outputs and E groups take 2 M I O FLOPs in each of the three products. A tile of 128 x N reads
(128 + N) K values for 256 N K FLOPs: at N = 256 85 FLOPs a byte from L2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlm.kernels.flash_attention.gpu_common import COMPUTE_REGISTERS, COPY_REGISTERS, WARPGROUPS, buffer
from jaxlm.kernels.groups import Groups

ROWS = 64  # of a warpgroup
TILE = ROWS * WARPGROUPS  # least rows of a block of `Groups`
STEP = 64  # of the contracted dim, brought to the chip at a time
WIDTHS = (256, 192, 128)  # of a tile
STAGES = 3  # steps that are on the chip at once, beside a tile of the result


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gpu_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups, interpret: Any = None) -> jax.Array:
    """x [M, I] times the matrix of each row's group, w [E, I, O]: [M, O] in x's dtype, accumulated in float32.

    Rows of unused blocks are not written: they hold anything. Those of x's gradient too.

    Args:
        x, w: of one 16-bit dtype.
        groups: with blocks of a multiple of TILE rows.
        interpret: for tests: `InterpretGPUParams`, to run on a CPU.
    """
    return _product(x, w, groups, False, interpret)


def _fwd(x: jax.Array, w: jax.Array, groups: Groups, interpret: Any) -> tuple[jax.Array, Any]:
    return gpu_grouped_matmul(x, w, groups, interpret), (x, w, groups)


def _bwd(interpret: Any, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, groups = residuals
    return _product(grad, w, groups, True, interpret), _matrix_gradient(x, grad, groups, interpret), None


gpu_grouped_matmul.defvjp(_fwd, _bwd)


def _filled(x: jax.Array, *multiples: int) -> jax.Array:
    """x with zeros behind, so that its last dims are multiples of these."""
    sizes = x.shape[-len(multiples) :]
    more = [(0, 0)] * (x.ndim - len(multiples)) + [(0, -n % m) for n, m in zip(sizes, multiples, strict=True)]
    return jnp.pad(x, more) if any(end for _, end in more) else x


def width(columns: int) -> int:
    """Columns of a tile: those that leave least of the last tile empty, the wider ones first."""
    return min(WIDTHS, key=lambda each: -(-columns // each) * each)


def _product(x: jax.Array, w: jax.Array, groups: Groups, transposed: bool, interpret: Any) -> jax.Array:
    """x [M, I] times w [E, I, O] of each block; transposed: x [M, O] times the transposed matrices, [M, I]."""
    rows, columns = x.shape[0], w.shape[1 if transposed else 2]
    wide, per_block = width(columns), rows // groups.owner.shape[0] // TILE
    x = _filled(x, STEP)
    w = _filled(w, wide, STEP) if transposed else _filled(w, STEP, wide)
    steps, tiles = x.shape[1] // STEP, w.shape[1 if transposed else 2] // wide

    def kernel(owner: Any, live: Any, x: Any, w: Any, out: Any, smem: Any, barriers: Any) -> None:
        column, tile, group = (lax.axis_index(name) for name in ("column", "tile", "warpgroup"))
        block = lax.div(tile, jnp.int32(per_block))

        def operands(slot: Any) -> tuple[Any, Any]:
            return smem[0].at[slot, group], smem[1].at[slot]

        def copy(i: Any, slot: Any, ready: Any) -> None:
            for part in range(WARPGROUPS):
                place = pl.ds(tile * TILE + part * ROWS, ROWS), pl.ds(i * STEP, STEP)
                plgpu.copy_gmem_to_smem(x.at[place], smem[0].at[slot, part], ready)
            across, down = pl.ds(column * wide, wide), pl.ds(i * STEP, STEP)
            matrix = w.at[(owner[block], across, down) if transposed else (owner[block], down, across)]
            plgpu.copy_gmem_to_smem(matrix, smem[1].at[slot], ready)

        @pl.when(block < live[0])
        def _() -> None:
            place = pl.ds(tile * TILE + group * ROWS, ROWS), pl.ds(column * wide, wide)
            _tile(steps, copy, operands, (False, transposed), out.at[place], smem[2], barriers, wide, interpret)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, tiles * wide), x.dtype),
        scratch_types=(
            (
                buffer((STAGES, WARPGROUPS, ROWS, STEP), x.dtype),
                buffer((STAGES, wide, STEP) if transposed else (STAGES, STEP, wide), x.dtype),
                buffer((WARPGROUPS, ROWS, wide), x.dtype),
            ),
            _barriers(),
        ),
        grid=(tiles, rows // TILE),
        grid_names=("column", "tile"),
        kernel_name="grouped_matmul_x_gradient" if transposed else "grouped_matmul",
        **_launch(interpret),
    )(groups.owner, groups.live[None], x, w)
    return out[:, :columns]


def _matrix_gradient(x: jax.Array, grad: jax.Array, groups: Groups, interpret: Any) -> jax.Array:
    """x [M, I], grad [M, O] -> [E, I, O] in x's dtype: for each group, the sum over its rows."""
    (inner, columns), count = (x.shape[1], grad.shape[1]), groups.sizes.shape[0]
    wide = width(columns)
    x, grad = _filled(x, TILE), _filled(grad, wide)
    tall, tiles = x.shape[1] // TILE, grad.shape[1] // wide
    starts = jnp.cumsum(groups.sizes) - groups.sizes

    def kernel(starts: Any, sizes: Any, x: Any, grad: Any, out: Any, smem: Any, barriers: Any) -> None:
        column, tile, number, group = (lax.axis_index(name) for name in ("column", "tile", "group", "warpgroup"))
        start, steps = starts[number], lax.div(sizes[number], jnp.int32(STEP))

        def operands(slot: Any) -> tuple[Any, Any]:
            return smem[0].at[slot, group], smem[1].at[slot]

        def copy(i: Any, slot: Any, ready: Any) -> None:
            down = pl.ds(pl.multiple_of(start + i * STEP, STEP), STEP)
            for part in range(WARPGROUPS):
                place = down, pl.ds(tile * TILE + part * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(x.at[place], smem[0].at[slot, part], ready)
            plgpu.copy_gmem_to_smem(grad.at[down, pl.ds(column * wide, wide)], smem[1].at[slot], ready)

        place = number, pl.ds(tile * TILE + group * ROWS, ROWS), pl.ds(column * wide, wide)
        _tile(steps, copy, operands, (True, False), out.at[place], smem[2], barriers, wide, interpret)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((count, tall * TILE, tiles * wide), x.dtype),
        scratch_types=(
            (
                buffer((STAGES, WARPGROUPS, STEP, ROWS), x.dtype),
                buffer((STAGES, STEP, wide), x.dtype),
                buffer((WARPGROUPS, ROWS, wide), x.dtype),
            ),
            _barriers(),
        ),
        grid=(tiles, tall, count),
        grid_names=("column", "tile", "group"),
        kernel_name="grouped_matmul_w_gradient",
        **_launch(interpret),
    )(starts.astype(jnp.int32), groups.sizes, x, grad)
    return out[:, :inner, :columns]


def _tile(
    steps: Any,
    copy: Any,
    operands: Any,
    transposed: tuple[bool, bool],
    out: Any,
    out_smem: Any,
    barriers: Any,
    wide: int,
    interpret: Any,
) -> None:
    """One tile of a result: the sum over `steps` of a b, written to `out`.

    Args:
        copy: (step, slot, barrier) -> None: begins the three copies of a step.
        operands: slot -> this warpgroup's a and b in shared memory.
        transposed: whether a and b lie there transposed.
        out: [ROWS, wide] of this warpgroup in memory.
    """
    ready, free = barriers
    group = lax.axis_index("warpgroup")

    def slot_of(i: Any) -> Any:
        return lax.rem(i, jnp.int32(STAGES))

    @pl.when(group < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        def run(acc: Any) -> jax.Array:
            @pl.loop(0, steps)
            def _(i: Any) -> None:
                plgpu.barrier_wait(ready.at[slot_of(i)])
                a, b = operands(slot_of(i))
                plgpu.wgmma(
                    acc, a.transpose((1, 0)) if transposed[0] else a, b.transpose((1, 0)) if transposed[1] else b
                )
                plgpu.wgmma_wait(1)  # the step before has been multiplied

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[slot_of(i - 1)])

            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[slot_of(steps - 1)])

            result: jax.Array = acc[...]
            return result

        def played(i: Any, total: jax.Array) -> jax.Array:
            """The same on a CPU: the interpreter has no tensor cores."""
            plgpu.barrier_wait(ready.at[slot_of(i)])
            a, b = (ref[...] for ref in operands(slot_of(i)))
            plgpu.commit_smem()
            dims = (((0 if transposed[0] else 1,), (1 if transposed[1] else 0,)), ((), ()))
            total += lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
            plgpu.barrier_arrive(free.at[slot_of(i)])
            return total

        if interpret is None:
            total = pl.run_scoped(run, plgpu.ACC((ROWS, wide), jnp.float32))
        else:
            total = lax.fori_loop(0, steps, played, jnp.zeros((ROWS, wide), jnp.float32))
        mine = out_smem.at[group]
        mine[...] = total.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _(i: Any) -> None:
            @pl.when(i >= STAGES)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot_of(i)])

            copy(i, slot_of(i), ready.at[slot_of(i)])

        @pl.loop(jnp.maximum(0, steps - STAGES), steps)
        def _(i: Any) -> None:
            plgpu.barrier_wait(free.at[slot_of(i)])


def _barriers() -> tuple[Any, Any]:
    """The copies of a stage have come; a stage is free."""
    return (
        plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    )


def _launch(interpret: Any) -> dict[str, Any]:
    return dict(num_threads=WARPGROUPS + 1, thread_name="warpgroup", interpret=interpret)
