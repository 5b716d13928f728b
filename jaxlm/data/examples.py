"""Records to token ids and loss masks, kept as flat arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.messages import unused
from jaxlm.data.rendering import Rendered, Segment, Template
from jaxlm.data.sources import Record, read_records
from jaxlm.data.templates import explain_choice, load_template
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Encoding, Tokenizer

# Called with the source's path and the number of its records done so far.
Progress = Callable[[str, int], None]

_BATCH = 512  # records tokenised in one call
_MANY_EMPTY = 0.1  # share of empty answers that is worth a warning
_LOOKED_AT = 100  # records by which `auto` chooses


@dataclass(frozen=True)
class Example:
    """One record.

    Args:
        input_ids: int32 [n].
        loss_mask: bool [n]: True where the token is a target to learn.
        ends: places of the special tokens that end an answer.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Many examples, flat: example i is [offsets[i], offsets[i + 1]).

    Args:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens].
        offsets: int64 [examples + 1].
        source: int32 [examples], which source each came from.
        record: int64 [examples], which record: the pieces of a long document share one.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    record: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.input_ids[part], self.loss_mask[part])

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
        for array in (self.input_ids, self.loss_mask, self.offsets, self.source):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def from_list(
    items: Sequence[Example], source: Sequence[int] | NDArray[np.int32], record: Sequence[int] | NDArray[np.int64]
) -> Examples:
    """Flat arrays of single examples, with the source and record of each."""
    ids = [item.input_ids for item in items] or [np.zeros(0, np.int32)]
    masks = [item.loss_mask for item in items] or [np.zeros(0, np.bool_)]
    lengths = np.array([0, *(len(item.input_ids) for item in items)], np.int64)
    return Examples(
        np.concatenate(ids),
        np.concatenate(masks),
        np.cumsum(lengths),
        np.asarray(source, np.int32),
        np.asarray(record, np.int64),
    )


@dataclass
class SourceReport:
    """What became of a source.

    `records` counts all that were read, or after a split off for validation those that are left; tokens are those kept.

    Attributes:
        why: why `auto` stands for this template; empty where the template was named.
        ends: learnt tokens that end an answer; `end_ids` are their ids.
        empty: records whose answers are all empty, of `answered` that have answers.
        unused: what holds something in records and is not read, with the number of records.
        lost: roles of messages that the chat template changes or leaves out, with the number of records.
    """

    path: str
    template: str
    why: str = ""
    records: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    split: int = 0
    dropped_too_long: int = 0
    dropped_without_target: int = 0
    dropped_unknown: int = 0
    dropped_pieces: int = 0
    tokens_dropped: int = 0
    ends: int = 0
    end_ids: frozenset[int] = frozenset()
    answered: int = 0
    empty: int = 0
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return self.dropped_too_long + self.dropped_without_target + self.dropped_unknown

    def line(self) -> str:
        """One line for a log."""
        chosen = f"{self.template}: {self.why}" if self.why else self.template
        text = f"{self.path} ({chosen}): {self.records:,} records, {self.tokens:,} tokens"
        text += f", {self.trained_tokens:,} of them learnt"
        if self.truncated:
            text += f"; {self.truncated:,} records cut to data.sequence_length ({self.tokens_cut:,} tokens lost)"
        if self.split:
            text += f"; {self.split:,} records longer than data.sequence_length split into pieces"
        if self.dropped_pieces:
            text += f"; {self.dropped_pieces:,} pieces with nothing to learn dropped ({self.tokens_dropped:,} tokens)"
        if self.dropped_too_long:
            text += f"; {self.dropped_too_long:,} records dropped as too long"
        if self.dropped_unknown:
            text += f"; {self.dropped_unknown:,} records dropped for an unknown token (data.drop_unknown)"
        if self.dropped_without_target:
            text += f"; {self.dropped_without_target:,} records dropped because nothing to learn is left of them"
        if self.empty:
            text += f"; {self.empty:,} records have an empty answer"
        return text

    def remarks(self) -> list[str]:
        """Further lines: what is not used, and what looks like a mistake."""
        lines = []
        if self.unused:
            found = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
            lines.append(f"{self.path}: columns that hold something (in so many records) and are not used: {found}")
            beside = [name for name in ("system", "history", "tools") if name in self.unused]
            if beside:
                lines.append(
                    f"warning: {self.path}: the template {self.template} has no place for {' and '.join(beside)}; "
                    "chat and vicuna_v1.1 read system and history, chat also tools"
                )
        if self.lost:
            found = " and ".join(f"{role} messages in {count:,} records" for role, count in self.lost.items())
            lines.append(
                f"warning: {self.path}: the chat template changes or leaves out {found}; see --preview, or choose "
                "another template"
            )
        if self.empty and self.empty >= _MANY_EMPTY * self.answered:
            all_of_them = self.empty == self.answered
            share = "every answer is" if all_of_them else f"{self.empty:,} of {self.answered:,} answers are"
            lines.append(
                f"warning: {self.path}: {share} empty: the model learns to say nothing there. Name the right column, "
                "e.g. columns: {output: NAME}, or leave these records out"
            )
        return lines


