"""Megatron-Core's indexed dataset: tokens back to back in a `.bin`, where each sequence lies in a `.idx`.

The layout of an index (megatron-core 0.16, core/datasets/indexed_dataset.py), little-endian and unpadded:

    9 bytes b"MMIDIDX\\0\\0" | u64 version, 1 | u8 code of the tokens' type | u64 sequences S | u64 documents + 1
    i32 lengths [S] | i64 byte offsets into the .bin [S] | i64 first sequence of each document [documents + 1]
    i8 modes [S], in multimodal datasets only
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_SMALL_VOCABULARY = 65500  # Megatron's own limit for 16 bits (DType.optimal_dtype)
_AGAIN = "copy the .bin and the .idx again, both of one store"


@dataclass(frozen=True)
class Index:
    """Where the sequences of a `.bin` lie.

    Args:
        dtype: of the tokens.
        lengths: int32 [S].
        documents: int64 [documents + 1]: document d is the sequences [documents[d], documents[d + 1]).
        modes: int8 [S], of a multimodal dataset; else None.
    """

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    documents: NDArray[np.int64]
    modes: NDArray[np.int8] | None = None

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where all ids fit, else int32, by Megatron's rule."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)


def read_index(path: Path) -> Index:
    """The index of `path` (a `.idx`), checked against itself and the size of the `.bin` beside it.

    Raises:
        UserError: it is cut short, not such an index, or does not belong to its `.bin`; the message says what differs.
    """
    tokens = path.with_suffix(".bin")
    if not tokens.is_file():
        raise UserError(f"{path}: {tokens.name} is missing beside it; {_AGAIN}")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the index is empty; {_AGAIN}")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_index(content, path, tokens.stat().st_size)


def parse_index(content: bytes | mmap.mmap, path: Path, bin_size: int) -> Index:
    """As `read_index`, for the content of an index and the size of its `.bin` in bytes."""
    size = len(content)
    if size < _HEADER.size or content[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an index of Megatron's: it does not begin with MMIDIDX; {_AGAIN}")
    _, version, code, sequences, borders = _HEADER.unpack(content[: _HEADER.size])
    if version != 1:
        raise UserError(f"{path}: index version {version}, expected 1; write it with a Megatron that has version 1")
    kind = _CODES.get(code)
    if kind is None or not np.issubdtype(kind, np.integer):
        raise UserError(f"{path}: the tokens' type has code {code}, expected an integer (1 to 5, or 8); {_AGAIN}")
    dtype = np.dtype(kind)
    plain = _HEADER.size + 12 * sequences + 8 * borders
    if size not in (plain, plain + sequences):
        raise UserError(
            f"{path}: {size:,} bytes, but {sequences:,} sequences in {borders - 1:,} documents need {plain:,}; {_AGAIN}"
        )
    at = _HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at)
    at += lengths.nbytes
    pointers = np.frombuffer(content, "<i8", sequences, at)
    at += pointers.nbytes
    documents = np.frombuffer(content, "<i8", borders, at)
    at += documents.nbytes
    modes = np.frombuffer(content, np.int8, sequences, at) if size > plain and sequences else None
    if sequences and int(lengths.min()) < 0:
        raise UserError(f"{path}: a sequence has length {int(lengths.min())}; {_AGAIN}")
    end = 0
    for first in range(0, sequences, _BLOCK):
        part = lengths[first : first + _BLOCK].astype(np.int64) * dtype.itemsize
        expected = end + np.concatenate([[0], np.cumsum(part)])
        wrong = np.flatnonzero(pointers[first : first + _BLOCK] != expected[:-1])
        if len(wrong):
            number = first + int(wrong[0])
            raise UserError(
                f"{path}: sequence {number:,} begins at byte {int(pointers[number]):,}, but those before it end at "
                f"byte {int(expected[wrong[0]]):,}; {_AGAIN}"
            )
        end = int(expected[-1])
    if end != bin_size:
        raise UserError(
            f"{path}: the index describes {end:,} bytes of tokens, {path.with_suffix('.bin').name} has {bin_size:,}; "
            f"{_AGAIN}"
        )
    if not borders or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{path}: the documents do not cover the {sequences:,} sequences one after the other; {_AGAIN}")
    return Index(dtype, lengths, documents, modes)


_BLOCK = 1 << 20


def write_index(
    file: IO[bytes],
    dtype: np.dtype[Any],
    counts: tuple[int, int],
    lengths: Iterable[NDArray[np.int32]],
    again: Iterable[NDArray[np.int32]],
    documents: Iterable[NDArray[np.int64]],
) -> None:
    """Writes an index as a stream.

    Args:
        file: a new file.
        dtype: of the tokens.
        counts: sequences, documents.
        lengths: the lengths of all sequences, in blocks.
        again: the same once more.
        documents: the first sequence of each document, in blocks.
    """
    code = next(code for code, kind in _CODES.items() if np.dtype(kind) == dtype)
    sequences, number = counts
    file.write(_HEADER.pack(MAGIC, 1, code, sequences, number + 1))
    for block in lengths:
        file.write(np.ascontiguousarray(block, "<i4").data)
    end = 0
    for block in again:
        ends = end + np.cumsum(block, dtype=np.int64) * dtype.itemsize
        starts = np.concatenate([[end], ends[:-1]])[: len(block)]
        file.write(starts.astype("<i8").data)
        end = int(ends[-1]) if len(ends) else end
    for first in documents:
        file.write(np.ascontiguousarray(first, "<i8").data)
    file.write(struct.pack("<q", sequences))
