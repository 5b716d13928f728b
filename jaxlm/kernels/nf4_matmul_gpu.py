"""Products with a weight in four bits on GPUs, in Pallas by Triton: codes become numbers on the chip and nowhere else.

XLA writes the dense weight to memory before the product and reads it again, together eight times the bytes of the codes
(benchmarks/README.md, "A base in few bits"). The plain twin is `Nf4Weight.dense` and a product. By Triton and not by
Mosaic as jaxlm's other kernels for GPUs, which Mosaic compiles for Hopper alone: four bits are for smaller GPUs.

Rows M, inputs I in N blocks of 64, outputs O. Two codes lie in a byte, those of inputs i and i + 32 of a block, so the
bytes are a matrix [32 N, O] whose upper and lower halves are multiplied each by itself. A product takes 2 M I O FLOPs,
and reads every code and looks it up as often as the rows are divided into tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

BLOCK = 64
BYTES = BLOCK // 2  # of a block
LEAST, ROWS = 16, 128  # rows of a tile: as many as there are, but no fewer than tensor cores multiply
FEW = 64  # rows of a tile up to which it is narrow, so that there are tiles for all of a GPU
# With these a tile takes 53 to 94 KB of shared memory, of which the smaller GPUs have 99; on 10.0, with 228, up to 102.
STAGES = 3


def nf4_product(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    table: np.ndarray,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [M, 64 N] times the weight, [M, O]; transposed: x [M, O] times the transposed weight, [M, 64 N].

    Args:
        x: in the dtype that is multiplied; sums are float32.
        codes: [N, 32, O] uint8, of each block the first half in the upper bits.
        absmax: [N, O] float32.
        table: the 16 values, float32.
        dtype: of the result; None: that of x.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    (rows, _), (blocks, _, outputs) = x.shape, codes.shape
    bm = min(ROWS, max(LEAST, pl.next_power_of_2(rows)))
    # Tiles divide the bytes of a column, so that only rows and outputs have a ragged end.
    if transposed:
        wide, columns, step, summed = (32 if bm <= FEW or blocks % 2 else 64), BYTES * blocks, 64, outputs
    else:
        wide, columns, step, summed = (32 if bm <= FEW else 128), outputs, BYTES, BYTES * blocks

    def kernel(x_ref: Any, codes_ref: Any, absmax_ref: Any, table_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0) * bm + jnp.arange(bm)
        column = pl.program_id(1) * wide + jnp.arange(wide)
        row_in = None if rows % bm == 0 else row[:, None] < rows

        def add(i: Any, sums: list[jax.Array]) -> list[jax.Array]:
            over = i * step + jnp.arange(step)
            byte, output = (column, over) if transposed else (over, column)
            output_in = None if outputs % output.size == 0 else output[None, :] < outputs
            packed = _load(codes_ref, byte, output, output_in).astype(jnp.int32)
            scales = _load(absmax_ref, byte // BYTES if transposed else i[None], output, output_in)
            halves = [(triton.load(table_ref.at[half]) * scales).astype(x.dtype) for half in (packed >> 4, packed & 15)]
            if transposed:
                grad = _load(x_ref, row, over, row_in, output_in)
                return [total + _dot(grad, half, 1) for total, half in zip(sums, halves, strict=True)]
            parts = [_load(x_ref, row, i * BLOCK + first + jnp.arange(BYTES), row_in) for first in (0, BYTES)]
            return [sums[0] + _dot(parts[0], halves[0], 0) + _dot(parts[1], halves[1], 0)]

        totals = [jnp.zeros((bm, wide), jnp.float32)] * (2 if transposed else 1)
        totals = jax.lax.fori_loop(0, pl.cdiv(summed, step), add, totals)
        if transposed:
            first = column // BYTES * BLOCK + column % BYTES
            _store(out_ref, row, first, totals[0], row_in)
            _store(out_ref, row, first + BYTES, totals[1], row_in)
        else:
            _store(out_ref, row, column, totals[0], row_in, None if outputs % wide == 0 else column[None, :] < outputs)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, bm), pl.cdiv(columns, wide)),
        out_shape=jax.ShapeDtypeStruct((rows, BLOCK * blocks if transposed else outputs), dtype),
        compiler_params=triton.CompilerParams(num_warps=4 if bm <= FEW else 8, num_stages=STAGES),
        name="nf4_product",
        interpret=interpret,
    )(x, codes.reshape(-1, outputs), absmax, jnp.asarray(table))


def _dot(x: jax.Array, y: jax.Array, y_dim: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((1,), (y_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _load(ref: Any, row: jax.Array, column: jax.Array, *inside: jax.Array | None) -> jax.Array:
    """The numbers at these rows and columns, with zeros for those that lie outside.

    Args:
        inside: which rows [R, 1] and which columns [1, C] lie within the matrix; None: all.
    """
    mask = _mask(row, column, inside)
    values: jax.Array = triton.load(ref.at[row[:, None], column[None, :]], mask=mask, other=None if mask is None else 0)
    return values


def _store(ref: Any, row: jax.Array, column: jax.Array, values: jax.Array, *inside: jax.Array | None) -> None:
    triton.store(ref.at[row[:, None], column[None, :]], values.astype(ref.dtype), mask=_mask(row, column, inside))


def _mask(row: jax.Array, column: jax.Array, inside: tuple[jax.Array | None, ...]) -> jax.Array | None:
    masks = [jnp.broadcast_to(mask, (row.size, column.size)) for mask in inside if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None
