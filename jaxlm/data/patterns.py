"""Packing by lengths: rows of many documents are decided at once, by how many documents there are of each length.

What is decided is a pattern, e.g. "a document of 900 tokens, one of 700 and eight of 56", and the number of rows that
have it. The number of rows of an epoch follows from the numbers of documents by length: it is known without a plan.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import PackedPlan, Shuffled, index_dtype

# A set of so few documents has hardly two of a length, and the best rows would be the same in every epoch. It is packed
# by lengths that are out of order by up to this share, as much as the rows allow.
SMALL = 100_000
DISORDER = (0.5, 0.2, 0.05, 0.0)


@dataclass(frozen=True)
class Pattern:
    """Rows alike.

    Args:
        rows: the number of such rows.
        members: (length, the number of documents of that length) in such a row, in the order in which they were put in.
    """

    rows: int
    members: tuple[tuple[int, int], ...]


def num_rows(counts: NDArray[np.int64], capacity: int) -> int:
    """The number of rows that documents are packed into.

    Args:
        counts: int64 [lengths]: the number of documents of each length.
        capacity: tokens of a row.
    """
    documents = int(counts.sum())
    rows = sum(pattern.rows for pattern in best_fit(counts, capacity))
    return min(documents, rows + rows // 400) if documents <= SMALL else rows


def pack(
    documents: NDArray[np.integer],
    lengths: NDArray[np.integer],
    offsets: NDArray[np.int64],
    capacity: int,
    random: np.random.Generator,
    rows: int | None = None,
) -> Shuffled:
    """Rows of whole documents, in random order; which documents of a length are in which row is random too.

    Args:
        documents: int32 or int64 [documents], by number; each goes into one row.
        lengths: tokens of every document there is, by its number; uint16 is sorted fastest.
        offsets: int64, of every document there is.
        capacity: tokens of a row; no document may be longer.
        random: what is drawn from.
        rows: `num_rows` of these documents, where it is known.
    """
    documents = random.permutation(documents)
    sizes = lengths[documents]
    documents = documents[np.argsort(sizes, kind="stable")]
    counts = np.bincount(sizes, minlength=1).astype(np.int64)
    rows = num_rows(counts, capacity) if rows is None else rows
    placed, ends = _place(_patterns(counts, capacity, random, rows), documents, counts)
    return Shuffled(PackedPlan(placed, ends, offsets), random.permutation(np.arange(rows, dtype=index_dtype(rows))))


def _patterns(counts: NDArray[np.int64], capacity: int, random: np.random.Generator, rows: int) -> list[Pattern]:
    """Patterns of `rows` rows in all."""
    if counts.sum() > SMALL:
        return best_fit(counts, capacity)
    lengths = np.flatnonzero(counts)
    shares = random.random(len(lengths))
    for disorder in DISORDER:
        patterns = best_fit(counts, capacity, lengths[np.argsort(lengths * (disorder * shares - 1), kind="stable")])
        missing = rows - sum(pattern.rows for pattern in patterns)
        if missing >= 0:
            return _torn(patterns, missing)
    raise AssertionError("in order, lengths need no more rows than num_rows says")


def best_fit(counts: NDArray[np.int64], capacity: int, lengths: NDArray[np.integer] | None = None) -> list[Pattern]:
    """Best-fit decreasing: each document, the longest first, goes into the row with the least space that has room.

    A row that took a document of a length is also the best one for the next of that length, so that rows are filled one
    by one, and many rows with the same space are filled alike in one go. The time depends on the number of different
    lengths, not on that of documents.

    Args:
        counts: int64 [lengths]: the number of documents of each length.
        capacity: tokens of a row.
        lengths: those that occur, in the order in which they are to be put in; None: the longest first.
    """
    occurring = np.flatnonzero(counts)
    if not len(occurring):
        return []
    if occurring[-1] > capacity:
        raise AssertionError("a record is longer than a row")
    smallest = max(1, int(occurring[0]))
    done: list[Pattern] = []
    spaces: list[int] = []  # sorted; of rows that may still take a document
    rows_with: dict[int, list[Pattern]] = {}

    def put(space: int, rows: int, members: tuple[tuple[int, int], ...]) -> None:
        if rows == 0:
            return
        pattern = Pattern(rows, members)
        if space < smallest:
            done.append(pattern)
        elif space in rows_with:
            rows_with[space].append(pattern)
        else:
            rows_with[space] = [pattern]
            bisect.insort(spaces, space)

    for length in (occurring[::-1] if lengths is None else lengths).tolist():
        left = int(counts[length])
        while left:
            best = bisect.bisect_left(spaces, length)
            if best == len(spaces):
                space, each = capacity, capacity // length if length else left
                pattern = Pattern(-(-left // each), ())
            else:
                space = spaces[best]
                each = space // length if length else left
                pattern = rows_with[space].pop()
                if not rows_with[space]:
                    del rows_with[space], spaces[best]
            full = min(pattern.rows, left // each)
            rest = min(left - full * each, each - 1) if full < pattern.rows else 0
            put(space - each * length, full, (*pattern.members, (length, each)))
            put(space - rest * length, min(rest, 1), (*pattern.members, (length, rest)))
            put(space, pattern.rows - full - min(rest, 1), pattern.members)
            left -= full * each + rest
    return [*done, *itertools.chain.from_iterable(rows_with.values())]


def _torn(patterns: list[Pattern], missing: int) -> list[Pattern]:
    """The same documents in `missing` rows more: a document of some rows gets a row of its own."""
    result: list[Pattern] = []
    for pattern in patterns:
        length, count = pattern.members[-1]
        torn = min(pattern.rows, missing) if len(pattern.members) > 1 or count > 1 else 0
        missing -= torn
        if torn:
            last = ((length, count - 1),) if count > 1 else ()
            result += [Pattern(torn, (*pattern.members[:-1], *last)), Pattern(torn, ((length, 1),))]
        if pattern.rows > torn:
            result.append(Pattern(pattern.rows - torn, pattern.members))
    # What was torn may be torn again, down to rows of one document.
    return _torn(result, missing) if missing else result


def _place(
    patterns: list[Pattern], documents: NDArray[np.integer], counts: NDArray[np.int64]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Documents of each length into the rows of the patterns: `documents` and `rows` of a PackedPlan.

    Args:
        patterns: rows for exactly these documents.
        documents: sorted by length.
        counts: int64 [lengths]: the number of documents of each length.
    """
    placed = np.empty_like(documents)
    next_of = np.cumsum(counts) - counts  # of each length, the next document
    at = 0
    sizes = np.array([sum(count for _, count in pattern.members) for pattern in patterns], np.int64)
    rows = np.array([pattern.rows for pattern in patterns], np.int64)
    for pattern, size in zip(patterns, sizes.tolist(), strict=True):
        table = placed[at : at + pattern.rows * size].reshape(pattern.rows, size)
        at += table.size
        column = 0
        for length, count in pattern.members:
            first, number = int(next_of[length]), pattern.rows * count
            table[:, column : column + count] = documents[first : first + number].reshape(pattern.rows, count)
            next_of[length] += number
            column += count
    ends = np.concatenate([[0], np.cumsum(np.repeat(sizes, rows))])
    return placed, ends.astype(index_dtype(len(documents)))
