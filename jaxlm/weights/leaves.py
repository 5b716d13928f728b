"""What a source of parameters offers: leaves by path, any slice of them, and the configuration that goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.spec import DecoderSpec
from jaxlm.weights.arithmetic import all_finite, convert_dtype
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.names import Entry, Layout, Shape

Index = tuple[slice, ...]
# Elements of a stored tensor that are read, worked on and written at a time: they stay in the cache.
BLOCK_ELEMENTS = 256 << 10
# Read at a time of an embedding in a layout of larger chunks: as much as jaxlm's own have.
READ_BYTES = 64 << 20
NAMED = 3  # tensors of each kind that a message names


@dataclass(frozen=True)
class LeafInfo:
    """A (stacked) parameter: its shape and the dtype it is stored in.

    Args:
        chunk: shape of the least that can be read; None: rows of a tensor of one layer.
    """

    shape: Shape
    dtype: np.dtype[Any]
    chunk: Shape | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class LeafReader(Protocol):
    """Leaves that can be read slice by slice, from several threads at once."""

    @property
    def leaves(self) -> Mapping[str, LeafInfo]:
        """Path ('layers/self_attn/q_proj/kernel') -> shape and dtype."""

    def read(self, path: str, index: Index) -> np.ndarray:
        """A slice of a leaf in its stored dtype, as numpy would index it; reads only what is needed. The array is the
        caller's to change.

        Args:
            path: a key of `leaves`.
            index: slices (starts, stops and positive steps may be None) of the leading dimensions; the
                rest is taken whole. The first dimension of 'layers/...' is the layer.
        """


class LeafSource(LeafReader, Protocol):
    """The leaves of a model or adapter in files."""

    @property
    def path(self) -> Path:
        """Where it was opened."""

    @property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer and generation files, to be carried along byte for byte."""

    @property
    def prompt_files(self) -> list[Path]:
        """prompt.json and, where it names one, template.json: how a jaxlm model was asked in training. Else empty."""


class ParamSource(LeafSource, Protocol):
    """A full model."""

    @property
    def config(self) -> DecoderSpec:
        """Its shape."""

    @property
    def hf_config(self) -> dict[str, Any] | None:
        """The `config.json` that the model came with, if any."""

    @property
    def tokenizer_dir(self) -> Path:
        """The directory that a tokenizer can be loaded from."""

    @property
    def partition(self) -> np.ndarray | None:
        """The original neuron at each place, int32 [L, F], of a model that `convert moefy` divided into experts."""


@runtime_checkable
class BlockSource(Protocol):
    """A source that can give tensors in HF's layout without turning them: those read from files like HF's."""

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        """What `stored_blocks` yields, from the files."""


def row_blocks(layout: Layout) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of the blocks that every source cuts a stored tensor into.

    They depend on the layout alone, so the blocks of two models of one shape match. Heads stay whole.
    """
    rows = layout.stored[0] if layout.stored else 1
    unit = layout.row_unit
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(layout.stored[1:]) * unit)) * unit
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def stored_blocks(source: LeafSource, entry: Entry) -> Iterator[np.ndarray]:
    """One tensor of a model in HF's layout, in the blocks of `row_blocks`, contiguous and in the source's dtype.

    From files like HF's the blocks are read as they are. From another layout one layer is read and turned at a time,
    and an embedding in pieces of READ_BYTES: smaller ones would read and check the same chunks over and over.
    """
    if isinstance(source, BlockSource):
        yield from source.blocks(entry)
        return
    blocks = list(row_blocks(entry.layout))
    if entry.layer is not None:
        leaf = source.read(entry.path, (slice(entry.layer, entry.layer + 1),))[0]
        whole = entry.layout.to_stored(np.ascontiguousarray(leaf))
        for start, stop in blocks:
            yield whole[start:stop]
        return
    assert entry.layout.split == 0, entry
    row_bytes = source.leaves[entry.path].nbytes // max(1, entry.layout.stored[0])
    together = max(1, READ_BYTES // max(1, row_bytes * (blocks[0][1] - blocks[0][0])))
    for first in range(0, len(blocks), together):
        part = blocks[first : first + together]
        offset = part[0][0]
        piece = np.ascontiguousarray(source.read(entry.path, (slice(offset, part[-1][1]),)))
        for start, stop in part:
            yield piece[start - offset : stop - offset]


class AdapterSource(LeafSource, Protocol):
    """A low-rank adapter; modules saved in full are leaves under 'modules_to_save/'."""

    @property
    def config(self) -> DecoderSpec:
        """The shape of the base model."""

    @property
    def lora(self) -> LoraConfig:
        """Ranks, scales and targets."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers that carry an adapter; None means all (PEFT's layers_to_transform)."""

    @property
    def base(self) -> str | None:
        """The base model's path or name, as recorded."""

    @property
    def partition(self) -> np.ndarray | None:
        """The order of the base's neurons, see `ParamSource`; None: the original one, or not recorded."""

    @property
    def peft_config(self) -> dict[str, Any] | None:
        """The `adapter_config.json` that the adapter came with, if any."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that was opened, and perhaps an adapter on it.

    Args:
        path: where the base is, as it was named or as the adapter records it.
        base: the model without the adapter.
        adapter_path: where the adapter is, as it was named.
        adapter: the adapter.
        merged: the model with the adapter folded in; `base` where there is none.
    """

    path: str
    base: ParamSource
    adapter_path: str | None
    adapter: AdapterSource | None
    merged: ParamSource

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.base.path) if self.adapter is None else f"{self.base.path} with {self.adapter.path}"

    @property
    def trained_path(self) -> Path:
        """Where the part that was trained last is: the adapter, or else the model."""
        return self.base.path if self.adapter is None else self.adapter.path

    def parts(self, merge: bool) -> tuple[ParamSource, AdapterSource | None]:
        """The model to load, and the adapter that is applied on the fly.

        Args:
            merge: the adapter is folded into the weights while they are read.

        Raises:
            UserError: there is no adapter to fold in.
        """
        if merge and self.adapter is None:
            raise UserError("model.merge_adapter: there is no adapter to merge; set model.adapter")
        return (self.merged, None) if merge else (self.base, self.adapter)


