"""A list of whole numbers as `torch.save` writes it, byte for byte, without torch and without pickling.

KnowLM keeps its counts in such files. The layout is that of PyTorch 2.7 and later (inline_container.cc,
serialization.py): a zip with seven records, of which the last names the content by hashes.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError

_ALIGNMENT = 64
_FLAGS = 0x0808  # a descriptor follows the data; names are UTF-8
# The hash of the names of the records, which C++ computes over an unordered set: the names are always these.
_NAMES_HASH = "02908468677762923104"
_MOST_BYTES = 8 << 20


def read_numbers(path: Path) -> list[int]:
    """The list of whole numbers that a file of `torch.save` holds.

    Raises:
        UserError: it is damaged, or holds anything else.
    """
    refusal = UserError(f"{path}: not a list of whole numbers written by torch.save; copy the file again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _MOST_BYTES:
                raise refusal
            program = archive.read(names[0])
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        struct.error,
    ) as error:
        raise UserError(f"{path}: damaged zip file ({error}); copy the file again") from None
    numbers: list[int] = []
    try:
        for place, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if opcode.name in ("BININT", "BININT1", "BININT2", "LONG1") and type(argument) is int:
                numbers.append(argument)
            elif opcode.name not in _OPCODES or (place == 1) != (opcode.name == "EMPTY_LIST"):
                raise refusal
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise UserError(f"{path}: data.pkl is damaged ({error}); copy the file again") from None
    return numbers


_OPCODES = {"PROTO", "FRAME", "EMPTY_LIST", "BINPUT", "MEMOIZE", "MARK", "APPEND", "APPENDS", "STOP"}


def write_numbers(path: Path, numbers: Sequence[int]) -> None:
    """Writes what `torch.save(list(numbers), path)` writes; the name of the file is part of the content."""
    records = {
        "data.pkl": _program(numbers),
        ".format_version": b"1",
        ".storage_alignment": str(_ALIGNMENT).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }
    combined = 0
    for content in records.values():  # c10's hash_combine, in 64 bits
        value = zlib.crc32(content) + 0x9E3779B9 + (combined << 6) + (combined >> 2)
        combined ^= value & 0xFFFFFFFFFFFFFFFF
    combined &= 0xFFFFFFFFFFFFFFFF
    records[".data/serialization_id"] = f"{_NAMES_HASH}{combined:020}".encode()
    body, directory = bytearray(), bytearray()
    for short, content in records.items():
        name = f"{path.stem}/{short}".encode()
        start, crc, size = len(body), zlib.crc32(content), len(content)
        padding = -(start + 30 + len(name) + 4) % _ALIGNMENT
        body += b"PK\x03\x04" + struct.pack("<5H3L2H", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), 4 + padding)
        body += name + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        body += content + b"PK\x07\x08" + struct.pack("<3L", crc, size, size)
        directory += b"PK\x01\x02" + struct.pack("<6H3L", 0, 0, _FLAGS, 0, 0, 0, crc, size, size)
        directory += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, start) + name
    start, size, count = len(body), len(directory), len(records)
    body += directory
    wide_at = len(body)
    body += b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 0x031E, 45, 0, 0, count, count, size, start)
    body += b"PK\x06\x07" + struct.pack("<LQL", 0, wide_at, 1)
    body += b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, size, start, 0)
    path.write_bytes(body)


def _program(numbers: Sequence[int]) -> bytes:
    """The pickle program (protocol 2) of a list of numbers, as Python's own pickler writes it."""
    parts = [b"\x80\x02]q\x00"]
    for first in range(0, len(numbers), 1000):
        batch = b"".join(map(_integer, numbers[first : first + 1000]))
        parts.append(batch + b"a" if len(numbers) == 1 else b"(" + batch + b"e")
    return b"".join([*parts, b"."])


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw
