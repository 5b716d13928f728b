"""Tensors in files, read with bounded memory, whatever kind of file holds them.

Only headers are read up front; the bytes of a tensor are read when asked for, a part of a megabyte at a time.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.weights.names import Layout, Shape
from jaxlm.weights.transpose import STRIP_ROWS, transpose_into

# Read at a time: small enough to stay in the cache between reading and transposing.
BLOCK_BYTES = 256 << 10


class Tensor(ABC):
    """A tensor in files: its shape and dtype are known, its elements are read a few rows at a time."""

    name: str
    file: Path
    shape: Shape
    dtype: np.dtype[Any]

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop (not included) in C order: shape [stop - start, *shape[1:]]; a scalar is one row."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole tensor, in C order."""
        return self.rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def read_into(self, out: np.ndarray, layout: Layout, index: tuple[slice, ...]) -> None:
        """Reads `index` of the leaf that `layout` makes of this tensor.

        Args:
            out: filled; its shape is that of the slices.
            index: one slice with explicit start, stop and positive step per dimension of the leaf.
        """
        assert layout.stored == self.shape, (layout, self.shape)
        if 0 in out.shape:
            return
        if not layout.view:
            out[...] = self.read()
            return
        stored_index = tuple(index[i] for i in layout.inverse)
        target = out.transpose(layout.inverse)
        rows, rest = stored_index[0], stored_index[1:]
        # The leaf as a matrix [inputs, outputs], of which every block is some columns.
        num_inputs = math.prod(out.shape[: out.ndim - layout.split])
        turned = out.reshape(num_inputs, -1) if layout.split and out.flags.c_contiguous else None
        row_bytes = math.prod(layout.view[1:]) * self.dtype.itemsize
        unit = layout.row_unit
        strip = STRIP_ROWS // unit if layout.split else 1
        per_block = max(1, strip, BLOCK_BYTES // row_bytes) * rows.step
        for start in range(rows.start, rows.stop, per_block):
            stop = min(start + per_block, rows.stop)
            data = self.rows(start * unit, stop * unit)
            block = data.reshape(stop - start, *layout.view[1:])[(slice(None, None, rows.step), *rest)]
            done = (start - rows.start) // rows.step
            if turned is None:
                target[done : done + block.shape[0]] = block
            else:
                matrix = block.reshape(-1, num_inputs)
                first = done * (len(matrix) // len(block))
                transpose_into(turned[:, first : first + len(matrix)], matrix)


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor inside one file: where its bytes are and how they are laid out.

    Args:
        offset: where the first element is, in bytes.
        strides: in elements, for torch's views of a storage; None means C order.
        pieces: (offset, bytes) of its parts in order, when they do not follow each other; C order only.
    """

    name: str
    file: Path
    offset: int
    shape: Shape
    dtype: np.dtype[Any]
    strides: Shape | None = None
    pieces: tuple[tuple[int, int], ...] = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *self.shape[1:])
        if 0 in shape:
            return np.empty(shape, self.dtype)
        try:
            with self.file.open("rb", buffering=0) as handle:
                if self.strides is not None:
                    out = np.empty(shape, self.dtype)
                    offset = self.offset + start * self.strides[0] * self.dtype.itemsize
                    self._read_strided(handle.fileno(), offset, self.strides, out)
                    return out
                row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
                buffer = np.empty((stop - start) * row_bytes, np.uint8)
                for offset, target in self._places(start * row_bytes, buffer.data):
                    self._pread(handle.fileno(), offset, target)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror})") from None
        return buffer.view(self.dtype).reshape(shape)

    def _places(self, begin: int, target: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Where in the file the bytes of the tensor from `begin` on are, each with its part of `target`."""
        if not self.pieces:
            yield self.offset + begin, target
            return
        for offset, nbytes in self.pieces:
            if begin < nbytes and target.nbytes:
                count = min(nbytes - begin, target.nbytes)
                yield offset + begin, target[:count]
                target, begin = target[count:], nbytes
            begin -= nbytes

    def _read_strided(self, fd: int, offset: int, strides: Shape, out: np.ndarray) -> None:
        itemsize = self.dtype.itemsize
        span = itemsize * (1 + sum((size - 1) * step for size, step in zip(out.shape, strides, strict=True)))
        if span > BLOCK_BYTES and max(out.shape) > 1:
            # In halves along the widest stride, so that a view never needs the whole storage.
            axis = max((i for i, size in enumerate(out.shape) if size > 1), key=lambda i: strides[i])
            half = out.shape[axis] // 2
            first, second = np.split(out, [half], axis)
            self._read_strided(fd, offset, strides, first)
            self._read_strided(fd, offset + half * strides[axis] * itemsize, strides, second)
            return
        flat = np.empty(span, np.uint8)
        self._pread(fd, offset, flat.data)
        steps = tuple(step * itemsize for step in strides)
        out[...] = np.lib.stride_tricks.as_strided(flat.view(self.dtype), out.shape, steps, writeable=False)

    def _pread(self, fd: int, offset: int, target: memoryview) -> None:
        while target:
            got = os.preadv(fd, [target], offset)
            if got == 0:
                raise UserError(f"{self.file}: ends inside tensor {self.name!r}; the file was cut short while reading")
            target, offset = target[got:], offset + got


@dataclass(frozen=True)
class WrappedTensor(Tensor):
    """A tensor with another one's name, place, shape and dtype, whose elements are computed from its rows."""

    tensor: Tensor

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tensor.name

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.tensor.file

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self.tensor.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.tensor.shape


@dataclass(frozen=True)
class JoinedRows(Tensor):
    """Rows of several tensors, one below the other.

    Args:
        parts: (tensor, first row, row after the last one).
    """

    name: str
    parts: tuple[tuple[Tensor, int, int], ...]

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.parts[0][0].file

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self.parts[0][0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (sum(stop - start for _, start, stop in self.parts), *self.parts[0][0].shape[1:])

    def rows(self, start: int, stop: int) -> np.ndarray:
        blocks = []
        for tensor, first, end in self.parts:
            size = end - first
            if start < size and stop > 0:
                blocks.append(tensor.rows(first + max(start, 0), first + min(stop, size)))
            start, stop = start - size, stop - size
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate(blocks) if blocks else np.empty((0, *self.shape[1:]), self.dtype)


@dataclass(frozen=True)
class JoinedColumns(Tensor):
    """Matrices side by side."""

    name: str
    parts: tuple[Tensor, ...]

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.parts[0].file

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    def rows(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.shape[1]), self.dtype)
        done = 0
        for part in self.parts:
            out[:, done : done + part.shape[1]] = part.rows(start, stop)
            done += part.shape[1]
        return out


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; `blocks` yields its bytes in C order, lazily."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    blocks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit by bit. Reads a block at a time."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    step = max(1, BLOCK_BYTES // max(1, math.prod(first.shape[1:]) * first.dtype.itemsize))
    for start in range(0, first.shape[0], step):
        stop = min(start + step, first.shape[0])
        if first.rows(start, stop).tobytes() != second.rows(start, stop).tobytes():
            return False
    return True
