"""Products with a weight in four bits on TPU, in Pallas: blocks become numbers in vector memory and nowhere else.

XLA writes the dense weight of a wide layer to memory before the product and reads it again, and forms that of a smaller
one inside of the product; both take twice the product's cycles (benchmarks/README.md, "A base in few bits"). Here a
tile of codes is read, becomes numbers, and is multiplied with all rows that are in vector memory.
The plain twin is `Nf4Weight.dense` and a product.

Rows M, inputs I in N blocks of 64, outputs O. A product takes 2 M I O FLOPs and some 40 vector operations for every two
codes, as often as the rows are divided into tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

BLOCK = 64
# Rows, blocks of inputs and outputs of a tile: a step's arrays take 30 MiB with those of the next step.
ROWS, BLOCKS, OUTPUTS = 2048, 8, 512
VMEM = 60 * 2**20


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
    bm, bn, bo = min(ROWS, rows), min(BLOCKS, blocks), min(OUTPUTS, outputs)
    tiles = pl.cdiv(rows, bm), pl.cdiv(outputs, bo), pl.cdiv(blocks, bn)
    # The sum is over the last dim of the grid: outputs, or blocks.
    order = "mno" if transposed else "mon"
    grid = tuple(dict(zip("mon", tiles, strict=True))[dim] for dim in order)

    def index(*dims: str) -> Any:
        def at(*ids: Any) -> tuple[Any, ...]:
            return tuple(0 if dim == "0" else ids[order.index(dim)] for dim in dims)

        return at

    ragged = outputs % bo if transposed else blocks % bn
    wide = BLOCK * bn
    x_spec = pl.BlockSpec((bm, bo), index("m", "o")) if transposed else pl.BlockSpec((bm, wide), index("m", "n"))
    out_spec = pl.BlockSpec((bm, wide), index("m", "n")) if transposed else pl.BlockSpec((bm, bo), index("m", "o"))
    out = (rows, BLOCK * blocks) if transposed else (rows, outputs)

    def kernel(x_ref: Any, codes_ref: Any, absmax_ref: Any, out_ref: Any, sum_ref: Any) -> None:
        last = pl.program_id(2)

        @pl.when(last == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        scales, values = absmax_ref[...], x_ref[...]
        if ragged:
            # Of the last tile of the sum, what lies behind the arrays' ends is anything.
            size = outputs if transposed else blocks
            start = last * (bo if transposed else bn)
            inside = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1 if transposed else 0) + start < size
            scales = jnp.where(inside, scales, 0.0)
            width = size if transposed else BLOCK * size
            first = start if transposed else BLOCK * start
            inside = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) + first < width
            values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
        packed = codes_ref[...].astype(jnp.int32)
        halves = [_choose(packed >> 4, table), _choose(packed & 15, table)]
        weight = jnp.concatenate([half * scales[:, None, :] for half in halves], axis=1)
        weight = weight.astype(values.dtype).reshape(wide, bo)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        sum_ref[...] += jax.lax.dot_general(values, weight, dims, preferred_element_type=jnp.float32)

        @pl.when(last == grid[2] - 1)
        def _() -> None:
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            x_spec,
            pl.BlockSpec((bn, BLOCK // 2, bo), index("n", "0", "o")),
            pl.BlockSpec((bn, bo), index("n", "o")),
        ],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(out, dtype),
        scratch_shapes=[pltpu.VMEM((bm, wide if transposed else bo), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * codes.size * 2,
            bytes_accessed=codes.size + 4 * absmax.size + x.size * x.dtype.itemsize + rows * out[1] * dtype.itemsize,
            transcendentals=0,
        ),
        name="nf4_product",
        interpret=interpret,
    )(x, codes, absmax)


def _choose(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] bit by bit, in float32."""
    rows = [jnp.float32(value) for value in table]
    for shift in range(4):
        bit = (codes & (1 << shift)) != 0
        rows = [jnp.where(bit, odd, even) for even, odd in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]
