"""Tokens as they come from a source, in chunks of bounded size: what examples in memory and stores are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.encoding import Example
from jaxlm.data.report import SourceReport


class Tokens(Protocol):
    """Many examples, flat, wherever they lie: `Examples` in memory, `StoredTokens` in a store's mapped files.

    Attributes are those of `Examples`; ids may have another integer type.
    """

    @property
    def input_ids(self) -> NDArray[Any]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...
    @property
    def source(self) -> NDArray[np.int32]: ...
    @property
    def record(self) -> NDArray[np.int64]: ...
    @property
    def encoder_ids(self) -> NDArray[Any] | None: ...
    @property
    def encoder_offsets(self) -> NDArray[np.int64] | None: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def digest(self) -> str: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Chunk:
    """Examples of one source, flat, in order.

    Args:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens].
        lengths: int32 [examples].
        begins: bool [examples]: the example is the first of its record; the pieces of a long document share one.
        report: what became of the records.
        encoder_ids: int32 [tokens of encoders]; None for a decoder alone.
        encoder_lengths: int32 [examples]; None for a decoder alone.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    begins: NDArray[np.bool_]
    report: SourceReport
    encoder_ids: NDArray[np.int32] | None = None
    encoder_lengths: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.lengths)


def chunk_of(pieces: Sequence[Sequence[Example]], report: SourceReport, with_encoder: bool) -> Chunk:
    """The pieces of each record, one record after the other, as one chunk."""
    examples = [example for record in pieces for example in record]
    ids = [example.input_ids for example in examples]
    begins = np.array([number == 0 for record in pieces for number in range(len(record))], np.bool_)
    sources = [example.encoder_ids for example in examples if example.encoder_ids is not None]
    return Chunk(
        np.concatenate([np.zeros(0, np.int32), *ids]),
        np.concatenate([np.zeros(0, np.bool_), *(example.loss_mask for example in examples)]),
        np.array([len(each) for each in ids], np.int32),
        begins,
        report,
        np.concatenate([np.zeros(0, np.int32), *sources]) if with_encoder else None,
        np.array([len(each) for each in sources], np.int32) if with_encoder else None,
    )


def merged(first: SourceReport, second: SourceReport) -> SourceReport:
    """The counts of two stretches of one source, added up."""
    values = {}
    for field in dataclasses.fields(SourceReport):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        if isinstance(mine, frozenset):
            values[field.name] = mine | theirs
        elif isinstance(mine, dict):
            values[field.name] = mine | {name: mine.get(name, 0) + count for name, count in theirs.items()}
        elif isinstance(mine, int):
            values[field.name] = mine + theirs
    return dataclasses.replace(first, **values)


def add_report(reports: list[SourceReport], number: int, report: SourceReport) -> None:
    """Adds the counts of a stretch of source `number`; sources come in order."""
    if number == len(reports):
        reports.append(report)
    else:
        reports[number] = merged(reports[number], report)
