"""Adapters of gate, up and down, on models whose neurons stand in another order.

`convert moefy` moves neurons, and with them what a row of such an adapter's factors belongs to. The order of a model is
its partition. Dense models and the adapters of PEFT and MindSpore are in the original one: a PEFT adapter belongs to
the dense model that `convert jax-to-hf` writes. jaxlm's own adapters keep the partition of the model that they were
trained on. So an adapter can be put in the order of another model; it then changes the same neurons.
"""

from __future__ import annotations

import numpy as np

from convert.transforms.experts import read_reordered
from jaxlm.errors import UserError
from jaxlm.models.adapters import adapted_linears, as_one_adapter
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import AdapterSource, Index, ParamSource
from jaxlm.weights.partition import inverse

# What of an adapter has neurons: (linear layer, factor) -> which dim of the leaf is theirs; 0 is the layer.
NEURON_DIMS = {
    ("gate_proj", "lora_B"): 2,
    ("up_proj", "lora_B"): 2,
    ("gate_proj", "magnitude"): 1,
    ("up_proj", "magnitude"): 1,
    ("down_proj", "lora_A"): 1,
}


class ReorderedAdapter:
    """An adapter with its neurons in another order.

    Args:
        order: [L, F], the neuron of `adapter` at each place.
        config: the spec of the base that it is for.
        partition: the order of that base; None for a dense one.
    """

    def __init__(
        self, adapter: AdapterSource, order: np.ndarray, config: DecoderSpec, partition: np.ndarray | None
    ) -> None:
        self._adapter = adapter
        self._order = order
        self.config = config
        self.partition = partition
        self.path = adapter.path
        self.leaves = adapter.leaves
        # In another order experts are other neurons, so adapters of their own become one.
        self.lora = as_one_adapter(adapter.config, adapter.lora)
        self.layers = adapter.layers
        self.base = adapter.base
        self.peft_config = adapter.peft_config
        self.tokenizer_files = adapter.tokenizer_files
        self.prompt_files = adapter.prompt_files

    def read(self, path: str, index: Index) -> np.ndarray:
        *_, linear, factor = path.split("/")
        dim = NEURON_DIMS.get((linear, factor))
        if dim is None:
            return self._adapter.read(path, index)
        return read_reordered(self._adapter, path, index, dim, self._order)


def moved_linears(adapter: AdapterSource) -> list[str]:
    """The linear layers of the feed-forward layers that it changes."""
    adapted = adapted_linears(adapter.config, adapter.lora, adapter.layers)
    return [name for name, each in adapted.items() if each.linear.feed_forward]


def in_original_order(adapter: AdapterSource) -> AdapterSource:
    """The adapter as it belongs to the dense model."""
    if adapter.partition is None or not moved_linears(adapter):
        return adapter
    return ReorderedAdapter(adapter, inverse(adapter.partition), adapter.config.with_experts(None), None)


def in_order_of(adapter: AdapterSource, base: ParamSource | DecoderSpec) -> AdapterSource:
    """The adapter as it belongs to `base`, whose shape it has; its `config` becomes the base's.

    Args:
        adapter: as it is stored; `config.experts` is that of the model it was trained on.
        base: the model, or only its shape, which does not tell an order of neurons.

    Raises:
        UserError: when it changes neurons and the order of one of the two is not known.
    """
    own, order = adapter.config.experts, adapter.partition
    config = base if isinstance(base, DecoderSpec) else base.config
    moved = moved_linears(adapter)
    wanted = None if isinstance(base, DecoderSpec) or config.experts is None else base.partition
    adapter.config = config  # type: ignore[misc]
    if not moved or (own is None and config.experts is None):
        return adapter
    name = f"{adapter.path}: adapts {moved[0]}, and `convert moefy` changes the order of its neurons"
    if isinstance(base, DecoderSpec) and config.experts is not None:
        if own is not None:
            return adapter
        raise UserError(
            f"{name}: it was trained on a dense model, this one has {config.experts.num_experts} experts. Put it in "
            "their order first: convert peft-to-jax ADAPTER OUT --base MODEL (a jaxlm adapter by way of "
            "convert jax-to-peft)"
        )
    if own is not None and order is None and (config.experts is None or wanted is not None):
        raise UserError(
            f"{name}: it was trained on a model of experts and has no jaxlm/partition.npy, the order of that model; "
            "give the model that it was trained on, or copy the file from there"
        )
    if order is not None and config.experts is not None and wanted is None:
        assert not isinstance(base, DecoderSpec)
        raise UserError(
            f"{name}: {base.path} has no jaxlm/partition.npy, the order of its neurons; give the model that the "
            "adapter was trained on, or copy the file from there"
        )
    if order is None and wanted is None:
        return adapter
    original = np.tile(np.arange(config.feed_forward.size, dtype=np.int32), (config.num_layers, 1))
    order, target = (original if known is None else known for known in (order, wanted))
    if np.array_equal(order, target):
        return adapter
    return ReorderedAdapter(adapter, np.take_along_axis(inverse(order), target, axis=1), config, wanted)
