"""Which tokens go into which row of an epoch. All of it is arithmetic on lengths; no token is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP_BATCH = 1000  # documents that HF's run_clm concatenates at a time (the batch size of datasets.map)
WINDOW = 64  # rows kept open by first_fit


@dataclass(frozen=True)
class Plan:
    """Rows of pieces; a piece is a stretch of the flat token array.

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
        counts = np.diff(self.rows)[order]
        rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        pieces = np.repeat(self.rows[:-1][order] - rows[:-1], counts) + np.arange(rows[-1])
        return Plan(self.starts[pieces], self.lengths[pieces], rows, self.one_segment)


def plan_rows(
    mode: str,
    offsets: NDArray[np.int64],
    order: NDArray[np.int64],
    sequence_length: int,
    seed: int,
    epoch: int,
    encoder: tuple[NDArray[np.int64], int] | None = None,
) -> Plan:
    """The rows of an epoch.

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
    starts, lengths = offsets[:-1][order], np.diff(offsets)[order]
    if len(lengths) and int(lengths.max()) > sequence_length:
        raise AssertionError("a record is longer than a row")
    of_encoder = None
    if encoder is not None:
        of_encoder = encoder[0][:-1][order], np.diff(encoder[0])[order]
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


def group_texts(offsets: NDArray[np.int64], order: NDArray[np.int64], block: int) -> Plan:
    """HF run_clm's rows: 1000 documents are joined and cut in blocks, and what is left over is dropped.

    As there, 1000 documents that together are shorter than a block are kept as one short row.
    """
    starts, lengths, rows = [], [], [np.zeros(1, np.int64)]
    pieces = 0
    for first in range(0, len(order), GROUP_BATCH):
        documents = order[first : first + GROUP_BATCH]
        ends = np.cumsum(np.diff(offsets)[documents])  # in the joined text
        total = int(ends[-1])
        used = total // block * block if total >= block else total
        if used == 0:
            continue
        cuts = np.arange(0, used, block)
        begins = np.union1d(cuts, np.concatenate([[0], ends]))
        begins = begins[begins < used]
        document = np.searchsorted(ends, begins, side="right")
        into = begins - (ends[document] - np.diff(offsets)[documents][document])
        starts.append(offsets[:-1][documents][document] + into)
        lengths.append(np.diff(np.concatenate([begins, [used]])))
        rows.append(pieces + np.append(np.searchsorted(begins, cuts)[1:], len(begins)))
        pieces += len(begins)
    empty = [np.zeros(0, np.int64)]
    return Plan(np.concatenate(starts or empty), np.concatenate(lengths or empty), np.concatenate(rows), True)


def epoch_order(source: NDArray[np.int32], weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.int64]:
    """Indices of the examples seen in an epoch, in source order.

    A weight of 2.5 means every example twice, and half of them, drawn anew each epoch, once more.

    Args:
        source: int32 [examples], which source each example came from.
        weights: by source.
        seed: the drawing is a function of seed, epoch and source only.
        epoch: see seed.
    """
    parts = [np.zeros(0, np.int64)]
    for number, weight in enumerate(weights):
        members = np.flatnonzero(source == number)
        whole = int(weight)
        parts += [members] * whole
        extra = round((weight - whole) * len(members))
        if extra:
            random = np.random.default_rng([seed, epoch, number, 1])
            parts.append(np.sort(random.choice(members, extra, replace=False)))
    return np.concatenate(parts)
