"""Reading tensors from files with bounded memory: safetensors here, torch's zip files in `torch_zip`.

Only headers are read up front; the bytes of a tensor are read when asked for, a part of a megabyte at a time. Every
offset, shape and length comes from the file, so all of them are checked against it.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.shapes import read_json
from jaxlm.weights.names import STRIP_ROWS, Layout, Shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# Read at a time: small enough to stay in the cache between reading and transposing.
BLOCK_BYTES = 256 << 10
# The safetensors format's own limit.
MAX_HEADER_BYTES = 100_000_000


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
        row_bytes = math.prod(layout.view[1:]) * self.dtype.itemsize
        unit = layout.row_unit
        strip = STRIP_ROWS // unit if layout.split else 1
        per_block = max(1, strip, BLOCK_BYTES // row_bytes) * rows.step
        for start in range(rows.start, rows.stop, per_block):
            stop = min(start + per_block, rows.stop)
            data = self.rows(start * unit, stop * unit)
            block = data.reshape(stop - start, *layout.view[1:])[(slice(None, None, rows.step), *rest)]
            done = (start - rows.start) // rows.step
            target[done : done + block.shape[0]] = block


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor inside one file: where its bytes are and how they are laid out.

    Args:
        offset: of the first element, in bytes.
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
        found = []
        for tensor, first, end in self.parts:
            size = end - first
            if start < size and stop > 0:
                found.append(tensor.rows(first + max(start, 0), first + min(stop, size)))
            start, stop = start - size, stop - size
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)


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


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        UserError: when the header is broken, or a tensor lies outside the file or on another one.
    """
    again = "; copy or download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short in its header ({size} bytes){again}")
            raw = handle.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header: dict[str, Any] = {}

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header is not valid JSON ({error}){again}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is no JSON object{again}")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _safetensors_entry(path, name, entry, data_start, size) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end:
            raise UserError(f"{path}: tensor {tensor.name!r} overlaps the one before it{again}")
        if tensor.offset > end:
            raise UserError(f"{path}: {tensor.offset - end} bytes before tensor {tensor.name!r} belong to none{again}")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise UserError(f"{path}: {size - end} bytes after the last tensor belong to none{again}")
    return tensors


def _safetensors_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets in the header") from None
    dtype = SAFETENSORS_DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise UserError(f"{path}: tensor {name!r} has the unknown dtype {dtype_name!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(f"{path}: tensor {name!r} has shape {shape} and data_offsets [{begin}, {end}] in the header")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs {needed} bytes, "
            f"its data_offsets give {end - begin}"
        )
    if data_start + end > size:
        raise UserError(
            f"{path}: cut short inside tensor {name!r}: the file has {size} bytes, {data_start + end} are needed; "
            "copy or download the file again"
        )
    return StoredTensor(name, path, data_start + begin, tuple(shape), dtype)


def shard_path(directory: Path, name: Any, index: Path) -> Path:
    """The file that an index names, refused when it lies outside the directory.

    A model in the Hugging Face cache consists of links into the `blobs` folder beside it; those are followed.
    """
    inside = isinstance(name, str) and name not in ("", ".") and name.isprintable()
    if inside:
        for pure in (PurePosixPath(name), PureWindowsPath(name)):
            inside = inside and not pure.is_absolute() and not pure.drive and ".." not in pure.parts
    if not inside:
        raise UserError(f"{index}: names the file {name!r}; a shard must lie inside {directory}")
    path = directory / name
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UserError(f"{index}: {name!r} is a link to {real}, outside {directory}; put the file itself there")
    if not path.is_file():
        raise UserError(f"{index}: names {name!r}, which is not in {directory}; download the missing file")
    return path


def find_weights(directory: Path, stem: str = "model", torch_stem: str = "pytorch_model") -> Path | None:
    """The file to read weights from: safetensors before torch, like transformers. None when there is none."""
    for name in (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{torch_stem}.bin",
        f"{torch_stem}.bin.index.json",
    ):
        if (directory / name).is_file():
            return directory / name
    return None


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors, .bin, .pth or MindSpore .ckpt file, or of all shards named by an index.json."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".json":
        return _read_index(path)
    from jaxlm.weights.mindspore_ckpt import is_ckpt, read_ckpt

    if path.suffix == ".ckpt" and is_ckpt(path):
        return read_ckpt(path)
    from jaxlm.weights.torch_zip import read_torch_zip

    return read_torch_zip(path)


def _read_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no 'weight_map' from tensor to file")
    shards = {name: shard_path(index.parent, name, index) for name in weight_map.values() if isinstance(name, str)}
    tensors: dict[str, StoredTensor] = {}
    for file_name, path in sorted(shards.items()):
        found = read_tensors(path)
        listed = {name for name, file in weight_map.items() if file == file_name}
        for name in sorted(listed - found.keys()):
            raise UserError(f"{index}: says that {file_name} holds {name!r}; it does not")
        for name in sorted(found.keys() - listed):
            raise UserError(f"{path}: holds tensor {name!r}, which {index.name} does not list there")
        tensors.update(found)
    for name in sorted(weight_map.keys() - tensors.keys()):
        shard_path(index.parent, weight_map[name], index)
    return tensors


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