def encode_rendered(
    items: Sequence[Rendered],
    tokenizer: Tokenizer,
    *,
    add_bos: bool,
    add_eos: bool,
    train_on_inputs: bool,
    running: bool = False,
) -> list[Example]:
    """Tokens and masks of rendered records, not truncated; the first token of each is masked.

    A token is a target when it covers at least one trained character, so a token across the border between prompt and
    answer is learnt. `running`: the records become one running text, where the first token of one is learnt like the
    others if all of them are (as HF's run_clm learns every document's bos).

    Raises:
        UserError: bos or eos is asked for and the tokenizer has none.
        TextError: a record with what the tokenizer cannot read; its number is the record's place in `items`.
    """
    segments = [segment for item in items for segment in item.segments]
    special = {item.special_tokens for item in items}
    if len(special) > 1:
        raise AssertionError("records of one call must come from one template")
    # Behind an eos a segment goes on; it does not begin a text.
    continued = [
        number > 0 and add_eos and item.segments[number - 1].eos
        for item in items
        for number in range(len(item.segments))
    ]
    try:
        texts = [segment.text for segment in segments]
        encodings = iter(tokenizer.encode_batch(texts, next(iter(special), None), continued))
    except TextError as error:
        owners = [number for number, item in enumerate(items) for _ in item.segments]
        raise TextError(owners[error.number], str(error)) from None
    return [_join(item, encodings, tokenizer, add_bos, add_eos, train_on_inputs, running) for item in items]


def _join(
    item: Rendered,
    encodings: Iterator[Encoding],
    tokenizer: Tokenizer,
    add_bos: bool,
    add_eos: bool,
    whole: bool,
    running: bool,
) -> Example:
    ids: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    ends: list[int] = []
    if add_bos and not item.has_bos:
        opening = tokenizer.opening or (_required(tokenizer, "bos"),)
        ids += opening
        masks.append(np.zeros(len(opening), np.bool_))
    for segment in item.segments:
        encoding = next(encodings)
        own = _mask(segment, encoding)
        # Words that a template ends turns with are learnt too, but no token stops a generation there.
        stopping = (place for place in _ends(segment, encoding) if tokenizer.is_end(encoding.ids[place]))
        ends += [len(ids) + place for place in stopping]
        ids += encoding.ids
        masks.append(np.ones(len(encoding.ids), np.bool_) if whole else own)
        if not segment.eos:
            continue
        learnt = segment.spans[-1].trained
        # As alpaca-lora: an answer that brings its own eos gets no second one.
        brought = bool(ids) and ids[-1] == tokenizer.eos_id
        if add_eos and not brought:
            ids.append(_required(tokenizer, "eos"))
            masks.append(np.array([whole or learnt]))
        if learnt and (add_eos or brought):
            ends.append(len(ids) - 1)
    mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    mask[:1] = running and mask[1:].all()
    return Example(np.array(ids, np.int32), mask, tuple(dict.fromkeys(ends)))


def _required(tokenizer: Tokenizer, name: str) -> int:
    index: int | None = getattr(tokenizer, f"{name}_id")
    if index is None:
        raise UserError(
            f"data.add_{name} is true, but the tokenizer of {tokenizer.path} has no {name} token; "
            f"set {name}_token in its tokenizer_config.json, or data.add_{name}: false"
        )
    return index


