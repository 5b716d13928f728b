"""MindSpore's `.ckpt` files: protobuf read and written by hand, a tensor's bytes never in memory at once.

    message Checkpoint { repeated Value value = 1; }
    message Value { required string tag = 1; oneof value { TensorProto tensor = 2; MapTensorProto maptensor = 3; } }
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

A file is one Checkpoint after the other, which to protobuf is the same as one Checkpoint. A tensor above 512 MiB comes
in several Values with the same tag and the whole tensor's dims; their contents follow each other. At the end there may
be `crc_num` and the CRC-32 of everything before it. Lengths and counts come from the file, so they are checked against
its size before anything is made of them. (mindspore 2.x, `train/serialization.py` and `ccsrc/utils/checkpoint.proto`.)
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.errors import UserError
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.names import Shape
from jaxlm.weights.output import Advance, Watcher
from jaxlm.weights.tensors import StoredTensor

DTYPES: dict[str, np.dtype[Any]] = {
    "Int8": np.dtype(np.int8),
    "UInt8": np.dtype(np.uint8),
    "Int16": np.dtype(np.int16),
    "UInt16": np.dtype(np.uint16),
    "Int32": np.dtype(np.int32),
    "UInt32": np.dtype(np.uint32),
    "Int64": np.dtype(np.int64),
    "UInt64": np.dtype(np.uint64),
    "Float16": np.dtype(np.float16),
    "Float32": np.dtype(np.float32),
    "Float64": np.dtype(np.float64),
    "Bool": np.dtype(np.bool_),
    "BFloat16": BFLOAT16,
}
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SLICE_BYTES = 512 << 20
CRC_MARK = b"crc_num"
CRC_BYTES = 10
ENCRYPTED = bytes.fromhex("d85e3a7f")
# Far more than any model has; a file of junk is refused before it is followed to its end.
MAX_VALUES = 1_000_000
MAX_FIELDS = 64
MAX_SLICES = 4096
MAX_NAME_BYTES = 4096
_AGAIN = "copy or download the file again"


class _Damaged(Exception):
    """The file is not what it should be; the reason is the message."""


@dataclass
class _Value:
    """One tensor so far: `pieces` are (offset, bytes) of its contents."""

    name: str
    dims: Shape
    kind: str
    pieces: list[tuple[int, int]] = field(default_factory=list)


class _Wire:
    """Protobuf's wire format in a file: nothing but headers is read."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self.handle = handle
        self.size = size
        self.position = 0

    def seek(self, position: int) -> None:
        self.handle.seek(position)
        self.position = position

    def take(self, count: int, end: int) -> bytes:
        if self.position + count > end:
            raise _Damaged("it is cut short, or a length in it is wrong")
        data = self.handle.read(count)
        if len(data) != count:
            raise _Damaged("it is cut short")
        self.position += count
        return data

    def varint(self, end: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1, end)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise _Damaged("a number in it does not end")

    def fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, wire type, value or length) of each field up to `end`; a length's bytes are next to be read."""
        for _ in range(MAX_FIELDS):
            if self.position == end:
                return
            key = self.varint(end)
            number, wire = key >> 3, key & 7
            if wire == 0:
                yield number, wire, self.varint(end)
            elif wire == 2:
                length = self.varint(end)
                after = self.position + length
                if after > end:
                    raise _Damaged("it is cut short, or a length in it is wrong")
                yield number, wire, length
                self.seek(after)
            elif wire in (1, 5):
                self.take(8 if wire == 1 else 4, end)
            else:
                raise _Damaged(f"it holds a field of the unknown wire type {wire}")
        if self.position != end:
            raise _Damaged(f"it holds more than {MAX_FIELDS} fields where a tensor should be")

    def text(self, length: int, end: int) -> str:
        if length > MAX_NAME_BYTES:
            raise _Damaged(f"it holds a name of {length} bytes")
        try:
            return self.take(length, end).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("it holds a name that is not text") from None


