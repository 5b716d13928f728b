"""Which rows a step takes: a function of (data, seed, step)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import Rows
from jaxlm.data.planner import Planner, Plans
from jaxlm.errors import UserError


@dataclass(frozen=True)
class Share:
    """Some rows of a step's batch, of one pass.

    Args:
        rows: of the pass.
        numbers: int64 [n], which of them.
        places: int64 [n], their places among all rows of the batch.
    """

    rows: Rows
    numbers: NDArray[np.int64]
    places: NDArray[np.int64]


class Order(Protocol):
    """The rows of a run, step by step."""

    def __len__(self) -> int:
        """Steps of the run."""

    def shares(self, step: int) -> list[Share]:
        """The rows of a step; what they leave of the batch is empty."""

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""

    def passes(self, step: int) -> list[float]:
        """Passes over each source after `step` steps, as they are planned."""

    def counters(self, step: int) -> dict[str, Any]:
        """Where `step` steps lead to, as plain values to be kept: a later start on the same data is given them."""

    def steps_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        """The number of steps of a run of `epochs` passes over these data; `known`: as `counters` gave them."""


class EpochOrder:
    """One pass after the other, each over all sources by their weights; a batch may hold rows of two.

    A run by epochs fills its last batch with empty rows.

    Args:
        planner: the passes.
        batch: rows of a step.
        epochs: length of the run, fractions allowed; ignored when steps is given.
        steps: length of the run.
        known: what `counters` said of an earlier start on the same data: the passes before need no plan.
    """

    def __init__(
        self,
        planner: Planner,
        batch: int,
        epochs: float = 1.0,
        steps: int | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self._planner, self._plans = planner, Plans(planner)
        self._batch = batch
        # (pass, rows of all passes up to and with it), rising, of some passes. The read-ahead thread adds to it too.
        # Not used where all passes have the same number of rows.
        self._ends: list[tuple[int, int]] = [(-1, 0)]
        known = known or {}
        if known.get("epoch"):
            self._ends.append((int(known["epoch"]) - 1, int(known["rows_before"])))
        self._epochs = epochs
        self._total = self._rows_of(epochs, known) if steps is None else None
        self._steps: int = math.ceil((self._total or 0) / batch) if steps is None else steps
        if steps is not None and planner.most and max(planner.most) < math.inf:
            self._epoch_of(steps * batch - 1)  # says so if there are not that many

    def __len__(self) -> int:
        return self._steps

    @property
    def total_rows(self) -> int | None:
        """Rows of a run by epochs; None for a run by steps."""
        return self._total

    def _rows_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        if known.get("epochs") == epochs:
            return int(known["total_rows"])
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self._size(whole)) if epochs > whole else 0
        return self._end(whole - 1) + part

    def steps_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        """See `Order`."""
        return math.ceil(self._rows_of(epochs, known) / self._batch)

    def _row(self, step: int) -> int:
        row = step * self._batch
        return row if self._total is None else min(row, self._total)

    def epoch(self, step: int) -> float:
        """See `Order`."""
        row = self._row(step)
        if row == 0:
            return 0.0
        number = self._epoch_of(row - 1)  # the last row's: after it there may be no further pass
        return number + (row - self._end(number - 1)) / self._size(number)

    def passes(self, step: int) -> list[float]:
        """See `Order`."""
        passes = [weight * self.epoch(step) for weight in self._planner.weights]
        most = self._planner.most
        return [min(each, limit) for each, limit in zip(passes, most, strict=True)] if most else passes

    def counters(self, step: int) -> dict[str, Any]:
        """See `Order`. The number of rows of a pass may depend on its order, and a run may have thousands of passes."""
        number = self._epoch_of(max(0, self._row(step) - 1))
        counters: dict[str, Any] = {"epoch": number, "rows_before": self._end(number - 1)}
        return counters if self._total is None else counters | {"epochs": self._epochs, "total_rows": self._total}

    def shares(self, step: int) -> list[Share]:
        """See `Order`."""
        first = row = step * self._batch
        stop, last = self._row(step + 1), self._row(self._steps)
        shares = []
        while row < stop:
            number = self._epoch_of(row)
            before, end = self._end(number - 1), self._end(number)
            rows = np.arange(row, min(stop, end))
            shares.append(Share(self._plans.get(number, then_next=end < last), rows - before, rows - first))
            row = int(rows[-1]) + 1
        return shares

    def _epoch_of(self, row: int) -> int:
        """The pass that a row is in."""
        if (size := self._planner.constant_size) is not None:
            return row // self._checked(size, 0)
        before, _ = self._ends[bisect.bisect_right(self._ends, row, key=lambda end: end[1]) - 1]
        number = before + 1
        while self._end(number) <= row:
            number += 1
        return number

    def _size(self, number: int) -> int:
        return self._end(number) - self._end(number - 1)

    def _end(self, number: int) -> int:
        """Rows of the passes 0 … number; 0 for -1."""
        if (size := self._planner.constant_size) is not None:
            return (number + 1) * self._checked(size, 0)
        at, end = self._ends[bisect.bisect_right(self._ends, number, key=lambda end: end[0]) - 1]
        while at < number:
            at += 1
            end += self._checked(self._planner.size(at), at)
            bisect.insort(self._ends, (at, end))
        return end

    def _checked(self, size: int, number: int) -> int:
        if size:
            return size
        if number and self._planner.most:
            rows = self._end(number - 1)
            raise UserError(
                f"data.train: every source has been seen as often as its max_passes allows after {number} epochs, "
                f"{rows // self._batch} steps; set train.epochs or train.steps to no more, or raise max_passes"
            )
        raise UserError("data: an epoch has no rows; raise the sources' weights, or give more data")


class BatchOrder:
    """Every batch has the same number of rows of each source; each source is passed over by itself, time and again.

    All rows of a source are seen before any is seen again, but for those that `last_rows: drop` leaves out of a pass.

    Args:
        planners: of each source.
        names: of the sources, for messages.
        per_batch: rows of each source in a step.
        drop: leave the rows of a pass out that do not fill a step's share; otherwise the next pass fills it up.
        longest: an epoch ends with the longest source, and not with the shortest.
        epochs: length of the run, fractions allowed; ignored when steps is given.
        steps: length of the run.
        most: how often each source may be seen in the run; empty: without end.
    """

    def __init__(
        self,
        planners: Sequence[Planner],
        names: Sequence[str],
        per_batch: Sequence[int],
        drop: bool,
        longest: bool,
        epochs: float = 1.0,
        steps: int | None = None,
        most: Sequence[float] = (),
    ) -> None:
        self._plans = [Plans(planner) for planner in planners]
        self._per_batch = tuple(per_batch)
        self._used = []  # rows of a pass
        whole = []
        for number, (planner, rows) in enumerate(zip(planners, per_batch, strict=True)):
            size = planner.size(0)
            if size < rows:
                raise UserError(
                    f"data.mixing.per_batch: {rows} rows of {names[number]} in every batch, but all of it is {size} "
                    f"row{'s' * (size != 1)} of data.sequence_length tokens; ask for {max(size, 1)} at most, or give "
                    "more data"
                )
            self._used.append(size // rows * rows if drop else size)
            whole.append(size // rows if drop else -(-size // rows))
        self._epoch_steps = max(whole) if longest else min(whole)
        self._steps = math.ceil(epochs * self._epoch_steps) if steps is None else steps
        for number, limit in enumerate(most):
            passes = self.passes(self._steps)[number]
            if passes > limit:
                enough = int(limit * self._used[number] / per_batch[number])
                raise UserError(
                    f"data.train: max_passes of {names[number]} is {limit:g}, but {self._steps} steps of "
                    f"{per_batch[number]} rows pass over it {passes:.2f} times; run at most {enough} steps, lower its "
                    "share in data.mixing.per_batch, or raise max_passes"
                )
        # Sources are spread evenly over the batch, so that every micro-step and host has them in about these shares.
        within = np.concatenate([(np.arange(rows) + 0.5) / rows for rows in per_batch])
        source = np.repeat(np.arange(len(per_batch)), per_batch)
        order = np.argsort(within, kind="stable")
        self._places = [np.flatnonzero(source[order] == number) for number in range(len(per_batch))]

    def __len__(self) -> int:
        return self._steps

    @property
    def total_rows(self) -> None:
        """No batch has empty rows."""
        return None

    def epoch(self, step: int) -> float:
        """See `Order`."""
        return step / self._epoch_steps

    def passes(self, step: int) -> list[float]:
        """See `Order`."""
        return [step * rows / used for rows, used in zip(self._per_batch, self._used, strict=True)]

    def counters(self, step: int) -> dict[str, Any]:
        """See `Order`; the step says all."""
        return {}

    def steps_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        """See `Order`."""
        return math.ceil(epochs * self._epoch_steps)

    def shares(self, step: int) -> list[Share]:
        """See `Order`."""
        shares = []
        for plans, rows, used, places in zip(self._plans, self._per_batch, self._used, self._places, strict=True):
            numbers = np.arange(step * rows, (step + 1) * rows)
            for number in range(int(numbers[0]) // used, int(numbers[-1]) // used + 1):
                mine = numbers // used == number
                then_next = (number + 1) * used < self._steps * rows
                shares.append(Share(plans.get(number, then_next), numbers[mine] - number * used, places[mine]))
        return shares
