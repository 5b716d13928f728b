"""KnowLM's own store (pretrain/preprocess.py): `.bin .idx .dis .tmp`, read and written byte for byte.

.bin  u16 tokens of all samples, back to back
.idx  u64 first token of each sample [N], then u16 length of each [N]; no header
.dis  torch.save of a list: samples of each type of data
.tmp  torch.save of a list: samples with bos only, with eos only, with neither, with both
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.store.megatron import Index
from jaxlm.data.store.torch_numbers import read_numbers, write_numbers
from jaxlm.errors import UserError

_ROW = 10  # bytes of a sample in the index
_MOST = 1 << 16
_AGAIN = "copy the .bin and the .idx again, both of one store"


def read_index(path: Path) -> Index:
    """The index of a `.idx`, checked against the `.bin` and, where there is one, the `.dis` beside it.

    Raises:
        UserError: the files are cut short or do not belong together; the message says what differs.
    """
    tokens = path.with_suffix(".bin")
    if not tokens.is_file():
        raise UserError(f"{path}: {tokens.name} is missing beside it; {_AGAIN}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the index is empty; {_AGAIN}")
    with path.open("rb") as file:
        index = parse_index(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path, tokens.stat().st_size)
    types = path.with_suffix(".dis")
    if types.is_file() and sum(numbers := read_numbers(types)) != len(index.lengths):
        raise UserError(
            f"{types}: counts {sum(numbers):,} samples, the index beside it has {len(index.lengths):,}; copy the files "
            "again, all of one store"
        )
    return index


def parse_index(content: bytes | mmap.mmap, path: Path, bin_size: int) -> Index:
    """As `read_index`, for the content of an index and the size of its `.bin` in bytes."""
    count, rest = divmod(len(content), _ROW)
    if rest:
        raise UserError(f"{path}: {len(content):,} bytes are not a number of entries of {_ROW} bytes; {_AGAIN}")
    starts = np.frombuffer(content, "<u8", count)
    lengths = np.frombuffer(content, "<u2", count, 8 * count).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.uint64)
    expected = np.concatenate([np.zeros(1, np.uint64), ends])
    wrong = np.flatnonzero(starts != expected[:-1])
    if len(wrong):
        number = int(wrong[0])
        raise UserError(
            f"{path}: sample {number:,} begins at token {int(starts[number]):,}, but those before it end at token "
            f"{int(expected[number]):,}; {_AGAIN}"
        )
    if 2 * int(expected[-1]) != bin_size:
        raise UserError(
            f"{path}: the index describes {2 * int(expected[-1]):,} bytes of tokens, "
            f"{path.with_suffix('.bin').name} has {bin_size:,}; {_AGAIN}"
        )
    return Index(np.dtype(np.uint16), lengths, np.arange(count + 1, dtype=np.int64))


def write_store(
    prefix: Path,
    samples: Iterable[tuple[int, NDArray[np.integer]]],
    bos_id: int | None,
    eos_id: int | None,
) -> None:
    """Writes the four files of a store.

    Args:
        prefix: their path without the ending.
        samples: the type of data (0, 1, …, rising, without a gap) and the ids [length] of each.
        bos_id: for the counts of the `.tmp`.
        eos_id: for the counts of the `.tmp`.

    Raises:
        UserError: a sample or an id that does not fit 16 bits.
    """
    lengths: list[int] = []
    of_type: list[int] = []
    ends = [0, 0, 0, 0]
    with prefix.with_suffix(".bin").open("wb") as file:
        for number, (kind, ids) in enumerate(samples):
            if len(ids) >= _MOST or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < _MOST):
                raise UserError(
                    f"{prefix}: sample {number:,} has {len(ids):,} tokens and ids up to {int(ids.max()):,}; KnowLM's "
                    f"store holds both in 16 bits, less than {_MOST:,}; write Megatron's instead"
                )
            assert kind in (len(of_type), len(of_type) - 1)
            of_type += [0] * (kind + 1 - len(of_type))
            of_type[kind] += 1
            lengths.append(len(ids))
            first = len(ids) > 0 and ids[0] == bos_id
            last = len(ids) > 0 and ids[-1] == eos_id
            ends[3 if first and last else 0 if first else 1 if last else 2] += 1
            file.write(ids.astype("<u2").data)
    _write_index(prefix.with_suffix(".idx"), lengths)
    write_numbers(prefix.with_suffix(".dis"), of_type)
    write_numbers(prefix.with_suffix(".tmp"), ends)


def _write_index(path: Path, lengths: Sequence[int]) -> None:
    sizes = np.array(lengths, np.uint64)
    path.write_bytes((np.cumsum(sizes) - sizes).astype("<u8").tobytes() + sizes.astype("<u2").tobytes())
