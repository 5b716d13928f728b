"""Rows to batches.

A batch is a function of (data, seed, step) alone: it does not depend on the number of workers or hosts, nor on where a
run was resumed. Grain only computes batches ahead of time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.order import Order
from jaxlm.data.packing import Pieces
from jaxlm.data.tokens import Tokens
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
# Beside them in training: int64 [sources], the tokens of each source in the rows of all hosts.
SOURCE_TOKENS = "source_tokens"
CHUNK = 2**14  # tokens written at a time: their places stay in the processor's cache


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

    With `num_sources` also source_tokens, int64 [sources]: the tokens of each source in the rows of all hosts.

    Row a * B_global + b of a global batch is row b of micro-step a; a host has some of the b.

    Args:
        examples: the tokens.
        order: which rows a step takes.
        sequence_length: T.
        rows: B_global, rows of a micro-step over all hosts.
        accumulation: A.
        local_rows: this host's b, rising; None for all.
        ranges: token ids [start, stop) of the modalities 1, 2, ...; every other token is text, 0.
        encoder_length: S, for examples that have something for an encoder.
        num_sources: count the tokens of this number of sources.
    """

    def __init__(
        self,
        examples: Tokens,
        order: Order,
        sequence_length: int,
        *,
        rows: int,
        accumulation: int = 1,
        local_rows: Sequence[int] | None = None,
        ranges: Sequence[tuple[int, int]] = (),
        encoder_length: int = 0,
        num_sources: int = 0,
    ) -> None:
        self.order = order
        self._examples = examples
        self._encoder_length = encoder_length
        self._length = sequence_length
        self._ranges = tuple(ranges)
        self._accumulation = accumulation
        self._num_sources = num_sources
        self._columns: Mapping[str, NDArray[Any]] = {}
        self._at_a_time = max(1, CHUNK // sequence_length)  # rows
        mine = np.arange(rows) if local_rows is None else np.array(local_rows, np.int64)
        self._local_rows = len(mine)
        # By place in the global batch, the place among this host's rows; -1 for those of others.
        places = np.full((accumulation, rows), -1)
        places[:, mine] = np.arange(accumulation * len(mine)).reshape(accumulation, len(mine))
        self._local = places.reshape(-1)

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> BatchSource:
        """The same batches with further fields [A, B, T], 0 where padded.

        Args:
            columns: by name, a value of each token of the examples: [tokens].
        """
        source = copy.copy(self)
        source._columns = columns
        return source

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        rows = self._accumulation * self._local_rows
        batch: Batch = {name: np.zeros((rows, self._length), dtype) for name, dtype in BATCH_DTYPES.items()}
        if self._examples.encoder_ids is not None:
            batch |= {name: np.zeros((rows, self._encoder_length), dtype) for name, dtype in ENCODER_DTYPES.items()}
        batch |= {name: np.zeros((rows, self._length), column.dtype) for name, column in self._columns.items()}
        source_tokens = np.zeros(self._num_sources, np.int64)
        for share in self.order.shares(step):
            if self._num_sources:
                source_tokens += self._tokens_by_source(share.rows.pieces(share.numbers))
            here = self._local[share.places]
            numbers, places = share.numbers[here >= 0], here[here >= 0]
            for at in range(0, len(numbers), self._at_a_time):
                some = slice(at, at + self._at_a_time)
                self._fill(batch, places[some], share.rows.pieces(numbers[some]))
        for number, (start, stop) in enumerate(self._ranges, 1):
            batch["modality_ids"][(batch["input_ids"] >= start) & (batch["input_ids"] < stop)] = number
        batch["modality_ids"][batch["segment_ids"] == 0] = PADDING
        self._examples.release()
        shape = self._accumulation, self._local_rows, -1
        batch = {name: array.reshape(shape) for name, array in batch.items()}
        return batch | {SOURCE_TOKENS: source_tokens} if self._num_sources else batch

    def examples(self, step: int) -> NDArray[np.int64]:
        """int64 [rows, documents of a row + 1]: by segment id, the number of the example; -1 for what is padded.

        All rows of the step's one micro-step, of all hosts; column 0 is padding.
        """
        numbers = np.full((len(self._local), 1), -1, np.int64)
        for share in self.order.shares(step):
            pieces = share.rows.pieces(share.numbers)
            assert not pieces.one_segment, "the documents of such rows are not told apart"
            more = int(pieces.counts.max(initial=0)) + 1 - numbers.shape[1]
            numbers = np.pad(numbers, ((0, 0), (0, max(0, more))), constant_values=-1)
            first = np.repeat(np.cumsum(pieces.counts) - pieces.counts, pieces.counts)
            segment = np.arange(len(pieces.lengths)) - first + 1
            document = np.searchsorted(self._examples.offsets, pieces.starts, side="right") - 1
            numbers[np.repeat(share.places, pieces.counts), segment] = document
        return numbers

    def _tokens_by_source(self, pieces: Pieces) -> NDArray[np.int64]:
        document = np.searchsorted(self._examples.offsets, pieces.starts, side="right") - 1
        source = self._examples.source[document]
        return np.bincount(source, pieces.lengths, self._num_sources).astype(np.int64)

    def _fill(self, batch: Batch, rows: NDArray[np.int64], pieces: Pieces) -> None:
        """Writes the pieces into rows of the batch, one piece of a row behind the other."""
        segment = (
            np.arange(len(pieces.lengths)) - np.repeat(np.cumsum(pieces.counts) - pieces.counts, pieces.counts) + 1
        )
        to, token, position = _spread(rows, pieces.counts, pieces.starts, pieces.lengths, self._length)
        batch["input_ids"].reshape(-1)[to] = self._examples.input_ids[token]
        batch["loss_mask"].reshape(-1)[to] = self._examples.loss_mask[token]
        for name, column in self._columns.items():
            batch[name].reshape(-1)[to] = column[token]
        if pieces.one_segment:
            batch["segment_ids"].reshape(-1)[to] = 1
            batch["positions"].reshape(-1)[to] = to % self._length
        else:
            batch["segment_ids"].reshape(-1)[to] = np.repeat(segment, pieces.lengths)
            batch["positions"].reshape(-1)[to] = position
        batch["loss_mask"][rows, 0] = False  # nothing in the row predicts its first token
        if pieces.encoder_starts is None or pieces.encoder_lengths is None or self._examples.encoder_ids is None:
            return
        starts, lengths = pieces.encoder_starts, pieces.encoder_lengths
        to, token, _ = _spread(rows, pieces.counts, starts, lengths, self._encoder_length)
        batch["encoder_ids"].reshape(-1)[to] = self._examples.encoder_ids[token]
        batch["encoder_segment_ids"].reshape(-1)[to] = np.repeat(segment, lengths)


def _spread(
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    width: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each token of the pieces of some rows: where it goes, where it comes from, and its number within its piece.

    Args:
        rows: int64 [rows], their numbers.
        counts: int64 [rows], the number of pieces of each.
        starts, lengths: int64 [pieces].
        width: places of a row.

    Returns:
        Each int64 [tokens].
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    first = np.cumsum(counts) - counts  # piece of each row
    row_shift = rows * width - ends[first]
    tokens = np.arange(ends[-1])
    in_row = np.repeat(row_shift, ends[first + counts] - ends[first])
    return tokens + in_row, tokens + np.repeat(starts - ends[:-1], lengths), tokens - np.repeat(ends[:-1], lengths)


class EvaluationSource:
    """A BatchSource of one micro-step without its first dim: arrays are [B, T]."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: int) -> Batch:
        return {name: array[0] for name, array in self._source[step].items()}

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> EvaluationSource:
        """See `BatchSource.with_columns`."""
        return EvaluationSource(self._source.with_columns(columns))

    def examples(self, step: int) -> NDArray[np.int64]:
        """See `BatchSource.examples`."""
        return self._source.examples(step)


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

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> Batches:
        """See `BatchSource.with_columns`."""
        return Batches(self.source.with_columns(columns), self.workers)

    def counters(self, step: int) -> dict[str, Any]:
        """See `Order.counters`."""
        return self.order.counters(step)

    @property
    def order(self) -> Order:
        """Which rows a step takes."""
        assert isinstance(self.source, BatchSource)
        return self.source.order

    def iterator(self, step: int = 0) -> BatchIterator:
        """Batches from `step` on."""
        return BatchIterator(self.source, self.workers, step)

    def __iter__(self) -> Iterator[Batch]:
        with self.iterator() as batches:
            yield from batches
