"""Records for validation, drawn from the training sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlm.data.examples import Examples
from jaxlm.data.report import SourceReport
from jaxlm.errors import UserError


def split_off(examples: Examples, count: int | float, seed: int) -> tuple[Examples, Examples]:
    """(the rest, records drawn at random): training and validation data. A record is not torn apart.

    Args:
        examples: all of them.
        count: the number of records to draw, or a share of them between 0 and 1 (at least one record).
        seed: of the drawing.

    Raises:
        UserError: when nothing would be left.
    """
    records = np.unique(examples.record)
    asked = count
    if isinstance(count, float):
        count = max(1, round(count * len(records)))
    if count >= len(records):
        raise UserError(
            f"data.validation is {asked}, but there are only {len(records)} records; choose a smaller number, or a "
            "share of them, e.g. data.validation: 0.1"
        )
    drawn = records[np.random.default_rng([seed, 2]).permutation(len(records))[:count]]
    held_out = np.isin(examples.record, drawn)
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))


def count_split(
    reports: Sequence[SourceReport], train: Examples, validation: Examples
) -> tuple[tuple[SourceReport, ...], tuple[SourceReport, ...]]:
    """The sources' reports after a split: for training, where what was cut and dropped stays, and for validation."""

    def counted(number: int, report: SourceReport, part: Examples) -> SourceReport:
        mine = part.source == number
        trained_before = np.concatenate([[0], np.cumsum(part.loss_mask)])
        trained = np.diff(trained_before[part.offsets])
        return dataclasses.replace(
            report,
            records=len(np.unique(part.record[mine])),
            tokens=int(part.lengths[mine].sum()),
            trained_tokens=int(trained[mine].sum()),
        )

    clean = [SourceReport(report.path, report.template, report.why) for report in reports]
    return (
        tuple(counted(number, report, train) for number, report in enumerate(reports)),
        tuple(counted(number, report, validation) for number, report in enumerate(clean)),
    )
