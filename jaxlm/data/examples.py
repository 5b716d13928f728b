"""All records of the sources as tokenised examples, kept as flat arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import Example, encode_pairs, encode_rendered, resolve_ends
from jaxlm.data.messages import unused
from jaxlm.data.records import Record, read_records
from jaxlm.data.report import SourceReport
from jaxlm.data.templates import explain_choice, load_template
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Tokenizer

# Called with the source's path and the number of its records done so far.
Progress = Callable[[str, int], None]

_BATCH = 512  # records tokenised in one call
_LOOKED_AT = 100  # records by which `auto` chooses


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


def chosen_template(
    source: SourceConfig, tokenizer: Tokenizer, first: Sequence[Record] | None = None
) -> tuple[str, str]:
    """A source's template and why it is that one; empty where it was named. `first`: records that were read already."""
    if source.template != "auto":
        return source.template, ""
    if first is None:
        first = list(itertools.islice(read_records(source), _LOOKED_AT))
    return explain_choice(first, tokenizer, source.columns)


def build_examples(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    progress: Progress | None = None,
    start_id: int | None = None,
) -> tuple[Examples, tuple[SourceReport, ...]]:
    """Reads and tokenises all records of the sources.

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
    assert config.add_bos is not None and config.add_eos is not None
    check_streams(config, start_id)
    all_examples: list[Example] = []
    origin: list[int] = []
    number_of: list[int] = []
    record_count = 0
    reports = []
    for number, source in enumerate(sources):
        records = read_records(source)
        first = list(itertools.islice(records, _LOOKED_AT))
        name, why = chosen_template(source, tokenizer, first)
        records = itertools.chain(first, records)
        template = load_template(name, tokenizer, source.columns)
        if start_id is not None and template.name == "text":
            raise UserError(
                f"data: {source.path}: template text has no question, and the model's encoder reads one; choose a "
                "template with questions and answers, e.g. alpaca, or name the columns that hold them"
            )
        report = SourceReport(source.path, name, why)
        reports.append(report)
        while batch := list(itertools.islice(records, _BATCH)):
            rendered = [template.render(record) for record in batch]
            for record, text in zip(batch, rendered, strict=True):
                report.answered += bool(text.answers)
                report.empty += bool(text.answers) and not any(answer.strip() for answer in text.answers)
                for role in text.lost:
                    report.lost[role] = report.lost.get(role, 0) + 1
                for column in unused(record, template.used(record)):
                    report.unused[column] = report.unused.get(column, 0) + 1
            ends = dict(add_bos=config.add_bos, add_eos=config.add_eos)
            try:
                if start_id is None:
                    encoded = encode_rendered(
                        rendered,
                        tokenizer,
                        **ends,
                        train_on_inputs=config.train_on_inputs,
                        running=config.packing_mode == "group_texts",
                    )
                else:
                    prompts = [template.render_prompt(record) for record in batch]
                    encoded = encode_pairs(prompts, rendered, tokenizer, **ends, start_id=start_id)
            except TextError as error:
                raise UserError(f"data: {batch[error.number].name}: {error}") from None
            for record, example in zip(batch, encoded, strict=True):
                if config.drop_unknown and (example.input_ids == tokenizer.unk_id).any():
                    report.records += 1
                    report.dropped_unknown += 1
                    continue
                pieces = _fit(record, example, config, report)
                all_examples.extend(pieces)
                origin.extend([number] * len(pieces))
                number_of.extend([record_count] * len(pieces))
                record_count += 1
            if progress is not None:
                progress(source.path, report.records)
    examples = from_list(all_examples, origin, number_of)
    _check(examples, sources, reports, tokenizer, vocab_size)
    return examples, tuple(reports)


def _fit(record: Record, example: Example, config: DataConfig, report: SourceReport) -> list[Example]:
    """The example in pieces that fit a row, counted; none when it is dropped."""
    report.records += 1
    length, room = len(example.input_ids), config.sequence_length
    source, source_room = example.encoder_ids, config.row_length("encoder_ids")
    pieces = [example]
    over = 0 if source is None else max(0, len(source) - source_room)
    if config.packing_mode != "group_texts" and (length > room or over):
        action = config.too_long
        if action == "auto":  # a document loses nothing by being cut in pieces; an answer loses its question
            action = "split" if report.template == "text" else "truncate"
        if action == "error":
            what = f"{length} tokens, data.sequence_length is {room}"
            if source is not None and over:
                what = f"a question of {len(source)} tokens, data.encoder_length is {source_room}"
            raise UserError(
                f"data: {record.name} has {what}; raise it, or set data.too_long to truncate, split or drop"
            )
        if action == "drop":
            report.dropped_too_long += 1
            return []
        borders = [*range(0, length, room), length]
        if action == "split" and length % room == 1 and room > 2:
            borders[-2] -= 1  # a token alone in a row is never trained, and the last one is the end
        pieces = [_piece(example, start, stop) for start, stop in itertools.pairwise(borders)]
        if action == "truncate":
            report.truncated += 1
            report.tokens_cut += max(0, length - room) + over
            del pieces[1:]
            if source is not None and over:
                # Its last token says that the question ends there, as transformers' truncation keeps it.
                source = np.concatenate([source[: source_room - 1], source[-1:]])
        else:
            report.split += 1
            for piece in pieces:
                piece.loss_mask[0] = False  # nothing in the row predicts it
    if source is not None:
        pieces = [dataclasses.replace(piece, encoder_ids=source) for piece in pieces]
    kept = [piece for piece in pieces if piece.loss_mask.any()]
    if not kept:
        report.dropped_without_target += 1
    elif len(kept) < len(pieces):
        report.dropped_pieces += len(pieces) - len(kept)
        report.tokens_dropped += sum(len(piece.input_ids) for piece in pieces if not piece.loss_mask.any())
    for piece in kept:
        report.tokens += len(piece.input_ids)
        report.trained_tokens += int(piece.loss_mask.sum())
        ends = [end for end in piece.ends if piece.loss_mask[end]]
        report.ends += len(ends)
        report.end_ids |= {int(piece.input_ids[end]) for end in ends}
    return kept


def check_streams(config: DataConfig, start_id: int | None) -> None:
    """Refuses settings that mean nothing for a decoder alone or, with a `start_id`, for one with an encoder.

    Raises:
        UserError: the first of them.
    """
    if start_id is None:
        if config.encoder_length is not None:
            raise UserError("data.encoder_length: the model has no encoder; leave it out, sequence_length says all")
        return
    for key, value, instead in (
        ("packing", "group_texts", "true or false"),
        ("too_long", "split", "truncate, drop or error"),
        ("train_on_inputs", True, "false"),
    ):
        if getattr(config, key) == value:
            shown = str(value).lower()
            raise UserError(
                f"data.{key}: {shown} is not supported with an encoder, whose question and answer are two texts; set "
                f"it to {instead}"
            )


def _piece(example: Example, start: int, stop: int) -> Example:
    ends = tuple(end - start for end in example.ends if start <= end < stop)
    return Example(example.input_ids[start:stop], example.loss_mask[start:stop].copy(), ends)


def _check(
    examples: Examples,
    sources: Sequence[SourceConfig],
    reports: Sequence[SourceReport],
    tokenizer: Tokenizer,
    vocab_size: int,
) -> None:
    if not len(examples):
        counts = "; ".join(report.line() for report in reports)
        raise UserError(
            f"data: no record with anything to learn is left ({counts}). Look at data.sequence_length "
            "(answers may be cut off), data.too_long, whether the answers' column is empty, and whether weight: 0 or "
            "train: false stands on every answer"
        )
    largest = int(examples.input_ids.max())
    if examples.encoder_ids is not None and len(examples.encoder_ids):
        largest = max(largest, int(examples.encoder_ids.max()))
    if largest >= vocab_size:
        raise UserError(
            f"data: token id {largest} ({tokenizer.token(largest)!r}) of the tokenizer {tokenizer.path} is outside of "
            f"the model's vocabulary of {vocab_size}; use the model's own tokenizer (tokenizer.path: null)"
        )
