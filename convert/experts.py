"""A dense model divided into experts (`moefy`) and back (`demoefy`): the neurons of every layer in another order.

A neuron is a column of gate_proj and up_proj (with its biases) and a row of down_proj; moving all of them together
changes nothing but the order of one sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from convert.leaves import DerivedSource, Index, LeafInfo, ParamSource, full_index, index_shape, main_dtype, row_blocks
from convert.names import Entry, leaf_shapes
from convert.partition import cluster_neurons, inverse, permutation, read_owners
from convert.tensors import WEIGHT_DTYPES
from jaxlm.config import MoeRunConfig
from jaxlm.errors import UserError
from jaxlm.models.shapes import LlamaConfig, MoeConfig, resolve_moe

UP = "layers/mlp/up_proj/kernel"
ROUTER = "layers/mlp/router"
# Leaf -> which of its dimensions is that of the neurons; 0 is the layer.
NEURON_DIMENSION = {
    "layers/mlp/gate_proj/kernel": 2,
    UP: 2,
    "layers/mlp/down_proj/kernel": 1,
    "layers/mlp/gate_proj/bias": 1,
    "layers/mlp/up_proj/bias": 1,
}
METHODS = ("kmeans", "order", "partition")


class _Reordered(DerivedSource):
    """A model with its neurons in another order.

    Args:
        order: [L, F], the neuron of `source` at each place.
        moe: None for a dense model.
    """

    def __init__(self, source: ParamSource, order: np.ndarray, moe: MoeConfig | None) -> None:
        super().__init__(source)
        self._order = order
        self.config = dataclasses.replace(source.config, moe=moe)
        # A new router starts at zero: all experts are alike to it, and the first ones are used.
        new = WEIGHT_DTYPES[main_dtype(source.leaves)]
        self.leaves = {
            path: source.leaves.get(path, LeafInfo(shape, new)) for path, shape in leaf_shapes(self.config).items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        leaf = self.leaves[path]
        if path == ROUTER:
            return np.zeros(index_shape(full_index(leaf.shape, index)), leaf.dtype)
        if path not in NEURON_DIMENSION:
            return self._source.read(path, index)
        dimension = NEURON_DIMENSION[path]
        full = full_index(leaf.shape, index)
        out = np.empty(index_shape(full), leaf.dtype)
        # All neurons of one layer are in memory at a time.
        every = (*full[1:dimension], slice(None), *full[dimension + 1 :])
        for place, layer in enumerate(range(full[0].start, full[0].stop, full[0].step)):
            whole = self._source.read(path, (slice(layer, layer + 1), *every))[0]
            np.take(whole, self._order[layer, full[dimension]], axis=dimension - 1, out=out[place], mode="clip")
        return out

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        if entry.path not in NEURON_DIMENSION and entry.path != ROUTER:
            yield from super().blocks(entry)
            return
        assert entry.layer is not None, entry
        leaf = self.read(entry.path, (slice(entry.layer, entry.layer + 1),))[0]
        whole = entry.layout.to_stored(np.ascontiguousarray(leaf))
        for start, stop in row_blocks(entry.layout):
            yield whole[start:stop]


class MoefiedSource(_Reordered):
    """A dense model with its feed-forward layers divided into experts.

    Args:
        order: [L, F] int32, the original neuron at each place.
        moe: experts and router; a learned one starts at zero.
    """

    def __init__(self, source: ParamSource, order: np.ndarray, moe: MoeConfig) -> None:
        super().__init__(source, order, moe)
        self._kept = order

    @property
    def partition(self) -> np.ndarray | None:
        return self._kept


class DenseSource(_Reordered):
    """A model of experts with its neurons in their original order, and without router.

    Raises:
        UserError: for a dense model, or one that was never put in another order.
    """

    def __init__(self, source: ParamSource) -> None:
        if source.config.moe is None:
            raise UserError(f"{source.path}: is a dense model already; demoefy takes what `convert moefy` made")
        if source.partition is None:
            raise UserError(
                f"{source.path}: has no jaxlm/partition.npy, the original order of its neurons. A model made with "
                "experts from the start has none; a copy of a moefied one needs the file from the original"
            )
        super().__init__(source, inverse(source.partition), None)

    @property
    def partition(self) -> np.ndarray | None:
        return None


def moe_config(
    config: LlamaConfig,
    experts: int,
    router: str,
    top_k: dict[str, int],
    ranges: dict[str, tuple[int, int]],
    shared: int | None,
) -> MoeConfig:
    """What model.json says of experts, checked.

    Raises:
        UserError: naming the option, when the numbers do not fit the model or each other.
    """
    neurons = config.intermediate_size
    if experts < 1 or neurons % experts:
        fitting = [number for number in range(1, neurons + 1) if neurons % number == 0]
        near = sorted(sorted(fitting, key=lambda number: abs(number - experts))[:4])
        raise UserError(
            f"--experts {experts}: does not divide the {neurons} neurons of the feed-forward layer into equal parts; "
            f"numbers that do: {', '.join(map(str, near))}"
        )
    run = MoeRunConfig(experts=experts, router=router, top_k=top_k, ranges=ranges, shared=shared)  # type: ignore[arg-type]
    try:
        moe = resolve_moe(config, run, fresh=True).moe
    except UserError as error:
        text = str(error)
        for key, option in (("top_k", "--top-k"), ("ranges", "--range"), ("shared", "--shared")):
            text = text.replace(f"moe.{key}", option)
        raise UserError(text) from None
    assert moe is not None
    return moe


def make_order(source: ParamSource, experts: int, method: str, partition: Path | None, seed: int) -> np.ndarray:
    """The original neuron at each place, int32 [L, F], by one of METHODS.

    Args:
        partition: for the method partition, see `read_owners`.
        seed: for k-means, which holds one layer's up_proj in memory.

    Raises:
        UserError: when a partition does not fit, or weights to be clustered are not finite.
    """
    layers, neurons = source.config.num_layers, source.config.intermediate_size
    if method == "order":
        return np.tile(np.arange(neurons, dtype=np.int32), (layers, 1))
    if method == "partition":
        assert partition is not None
        owners = read_owners(partition, layers, neurons)
        found = int(owners.max()) + 1
        if found != experts:
            raise UserError(f"--experts {experts}: the partition {partition} has {found}; leave --experts out")
        return np.stack([permutation(row) for row in owners])
    with Progress(console=Console(stderr=True)) as progress:
        every = progress.track(range(layers), description="clustering")
        return np.stack([permutation(_clustered(source, layer, experts, seed)) for layer in every])


def _clustered(source: ParamSource, layer: int, experts: int, seed: int) -> np.ndarray:
    weights = source.read(UP, (slice(layer, layer + 1),))[0]
    try:
        return cluster_neurons(weights, experts, seed)
    except ValueError as error:
        raise UserError(f"{source.path}: {UP}, layer {layer}: {error}; --method order does not look at them") from None
