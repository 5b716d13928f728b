"""Which tokens go into which row of an epoch. All of it is arithmetic on lengths; no token is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

GROUP_BATCH = 1000  # documents that HF's run_clm concatenates at a time (the batch size of datasets.map)
SLAB = 200 * GROUP_BATCH  # documents at a time: their arrays stay in the processor's cache
WINDOW = 64  # rows kept open by first_fit


@dataclass(frozen=True)
class Pieces:
    """What some rows consist of, piece by piece; a piece is a stretch of the flat token array.

    Args:
        counts: int64 [rows], the number of pieces of each row.
        starts: int64 [pieces], where a piece begins in the flat array.
        lengths: int64 [pieces].
        one_segment: the pieces of a row are one running text; otherwise each is a document of its own.
        encoder_starts, encoder_lengths: int64 [pieces], what an encoder reads for each; None for a decoder alone.
    """

    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    one_segment: bool
    encoder_starts: NDArray[np.int64] | None = None
    encoder_lengths: NDArray[np.int64] | None = None


class Rows(Protocol):
    """The rows of a pass over the data."""

    def __len__(self) -> int: ...

    def pieces(self, rows: NDArray[np.integer]) -> Pieces:
        """What the rows of these numbers consist of, in this order."""


@dataclass(frozen=True)
class Plan:
    """Rows of pieces, written out.

    Args:
        starts: int64 [pieces], where a piece begins in the flat array.
        lengths: int64 [pieces].
        rows: int64 [rows + 1]: row r has the pieces [rows[r], rows[r + 1]).
        one_segment: the pieces of a row are one running text; otherwise each is a document of its own.
        encoder_starts, encoder_lengths: int64 [pieces], what an encoder reads for each; None for a decoder alone.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    one_segment: bool
    encoder_starts: NDArray[np.int64] | None = None
    encoder_lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def padding(self, sequence_length: int) -> float:
        """The share of all places in the rows that stays empty."""
        return 1.0 - self.tokens / (len(self) * sequence_length) if len(self) else 0.0

    def permuted(self, order: NDArray[np.int64]) -> Plan:
        """The same rows in another order."""
        pieces = self.pieces(order)
        rows = np.concatenate([[0], np.cumsum(pieces.counts)]).astype(np.int64)
        return Plan(pieces.starts, pieces.lengths, rows, self.one_segment)

    def pieces(self, rows: NDArray[np.integer]) -> Pieces:
        """What the rows of these numbers consist of, in this order."""
        counts, at = _ranges(self.rows, rows)
        encoder = (None if part is None else part[at] for part in (self.encoder_starts, self.encoder_lengths))
        return Pieces(counts, self.starts[at], self.lengths[at], self.one_segment, *encoder)


@dataclass(frozen=True)
class Shuffled:
    """Rows in another order: row r is row order[r] of `rows`."""

    rows: Rows
    order: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.order)

    def pieces(self, rows: NDArray[np.integer]) -> Pieces:
        """What the rows of these numbers consist of, in this order."""
        return self.rows.pieces(self.order[rows])


@dataclass(frozen=True)
class PackedPlan:
    """Rows of whole documents, by their numbers: a quarter of a Plan's memory.

    Args:
        documents: int32 or int64 [pieces].
        rows: int32 or int64 [rows + 1]: row r has the pieces [rows[r], rows[r + 1]).
        offsets: int64 [documents + 1], the documents in the flat token array.
    """

    documents: NDArray[np.integer]
    rows: NDArray[np.integer]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows) - 1

    def pieces(self, rows: NDArray[np.integer]) -> Pieces:
        """What the rows of these numbers consist of, in this order."""
        counts, at = _ranges(self.rows, rows)
        documents = self.documents[at]
        starts = np.asarray(self.offsets[documents], np.int64)
        return Pieces(counts, starts, self.offsets[documents + 1] - starts, False)


def written_out(rows: Rows) -> Plan:
    """All of the rows as a Plan."""
    pieces = rows.pieces(np.arange(len(rows)))
    ends = np.concatenate([[0], np.cumsum(pieces.counts)]).astype(np.int64)
    return Plan(pieces.starts, pieces.lengths, ends, pieces.one_segment, pieces.encoder_starts, pieces.encoder_lengths)


