"""More rows for the embedding and the head of a model: the rows of added tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from convert.leaves import (
    BLOCK_ELEMENTS,
    DerivedSource,
    Index,
    LeafInfo,
    ParamSource,
    cast,
    full_index,
    row_blocks,
    stored_blocks,
)
from convert.names import Entry
from jaxlm.errors import UserError

EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
# What a new row can start as.
NEW_ROWS = ("mean", "zero")


class GrownSource(DerivedSource):
    """A model with other rows in its embedding and head from some row on.

    Args:
        first: the first row that is replaced or added.
        rows: leaf ('embed_tokens/embedding', 'lm_head/kernel') -> its new rows [N, D]. Rows of the model beyond them
            stay.
    """

    def __init__(self, source: ParamSource, first: int, rows: Mapping[str, np.ndarray]) -> None:
        super().__init__(source)
        self._first = first
        self._rows = {path: cast(array, source.leaves[path].dtype, path) for path, array in rows.items()}
        assert rows.keys() == vocabulary_leaves(source), rows.keys()
        old = source.config.vocab_size
        assert first <= old, (first, old)
        self._last = first + len(rows[EMBEDDING])
        size = max(old, self._last)
        self.config = dataclasses.replace(source.config, vocab_size=size)
        self.leaves = {
            path: LeafInfo((size, *leaf.shape[1:]), leaf.dtype) if path in rows else leaf
            for path, leaf in source.leaves.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        if path not in self._rows:
            return self._source.read(path, index)
        wanted, columns = full_index(self.leaves[path].shape, index)
        parts = []
        for number, (begin, end) in enumerate(((0, self._first), (self._first, self._last), (self._last, None))):
            # The part of the wanted rows in [begin, end), in the steps that were asked for.
            skipped = max(0, -(-(begin - wanted.start) // wanted.step))
            start = wanted.start + skipped * wanted.step
            stop = wanted.stop if end is None else min(wanted.stop, end)
            if start >= stop:
                continue
            if number == 1:
                here = slice(start - self._first, stop - self._first, wanted.step)
                parts.append(self._rows[path][here, columns])
            else:
                parts.append(self._source.read(path, (slice(start, stop, wanted.step), columns)))
        return np.concatenate(parts) if parts else self._rows[path][:0, columns]

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        if entry.path not in self._rows:
            yield from stored_blocks(self._source, entry)
            return
        for start, stop in row_blocks(entry.layout):
            yield np.ascontiguousarray(self.read(entry.path, (slice(start, stop),)))


def vocabulary_leaves(source: ParamSource) -> set[str]:
    """The leaves with a row for each token: the embedding and, unless it is tied, the head."""
    return {path for path in (EMBEDDING, HEAD) if path in source.leaves}


def mean_row(source: ParamSource, path: str, rows: int) -> np.ndarray:
    """Mean of the first rows of a leaf [V, D] in float32: shape [D].

    Added up in the order in which torch adds on a CPU (four levels of partial sums), so that the mean is the same bit
    by bit: the published Alpaca difference was taken against it. Torch adds columns beyond the last multiple of 64 (in
    each thread's share of them) in another order; there the two may differ in the last bits.
    """
    width = source.leaves[path].shape[1]
    power = max(4, (rows - 1).bit_length() // 4)
    step = 1 << power
    levels = np.zeros((4, width), np.float32)
    done = 0
    for row in _float32_rows(source, path, rows):
        levels[0] += row
        done += 1
        if done % step or done > rows // step * step:
            continue
        for level in range(1, 4):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if done & ((step - 1) << (level * power)):
                break
    for level in range(1, 4):
        levels[0] += levels[level]
    return levels[0] / np.float32(rows)


def _float32_rows(source: ParamSource, path: str, rows: int) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_ELEMENTS // source.leaves[path].shape[1])
    for start in range(0, rows, step):
        yield from source.read(path, (slice(start, min(start + step, rows)),)).astype(np.float32)


def grow(source: ParamSource, vocab_size: int, new_row: str) -> ParamSource:
    """The model with embedding and head of `vocab_size` rows.

    Args:
        new_row: what the rows beyond the model's own are: 'mean' of its rows, or 'zero'.

    Raises:
        UserError: when the model has more rows already.
    """
    old = source.config.vocab_size
    if vocab_size < old:
        raise UserError(f"{source.path}: has {old} rows in its embedding, more than the {vocab_size} wanted")
    rows = {}
    for path in vocabulary_leaves(source):
        width = source.leaves[path].shape[1]
        row = np.zeros(width, np.float32) if new_row == "zero" else mean_row(source, path, old)
        rows[path] = np.broadcast_to(row, (vocab_size - old, width))
    return GrownSource(source, old, rows)
