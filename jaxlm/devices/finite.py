"""Whether weights are finite, asked of the devices that hold them: one pass over memory, a number for each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import SequenceKey

from jaxlm.devices.mesh import replicated
from jaxlm.errors import UserError

Namer = Callable[[str, int | None], str]  # (leaf, layer) -> how the user knows that tensor


def leaf_name(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}, layer {layer}"


def check_finite(tree: Any, mesh: Mesh, where: str, way_out: str, name: Namer = leaf_name) -> None:
    """Checks a tree of weights; integers are passed over.

    Args:
        tree: arrays on `mesh`; those below 'layers' and 'tail' have the layer as first dim, or lie in lists by layer.
        where: they come from, for the message: 'model.path: models/base'.
        way_out: what the user can do.
        name: how the message names a tensor.

    Raises:
        UserError: some are NaN or infinite: which tensor of which layer, and how many values.
    """
    everywhere = replicated(mesh)
    # XLA's CPU backend has a few threads for all devices. Sums over devices of many programs that are under way at once
    # have been seen to wait for each other, until it gave up and ended the process.
    one_by_one = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    counts: dict[tuple[str, int | None, bool], jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            layer = next((key.idx for key in keys if isinstance(key, SequenceKey)), None)
            names = [jax.tree_util.keystr((key,), simple=True) for key in keys if not isinstance(key, SequenceKey)]
            stacked = layer is None and not {"layers", "tail"}.isdisjoint(names)
            path = "/".join(names).removeprefix("params/")
            counts[path, layer, stacked] = _counter(everywhere, stacked)(leaf)
            if one_by_one:
                counts[path, layer, stacked].block_until_ready()
    broken = [
        (path, index if stacked else layer, int(number))
        for (path, layer, stacked), values in zip(counts, jax.device_get(list(counts.values())), strict=True)
        for index, number in enumerate(np.atleast_1d(values))
        if number
    ]
    if not broken:
        return
    path, layer, number = broken[0]
    tensor = name(path, layer)
    more = f", and in {len(broken) - 1} more tensors" if len(broken) > 1 else ""
    raise UserError(
        f"{where}: {tensor} holds {number:,} value{'s that are' if number > 1 else ' that is'} not finite (NaN or "
        f"infinity){more}; {way_out}"
    )


@cache
def _counter(everywhere: NamedSharding, stacked: bool) -> Callable[[jax.Array], jax.Array]:
    def count(leaf: jax.Array) -> jax.Array:
        if stacked and jax.typeof(leaf).memory_space == jax.memory.Space.Host:  # fetched a layer at a time
            return jax.lax.map(lambda layer: not_finite(jax.device_put(layer, jax.memory.Space.Device)), leaf)
        return not_finite(leaf, 1 if stacked else 0)

    def not_finite(values: jax.Array, first: int = 0) -> jax.Array:
        return jnp.sum(~jnp.isfinite(values), axis=tuple(range(first, values.ndim)))

    return jax.jit(count, out_shardings=everywhere)
