"""A dense model divided into experts (`moefy`) and back (`demoefy`): the neurons of every layer in another order.

A neuron is a column of gate_proj and up_proj (with its biases) and a row of down_proj; moving all of them together
changes nothing but the order of one sum.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxlm.config import MoeRunConfig
from jaxlm.errors import UserError
from jaxlm.models.resolve import resolve_experts
from jaxlm.screen import Bars
from jaxlm.spec import DecoderSpec, ExpertsSpec
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.leaves import (
    DerivedSource,
    Index,
    LeafInfo,
    LeafReader,
    ParamSource,
    full_index,
    index_shape,
    main_dtype,
    row_blocks,
)
from jaxlm.weights.names import Entry, leaf_shapes
from jaxlm.weights.partition import cluster_neurons, inverse, permutation, read_owners
from jaxlm.weights.transpose import transposed

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
# Elements of a matrix whose neurons are put in another order at a time.
STRIP_ELEMENTS = 1 << 20


class _Reordered(DerivedSource):
    """A model with its neurons in another order.

    Args:
        order: [L, F], the neuron of `source` at each place; None: as they stand.
        moe: None for a dense model.
        partition: [L, F], what the result says of the original order of its neurons.
        router: where a learned router is read; None: it starts at zero.
    """

    def __init__(
        self,
        source: ParamSource,
        order: np.ndarray | None,
        moe: ExpertsSpec | None,
        partition: np.ndarray | None = None,
        router: LeafReader | None = None,
    ) -> None:
        super().__init__(source)
        source.config.refuse_encoder("dividing feed-forward layers into experts")
        self._order = order
        self._partition = partition
        self._router = router
        self.config = source.config.with_experts(moe)
        # A new router starts at zero: all experts are alike to it, and the first ones are used.
        new = WEIGHT_DTYPES[main_dtype(source.leaves)]
        known = dict(source.leaves) | ({} if router is None else {ROUTER: router.leaves[ROUTER]})
        self.leaves = {path: known.get(path, LeafInfo(shape, new)) for path, shape in leaf_shapes(self.config).items()}

    @property
    def partition(self) -> np.ndarray | None:
        return self._partition

    def read(self, path: str, index: Index) -> np.ndarray:
        leaf = self.leaves[path]
        if path == ROUTER and self._router is None:
            return np.zeros(index_shape(full_index(leaf.shape, index)), leaf.dtype)
        if path == ROUTER:
            assert self._router is not None
            return self._router.read(path, index)
        if path not in NEURON_DIMENSION or self._order is None:
            return self._source.read(path, index)
        return read_reordered(self._source, path, index, NEURON_DIMENSION[path], self._order)

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        if entry.path not in NEURON_DIMENSION and entry.path != ROUTER:
            yield from super().blocks(entry)
            return
        if entry.path in NEURON_DIMENSION and self._order is None:
            yield from super().blocks(entry)
            return
        assert entry.layer is not None, entry
        leaf = self.read(entry.path, (slice(entry.layer, entry.layer + 1),))[0]
        for start, stop in row_blocks(entry.layout):
            yield leaf[start:stop] if entry.layout.split == 0 else transposed(leaf[:, start:stop])


def read_reordered(source: LeafReader, path: str, index: Index, dimension: int, order: np.ndarray) -> np.ndarray:
    """What `source.read` would give if its neurons stood in another order. One layer is in memory beside the result.

    Args:
        dimension: that of the neurons in the leaf; 0 is the layer.
        order: [L, F], the neuron of `source` at each place.
    """
    full = full_index(source.leaves[path].shape, index)
    every = (*full[1:dimension], slice(None), *full[dimension + 1 :])
    layers = range(full[0].start, full[0].stop, full[0].step)
    if len(layers) == 1:
        whole = source.read(path, (slice(layers[0], layers[0] + 1), *every))
        places = order[layers[0], full[dimension]]
        if len(places) < order.shape[1]:
            return np.take(whole, places, axis=dimension, mode="clip")
        # In place, so that a layer is in memory once.
        whole = whole if whole.flags.writeable else whole.copy()
        _permute(whole[0], dimension - 1, places)
        return whole
    out = np.empty(index_shape(full), source.leaves[path].dtype)
    for place, layer in enumerate(layers):
        whole = source.read(path, (slice(layer, layer + 1), *every))[0]
        np.take(whole, order[layer, full[dimension]], axis=dimension - 1, out=out[place], mode="clip")
    return out


def _permute(array: np.ndarray, axis: int, order: np.ndarray) -> None:
    """Puts an axis in another order, a strip of STRIP_ELEMENTS at a time; at most one other axis."""
    if array.ndim == 1:
        array[:] = array[order]
        return
    step = max(1, STRIP_ELEMENTS // len(order))
    for start in range(0, array.shape[1 - axis], step):
        strip = array[start : start + step] if axis else array[:, start : start + step]
        strip[...] = np.take(strip, order, axis=axis)


class MoefiedSource(_Reordered):
    """A dense model with its feed-forward layers divided into experts.

    Args:
        order: [L, F] int32, the original neuron at each place; None for a model whose neurons stay where they are and
            which has no other order.
        moe: experts and router; a learned one starts at zero.
        router: where a learned router is read instead.
    """

    def __init__(
        self, source: ParamSource, order: np.ndarray | None, moe: ExpertsSpec, router: LeafReader | None = None
    ) -> None:
        super().__init__(source, order, moe, order, router)


class DenseSource(_Reordered):
    """A model of experts with its neurons in their original order, and without router.

    Args:
        strict: refuses a model without original order; otherwise its neurons stay as they stand.

    Raises:
        UserError: for a dense model, or one that was never put in another order.
    """

    def __init__(self, source: ParamSource, strict: bool = True) -> None:
        if source.config.experts is None:
            raise UserError(f"{source.path}: is a dense model already; demoefy takes what `convert moefy` made")
        partition = source.partition
        if strict and partition is None:
            raise UserError(
                f"{source.path}: has no jaxlm/partition.npy, the original order of its neurons. A model made with "
                "experts from the start has none; a copy of a moefied one needs the file from the original"
            )
        super().__init__(source, None if partition is None else inverse(partition), None)


def dense_first(source: ParamSource) -> str:
    """What to do with a model of experts where only a dense one has a place; for messages."""
    if source.partition is None:  # as `DenseSource` has it
        return "it was made with experts, and has no dense form"
    return f"make it dense first (convert demoefy {shlex.quote(str(source.path))} DENSE)"


def moe_config(
    config: DecoderSpec,
    experts: int,
    router: str,
    top_k: dict[str, int],
    ranges: dict[str, tuple[int, int]],
    shared: int | None,
) -> ExpertsSpec:
    """What model.json says of experts, checked.

    Raises:
        UserError: naming the option, when the numbers do not fit the model or each other.
    """
    neurons = config.feed_forward.size
    if experts < 1 or neurons % experts:
        fitting = [number for number in range(1, neurons + 1) if neurons % number == 0]
        near = sorted(sorted(fitting, key=lambda number: abs(number - experts))[:4])
        raise UserError(
            f"--experts {experts}: does not divide the {neurons} neurons of the feed-forward layer into equal parts; "
            f"numbers that do: {', '.join(map(str, near))}"
        )
    run = MoeRunConfig(experts=experts, router=router, top_k=top_k, ranges=ranges, shared=shared)  # type: ignore[arg-type]
    try:
        moe = resolve_experts(config, run, fresh=True).experts
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
    layers, neurons = source.config.num_layers, source.config.feed_forward.size
    if method == "order":
        return np.tile(np.arange(neurons, dtype=np.int32), (layers, 1))
    if method == "partition":
        assert partition is not None
        owners = read_owners(partition, layers, neurons)
        held = int(owners.max()) + 1
        if held != experts:
            raise UserError(f"--experts {experts}: the partition {partition} has {held}; leave --experts out")
        return np.stack([permutation(row) for row in owners])
    with Bars(console=Console(stderr=True)) as progress:
        every = progress.track(range(layers), description="clustering")
        return np.stack([permutation(_clustered(source, layer, experts, seed)) for layer in every])


def _clustered(source: ParamSource, layer: int, experts: int, seed: int) -> np.ndarray:
    weights = source.read(UP, (slice(layer, layer + 1),))[0]
    try:
        return cluster_neurons(weights, experts, seed)
    except ValueError as error:
        raise UserError(f"{source.path}: {UP}, layer {layer}: {error}; --method order does not look at them") from None
