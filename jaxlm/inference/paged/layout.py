"""How weights lie in a CPU's memory while the engine runs, so that no product depends on the number of its rows.

A float32 matrix stays as it was loaded, [in, out], and is summed in an order that holds for all programs of the engine
(`nn.ordered_weight`). All others are laid out [out, in] (`OutputMajorWeight`), which XLA packs anew for each product:
int8 and bfloat16, matrices that several devices share, those for which this machine has no such order, and all of a
processor with AVX-512, whose products of packed weights are faster (benchmarks/README.md, "Products").
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Weights
from jaxlm.nn.ordered_weight import OrderedWeight, block_of
from jaxlm.nn.weight_types import Int8Weight, OutputMajorWeight, StoredWeight

_major = jax.jit(OutputMajorWeight.of_weight, static_argnums=1)
_transposed = jax.jit(jnp.transpose)


def laid_out(decoder: Decoder, weights: Weights, layer_rows: set[int], head_rows: set[int]) -> Weights:
    """Weights whose products do not depend on the number of rows on a CPU; laid out one by one.

    Args:
        layer_rows: the numbers of rows that linear layers multiply.
        head_rows: those that the output matrix multiplies.
    """
    params = weights["params"]
    module, name = ("embed_tokens", "embedding") if decoder.spec.tied_head else ("lm_head", "kernel")
    head = params[module][name]
    layers = [traverse_util.flatten_dict(layer) for layer in params["layers"]]
    shapes = {_matrix(path, leaf) for layer in layers for path, leaf in layer.items() if _is_plain(path, leaf, decoder)}
    asked = dict.fromkeys(shapes, layer_rows)
    head_shape = (*head.shape[::-1], "head")
    if not decoder.spec.normed_head and _is_float32(head, decoder):
        asked[head_shape] = head_rows
    if prefers_packed():
        asked = {}
    with ThreadPoolExecutor(os.cpu_count(), "jaxlm-orders") as pool:
        found = pool.map(lambda shape: block_of(shape[0], shape[1], tuple(asked[shape])), asked)
        blocks = dict(zip(asked, found, strict=True))

    def placed(path: tuple[Any, ...], leaf: Any) -> Any:
        if path[-1] != "kernel" or not isinstance(leaf, (jax.Array, Int8Weight)):
            return leaf
        block = blocks.get(_matrix(path, leaf)) if _is_plain(path, leaf, decoder) else None
        return _major(leaf, _in_dims(path)) if block is None else OrderedWeight(leaf, _in_dims(path), block)

    result = {**params, "layers": [traverse_util.path_aware_map(placed, layer) for layer in params["layers"]]}
    if (block := blocks.get(head_shape)) is not None:
        result[module] = {**params[module], name: OrderedWeight(_transposed(head), 1, block)}
    return {**weights, "params": result}


def prefers_packed() -> bool:
    """Whether this machine's products are faster with weights that XLA packs for each of them: with AVX-512."""
    information = Path("/proc/cpuinfo")  # Linux; elsewhere nobody has measured
    return information.is_file() and " avx512f " in information.read_text()


def in_words(weights: Weights) -> str:
    """How the matrices of layers lie, and why; empty where they are as any model's."""
    layers = weights["params"]["layers"]
    leaves = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, StoredWeight))
    ordered, major = (sum(isinstance(leaf, kind) for leaf in leaves) for kind in (OrderedWeight, OutputMajorWeight))
    if not ordered + major:
        return ""
    parts = [f"{ordered} matrices as loaded, summed alike for any number of rows"] if ordered else []
    if major:
        quicker, needed = "quicker on this processor", "not in float32 on one device, or without such sums here"
        parts.append(f"{major} laid out [out, in]: {quicker if prefers_packed() else needed}")
    return "; ".join(parts)


def _in_dims(path: tuple[str, ...]) -> int:
    """A linear layer goes from the model's dim to dims of its own, or back: o_proj from [H, h]."""
    return 2 if path[-2] == "o_proj" else 1


def _is_float32(leaf: Any, decoder: Decoder) -> bool:
    is_whole = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1
    return is_whole and leaf.dtype == decoder.dtype == jnp.float32


def _is_plain(path: tuple[str, ...], leaf: Any, decoder: Decoder) -> bool:
    return path[-1] == "kernel" and _is_float32(leaf, decoder)


def _matrix(path: tuple[str, ...], leaf: Any) -> tuple[Any, ...]:
    split = _in_dims(path)
    return math.prod(leaf.shape[:split]), math.prod(leaf.shape[split:]), "layer"
