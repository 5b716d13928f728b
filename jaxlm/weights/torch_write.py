"""Writing `torch.save` files without torch and without pickling, in one pass with bounded memory.

The layout is that of `torch_zip`: `data.pkl`, then one stored (uncompressed) member per tensor, each starting at a
multiple of 64 bytes so that torch can map it. The pickle program is spelled out opcode by opcode: an OrderedDict of
names and `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxlm.weights.names import Shape
from jaxlm.weights.torch_zip import ORDERED_DICT, REBUILD_TENSOR, STORAGES

ALIGNMENT = 64
_ROOT = "archive"
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
# Zip (APPNOTE 6.3): sizes and offsets from here on need the 64-bit fields.
_WIDE = 0xFFFFFFFF
_DATE = (1 << 5) | 1  # 1 January 1980, so that the same model gives the same file


@dataclass(frozen=True)
class TensorInfo:
    """What the program says about a tensor."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Member:
    name: bytes
    offset: int  # of its local header
    nbytes: int
    crc: int = 0


class TorchZipWriter:
    """A state dict on its way into a file: `begin` a tensor, `write` its bytes, then the next, in the order given.

    Args:
        path: a new file.
        tensors: everything that will be written.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._tensors = list(tensors)
        self._members: list[_Member] = []
        self._position = 0
        self._begun = 0
        self._left = 0
        self._small("data.pkl", state_dict_program(self._tensors))
        self._small("byteorder", b"little")

    def __enter__(self) -> TorchZipWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._begun == len(self._tensors), self._tensors[self._begun].name
                self._small("version", b"3\n")
                self._finish_member()
                self._append(self._directory())
        finally:
            self._file.close()

    @property
    def settled(self) -> int:
        """Bytes at the beginning of the file that will not change any more: the CRC of a member comes at its end."""
        return self._members[-1].offset if self._members else 0

    def begin(self, name: str) -> None:
        """Starts the next tensor."""
        info = self._tensors[self._begun]
        assert info.name == name, (info.name, name)
        self._begin_member(f"data/{self._begun}", info.nbytes)
        self._begun += 1

    def write(self, block: np.ndarray) -> None:
        """Appends contiguous elements to the tensor begun last."""
        assert block.flags.c_contiguous and block.dtype == self._tensors[self._begun - 1].dtype
        self._content(block.reshape(-1).view(np.uint8).data)

    def _small(self, name: str, content: bytes) -> None:
        self._begin_member(name, len(content))
        self._content(memoryview(content))

    def _begin_member(self, name: str, nbytes: int) -> None:
        self._finish_member()
        member = _Member(f"{_ROOT}/{name}".encode(), self._position, nbytes)
        wide = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= _WIDE else b""
        # As torch does: an extra field 'FB' of any length fills up to the alignment.
        start = self._position + 30 + len(member.name) + len(wide) + 4
        padding = -start % ALIGNMENT
        extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        size, version = min(nbytes, _WIDE), 45 if wide else 20
        numbers = version, 0, 0, 0, _DATE, 0, size, size, len(member.name), len(extra)
        self._append(b"PK\x03\x04" + struct.pack("<5H3L2H", *numbers) + member.name + extra)
        self._members.append(member)
        self._left = nbytes

    def _content(self, data: memoryview) -> None:
        self._left -= data.nbytes
        self._members[-1].crc = zlib.crc32(data, self._members[-1].crc)
        self._append(data)

    def _finish_member(self) -> None:
        assert self._left == 0, self._members[-1]
        if self._members:
            member = self._members[-1]
            os.pwrite(self._file.fileno(), struct.pack("<L", member.crc), member.offset + 14)

    def _append(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._position += view.nbytes
        while view:
            view = view[os.write(self._file.fileno(), view) :]

    def _directory(self) -> bytes:
        start, parts = self._position, []
        for member in self._members:
            large = [value for value in (member.nbytes, member.nbytes, member.offset) if value >= _WIDE]
            extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
            size, version = min(member.nbytes, _WIDE), 45 if large else 20
            head = struct.pack("<6H3L", version, version, 0, 0, 0, _DATE, member.crc, size, size)
            head += struct.pack("<5H2L", len(member.name), len(extra), 0, 0, 0, 0, min(member.offset, _WIDE))
            parts.append(b"PK\x01\x02" + head + member.name + extra)
        directory = b"".join(parts)
        count, end = len(parts), start + len(directory)
        wide = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, len(directory), start)
        wide += b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
        few = min(count, 0xFFFF)
        last = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, few, few, len(directory), min(start, _WIDE), 0)
        return directory + (wide if start >= _WIDE or count >= 0xFFFF else b"") + last


def state_dict_program(tensors: Sequence[TensorInfo]) -> bytes:
    """The pickle program (protocol 2) of an OrderedDict of tensors; tensor number i lies in `data/i`."""
    parts = [b"\x80\x02", _call_ordered_dict(), b"("]  # PROTO 2; MARK of the items
    for number, info in enumerate(tensors):
        strides = tuple(math.prod(info.shape[i + 1 :]) for i in range(len(info.shape)))
        storage = (
            b"("
            + _text("storage")
            + _global(_STORAGE_NAMES[info.dtype])
            + _text(str(number))
            + _text("cpu")
            + _integer(math.prod(info.shape))
            + b"tQ"  # TUPLE, BINPERSID
        )
        arguments = b"(" + storage + _integer(0) + _integers(info.shape) + _integers(strides) + b"\x89"  # NEWFALSE
        parts += [_text(info.name), _global(REBUILD_TENSOR), arguments, _call_ordered_dict(), b"tR"]  # TUPLE, REDUCE
    return b"".join([*parts, b"u."])  # SETITEMS, STOP


def _global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return f"c{module}\n{attribute}\n".encode()


def _call_ordered_dict() -> bytes:
    return _global(ORDERED_DICT) + b")R"  # EMPTY_TUPLE, REDUCE


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw  # BINUNICODE


def _integer(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + struct.pack("<B", value)  # BININT1
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)  # BININT
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw  # LONG1


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"
