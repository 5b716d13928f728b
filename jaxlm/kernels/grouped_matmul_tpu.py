"""Grouped products on TPU in Pallas, forward and both gradients; `grouped_matmul` has the plain twin.

One grid step is one block of rows with its group's matrix, or with as many columns of it as fit on the chip. Steps go
through the blocks in order, so a group's matrix is fetched once; which matrix that is, the index maps read from the
groups' tables, which are in scalar memory before the kernel starts. Steps for unused blocks name the last used block
again: nothing is fetched and nothing is computed for them.

XLA's `ragged_dot` is such a kernel too, for the product itself. But it reads the rows once for every 256 columns and
leaves a float32 result to a second pass, and its gradient for the matrices multiplies every row with all groups
(docs/kernels.md, "Grouped matmul").

M rows, I inputs, O outputs, E groups and T tiles of columns take 2 M I O FLOPs in each of the three products, and move
T M I + E I O + M O values between chip and memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.errors import UserError
from jaxlm.kernels.groups import Groups

MIB = 2**20
# The chip's vector memory that a kernel may use: TPU v5p and 7x have 64 MiB, v5e and v6e 128 MiB, older ones 16 MiB.
VMEM, OLD_VMEM = 60 * MIB, 15 * MIB
OLD = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tpu_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups, transposed: bool = False) -> jax.Array:
    """x [M, I] times the matrix of each row's group, w [E, I, O]: [M, O] in x's dtype, accumulated in float32.

    Rows of unused blocks are not written: they hold anything. Those of x's gradient too.

    Args:
        transposed: the matrices are [E, O, I].
    """
    return _product(x, w, groups, transposed, "grouped_matmul")


def _fwd(x: jax.Array, w: jax.Array, groups: Groups, transposed: bool) -> tuple[jax.Array, Any]:
    return tpu_grouped_matmul(x, w, groups, transposed), (x, w, groups)


def _bwd(transposed: bool, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, groups = residuals
    left, right = (grad, x) if transposed else (x, grad)
    grad_x = _product(grad, w, groups, not transposed, "grouped_matmul_x_gradient")
    return grad_x, _matrix_gradient(left, right, groups).astype(w.dtype), None


tpu_grouped_matmul.defvjp(_fwd, _bwd)


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _tile(size: int, tiles: int) -> int:
    """The size of one of `tiles` tiles: all of it, or a multiple of the chip's 128 lanes."""
    return size if tiles == 1 else pl.cdiv(pl.cdiv(size, tiles), 128) * 128


def vector_memory() -> int:
    """Bytes of this process's TPU; of a TPU v5 or later where it has none and compiles for one."""
    return OLD_VMEM if jax.devices()[0].device_kind in OLD else VMEM


def for_tiles() -> int:
    """Bytes that tiles may take: the compiler needs some for itself."""
    return vector_memory() * 4 // 5


def _parameters(semantics: tuple[Any, ...]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vector_memory())


# --- the product, and the gradient of x -------------------------------------------------------------------------------


def column_tiles(block: int, inner: int, columns: int, itemsize: int) -> int:
    """The number of tiles that the columns of a matrix [inner, columns] are divided into.

    Raises:
        UserError: when not even 128 columns fit on the chip.
    """
    for tiles in range(1, pl.cdiv(columns, 128) + 1):
        tile = _tile(columns, tiles)
        # Everything that moves is there twice, so that the next step's is fetched during this one.
        moving = block * inner + inner * tile + block * tile
        if 2 * moving * itemsize + 4 * block * tile <= for_tiles():
            return tiles
    raise UserError(
        f"moe.compute: pallas_tpu: experts of {inner} inputs and outputs in {8 * itemsize} bits do not fit on the "
        "chip; use more experts, bfloat16 or 'ragged'"
    )


