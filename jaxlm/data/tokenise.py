"""Records to chunks of tokens: the work that one process, or many of them, does for a source."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import Example, encode_pairs, encode_rendered
from jaxlm.data.messages import unused
from jaxlm.data.preferences import own_columns, preference_examples
from jaxlm.data.records import Record, is_token_source, read_records
from jaxlm.data.rendering import Template
from jaxlm.data.report import SourceReport
from jaxlm.data.templates import explain_choice, load_template
from jaxlm.data.tokens import Chunk, chunk_of
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Tokenizer

RECORDS = 512  # of a batch at most
CHARACTERS = 1 << 21  # of a batch, about, so that memory is bounded whatever a record's size
_LOOKED_AT = 100  # records by which `auto` chooses


@dataclass(frozen=True)
class Batch:
    """Records of one source that are tokenised in one call.

    Args:
        source: its number.
        path: its path.
        template: the template's name, and `why` it is that one.
        records: the records.
        characters: of their texts, about.
    """

    source: int
    path: str
    template: str
    why: str
    records: list[Record]
    characters: int


def chosen_template(
    source: SourceConfig, tokenizer: Tokenizer, first: Sequence[Record] | None = None
) -> tuple[str, str]:
    """A source's template and why it is that one; empty where it was named. `first`: records that were read already."""
    if is_token_source(source):
        return "text", "tokens as the store has them"
    if source.template != "auto":
        return source.template, ""
    if first is None:
        first = list(itertools.islice(read_records(source), _LOOKED_AT))
    return explain_choice(first, tokenizer, source.columns)


def read_batches(number: int, source: SourceConfig, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The records of a source in batches, in order.

    Raises:
        UserError: see `read_records`.
    """
    records = read_records(source)
    first = list(itertools.islice(records, _LOOKED_AT))
    name, why = chosen_template(source, tokenizer, first)
    batch: list[Record] = []
    characters = 0
    for record in itertools.chain(first, records):
        batch.append(record)
        characters += _characters(record.data)
        if len(batch) == RECORDS or characters >= CHARACTERS:
            yield Batch(number, source.path, name, why, batch, characters)
            batch, characters = [], 0
    if batch:
        yield Batch(number, source.path, name, why, batch, characters)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


class Tokeniser:
    """What turns batches of records into chunks of tokens; it is sent to worker processes.

    Args:
        columns: of each source.
        config: the data section, with add_bos and add_eos decided.
        tokenizer: the tokenizer.
        start_id: for an encoder and a decoder: the token that the decoder begins with; None: a decoder alone.
    """

    def __init__(
        self, columns: Sequence[dict[str, str]], config: DataConfig, tokenizer: Tokenizer, start_id: int | None
    ) -> None:
        assert config.add_bos is not None and config.add_eos is not None
        self.columns, self.config, self.tokenizer, self.start_id = list(columns), config, tokenizer, start_id
        self._templates: dict[int, Template] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokeniser, (self.columns, self.config, self.tokenizer, self.start_id)

    def _template(self, batch: Batch) -> Template:
        template = self._templates.get(batch.source)
        if template is None:
            columns = self.columns[batch.source]
            if self.config.records != "answers":
                columns = own_columns(columns)[1]
            template = load_template(batch.template, self.tokenizer, columns)
            if self.start_id is not None and template.name == "text":
                raise UserError(
                    f"data: {batch.path}: template text has no question, and the model's encoder reads one; choose a "
                    "template with questions and answers, e.g. alpaca, or name the columns that hold them"
                )
            self._templates[batch.source] = template
        return template

    def chunk(self, batch: Batch) -> Chunk:
        """The tokens of a batch.

        Raises:
            UserError: a record that cannot be used.
        """
        config, tokenizer, records = self.config, self.tokenizer, batch.records
        assert config.add_bos is not None and config.add_eos is not None
        template = self._template(batch)
        report = SourceReport(batch.path, batch.template, batch.why)
        if config.records != "answers":
            columns = self.columns[batch.source]
            return chunk_of(preference_examples(records, template, columns, config, tokenizer, report), report, False)
        rendered = [template.render(record) for record in records]
        for record, text in zip(records, rendered, strict=True):
            report.answered += bool(text.answers)
            report.empty += bool(text.answers) and not any(answer.strip() for answer in text.answers)
            for role in text.lost:
                report.lost[role] = report.lost.get(role, 0) + 1
            for column in unused(record, template.used(record)):
                report.unused[column] = report.unused.get(column, 0) + 1
        ends = dict(add_bos=config.add_bos, add_eos=config.add_eos)
        try:
            if self.start_id is None:
                encoded = encode_rendered(
                    rendered,
                    tokenizer,
                    **ends,
                    train_on_inputs=config.train_on_inputs,
                    running=config.packing_mode == "group_texts",
                )
            else:
                prompts = [template.render_prompt(record) for record in records]
                encoded = encode_pairs(prompts, rendered, tokenizer, **ends, start_id=self.start_id)
        except TextError as error:
            raise UserError(f"data: {records[error.number].name}: {error}") from None
        pieces = []
        for record, example in zip(records, encoded, strict=True):
            if config.drop_unknown and (example.input_ids == tokenizer.unk_id).any():
                report.records += 1
                report.dropped_unknown += 1
            else:
                pieces.append(fit_row(record.name, example, config, report))
        return chunk_of(pieces, report, self.start_id is not None)


def fit_row(name: str, example: Example, config: DataConfig, report: SourceReport) -> list[Example]:
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
            raise UserError(f"data: {name} has {what}; raise it, or set data.too_long to truncate, split or drop")
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
