"""Experts that files hold one by one: the matrices of a layer's experts are the parts of one leaf of the layer.

Shapes: D model, E experts, f neurons of an expert, F = E f.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.families import family_of
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import ParamSource, cast
from jaxlm.weights.names import Entry, Shape, model_leaves
from jaxlm.weights.tensors import JoinedColumns, JoinedRows, StoredTensor, Tensor, TensorSpec
from jaxlm.weights.transpose import transposed


@dataclass(frozen=True)
class ExpertsEntry:
    """A matrix of a layer as those of its experts.

    Args:
        whole: the matrix, by the name that it would have by itself.
        names: of the experts' matrices.
        side_by_side: whether the experts are columns of it (down_proj [D, F]), not rows.
    """

    whole: Entry
    names: tuple[str, ...]
    side_by_side: bool

    @property
    def stored(self) -> Shape:
        """Shape of an expert's matrix: [f, D], or [D, f] where they lie side by side."""
        rows, columns = self.whole.layout.stored
        return (rows, columns // len(self.names)) if self.side_by_side else (rows // len(self.names), columns)


def experts_entries(spec: DecoderSpec, names: Mapping[str, str]) -> list[ExpertsEntry]:
    """The matrices of all layers that are divided into experts.

    Args:
        names: path of the linear layer ('mlp/up_proj') -> name of an expert's matrix, with '{}' for the number of the
            layer and for that of the expert.
    """
    entries = []
    for leaf in model_leaves(spec):
        name = names.get(leaf.row.path.removesuffix("/kernel"))
        if name is None or leaf.layers is None:
            continue
        for index, number in enumerate(leaf.layers):
            experts = spec.layer(number).feed_forward.experts
            if experts is not None:
                whole = Entry(leaf.row.hf.format(number), leaf.path, index, leaf.layout)
                each = tuple(name.format(number, expert) for expert in range(experts.num_experts))
                entries.append(ExpertsEntry(whole, each, leaf.row.dims.split()[0] == "F"))
    return entries


def own_experts(spec: DecoderSpec) -> list[ExpertsEntry]:
    """`experts_entries` of a family whose files hold experts; empty for others."""
    per_expert = family_of(spec).experts
    return [] if per_expert is None else experts_entries(spec, per_expert.names)


# --- reading ----------------------------------------------------------------------------------------------------------


def split_stacked(where: Path, tensors: dict[str, Tensor], spec: DecoderSpec) -> None:
    """Replaces tensors [E, rows, columns] of all experts of a layer, which some files have, by those of each."""
    per_expert = family_of(spec).experts
    if per_expert is None or spec.experts is None:
        return
    num_experts = spec.experts.num_experts
    for number in range(spec.num_layers):
        for stacked, paths in per_expert.stacked.items():
            tensor = tensors.pop(stacked.format(number), None)
            if tensor is None:
                continue
            if len(tensor.shape) != 3 or tensor.shape[0] != num_experts or tensor.shape[1] % len(paths):
                raise UserError(
                    f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}; config.json means {num_experts} "
                    "experts"
                )
            rows = tensor.shape[1] // len(paths)
            for expert in range(num_experts):
                matrix = _matrix_of(tensor, expert)
                for at, path in enumerate(paths):
                    name = per_expert.names[path].format(number, expert)
                    tensors[name] = JoinedRows(name, ((matrix, at * rows, (at + 1) * rows),))


def _matrix_of(tensor: Tensor, expert: int) -> Tensor:
    _, rows, columns = tensor.shape
    assert isinstance(tensor, StoredTensor) and not tensor.pieces, tensor  # as all tensors of HF's files are
    if tensor.strides not in (None, (rows * columns, columns, 1)):
        raise UserError(f"{tensor.file}: tensor {tensor.name!r} is a view of another one; save the model again")
    offset = tensor.offset + expert * rows * columns * tensor.dtype.itemsize
    return dataclasses.replace(tensor, offset=offset, shape=(rows, columns), strides=None)


def join_experts(where: Path, tensors: dict[str, Tensor], entry: ExpertsEntry) -> Tensor:
    """The matrix of a layer, whose experts' matrices are taken out of `tensors`.

    Raises:
        UserError: one is missing, or they differ from the configuration or in their dtypes.
    """
    parts: list[Tensor] = []
    for name in entry.names:
        if name not in tensors:
            raise UserError(f"{where}: tensor {name!r} is missing; copy the model again")
        tensor = tensors.pop(name)
        if tensor.shape != entry.stored:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(tensor.shape)}, config.json means {list(entry.stored)}"
            )
        if parts and tensor.dtype != parts[0].dtype:
            raise UserError(
                f"{where}: {name!r} is {tensor.dtype.name} and {entry.names[0]!r} is {parts[0].dtype.name}; experts "
                "are joined, so they need one dtype: save the model in one dtype first"
            )
        parts.append(tensor)
    if entry.side_by_side:
        return JoinedColumns(entry.whole.name, tuple(parts))
    return JoinedRows(entry.whole.name, tuple((tensor, 0, tensor.shape[0]) for tensor in parts))


# --- writing ----------------------------------------------------------------------------------------------------------


def expert_tensors(source: ParamSource, entry: ExpertsEntry, factor: int = 1) -> list[TensorSpec]:
    """One matrix of a layer as those of its experts, which are written one after the other.

    Args:
        factor: what they are multiplied with, in float32.
    """
    dtype, pieces = source.leaves[entry.whole.path].dtype, _pieces(source, entry, factor)
    return [TensorSpec(name, entry.stored, dtype, _Next(pieces, name == entry.names[-1])) for name in entry.names]


def _pieces(source: ParamSource, entry: ExpertsEntry, factor: int) -> Generator[np.ndarray, None, None]:
    """The matrices of the experts of one layer; the layer's is in memory meanwhile."""
    index = entry.whole.layer
    assert index is not None
    # Turned: the leaf of down_proj is [F, D], those of the others [D, F].
    leaf = source.read(entry.whole.path, (slice(index, index + 1),))[0]
    size = entry.stored[1] if entry.side_by_side else entry.stored[0]
    for start in range(0, size * len(entry.names), size):
        neurons = slice(start, start + size)
        matrix = transposed(leaf[neurons] if entry.side_by_side else leaf[:, neurons])
        if factor != 1:
            matrix = cast(matrix.astype(np.float32) * np.float32(factor), matrix.dtype, entry.whole.name)
        yield matrix


class _Next:
    """The next piece of a stream. The last one closes it: what it holds would stay until all layers are written."""

    def __init__(self, stream: Generator[np.ndarray, None, None], last: bool) -> None:
        self._stream = stream
        self._last = last

    def __iter__(self) -> Iterator[np.ndarray]:
        yield next(self._stream)
        if self._last:
            self._stream.close()