def _mask(segment: Segment, encoding: Encoding) -> NDArray[np.bool_]:
    """bool [tokens]: which of a segment's tokens are learnt."""
    if all(span.trained for span in segment.spans):
        return np.ones(len(encoding.ids), np.bool_)  # also tokens that stand for no character, like a leading "▁"
    lengths = [len(span.text) for span in segment.spans]
    characters = np.repeat([span.trained for span in segment.spans], lengths)
    trained_before = np.concatenate([[0], np.cumsum(characters)])
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    # A token that stands for no character (the space that SentencePiece puts in front, half of a letter that
    # normalisation takes apart) goes with those beside it.
    empty = offsets[:, 0] == offsets[:, 1]
    begin = np.where(empty, np.maximum(offsets[:, 0] - 1, 0), offsets[:, 0])
    end = np.where(empty, np.minimum(offsets[:, 1] + 1, len(characters)), offsets[:, 1])
    result: NDArray[np.bool_] = trained_before[end] > trained_before[begin]
    return result


def _ends(segment: Segment, encoding: Encoding) -> list[int]:
    """Places of the tokens with which the segment's learnt ends of answers end."""
    found, at = [], 0
    for span in segment.spans:
        begin, at = at, at + len(span.text)
        if span.end and span.trained and span.text:
            covering = [k for k, (a, b) in enumerate(encoding.offsets) if a < at and b > begin]
            found += covering[-1:]
    return found


def resolve_ends(config: DataConfig, tokenizer: Tokenizer) -> tuple[DataConfig, str]:
    """The configuration with add_bos and add_eos decided, and a line that says how and why.

    bos goes in front of a record where the tokenizer itself puts it. eos ends every answer and every document whatever
    the tokenizer does: that rule of a tokenizer is about any text, prompts too, and without eos a model would not learn
    to stop, nor where documents end.
    """
    bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
    eos = tokenizer.eos_id is not None if config.add_eos is None else config.add_eos
    first = "no bos first" if not bos else f"bos {''.join(map(tokenizer.token, tokenizer.opening))} first"
    first += f" ({tokenizer.adds_why if config.add_bos is None else 'data.add_bos'})"
    last = f"eos {tokenizer.token(tokenizer.eos_id)} ends" if eos and tokenizer.eos_id is not None else "no eos ends"
    why = "data.add_eos" if config.add_eos is not None else "" if eos else "the tokenizer has none"
    line = (
        f"each record: {first}; {last} answers and documents{f' ({why})' if why else ''}; a chat template has its own"
    )
    return dataclasses.replace(config, add_bos=bos, add_eos=eos), line