def _ranges(ends: NDArray[np.integer], rows: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the number of pieces of each row, the places of all these pieces)."""
    first = ends[rows].astype(np.int64)
    counts = ends[rows + 1] - first
    before = np.cumsum(counts) - counts
    return counts, np.repeat(first - before, counts) + np.arange(counts.sum())


def plan_rows(
    mode: str,
    offsets: NDArray[np.int64],
    order: NDArray[np.integer],
    sequence_length: int,
    seed: int,
    epoch: int,
    encoder: tuple[NDArray[np.int64], int] | None = None,
) -> Plan:
    """The rows of an epoch, as all versions plan validation rows, and version 1 of packing planned all.

    Args:
        mode: first_fit, group_texts or none.
        offsets: int64 [records + 1], the records in the flat token array.
        order: the records of this epoch; group_texts runs them together in this order, the others shuffle them.
        sequence_length: T, tokens of a row. Under first_fit and none no record may be longer.
        seed: the order of rows is a function of seed and epoch only.
        epoch: see seed.
        encoder: the offsets of what an encoder reads for each record, and the tokens of a row of it.
    """
    random = np.random.default_rng([seed, epoch, 0])
    if mode == "group_texts":
        plan = group_texts(offsets, order, sequence_length)
        return plan.permuted(random.permutation(len(plan)))
    order = random.permutation(order)
    starts = offsets[order]
    lengths = offsets[order + 1] - starts
    if len(lengths) and int(lengths.max()) > sequence_length:
        raise AssertionError("a record is longer than a row")
    of_encoder = None
    if encoder is not None:
        of_encoder = encoder[0][order], encoder[0][order + 1] - encoder[0][order]
        if len(order) and int(of_encoder[1].max()) > encoder[1]:
            raise AssertionError("a record is longer than a row of the encoder")
    if mode == "none":
        return Plan(starts, lengths, np.arange(len(order) + 1, dtype=np.int64), False, *(of_encoder or ()))
    if encoder is None or of_encoder is None:
        members = first_fit(lengths.tolist(), sequence_length)
    else:
        members = first_fit_pairs(np.stack([lengths, of_encoder[1]], 1).tolist(), (sequence_length, encoder[1]))
    flat = np.array([index for row in members for index in row], np.int64)
    rows = np.cumsum([0, *(len(row) for row in members)]).astype(np.int64)
    return Plan(starts[flat], lengths[flat], rows, False, *(part[flat] for part in of_encoder or ()))


def first_fit(lengths: Sequence[int], capacity: int, window: int = WINDOW) -> list[list[int]]:
    """Puts each item into the first open row with room for it.

    At most `window` rows are open, which bounds the time; beyond that the fullest is closed.

    Returns:
        For each row, in the order in which they were begun, the indices of its items.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []
    space: list[int] = []
    smallest = min(lengths, default=0)
    for index, length in enumerate(lengths):
        k = next((k for k, left in enumerate(space) if left >= length), len(space))
        if k == len(space):
            if k == window:
                fullest = min(range(window), key=space.__getitem__)
                del open_rows[fullest], space[fullest]
                k -= 1
            rows.append([])
            open_rows.append(rows[-1])
            space.append(capacity)
        open_rows[k].append(index)
        space[k] -= length
        if space[k] < smallest:
            del open_rows[k], space[k]
    return rows


def first_fit_pairs(
    lengths: Sequence[Sequence[int]], capacity: tuple[int, int], window: int = WINDOW
) -> list[list[int]]:
    """As `first_fit`, for items of two lengths each, which both must fit."""
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], list[int]]] = []  # the items, and the space left for each length
    smallest = [min(each) for each in zip(*lengths, strict=True)] if lengths else []
    for index, pair in enumerate(lengths):
        k = next((k for k, (_, left) in enumerate(open_rows) if left[0] >= pair[0] and left[1] >= pair[1]), None)
        if k is None:
            if len(open_rows) == window:
                share = [min(left[0] / capacity[0], left[1] / capacity[1]) for _, left in open_rows]
                del open_rows[min(range(window), key=share.__getitem__)]
            rows.append([])
            open_rows.append((rows[-1], list(capacity)))
            k = len(open_rows) - 1
        members, left = open_rows[k]
        members.append(index)
        left[:] = left[0] - pair[0], left[1] - pair[1]
        if left[0] < smallest[0] or left[1] < smallest[1]:
            del open_rows[k]
    return rows


