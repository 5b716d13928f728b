"""All records of the sources as tokenised examples, kept as flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import Example, resolve_ends
from jaxlm.data.records import is_token_source
from jaxlm.data.report import SourceReport
from jaxlm.data.split import drawn_examples
from jaxlm.data.store.source import read_chunks
from jaxlm.data.tokenise import Tokeniser, check_streams, read_batches
from jaxlm.data.tokens import Chunk, Tokens, add_report
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

# Called with the source's path and the number of its records done so far.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Examples:
    """Many examples, flat: example i is [offsets[i], offsets[i + 1]).

    Args:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens].
        offsets: int64 [examples + 1].
        source: int32 [examples], which source each came from.
        record: int64 [examples], which record: the pieces of a long document share one.
        encoder_ids: int32 [tokens of encoders], example i is [encoder_offsets[i], encoder_offsets[i + 1]).
        encoder_offsets: int64 [examples + 1]; None for a decoder alone.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    record: NDArray[np.int64]
    encoder_ids: NDArray[np.int32] | None = None
    encoder_offsets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        part = slice(self.offsets[index], self.offsets[index + 1])
        source = None
        if self.encoder_ids is not None and self.encoder_offsets is not None:
            source = self.encoder_ids[self.encoder_offsets[index] : self.encoder_offsets[index + 1]]
        return Example(self.input_ids[part], self.loss_mask[part], encoder_ids=source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, indices: NDArray[np.int64]) -> Examples:
        """Some of the examples, copied."""
        items = [self[int(i)] for i in indices]
        return from_list(items, self.source[indices], self.record[indices])

    def release(self) -> None:
        """Gives mapped pages back to the system: these lie in memory, so there are none."""

    def digest(self) -> str:
        """SHA-256 of the contents."""
        digest = hashlib.sha256()
        arrays = [self.input_ids, self.loss_mask, self.offsets, self.source]
        if self.encoder_ids is not None and self.encoder_offsets is not None:
            arrays += [self.encoder_ids, self.encoder_offsets]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def from_list(
    examples: Sequence[Example], source: Sequence[int] | NDArray[np.int32], record: Sequence[int] | NDArray[np.int64]
) -> Examples:
    """Flat arrays of single examples, with the source and record of each."""
    ids = [example.input_ids for example in examples] or [np.zeros(0, np.int32)]
    masks = [example.loss_mask for example in examples] or [np.zeros(0, np.bool_)]
    sources = [example.encoder_ids for example in examples if example.encoder_ids is not None]
    assert len(sources) in (0, len(examples))
    return Examples(
        np.concatenate(ids),
        np.concatenate(masks),
        _offsets(ids),
        np.asarray(source, np.int32),
        np.asarray(record, np.int64),
        np.concatenate(sources) if sources else None,
        _offsets(sources) if sources else None,
    )


def _offsets(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def from_chunks(chunks: Iterable[tuple[int, Chunk]], with_encoder: bool = False) -> Examples:
    """All chunks, each with the number of its source, as flat arrays."""
    parts = list(chunks)
    each = [chunk for _, chunk in parts]
    begins = np.concatenate([np.zeros(0, np.bool_), *(chunk.begins for chunk in each)])
    lengths = np.concatenate([np.zeros(0, np.int32), *(chunk.lengths for chunk in each)])
    of_encoder = [chunk.encoder_lengths for chunk in each if chunk.encoder_lengths is not None]
    encoder_lengths = np.concatenate([np.zeros(0, np.int32), *of_encoder])
    encoder_ids = [chunk.encoder_ids for chunk in each if chunk.encoder_ids is not None]
    return Examples(
        np.concatenate([np.zeros(0, np.int32), *(chunk.input_ids for chunk in each)]),
        np.concatenate([np.zeros(0, np.bool_), *(chunk.loss_mask for chunk in each)]),
        offsets_of(lengths),
        np.repeat(np.array([number for number, _ in parts], np.int32), [len(chunk) for chunk in each]),
        np.cumsum(begins, dtype=np.int64) - 1,
        np.concatenate([np.zeros(0, np.int32), *encoder_ids]) if with_encoder else None,
        offsets_of(encoder_lengths) if with_encoder else None,
    )


def offsets_of(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64 [n + 1]: where each of n pieces begins, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def build_examples(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    progress: Progress | None = None,
    start_id: int | None = None,
) -> tuple[Examples, tuple[SourceReport, ...]]:
    """Reads and tokenises all records of the sources, in this process and into memory.

    Under group_texts nothing is too long, as rows are cut from the running text.

    Args:
        sources: read in this order.
        config: sequence_length, too_long, drop_unknown, add_bos, add_eos, train_on_inputs and packing are used.
        tokenizer: the tokenizer.
        vocab_size: rows of the model's embedding.
        progress: called now and then.
        start_id: for an encoder and a decoder: the token that the decoder begins with; None: a decoder alone.

    Raises:
        UserError: unusable records or sources, a token the model does not have, or nothing left to learn.
    """
    config, _ = resolve_ends(config, tokenizer)
    check_streams(config, start_id)
    tokeniser = Tokeniser([source.columns for source in sources], config, tokenizer, start_id)
    chunks: list[tuple[int, Chunk]] = []
    reports: list[SourceReport] = []
    for number, source in enumerate(sources):
        made = (
            read_chunks(source, config, tokenizer, start_id)
            if is_token_source(source)
            else map(tokeniser.chunk, read_batches(number, source, tokenizer))
        )
        for chunk in made:
            chunks.append((number, chunk))
            add_report(reports, number, chunk.report)
            if progress is not None:
                progress(source.path, reports[number].records)
    examples = from_chunks(chunks, start_id is not None)
    check_examples(examples, largest_id(examples), reports, tokenizer, vocab_size)
    return examples, tuple(reports)


def split_off(examples: Examples, count: int | float, seed: int) -> tuple[Examples, Examples]:
    """(the rest, records drawn at random): training and validation data, see `drawn_examples`."""
    drawn = drawn_examples(examples, count, seed)
    return examples.take(np.flatnonzero(~drawn)), examples.take(np.flatnonzero(drawn))


def largest_id(examples: Examples) -> int:
    """The largest id of all; -1 where there is none."""
    arrays = [examples.input_ids] + ([] if examples.encoder_ids is None else [examples.encoder_ids])
    return max((int(array.max()) for array in arrays if len(array)), default=-1)


def check_examples(
    examples: Tokens, largest: int, reports: Sequence[SourceReport], tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Refuses data without anything to learn, and tokens that the model does not have.

    Args:
        examples: all of them.
        largest: their largest id.
        reports: what became of the sources.
        tokenizer: the tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: saying which.
    """
    if not len(examples):
        counts = "; ".join(report.line() for report in reports)
        raise UserError(
            f"data: no record with anything to learn is left ({counts}). Look at data.sequence_length "
            "(answers may be cut off), data.too_long, whether the answers' column is empty, and whether weight: 0 or "
            "train: false stands on every answer"
        )
    if largest >= vocab_size:
        name = tokenizer.token(largest) if largest < tokenizer.vocab_size else "unknown"
        raise UserError(
            f"data: token id {largest} ({name!r}) of the tokenizer {tokenizer.path} is outside of "
            f"the model's vocabulary of {vocab_size}; use the model's own tokenizer (tokenizer.path: null)"
        )