def full_index(shape: Shape, index: Index) -> Index:
    """`index` with explicit start, stop and step in every dimension.

    Raises:
        ValueError: for too many slices, anything but slices, or a step below 1.
    """
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a leaf of {len(shape)} dimensions")
    full = []
    for position, size in enumerate(shape):
        part = index[position] if position < len(index) else slice(None)
        if not isinstance(part, slice) or (part.step is not None and part.step < 1):
            raise ValueError(f"index {part!r}: only slices with a positive step are read")
        start, stop, step = part.indices(size)
        full.append(slice(start, max(start, stop), step))
    return tuple(full)


def index_shape(index: Index) -> Shape:
    """Shape of what an explicit index selects."""
    return tuple(len(range(part.start, part.stop, part.step)) for part in index)


def main_dtype(leaves: Mapping[str, LeafInfo]) -> str:
    """Name of the dtype that most bytes are stored in, e.g. 'bfloat16'."""
    sizes: dict[str, int] = {}
    for leaf in leaves.values():
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.nbytes
    return max(sizes, key=lambda name: sizes[name])


def total_bytes(leaves: Mapping[str, LeafInfo]) -> int:
    return sum(leaf.nbytes for leaf in leaves.values())


def check_leaves(where: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], hint: str = "") -> None:
    """Refuses tensors that are missing, unexpected or of another shape; names the first three of each kind.

    Args:
        hint: the way out where one is missing.
    """
    missing = [name for name in expected if name not in found]
    unexpected = sorted(found.keys() - expected.keys())
    other = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    problems = []
    if missing:
        first, *more = map(repr, missing[:NAMED])
        also = f", so are {' and '.join(more)}" if more else ""
        problems.append(f"tensor {first} is missing{also} ({len(missing)} missing in all){hint}")
    if unexpected:
        first, *more = map(repr, unexpected[:NAMED])
        also = f", nor have {' and '.join(more)}" if more else ""
        problems.append(f"tensor {first} has no place in this model{also} ({len(unexpected)} unexpected in all)")
    if other:
        shapes = [
            f"tensor {name!r} has shape {list(found[name])}, expected {list(expected[name])}" for name in other[:NAMED]
        ]
        problems.append(f"{'; '.join(shapes)} ({len(other)} of another shape in all)")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def cast(array: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """`array` rounded to `dtype`; UserError when a finite value would become infinite."""
    result = convert_dtype(array, dtype)
    if result is not array and dtype == np.float16 and not all_finite(result):
        bad = np.isinf(result) & np.isfinite(array)
        if bad.any():
            largest = float(np.abs(array[bad].astype(np.float32)).max())
            raise UserError(f"--dtype float16: {name} holds {largest:g}, above float16's 65504; use bfloat16")
    return result


class DerivedSource:
    """A model that is another one but for what a subclass changes."""

    def __init__(self, source: ParamSource) -> None:
        self._source = source
        self.path = source.path
        self.config = source.config
        self.hf_config = source.hf_config
        self.tokenizer_files = source.tokenizer_files
        self.tokenizer_dir = source.tokenizer_dir
        self.prompt_files = source.prompt_files
        self.leaves: Mapping[str, LeafInfo] = source.leaves

    @property
    def partition(self) -> np.ndarray | None:
        return self._source.partition

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._source.read(path, index)

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        return stored_blocks(self._source, entry)


class CastSource(DerivedSource):
    """A model read in another dtype.

    Args:
        dtype: name of the dtype of all leaves, or leaf -> its dtype.
    """

    def __init__(self, source: ParamSource, dtype: str | Mapping[str, np.dtype[Any]]) -> None:
        super().__init__(source)
        self.leaves = {
            path: LeafInfo(leaf.shape, WEIGHT_DTYPES[dtype] if isinstance(dtype, str) else dtype[path], leaf.chunk)
            for path, leaf in source.leaves.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        return cast(self._source.read(path, index), self.leaves[path].dtype, path)

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        for block in stored_blocks(self._source, entry):
            yield cast(block, self.leaves[entry.path].dtype, entry.name)
