"""Sums over devices, of which each device keeps a part: what FSDP does with gradients, as networks do it fast.

Left to itself the partitioner makes an all-reduce over all devices of it and drops most of the result. So does a TPU's
compiler with a reduce-scatter over more than one dim of the torus, or with parts that are not a leading dim. One mesh
axis after the other, each a line of the torus (see `devices.mesh`), sends half the bytes, and no device holds the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def split_axes(shape: Sequence[int], logical: tuple[str, ...]) -> list[tuple[str, ...]]:
    """For each dim the mesh axes that it is split over, by the current mesh and logical-axis rules.

    Axes of one device are left out. () for a dim that is whole, or that does not divide evenly; all () without a mesh
    and inside `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return [()] * len(logical)
    split = []
    for size, axes in zip(shape, nn.logical_to_mesh_axes(logical) or (None,) * len(logical), strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        names = tuple(name for name in names if mesh.shape[name] > 1)
        split.append(names if size % math.prod(mesh.shape[name] for name in names) == 0 else ())
    return split


def sum_scattered(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """[N, ...] of each device -> its part [N / devices, ...] of their sum; for use inside `jax.shard_map`.

    Args:
        axes: mesh axes, of which the first changes slowest, as in a PartitionSpec; their sizes divide N.
    """
    sizes = [jax.lax.axis_size(axis) for axis in axes]
    x = x.reshape(*sizes, x.shape[0] // math.prod(sizes), *x.shape[1:])
    for axis in axes:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=0)
    return x


def sum_scattered_columns(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """[M, N] of each device -> its part [M, N / devices] of their sum; see `sum_scattered`."""
    rows = x.shape[0]
    filler = -rows % math.prod(jax.lax.axis_size(axis) for axis in axes)
    x = sum_scattered(jnp.pad(x, ((0, filler), (0, 0))) if filler else x, axes)
    # Now a device has rows and wants columns: what moves is a part already.
    return jax.lax.all_to_all(x, tuple(axes), split_axis=1, concat_axis=0, tiled=True)[:rows]
