"""Records for validation, drawn from the training sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.report import SourceReport
from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError

_BLOCK = 1 << 16  # examples whose masks are counted at a time


def drawn_examples(examples: Tokens, count: int | float, seed: int) -> NDArray[np.bool_]:
    """bool [examples]: those of records drawn at random, for validation. A record is not torn apart.

    Args:
        examples: all of them.
        count: the number of records to draw, or a share of them between 0 and 1 (at least one record).
        seed: of the drawing.

    Raises:
        UserError: when nothing would be left.
    """
    records, numbers = np.unique(examples.record, return_inverse=True)
    asked = count
    if isinstance(count, float):
        count = max(1, round(count * len(records)))
    if count >= len(records):
        raise UserError(
            f"data.validation is {asked}, but there are only {len(records)} records; choose a smaller number, or a "
            "share of them, e.g. data.validation: 0.1"
        )
    drawn = np.zeros(len(records), np.bool_)
    drawn[np.random.default_rng([seed, 2]).permutation(len(records))[:count]] = True
    return drawn[numbers]


def count_split(
    reports: Sequence[SourceReport], examples: Tokens, held_out: NDArray[np.bool_]
) -> tuple[tuple[SourceReport, ...], tuple[SourceReport, ...]]:
    """The sources' reports after a split: for training, where what was cut and dropped stays, and for validation."""
    trained = _trained(examples)
    lengths, source, record = examples.lengths, np.asarray(examples.source), examples.record

    def counted(number: int, report: SourceReport, part: NDArray[np.bool_]) -> SourceReport:
        mine = part & (source == number)
        return dataclasses.replace(
            report,
            records=len(np.unique(record[mine])),
            tokens=int(lengths[mine].sum()),
            trained_tokens=int(trained[mine].sum()),
        )

    clean = [SourceReport(report.path, report.template, report.why) for report in reports]
    return (
        tuple(counted(number, report, ~held_out) for number, report in enumerate(reports)),
        tuple(counted(number, report, held_out) for number, report in enumerate(clean)),
    )


def _trained(examples: Tokens) -> NDArray[np.int64]:
    """int64 [examples]: targets of each, counted in blocks, as masks may be larger than memory."""
    counts = [np.zeros(0, np.int64)]
    for first in range(0, len(examples), _BLOCK):
        offsets = np.asarray(examples.offsets[first : first + _BLOCK + 1])
        mask = examples.loss_mask[offsets[0] : offsets[-1]]
        before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        counts.append(np.diff(before[offsets - offsets[0]]))
        examples.release()
    return np.concatenate(counts)
