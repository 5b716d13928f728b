"""Rows that are sorted into groups, each of which has a matrix of its own: where they lie in a buffer.

Rows lie in a buffer of blocks. A block belongs to one group, and only the first `live` blocks hold rows at all, so the
work is that of the rows there are, although shapes are static:

    rows of group 0 | padding to a whole block | rows of group 1 | padding | ... | unused blocks

Padding must be zero in the rows that are multiplied or in the gradient of their products, so that the matrices'
gradients have none of it; results there are never read.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

# Most rows of a block. Larger ones make faster products, and more padding: half a block per group on average.
BLOCK = 256


@flax.struct.dataclass
class Groups:
    """Which rows belong together.

    Attributes:
        sizes: [E] int32, rows of each group, padding included: multiples of the block.
        owner: [blocks] int32, the group of each block (the last group for an unused one).
        live: int32 scalar, number of used blocks.
    """

    sizes: jax.Array
    owner: jax.Array
    live: jax.Array


def make_groups(counts: jax.Array, rows: int, block: int = BLOCK) -> tuple[Groups, jax.Array, int]:
    """Groups of `counts` [E] rows each, at most `rows` together.

    Returns:
        The groups; the row [E] at which each begins; the number of rows of the buffer (a static upper bound).
    """
    groups = counts.shape[0]
    blocks = -(-rows // block) + groups
    used = -(-counts // block)
    ends = jnp.cumsum(used)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), groups - 1)
    starts = (ends - used) * block
    return Groups(used * block, owner.astype(jnp.int32), ends[-1].astype(jnp.int32)), starts, blocks * block