def _product(x: jax.Array, w: jax.Array, groups: Groups, transposed: bool, name: str) -> jax.Array:
    """x [M, I] times w [E, I, O] of each block: [M, O]; transposed: w is [E, O, I]."""
    (rows, inner), blocks = x.shape, groups.owner.shape[0]
    columns = w.shape[1] if transposed else w.shape[2]
    block = rows // blocks
    tiles = column_tiles(block, inner, columns, x.dtype.itemsize)
    tile = _tile(columns, tiles)

    def kernel(owner: Any, live: Any, x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        @pl.when(pl.program_id(1) < live[0])
        def _() -> None:
            out_ref[...] = _dot(x_ref[...], w_ref[...], 1, 1 if transposed else 0).astype(out_ref.dtype)

    def used(step: Any, live: Any) -> Any:
        return jnp.minimum(step, jnp.maximum(live[0] - 1, 0))

    def matrix(column: Any, step: Any, owner: Any, live: Any) -> tuple[Any, ...]:
        group = owner[used(step, live)]
        return (group, column, 0) if transposed else (group, 0, column)

    values = tiles * rows * inner + w.size + rows * columns
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles, blocks),
            in_specs=[
                pl.BlockSpec((block, inner), lambda column, step, owner, live: (used(step, live), 0)),
                pl.BlockSpec((None, tile, inner) if transposed else (None, inner, tile), matrix),
            ],
            out_specs=pl.BlockSpec((block, tile), lambda column, step, owner, live: (used(step, live), column)),
        ),
        compiler_params=_parameters(("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns, bytes_accessed=values * x.dtype.itemsize, transcendentals=0
        ),
        name=name,
    )(groups.owner, groups.live[None], x, w)


# --- the gradient of the matrices -------------------------------------------------------------------------------------


def matrix_tiles(block: int, inner: int, columns: int, itemsize: int) -> tuple[int, int]:
    """The numbers of tiles (rows, columns) of the matrices [inner, columns]: what fits and is read again least."""
    best, least = (pl.cdiv(inner, 128), pl.cdiv(columns, 128)), float("inf")
    for across in range(1, pl.cdiv(columns, 128) + 1):
        for down in range(1, pl.cdiv(inner, 128) + 1):
            tall, wide = _tile(inner, down), _tile(columns, across)
            # The sum, a product to add to it, and the result twice; the rows' two sides, twice.
            needed = tall * wide * (8 + 2 * itemsize) + 2 * block * (tall + wide) * itemsize
            read = inner * across + columns * down
            if needed <= for_tiles() and read < least:
                best, least = (down, across), read
    return best


def visits(groups: Groups, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The steps of a pass over all groups in which also those without rows get one, to be written as zeros.

    Returns:
        [blocks] int32 each: a step's group, its block of rows, whether it has rows to add, whether it is the group's
        first. There are as many steps as blocks (`make_groups` has one block to spare for every group); those behind
        the last group's repeat it, without rows.
    """
    used = groups.sizes // block
    steps = jnp.maximum(used, 1)
    ends, blocks = jnp.cumsum(steps), groups.owner.shape[0]
    step = jnp.arange(blocks, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, step, side="right"), used.shape[0] - 1)
    nth = step - (ends - steps)[group]
    has_rows = nth < used[group]
    # A step without rows names the block before it once more: nothing is fetched.
    rows = jnp.maximum(jnp.cumsum(has_rows) - 1, 0)
    return tuple(each.astype(jnp.int32) for each in (group, rows, has_rows, nth == 0))  # type: ignore[return-value]


def _matrix_gradient(x: jax.Array, grad: jax.Array, groups: Groups) -> jax.Array:
    """x [M, I], grad [M, O] -> [E, I, O] in x's dtype: for each group, the sum over its rows."""
    (rows, inner), columns, blocks = x.shape, grad.shape[1], groups.owner.shape[0]
    block, count = rows // blocks, groups.sizes.shape[0]
    down, across = matrix_tiles(block, inner, columns, x.dtype.itemsize)
    tall, wide = _tile(inner, down), _tile(columns, across)

    def kernel(
        group: Any, at: Any, has_rows: Any, first: Any, x_ref: Any, grad_ref: Any, out_ref: Any, total: Any
    ) -> None:
        step = pl.program_id(2)

        @pl.when(first[step] == 1)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(has_rows[step] == 1)
        def _() -> None:
            total[...] += _dot(x_ref[...], grad_ref[...], 0, 0)

        after = jnp.minimum(step + 1, blocks - 1)

        @pl.when((step == blocks - 1) | (first[after] == 1))
        def _() -> None:
            out_ref[...] = total[...].astype(out_ref.dtype)

    values = across * x.size + down * grad.size + count * inner * columns
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((count, inner, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(down, across, blocks),
            in_specs=[
                pl.BlockSpec((block, tall), lambda i, o, step, group, at, *_: (at[step], i)),
                pl.BlockSpec((block, wide), lambda i, o, step, group, at, *_: (at[step], o)),
            ],
            out_specs=pl.BlockSpec((None, tall, wide), lambda i, o, step, group, *_: (group[step], i, o)),
            scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)],
        ),
        compiler_params=_parameters(("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns, bytes_accessed=values * x.dtype.itemsize, transcendentals=0
        ),
        name="grouped_matmul_w_gradient",
    )(*visits(groups, block), x, grad)
