"""Rows to batches.

A batch is a function of (data, seed, step) alone: it does not depend on the number of workers or hosts, nor on where a
run was resumed. Grain only computes batches ahead of time.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import Plan
from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError
from jaxlm.modalities import PADDING

Batch = dict[str, NDArray[Any]]
BATCH_DTYPES: dict[str, Any] = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "segment_ids": np.int32,
    "positions": np.int32,
    "modality_ids": np.int8,
}
# Further ones of a model with an encoder.
ENCODER_DTYPES: dict[str, Any] = {"encoder_ids": np.int32, "encoder_segment_ids": np.int32}


class BatchSource:
    """Batches by step, in random access.

    A batch has, each of shape [A, B, T] (A micro-steps of B rows of T tokens, B being this host's share):
        input_ids int32, 0 where padded;
        loss_mask bool: the token is a target;
        segment_ids int32: 1, 2, … for the documents of a row, 0 where padded;
        positions int32: from 0 in each segment;
        modality_ids int8: 0 for text, 1, 2, … for the modalities that have tokens of their own, -1 where padded.
    With an encoder also, each [A, B, S]:
        encoder_ids int32, 0 where padded: what is read for the documents of the row, one behind the other;
        encoder_segment_ids int32: the document's number, 0 where padded.

    Row a * B_global + b of a global batch is row b of micro-step a; a host has some of the b. Rows run on over
    epochs, so a batch may hold rows of two. A run by epochs fills its last batch with empty rows.

    Args:
        examples: the tokens.
        plan: gives the rows of an epoch.
        sequence_length: T.
        rows: B_global, rows of a micro-step over all hosts.
        accumulation: A.
        epochs: length of the run, fractions allowed; ignored when steps is given.
        steps: length of the run.
        local_rows: this host's b, rising; None for all.
        ranges: token ids [start, stop) of the modalities 1, 2, ...; every other token is text, 0.
        known: what `counters` said of an earlier start on the same data: the epochs before need no plan.
        encoder_length: S, for examples that have something for an encoder.
    """

    def __init__(
        self,
        examples: Tokens,
        plan: Callable[[int], Plan],
        sequence_length: int,
        *,
        rows: int,
        accumulation: int = 1,
        epochs: float = 1.0,
        steps: int | None = None,
        local_rows: Sequence[int] | None = None,
        ranges: Sequence[tuple[int, int]] = (),
        known: Mapping[str, Any] | None = None,
        encoder_length: int = 0,
    ) -> None:
        self._examples = examples
        self._encoder_length = encoder_length
        self._plan = plan
        self._length = sequence_length
        self._ranges = tuple(ranges)
        self._rows = rows
        self._accumulation = accumulation
        self._local = range(rows) if local_rows is None else tuple(local_rows)
        # (epoch, rows of all epochs up to and with it), rising, of some epochs. The read-ahead thread adds to it too.
        self._ends: list[tuple[int, int]] = [(-1, 0)]
        self._plans: dict[int, Plan] = {}
        known = known or {}
        if known.get("epoch"):
            self._ends.append((int(known["epoch"]) - 1, int(known["rows_before"])))
        self._epochs = epochs
        self._total = self._rows_of(epochs, known) if steps is None else None
        self._steps: int = math.ceil((self._total or 0) / (rows * accumulation)) if steps is None else steps

    def __len__(self) -> int:
        return self._steps

    def _rows_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        if known.get("epochs") == epochs:
            return int(known["total_rows"])
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self._size(whole)) if epochs > whole else 0
        return self._end(whole - 1) + part

    def steps_of(self, epochs: float, known: Mapping[str, Any]) -> int:
        """The number of steps of a run of `epochs` passes over these data; `known` as for the class."""
        return math.ceil(self._rows_of(epochs, known) / (self._rows * self._accumulation))

    @property
    def total_rows(self) -> int | None:
        """Rows of a run by epochs; None for a run by steps."""
        return self._total

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        row = step * self._rows * self._accumulation
        if self._total is not None:
            row = min(row, self._total)
        epoch = self._epoch_of(row)
        return epoch + (row - self._end(epoch - 1)) / self._size(epoch)

    def counters(self, step: int) -> dict[str, Any]:
        """Where `step` steps lead to, as plain values to be kept: with them earlier epochs need not be planned again.

        How many rows an epoch has depends on its order, and a run may have thousands of epochs.
        """
        row = step * self._rows * self._accumulation
        row = row if self._total is None else min(row, self._total)
        epoch = self._epoch_of(max(0, row - 1))
        counters: dict[str, Any] = {"epoch": epoch, "rows_before": self._end(epoch - 1)}
        return counters if self._total is None else counters | {"epochs": self._epochs, "total_rows": self._total}

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        shape = (self._accumulation, len(self._local), self._length)
        batch: Batch = {name: np.zeros(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
        if self._examples.encoder_ids is not None:
            shape = (*shape[:-1], self._encoder_length)
            batch |= {name: np.zeros(shape, dtype) for name, dtype in ENCODER_DTYPES.items()}
        for a in range(self._accumulation):
            for local, b in enumerate(self._local):
                row = (step * self._accumulation + a) * self._rows + b
                if self._total is None or row < self._total:
                    self._fill({name: array[a, local] for name, array in batch.items()}, row)
        for number, (start, stop) in enumerate(self._ranges, 1):
            batch["modality_ids"][(batch["input_ids"] >= start) & (batch["input_ids"] < stop)] = number
        batch["modality_ids"][batch["segment_ids"] == 0] = PADDING
        self._examples.release()
        return batch

    def _fill(self, row: Batch, number: int) -> None:
        epoch = self._epoch_of(number)
        plan = self._epoch_plan(epoch)
        index = number - self._end(epoch - 1)
        at = 0
        for segment, piece in enumerate(range(plan.rows[index], plan.rows[index + 1]), 1):
            start, length = int(plan.starts[piece]), int(plan.lengths[piece])
            target, source = slice(at, at + length), slice(start, start + length)
            row["input_ids"][target] = self._examples.input_ids[source]
            row["loss_mask"][target] = self._examples.loss_mask[source]
            row["segment_ids"][target] = 1 if plan.one_segment else segment
            row["positions"][target] = np.arange(length) + (at if plan.one_segment else 0)
            at += length
        row["loss_mask"][0] = False  # nothing in the row predicts its first token
        if plan.encoder_starts is None or plan.encoder_lengths is None or self._examples.encoder_ids is None:
            return
        at = 0
        for segment, piece in enumerate(range(plan.rows[index], plan.rows[index + 1]), 1):
            start, length = int(plan.encoder_starts[piece]), int(plan.encoder_lengths[piece])
            row["encoder_ids"][at : at + length] = self._examples.encoder_ids[start : start + length]
            row["encoder_segment_ids"][at : at + length] = segment
            at += length

    def _epoch_of(self, row: int) -> int:
        before, _ = self._ends[bisect.bisect_right(self._ends, row, key=lambda end: end[1]) - 1]
        epoch = before + 1
        while self._end(epoch) <= row:
            epoch += 1
        return epoch

    def _size(self, epoch: int) -> int:
        return self._end(epoch) - self._end(epoch - 1)

    def _end(self, epoch: int) -> int:
        """Rows of the epochs 0 … epoch; 0 for -1."""
        at, end = self._ends[bisect.bisect_right(self._ends, epoch, key=lambda end: end[0]) - 1]
        while at < epoch:
            at += 1
            size = len(self._epoch_plan(at))
            if size == 0:
                raise UserError("data: an epoch has no rows; raise the sources' weights, or give more data")
            end += size
            bisect.insort(self._ends, (at, end))
        return end

    def _epoch_plan(self, epoch: int) -> Plan:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._plan(epoch)
            # A batch needs at most the plans of neighbouring epochs; others are let go. The dict is replaced and not
            # changed, because the read-ahead thread uses it too.
            self._plans = {key: kept for key, kept in self._plans.items() if abs(key - epoch) == 1} | {epoch: plan}
        return plan


class EvaluationSource:
    """A BatchSource of one micro-step without its first dim: arrays are [B, T]."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: int) -> Batch:
        return {name: array[0] for name, array in self._source[step].items()}


class BatchIterator:
    """Batches from some step on, computed ahead in a thread or in worker processes.

    The state is the number of the next step: it says the same for any number of workers or hosts.
    """

    def __init__(self, source: BatchSource | EvaluationSource, workers: int, step: int = 0) -> None:
        self._source = source
        self._workers = workers
        self._iterator: Any = None
        self._step = step

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._step >= len(self._source):
            raise StopIteration
        if self._iterator is None:
            self._iterator = iter(self._pipeline())
        batch: Batch = next(self._iterator)
        self._step += 1
        return batch

    def _pipeline(self) -> Any:
        import grain

        data = grain.MapDataset.source(self._source)[self._step :]
        ahead = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain starts no worker otherwise
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            ahead = ahead.mp_prefetch(options)
        return ahead

    def get_state(self) -> dict[str, int]:
        """{"step": number of the next batch}."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a state of `get_state`."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends threads and worker processes. The iterator can still be used and starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Batches:
    """All batches of a run: `len()` steps, `[step]` in random access, `iterator()` with read-ahead."""

    source: BatchSource | EvaluationSource
    workers: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, step: int) -> Batch:
        return self.source[step]

    def counters(self, step: int) -> dict[str, Any]:
        """See `BatchSource.counters`."""
        assert isinstance(self.source, BatchSource)
        return self.source.counters(step)

    def iterator(self, step: int = 0) -> BatchIterator:
        """Batches from `step` on."""
        return BatchIterator(self.source, self.workers, step)

    def __iter__(self) -> Iterator[Batch]:
        with self.iterator() as batches:
            yield from batches