def check_ends(reports: Sequence[SourceReport], config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses a run that learns answers, but nothing that ends one.

    Raises:
        UserError: saying why that is so and how to train nevertheless.
    """
    answering = [report for report in reports if report.answered]
    if config.allow_no_end or not answering or any(report.ends for report in answering):
        return
    if not config.add_eos:
        why = (
            "data.add_eos is false"
            if tokenizer.eos_id is not None
            else f"the tokenizer of {tokenizer.path} names no eos_token"
        )
    else:
        why = "all ends are cut off by data.sequence_length" if any(r.truncated for r in answering) else "none is there"
    raise UserError(
        f"data: nothing that ends an answer is learnt, so the model would never stop ({why}); "
        "set data.add_eos: true, name eos_token in tokenizer_config.json, or raise data.sequence_length; "
        "data.allow_no_end: true trains nevertheless"
    )


def prompt_ids(
    template: Template,
    record: Record,
    tokenizer: Tokenizer,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
) -> list[int]:
    """Token ids of everything before the record's last answer, for inference.

    Args:
        template: the template.
        record: the record.
        tokenizer: the tokenizer.
        add_bos: begin with bos unless the template does; None: if the tokenizer itself does.
        add_eos: earlier answers end with eos; None: if the tokenizer has one.

    Raises:
        UserError: for what the template or the tokenizer cannot read.
    """
    rendered = template.render_prompt(record)
    bos = tokenizer.adds_bos if add_bos is None else add_bos
    eos = tokenizer.eos_id is not None if add_eos is None else add_eos
    try:
        example = encode_rendered([rendered], tokenizer, add_bos=bos, add_eos=eos, train_on_inputs=False)[0]
    except TextError as error:
        raise UserError(f"{record.name}: {error}") from None
    return [int(index) for index in example.input_ids]


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
) -> tuple[Examples, tuple[SourceReport, ...]]:
    """Reads and tokenises all records of the sources.

    Under group_texts nothing is too long, as rows are cut from the running text.

    Args:
        sources: read in this order.
        config: sequence_length, too_long, drop_unknown, add_bos, add_eos, train_on_inputs and packing are used.
        tokenizer: the tokenizer.
        vocab_size: rows of the model's embedding.
        progress: called now and then.

    Raises:
        UserError: unusable records or sources, a token the model does not have, or nothing left to learn.
    """
    config, _ = resolve_ends(config, tokenizer)
    assert config.add_bos is not None and config.add_eos is not None
    items: list[Example] = []
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
        report = SourceReport(source.path, name, why)
        reports.append(report)
        while batch := list(itertools.islice(records, _BATCH)):
            rendered = [template.render(record) for record in batch]
            for record, item in zip(batch, rendered, strict=True):
                report.answered += bool(item.answers)
                report.empty += bool(item.answers) and not any(answer.strip() for answer in item.answers)
                for role in item.lost:
                    report.lost[role] = report.lost.get(role, 0) + 1
                for column in unused(record, template.used(record)):
                    report.unused[column] = report.unused.get(column, 0) + 1
            try:
                encoded = encode_rendered(
                    rendered,
                    tokenizer,
                    add_bos=config.add_bos,
                    add_eos=config.add_eos,
                    train_on_inputs=config.train_on_inputs,
                    running=config.packing_mode == "group_texts",
                )
            except TextError as error:
                raise UserError(f"data: {batch[error.number].name}: {error}") from None
            for record, example in zip(batch, encoded, strict=True):
                if config.drop_unknown and (example.input_ids == tokenizer.unk_id).any():
                    report.records += 1
                    report.dropped_unknown += 1
                    continue
                kept = _fit(record, example, config, report)
                items.extend(kept)
                origin.extend([number] * len(kept))
                number_of.extend([record_count] * len(kept))
                record_count += 1
            if progress is not None:
                progress(source.path, report.records)
    examples = from_list(items, origin, number_of)
    _check(examples, sources, reports, tokenizer, vocab_size)
    return examples, tuple(reports)


def _fit(record: Record, example: Example, config: DataConfig, report: SourceReport) -> list[Example]:
    """The example in pieces that fit a row, counted; none when it is dropped."""
    report.records += 1
    length, room = len(example.input_ids), config.sequence_length
    pieces = [example]
    if config.packing_mode != "group_texts" and length > room:
        action = config.too_long
        if action == "auto":  # a document loses nothing by being cut in pieces; an answer loses its question
            action = "split" if report.template == "text" else "truncate"
        if action == "error":
            raise UserError(
                f"data: {record.name} has {length} tokens, data.sequence_length is {room}; "
                "raise it, or set data.too_long to truncate, split or drop"
            )
        if action == "drop":
            report.dropped_too_long += 1
            return []
        borders = [*range(0, length, room), length]
        if action == "split" and length % room == 1 and room > 2:
            borders[-2] -= 1  # a token alone in a row is never learnt, and the last one is the end
        pieces = [_piece(example, start, stop) for start, stop in itertools.pairwise(borders)]
        if action == "truncate":
            report.truncated += 1
            report.tokens_cut += length - room
            del pieces[1:]
        else:
            report.split += 1
            for piece in pieces:
                piece.loss_mask[0] = False  # nothing in the row predicts it
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
        found = "; ".join(report.line() for report in reports)
        raise UserError(
            f"data: no record with anything to learn is left ({found}). Look at data.sequence_length "
            "(answers may be cut off), data.too_long, whether the answers' column is empty, and whether weight: 0 or "
            "train: false stands on every answer"
        )
    largest = int(examples.input_ids.max())
    if largest >= vocab_size:
        raise UserError(
            f"data: token id {largest} ({tokenizer.token(largest)!r}) of the tokenizer {tokenizer.path} is outside of "
            f"the model's vocabulary of {vocab_size}; use the model's own tokenizer (tokenizer.path: null)"
        )


def epoch_order(examples: Examples, weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.int64]:
    """Indices of the examples seen in an epoch, in source order.

    A weight of 2.5 means every example twice, and half of them, drawn anew each epoch, once more.
    """
    parts = [np.zeros(0, np.int64)]
    for number, weight in enumerate(weights):
        members = np.flatnonzero(examples.source == number)
        whole = int(weight)
        parts += [members] * whole
        extra = round((weight - whole) * len(members))
        if extra:
            random = np.random.default_rng([seed, epoch, number, 1])
            parts.append(np.sort(random.choice(members, extra, replace=False)))
    return np.concatenate(parts)


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