def group_texts(offsets: NDArray[np.int64], order: NDArray[np.integer], block: int) -> Plan:
    """HF run_clm's rows: 1000 documents are joined and cut in blocks, and what is left over is dropped.

    As there, 1000 documents that together are shorter than a block are kept as one short row.

    Args:
        offsets: int64 [documents + 1], the documents in the flat token array.
        order: documents, by number.
        block: tokens of a row.
    """
    parts = [_grouped(offsets, order[at : at + SLAB], block) for at in range(0, len(order), SLAB)]
    if not parts:
        nothing = np.zeros(0, np.int64)
        return Plan(nothing, nothing, np.zeros(1, np.int64), True)
    pieces = np.cumsum([0, *(len(part.starts) for part in parts)])
    return Plan(
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([[0], *(part.rows[1:] + before for part, before in zip(parts, pieces, strict=False))]),
        True,
    )


def _grouped(offsets: NDArray[np.int64], order: NDArray[np.integer], block: int) -> Plan:
    """`group_texts` of some thousands of documents."""
    lengths = offsets[order + 1] - offsets[order]
    totals = _group_totals(lengths)
    used = _used(totals, block)
    group = np.arange(len(order)) // GROUP_BATCH
    # Places in the text of all groups, without what is left over of each.
    group_start = np.cumsum(used) - used
    in_group = np.cumsum(lengths) - lengths - (np.cumsum(totals) - totals)[group]
    document_starts = group_start[group] + np.minimum(in_group, used[group])
    document_ends = group_start[group] + np.minimum(in_group + lengths, used[group])
    rows_of_group = -(-used // block)
    row = np.arange(rows_of_group.sum()) - np.repeat(np.cumsum(rows_of_group) - rows_of_group, rows_of_group)
    cuts = np.repeat(group_start, rows_of_group) + row * block
    # A piece begins with each document that is not empty, and where a row begins within one.
    document = np.flatnonzero(document_ends > document_starts)
    begins = document_starts[document]
    at = np.searchsorted(begins, cuts)
    within = np.append(begins, -1)[at] != cuts
    document = np.insert(document, at[within], document[at[within] - 1])
    begins = np.insert(begins, at[within], cuts[within])
    starts = offsets[order[document]] + begins - document_starts[document]
    ends = np.append(np.searchsorted(begins, cuts), len(begins)).astype(np.int64)
    return Plan(starts, np.diff(begins, append=used.sum()), ends, True)


def group_texts_rows(lengths: NDArray[np.integer], block: int) -> int:
    """The number of rows of `group_texts`, for documents of these lengths."""
    return int((-(-_used(_group_totals(lengths), block) // block)).sum())


def _group_totals(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Tokens of each thousand of documents."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    return np.add.reduceat(lengths, np.arange(0, len(lengths), GROUP_BATCH), dtype=np.int64)


def _used(totals: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    return np.where(totals >= block, totals // block * block, totals)


def epoch_order(source: NDArray[np.int32], weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.integer]:
    """Indices of the examples seen in an epoch, in source order.

    A weight of 2.5 means every example twice, and half of them, drawn anew each epoch, once more.

    Args:
        source: int32 [examples], which source each example came from.
        weights: by source.
        seed: the drawing is a function of seed, epoch and source only.
        epoch: see seed.
    """
    dtype = index_dtype(len(source))
    # Examples stand in the order of their sources, as they were read.
    borders = np.searchsorted(source, np.arange(len(weights) + 1))
    parts = [np.zeros(0, dtype)]
    for number, weight in enumerate(weights):
        start, stop = int(borders[number]), int(borders[number + 1])
        whole, extra = int(weight), round((weight - int(weight)) * (stop - start))
        parts += [np.arange(start, stop, dtype=dtype)] * whole
        if extra:
            random = np.random.default_rng([seed, epoch, number, 1])
            drawn = np.zeros(stop - start, np.bool_)
            drawn[random.choice(stop - start, extra, replace=False)] = True
            parts.append((np.flatnonzero(drawn) + start).astype(dtype))
    return np.concatenate(parts)


def index_dtype(count: int) -> type[np.int32] | type[np.int64]:
    """The smaller dtype that holds the numbers of this many things."""
    return np.int32 if count < 2**31 else np.int64
