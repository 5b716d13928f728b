"""Linear layers' kernels in 8 or 4 bits (see `nn.rounding`): as a source has them, or rounded while they are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.nn.rounding import VERSIONS, Kind, parts_of, quantize
from jaxlm.spec import DecoderSpec
from jaxlm.weights.fingerprint import base_fingerprint
from jaxlm.weights.leaves import DerivedSource, Index, LeafInfo, LeafReader, ParamSource, full_index, index_shape
from jaxlm.weights.names import model_leaves, num_input_dims


@runtime_checkable
class QuantizedSource(Protocol):
    """A source whose kernels are stored in few bits; as a reader of leaves it gives what they stand for, in float32.

    Attributes:
        kind: what the kernels are stored as.
        rounding: tells which rounding of which weights this is, see `rounding_of`.
        stays_quantized: whether it is used in this form without being asked to: jaxlm's own.
    """

    kind: Kind
    rounding: str
    stays_quantized: bool

    def check_kept(self) -> None:
        """Refuses, before they are read, arrays that do not have the form.

        Raises:
            UserError: naming the first of them.
        """

    def read_part(self, path: str, index: Index) -> np.ndarray:
        """A slice of an array of a kernel ('layers/mlp/up_proj/kernel/codes'), as `LeafReader.read` gives one."""


def kernels_of(spec: DecoderSpec) -> dict[str, int]:
    """Path of every linear layer's kernel -> number of its dims that are contracted, without the layer."""
    return {leaf.path: num_input_dims(spec, leaf.row.linear) for leaf in model_leaves(spec) if leaf.row.linear}


def rounding_of(source: ParamSource, kind: Kind) -> str:
    """What tells a rounding of a model from others: the kind, its version, and a hash of the original's weights."""
    if isinstance(source, QuantizedSource) and source.kind == kind:
        return source.rounding
    return rounding_of_original(source, kind)


def rounding_of_original(source: ParamSource, kind: Kind) -> str:
    """`rounding_of` for weights as a source reads them."""
    return f"{kind}-{VERSIONS[kind]} {base_fingerprint(source.config, source)}"


def same_original(first: str, second: str) -> bool:
    """Whether two values of `rounding_of` are of the same weights."""
    return first.rpartition(" ")[2] == second.rpartition(" ")[2]


def layers_of(
    read_dense: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any], index: Index
) -> np.ndarray:
    """A slice of a stacked leaf of which only whole layers can be read.

    Args:
        read_dense: reads one layer.
        shape: of the leaf.
        dtype: of the leaf.
        index: as `LeafReader.read` takes it.
    """
    layers, *places = full_index(shape, index)
    numbers = range(layers.start, layers.stop, layers.step)
    out = np.empty((len(numbers), *index_shape(tuple(places))), dtype)
    if out.size:
        for position, layer in enumerate(numbers):
            out[position] = read_dense(layer)[tuple(places)]
    return out


class PartsReader:
    """A model's leaves with every kernel as the arrays of its stored form.

    They are those of the source where it has them in that form. Otherwise a kernel is rounded one layer at a time, when
    the first of its arrays is read (its codes, in the order in which a tree is loaded); what the other arrays of the
    same kernel are is kept until another kernel is asked for, so that every kernel is read once. The bits depend on
    neither the slices nor their order.

    Args:
        source: what is read.
        kind: the form.
        kernels: path of each kernel -> number of its dims that are contracted, without the layer.
    """

    def __init__(self, source: LeafReader, kind: Kind, kernels: Mapping[str, int]) -> None:
        self._source, self._kind, self._kernels = source, kind, kernels
        self._stored = source if isinstance(source, QuantizedSource) and source.kind == kind else None
        if self._stored is not None:
            self._stored.check_kept()
        self._lock = threading.Lock()
        self._kept: tuple[str, dict[int, dict[str, np.ndarray]]] = "", {}
        self._last: tuple[str, int, dict[str, np.ndarray]] = "", -1, {}
        leaves: dict[str, LeafInfo] = {}
        for path, leaf in source.leaves.items():
            if path not in kernels:
                leaves[path] = leaf
                continue
            for name, part in parts_of(kind, leaf.shape[1:], kernels[path]).items():
                leaves[f"{path}/{name}"] = LeafInfo((leaf.shape[0], *part.shape), part.dtype)
        self.leaves: Mapping[str, LeafInfo] = leaves

    def read(self, path: str, index: Index) -> np.ndarray:
        """A slice of a leaf, or of an array of a kernel; see `LeafReader.read`."""
        kernel, _, name = path.rpartition("/")
        if kernel not in self._kernels:
            return self._source.read(path, index)
        if self._stored is not None:
            return self._stored.read_part(path, index)
        info = self.leaves[path]
        with self._lock:
            return layers_of(lambda layer: self._part(kernel, layer, name), info.shape, info.dtype, index)

    def _part(self, kernel: str, layer: int, name: str) -> np.ndarray:
        if self._kept[0] != kernel:
            self._kept = kernel, {}
        small = self._kept[1].get(layer, {})
        if name in small:
            return small[name]
        if self._last[:2] != (kernel, layer):
            dense = self._source.read(kernel, (slice(layer, layer + 1),))[0]
            parts = quantize(self._kind, dense, self._kernels[kernel])
            self._last = kernel, layer, parts
            large = max(parts, key=lambda part: parts[part].nbytes)
            self._kept[1][layer] = {part: values for part, values in parts.items() if part != large}
        return self._last[2][name]


class QuantizedParts(DerivedSource):
    """A model whose leaves are those of `PartsReader`: what a quantised jaxlm directory holds."""

    def __init__(self, source: ParamSource, kind: Kind) -> None:
        super().__init__(source)
        self._reader = PartsReader(source, kind, kernels_of(source.config))
        self.leaves = self._reader.leaves
        self.rounding = rounding_of(source, kind)

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._reader.read(path, index)
