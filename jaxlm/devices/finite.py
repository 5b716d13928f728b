"""Whether weights are finite, asked of the devices that hold them: one pass over memory, a number for each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.devices.mesh import replicated
from jaxlm.errors import UserError

Namer = Callable[[str, int | None], str]  # (leaf, layer) -> how the user knows that tensor


def leaf_name(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}, layer {layer}"


def check_finite(tree: Any, mesh: Mesh, where: str, way_out: str, name: Namer = leaf_name) -> None:
    """Checks a tree of weights; integers are passed over.

    Args:
        tree: arrays on `mesh`; those below 'layers/' have the layer as first dim, or its number as the next key.
        where: they come from, for the message: 'model.path: models/base'.
        way_out: what the user can do.
        name: how the message names a tensor.

    Raises:
        UserError: some are NaN or infinite: which tensor of which layer, and how many values.
    """
    everywhere = replicated(mesh)
    counts: dict[str, jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            path = jax.tree_util.keystr(keys, simple=True, separator="/").removeprefix("params/")
            counts[path] = _counter(everywhere, _stacked(path))(leaf)
    found = [
        (path, at, int(number))
        for path, values in zip(counts, jax.device_get(list(counts.values())), strict=True)
        for at, number in enumerate(np.atleast_1d(values))
        if number
    ]
    if not found:
        return
    path, at, number = found[0]
    layer: int | None = at if _stacked(path) else None
    if layer is None and "layers" in (parts := path.split("/")):
        layer = int(parts.pop(parts.index("layers") + 1))
        path = "/".join(parts)
    tensor = name(path, layer)
    more = f", and in {len(found) - 1} more tensors" if len(found) > 1 else ""
    raise UserError(
        f"{where}: {tensor} holds {number:,} value{'s that are' if number > 1 else ' that is'} not finite (NaN or "
        f"infinity){more}; {way_out}"
    )


def _stacked(path: str) -> bool:
    parts = path.split("/")
    return "layers" in parts and not parts[parts.index("layers") + 1].isdigit()


@cache
def _counter(everywhere: NamedSharding, stacked: bool) -> Callable[[jax.Array], jax.Array]:
    def count(leaf: jax.Array) -> jax.Array:
        return jnp.sum(~jnp.isfinite(leaf), axis=tuple(range(1 if stacked else 0, leaf.ndim)))

    return jax.jit(count, out_shardings=everywhere)
