"""Float32 weights as they are loaded, whose products on a CPU do not depend on the number of rows by a single bit.

XLA's CPU backend gives products of two rows or more to YNNPACK. It reads a matrix [in, out] where it lies if there are
few rows, and packs it anew if there are many; each inner product is a sum of blocks of inputs, whose length follows
from the shape, the number of rows included. Here blocks are made so that they are the same ones: few rows are
multiplied at once, more of them in groups, and many by one product for each block. Which block that is, is found by
trying: `block_of` compares what the products give, bit by bit, on the machine that will run them.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlm.nn.matmul import as_matrix
from jaxlm.nn.weight_types import StoredWeight

# Rows that are multiplied at once: as fast as memory brings the weights.
GROUP = 8
# From this number of rows on, a product for each block is faster than one for each group.
MANY = 64
# Lengths of blocks that are tried. WHOLE: products of any number of rows have the same blocks without help.
WHOLE = 0
BLOCKS = (WHOLE, 256, 512, 128, 64)


def ordered_product(x: jax.Array, matrix: jax.Array, block: int) -> jax.Array:
    """x [M, I] times a matrix [I, O] in float32, summed in the order that `block` stands for (see `block_of`)."""
    rows, inputs = x.shape

    def times(x: jax.Array, matrix: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
        dims = ((x.ndim - 1,), (matrix.ndim - 2,)), (batch, batch)
        return jax.lax.dot_general(x, matrix, dims, preferred_element_type=jnp.float32)

    if block == WHOLE or rows <= GROUP:
        return times(x, matrix)
    if rows < MANY:
        return jnp.concatenate([times(x[start : start + GROUP], matrix) for start in range(0, rows, GROUP)])
    count = inputs // block
    # A batch of products reads the matrix where it lies; slices of it would be copied.
    parts = times(x.reshape(rows, count, block).swapaxes(0, 1), matrix.reshape(count, block, -1), (0,))
    total = parts[0]
    for number in range(1, count):
        total = total + parts[number]
    return total


def block_of(inputs: int, outputs: int, rows: tuple[int, ...]) -> int | None:
    """The block with which `ordered_product` gives the same bits for all of these numbers of rows, two at least.

    Returns:
        The block; None: there is none on this machine.
    """
    assert min(rows) > 1, "a single row is multiplied in another way"
    numbers = tuple(sorted(set(rows)))
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.random(dims, np.float32) - 0.5) for dims in ((numbers[-1], inputs), (inputs, outputs)))
    for block in BLOCKS:
        if (block == WHOLE or (block < inputs and inputs % block == 0)) and _agree(x, matrix, numbers, block):
            return block
    return None


@partial(jax.jit, static_argnums=(2, 3))
def _agree(x: jax.Array, matrix: jax.Array, numbers: tuple[int, ...], block: int) -> jax.Array:
    """Whether products of the first rows have the same bits for all numbers of rows."""

    def product(rows: int) -> jax.Array:
        # Compared by XLA, products of a few rows would become parts of that of all.
        few = jax.lax.optimization_barrier(x[:rows])
        return jax.lax.optimization_barrier(ordered_product(few, matrix, block))

    whole = product(numbers[-1])
    return jnp.all(jnp.array([jnp.array_equal(product(rows), whole[:rows]) for rows in numbers[:-1]]))


@flax.struct.dataclass
class OrderedWeight(StoredWeight):
    """A float32 array, and the order in which its products are summed.

    Attributes:
        values: [*in, *out].
        block: see `block_of`.
    """

    parts: ClassVar[tuple[str, ...]] = ("values",)

    values: Any
    in_dims: int = flax.struct.field(pytree_node=False)
    block: int = flax.struct.field(pytree_node=False, default=WHOLE)

    @property
    def array_shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def times(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        rows, out_shape = x.shape[: x.ndim - self.in_dims], self.values.shape[self.in_dims :]
        x, matrix = as_matrix(x.astype(jnp.float32), len(rows)), as_matrix(self.values, self.in_dims)
        return ordered_product(x, matrix, self.block).astype(dtype).reshape(*rows, *out_shape)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return jnp.asarray(self.values.astype(dtype))

    def columns(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Columns [..., I] of a matrix [I, O] for ids [...]: embeddings, where the matrix gives logits too."""
        return jnp.moveaxis(jnp.take(self.values, ids, axis=1), 0, -1).astype(dtype)

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        return cls(kernel, in_dims)

    @classmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        return cls(kernel, in_dims)
