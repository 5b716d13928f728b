"""A model's weights laid out for the unrolled runner (`models.unrolled`): read from where they lie, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import load_sharded, stored_chunks, tree_shardings
from jaxlm.models.decoder import Decoder, abstract_layer, abstract_variables
from jaxlm.models.unrolled import Weights
from jaxlm.nn.nf4 import WEIGHT_TYPES
from jaxlm.nn.weight_types import StoredWeight, join_parts, split_parts, with_stored_weights
from jaxlm.sharding import ROW_AXES, TENSOR, WHOLE_IF_UNEVEN
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import LeafReader
from jaxlm.weights.quantized import QuantizedSource


def abstract_weights(decoder: Decoder, weight_type: type[StoredWeight] | None = None) -> Weights:
    """Boxed shapes, dtypes and logical axes: {"params": {…, "layers": […]}, "lora": […]}.

    Args:
        weight_type: what the linear layers' kernels are stored as; None: arrays.
    """
    whole = abstract_variables(decoder.clone(adapters={}))["params"]
    top = {name: tree for name, tree in whole.items() if name not in ("layers", "tail")}

    def layer(number: int) -> Any:
        tree = dict(abstract_layer(decoder, number))
        if weight_type is not None:
            tree["params"] = with_stored_weights(tree["params"], weight_type)
        return tree

    by_period = [layer(p) for p in range(min(len(decoder.spec.period), decoder.spec.num_layers))]
    layers = [by_period[number % len(decoder.spec.period)] for number in range(decoder.spec.num_layers)]
    weights = {
        "params": {**top, "layers": [tree["params"] for tree in layers]},
        "lora": [tree.get("lora", {}) for tree in layers],
    }
    if decoder.spec.encoder is not None:
        weights["encoder_lora"] = abstract_variables(decoder).get("lora", {}).get("encoder", {})
    return weights


def load_weights(
    decoder: Decoder,
    mesh: Mesh,
    model: LeafReader,
    adapter: LeafReader | None = None,
    weight_type: type[StoredWeight] | None = None,
) -> Weights:
    """Reads a model, layer by layer, into the shards of `mesh`, cast to the decoder's `param_dtype` or stored smaller.

    Args:
        model: where 'layers/self_attn/q_proj/kernel' and so on are read from.
        adapter: the factors of a decoder with adapters, and modules that take the place of the model's.
        weight_type: what the linear layers' kernels are stored as; None: arrays.
    """
    boxed = abstract_weights(decoder, weight_type)
    saved = set() if adapter is None else {path for path in adapter.leaves if path.startswith("modules_to_save/")}

    def read_top(path: str, index: tuple[slice, ...]) -> np.ndarray:
        name = f"modules_to_save/{path}"
        return adapter.read(name, index) if adapter is not None and name in saved else model.read(path, index)

    top = {name: tree for name, tree in boxed["params"].items() if name != "layers"}
    bare = nn.unbox(top)
    params = load_sharded(bare, tree_shardings(top, mesh, WHOLE_IF_UNEVEN), read_top, stored_chunks(model, bare))
    layers, factors = [], []
    for number, (stack, index) in enumerate(layer_places(decoder.spec)):
        layers.append(_load_layer(boxed["params"]["layers"][number], mesh, model, stack, index))
        lora_box, lora = boxed["lora"][number], {}
        if lora_box:
            assert adapter is not None
            lora = _load_layer(lora_box, mesh, adapter, stack, index)
        factors.append(lora)
    weights = {"params": {**params, "layers": layers}, "lora": factors}
    if "encoder_lora" in boxed:
        tree = {"encoder": boxed["encoder_lora"]}
        bare = nn.unbox(tree)
        read = model.read if adapter is None else adapter.read
        own = load_sharded(bare, tree_shardings(tree, mesh, WHOLE_IF_UNEVEN), read, stored_chunks(adapter, bare))
        weights["encoder_lora"] = own.get("encoder", {})
    return weights


def load_adapter(decoder: Decoder, mesh: Mesh, adapter: LeafReader) -> list[Any]:
    """For each layer the factors of a decoder's adapters, {} where it has none: those that `load_weights` reads."""
    factors = []
    for number, (stack, index) in enumerate(layer_places(decoder.spec)):
        boxed = abstract_layer(decoder, number).get("lora", {})
        factors.append(_load_layer(boxed, mesh, adapter, stack, index) if boxed else {})
    return factors


def layer_places(spec: DecoderSpec) -> list[tuple[str, int]]:
    """For each layer the path of its stack, and its index there."""
    places = {number: (stack.path, at) for stack in spec.stacks for at, number in enumerate(stack.numbers)}
    return [places[number] for number in range(spec.num_layers)]


def _load_layer(boxed: Any, mesh: Mesh, source: LeafReader, stack: str, index: int) -> Any:
    """One layer's leaves, each read as a whole: it is cut into shards in memory.

    Args:
        boxed: tree of shapes with logical axes, without the layer dim.
        stack: path of the layer's stack.
        index: of the layer in it.
    """
    tree, stored = split_parts(boxed)
    last: tuple[str, StoredWeight] | None = None

    def read(path: str, places: tuple[slice, ...]) -> np.ndarray:
        nonlocal last
        kernel, _, part = path.rpartition("/")
        layer = slice(index, index + 1)
        if kernel not in stored:
            return source.read(f"{stack}/{path}", (layer, *places))[0]
        if isinstance(source, QuantizedSource) and WEIGHT_TYPES[source.kind] is type(stored[kernel]):
            return source.read_part(f"{stack}/{path}", (layer, *places))[0]
        if last is None or last[0] != kernel:
            # From the whole kernel, also for a shard: a factor is that of all inputs of an output.
            values = source.read(f"{stack}/{kernel}", (layer,))[0]
            last = kernel, type(stored[kernel]).of_array(values, stored[kernel].in_dims)
        return cast(np.ndarray, getattr(last[1], part)[places])

    bare = nn.unbox(tree)
    loaded = load_sharded(bare, tree_shardings(tree, mesh, WHOLE_IF_UNEVEN), read, stored_chunks(None, bare))
    return join_parts(loaded, stored)


def unstack(variables: Mapping[str, Any], spec: DecoderSpec) -> Weights:
    """The layout for generation of a model's variables with stacked layers (a copy): for tests and small models."""
    params, lora = dict(variables["params"]), variables.get("lora", {})
    places = layer_places(spec)
    top = {name: tree for name, tree in params.items() if name not in ("layers", "tail")}
    weights = {
        "params": {**top, "layers": [layer_at(params, *place) for place in places]},
        "lora": [layer_at(lora, *place) for place in places],
    }
    return weights if spec.encoder is None else weights | {"encoder_lora": lora.get("encoder", {})}


def layer_at(stacks: Mapping[str, Any], path: str, index: int) -> Any:
    """One layer of a collection, without the dim of its stack; {} where the collection has none."""
    tree: Any = stacks
    for name in path.split("/"):
        tree = tree.get(name, {})
    return jax.tree.map(lambda leaf: leaf[index], tree)


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a cache [R, K, S, h] over the row axes, heads over `tensor`."""
    return NamedSharding(mesh, P(ROW_AXES, TENSOR, None, None))


def weight_bytes(weights: Weights) -> int:
    """Bytes of all weights, over all devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