def is_ckpt(path: Path) -> bool:
    """Whether a file begins like a MindSpore checkpoint, encrypted or not, and not like torch's zip."""
    with path.open("rb") as handle:
        head = handle.read(4)
    return head[:1] == b"\x0a" or head == ENCRYPTED


def read_ckpt(path: Path, check: bool = True) -> dict[str, StoredTensor]:
    """The tensors of a `.ckpt` file, located but not read; strings are left out.

    Args:
        check: whether a CRC at the end is compared, which reads the whole file once.

    Raises:
        UserError: when the file is damaged, encrypted, or holds a kind of tensor that is not known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            if handle.read(4) == ENCRYPTED:
                raise UserError(
                    f"{path}: is encrypted; save it again without: in MindSpore, ms.save_checkpoint("
                    "ms.load_checkpoint(FILE, dec_key=KEY, dec_mode=MODE), NEW_FILE)"
                )
            values = _read_values(_Wire(handle, size), check)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except _Damaged as error:
        raise UserError(f"{path}: is not a MindSpore checkpoint, or is damaged: {error}; {_AGAIN}") from None
    tensors = {}
    for value in values.values():
        if value.kind != "str":
            tensors[value.name] = _located(path, value)
    return tensors


def _read_values(wire: _Wire, check: bool) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    last: _Value | None = None
    if wire.size == 0:
        raise _Damaged("it is empty")
    wire.seek(0)
    for _ in range(MAX_VALUES):
        if wire.position == wire.size:
            return values
        start = wire.position
        if wire.size - start == len(CRC_MARK) + CRC_BYTES and wire.take(len(CRC_MARK), wire.size) == CRC_MARK:
            if check:
                _check_crc(wire, start)
            return values
        wire.seek(start)
        if wire.take(1, wire.size) != b"\x0a":
            raise _Damaged(f"byte {start} is not where a tensor begins")
        end = wire.varint(wire.size) + wire.position
        if end > wire.size:
            raise _Damaged("it is cut short, or a length in it is wrong")
        value = _read_value(wire, end)
        if last is not None and value.name == last.name:
            if (value.dims, value.kind) != (last.dims, last.kind):
                raise _Damaged(f"the slices of {value.name!r} differ in shape or type")
            last.pieces += value.pieces
            if len(last.pieces) > MAX_SLICES:
                raise _Damaged(f"{value.name!r} has more than {MAX_SLICES} slices")
            continue
        if value.name in values:
            raise _Damaged(f"{value.name!r} occurs twice")
        values[value.name] = last = value
    raise _Damaged(f"it holds more than {MAX_VALUES} tensors")


def _check_crc(wire: _Wire, end: int) -> None:
    expected = int.from_bytes(wire.take(CRC_BYTES, wire.size), "big")
    wire.seek(0)
    crc = 0
    while wire.position < end:
        crc = zlib.crc32(wire.take(min(1 << 20, end - wire.position), end), crc)
    if crc != expected:
        raise _Damaged(f"its CRC-32 is {crc:08x}, the one stored at its end {expected:08x}")


def _read_value(wire: _Wire, end: int) -> _Value:
    name: str | None = None
    value: _Value | None = None
    for number, kind, length in wire.fields(end):
        if (number, kind) == (1, 2):
            name = wire.text(length, end)
        elif (number, kind) == (2, 2):
            value = _read_tensor(wire, wire.position + length)
        elif (number, kind) == (3, 2):
            raise _Damaged(f"{name!r} is a hash table (MapTensor), which no language model has")
    if not name or value is None:
        raise _Damaged("it holds a tensor without a name or a name without a tensor")
    value.name = name
    return value


def _read_tensor(wire: _Wire, end: int) -> _Value:
    dims: list[int] = []
    kind: str | None = None
    pieces: list[tuple[int, int]] = []
    for number, wire_type, length in wire.fields(end):
        if (number, wire_type) == (1, 0):
            dims.append(length)
        elif (number, wire_type) == (1, 2):  # packed
            after = wire.position + length
            while len(dims) <= MAX_FIELDS and wire.position < after:
                dims.append(wire.varint(after))
        elif (number, wire_type) == (2, 2):
            kind = wire.text(length, end)
        elif (number, wire_type) == (3, 2):
            pieces = [(wire.position, length)]
    if kind is None or not pieces:
        raise _Damaged("it holds a tensor without type or content")
    if any(dim >= 1 << 63 for dim in dims) or len(dims) > MAX_FIELDS:
        raise _Damaged(f"it holds a tensor of shape {dims}")
    return _Value("", tuple(dims), kind, pieces)


def _located(path: Path, value: _Value) -> StoredTensor:
    dtype = DTYPES.get(value.kind)
    if dtype is None:
        raise UserError(f"{path}: tensor {value.name!r} is of type {value.kind!r}; known: {', '.join(DTYPES)}")
    held = sum(nbytes for _, nbytes in value.pieces)
    # MindSpore writes [0] for a scalar.
    shape = () if value.dims == (0,) and held == dtype.itemsize else value.dims
    needed = math.prod(shape) * dtype.itemsize
    if held != needed:
        raise UserError(
            f"{path}: tensor {value.name!r} of shape {list(shape)} and type {value.kind} needs {needed} bytes, "
            f"the file has {held}; {_AGAIN}"
        )
    pieces = tuple(value.pieces) if len(value.pieces) > 1 else ()
    return StoredTensor(value.name, path, value.pieces[0][0], shape, dtype, pieces=pieces)


# ---- writing


class CkptWriter:
    """A `.ckpt` file on its way: tensor after tensor, in blocks.

    Args:
        crc: ends the file with the CRC-32, which `ms.load_checkpoint(…, crc_check=True)` asks for.
    """

    def __init__(self, path: Path, crc: bool = False) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._position = 0
        self._crc: int | None = 0 if crc else None

    def __enter__(self) -> CkptWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None and self._crc is not None:
                self._append(CRC_MARK + self._crc.to_bytes(CRC_BYTES, "big"))
        finally:
            self._file.close()

    def write(
        self, name: str, shape: Shape, dtype: np.dtype[Any], blocks: Iterable[np.ndarray], advance: Advance
    ) -> None:
        """Appends a tensor, sliced as MindSpore does when it is above 512 MiB; `blocks` are its elements in C order."""
        total, itemsize = math.prod(shape), dtype.itemsize
        count = max(1, -(-total * itemsize // SLICE_BYTES))
        # numpy.array_split: the first slices are one element longer.
        slices = [total // count + (number < total % count) for number in range(count)]
        left = slices.pop(0) * itemsize
        self._append(_value_header(name, shape, dtype, left))
        for block in blocks:
            assert block.flags.c_contiguous and block.dtype == dtype, name
            data = block.reshape(-1).view(np.uint8).data
            while data:
                if left == 0:
                    left = slices.pop(0) * itemsize
                    self._append(_value_header(name, shape, dtype, left))
                part, data = data[:left], data[left:]
                self._append(part)
                left -= part.nbytes
            advance(block.nbytes)
            if isinstance(advance, Watcher):
                advance.final(self._path, self._position)
        assert left == 0 and not slices, name

    def _append(self, data: bytes | memoryview) -> None:
        if self._crc is not None:
            self._crc = zlib.crc32(data, self._crc)
        view = memoryview(data)
        self._position += view.nbytes
        while view:
            view = view[os.write(self._file.fileno(), view) :]


def _value_header(name: str, shape: Shape, dtype: np.dtype[Any], nbytes: int) -> bytes:
    """Everything of a Checkpoint with one Value up to the content, which follows and is `nbytes` long."""
    dims = b"".join(b"\x08" + _varint(size) for size in shape)
    inner = dims + _field(2, _TYPE_NAMES[dtype].encode()) + b"\x1a" + _varint(nbytes)
    tag = _field(1, name.encode())
    tensor = b"\x12" + _varint(len(inner) + nbytes)
    return b"\x0a" + _varint(len(tag) + len(tensor) + len(inner) + nbytes) + tag + tensor + inner


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
