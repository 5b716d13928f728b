"""Rendered records to token ids and loss masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig
from jaxlm.data.records import Record
from jaxlm.data.rendering import Rendered, Segment, Span, Template
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Ids, Tokenizer


@dataclass(frozen=True)
class Example:
    """One record.

    Args:
        input_ids: int32 [n].
        loss_mask: bool [n]: True where the token is a target to learn.
        ends: places of the special tokens that end an answer.
        encoder_ids: int32 [m], what an encoder reads; None for a decoder alone, whose `input_ids` hold all of it.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    ends: tuple[int, ...] = ()
    encoder_ids: NDArray[np.int32] | None = None


def encode_rendered(
    records: Sequence[Rendered],
    tokenizer: Tokenizer,
    *,
    add_bos: bool,
    add_eos: bool,
    train_on_inputs: bool,
    running: bool = False,
) -> list[Example]:
    """Tokens and masks of rendered records, not truncated; the first token of each is masked.

    A token is a target when it covers at least one trained character, so a token across the border between prompt and
    answer is trained. What opens an answer (see `Tokenizer.opens_answers`) opens the last one, which alone is trained;
    a text that is all answer begins with it, and a prompt ends with it. `running`: the records become one running text,
    where the first token of one is trained like the others if all of them are (as HF's run_clm trains every document's
    bos).

    Raises:
        UserError: bos or eos is asked for and the tokenizer has none.
        TextError: a record with what the tokenizer cannot read; its number is the record's place in `records`.
    """
    segments = [segment for record in records for segment in record.segments]
    special = {record.special_tokens for record in records}
    if len(special) > 1:
        raise AssertionError("records of one call must come from one template")
    # Behind an eos a segment goes on; it does not begin a text.
    continued = [
        number > 0 and add_eos and record.segments[number - 1].eos
        for record in records
        for number in range(len(record.segments))
    ]
    try:
        texts = [segment.text for segment in segments]
        placed = [_needs_places(segment) for segment in segments]
        encodings = iter(tokenizer.encode_arrays(texts, next(iter(special), None), continued, placed))
    except TextError as error:
        owners = [number for number, record in enumerate(records) for _ in record.segments]
        raise TextError(owners[error.number], str(error)) from None
    return [_join(record, encodings, tokenizer, add_bos, add_eos, train_on_inputs, running) for record in records]


def _join(
    record: Rendered,
    encodings: Iterator[Ids],
    tokenizer: Tokenizer,
    add_bos: bool,
    add_eos: bool,
    whole: bool,
    running: bool,
) -> Example:
    parts: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    ends: list[int] = []
    length = 0
    for segment in record.segments:
        encoding = next(encodings)
        own = np.ones(len(encoding.ids), np.bool_) if whole else _mask(segment, encoding)
        # Words that a template ends turns with are trained too, but no token stops a generation there.
        stopping = (place for place in _ends(segment, encoding) if tokenizer.is_end(int(encoding.ids[place])))
        ends += [length + place for place in stopping]
        parts.append(encoding.ids)
        masks.append(own)
        length += len(encoding.ids)
        if not segment.eos:
            continue
        trained = segment.spans[-1].trained
        # As alpaca-lora: an answer that brings its own eos gets no second one.
        last = next((part[-1] for part in reversed(parts) if len(part)), None)
        brought = last is not None and last == tokenizer.eos_id
        if add_eos and not brought:
            parts.append(np.array([_required(tokenizer, "eos")], np.int32))
            masks.append(np.array([whole or trained]))
            length += 1
        if trained and (add_eos or brought):
            ends.append(length - 1)
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    if add_bos and not record.has_bos:
        opening = tokenizer.opening or (_required(tokenizer, "bos"),)
        at = 0
        if tokenizer.opens_answers:
            at = _last_answer(mask)
            mask[:at] = False
        ids = np.concatenate([ids[:at], np.array(opening, np.int32), ids[at:]])
        mask = np.concatenate([mask[:at], np.zeros(len(opening), np.bool_), mask[at:]])
        ends = [end + len(opening) for end in ends if end >= at]  # the end of an answer that is learned
    mask[:1] = running and mask[1:].all()
    return Example(ids, mask, tuple(dict.fromkeys(ends)))


def _last_answer(mask: NDArray[np.bool_]) -> int:
    """The place where the last trained tokens begin; behind all where none are."""
    if not mask.any():
        return len(mask)
    stop = int(np.flatnonzero(mask)[-1])
    before = np.flatnonzero(~mask[:stop])
    return int(before[-1]) + 1 if len(before) else 0


def encode_pairs(
    prompts: Sequence[Rendered],
    records: Sequence[Rendered],
    tokenizer: Tokenizer,
    *,
    add_bos: bool,
    add_eos: bool,
    start_id: int,
) -> list[Example]:
    """Records for an encoder and a decoder: the prompt is read by the one, its last answer written by the other.

    The two are tokenised apart, and each ends with one eos. Nothing of the prompt is trained.

    Args:
        prompts: everything before the last answers, see `Template.render_prompt`.
        records: the whole records.
        start_id: the token that the decoder begins with.

    Raises:
        UserError: bos or eos is asked for and the tokenizer has none.
        TextError: as `encode_rendered`.
    """
    sources = [source_ids(prompt.input_ids, tokenizer, add_eos) for prompt in _encoded(prompts, tokenizer, add_bos)]
    texts = [
        Rendered((Segment((Span("".join(record.answers[-1:]), True),), True),), special_tokens=record.special_tokens)
        for record in records
    ]
    answers = encode_rendered(texts, tokenizer, add_bos=False, add_eos=add_eos, train_on_inputs=False)
    examples = []
    for record, source, answer in zip(records, sources, answers, strict=True):
        # An answer that is not to be learned is the last one all the same.
        last = record.segments[-1].spans if record.segments else ()
        learned = bool(record.answers) and any(span.trained for span in last)
        ids = np.concatenate([[start_id], answer.input_ids]).astype(np.int32)
        mask = np.concatenate([[False], np.full(len(answer.input_ids), learned)])
        examples.append(Example(ids, mask, tuple(end + 1 for end in answer.ends), source))
    return examples


def _encoded(prompts: Sequence[Rendered], tokenizer: Tokenizer, add_bos: bool) -> list[Example]:
    return encode_rendered(prompts, tokenizer, add_bos=add_bos, add_eos=False, train_on_inputs=False)


def source_ids(prompt: NDArray[np.int32], tokenizer: Tokenizer, add_eos: bool) -> NDArray[np.int32]:
    """What an encoder reads of a prompt: with one eos at its end."""
    if not add_eos or (len(prompt) and prompt[-1] == tokenizer.eos_id):
        return prompt
    return np.append(prompt, np.int32(_required(tokenizer, "eos")))


def _required(tokenizer: Tokenizer, name: str) -> int:
    index: int | None = getattr(tokenizer, f"{name}_id")
    if index is None:
        raise UserError(
            f"data.add_{name} is true, but the tokenizer of {tokenizer.path} has no {name} token; "
            f"set {name}_token in its tokenizer_config.json, or data.add_{name}: false"
        )
    return index


def _needs_places(segment: Segment) -> bool:
    """Whether it matters which characters a segment's tokens stand for."""
    spans = segment.spans
    return any(span.trained != spans[0].trained or (span.end and span.trained) for span in spans)


def _mask(segment: Segment, encoding: Ids) -> NDArray[np.bool_]:
    """bool [tokens]: which of a segment's tokens are trained."""
    if all(span.trained for span in segment.spans):
        return np.ones(len(encoding.ids), np.bool_)  # also tokens that stand for no character, like a leading "▁"
    if not any(span.trained for span in segment.spans):
        return np.zeros(len(encoding.ids), np.bool_)
    assert encoding.begin is not None and encoding.end is not None
    lengths = [len(span.text) for span in segment.spans]
    characters = np.repeat([span.trained for span in segment.spans], lengths)
    trained_before = np.concatenate([[0], np.cumsum(characters)])
    # A token that stands for no character (the space that SentencePiece puts in front, half of a letter that
    # normalisation takes apart) goes with those beside it.
    empty = encoding.begin == encoding.end
    begin = np.where(empty, np.maximum(encoding.begin - 1, 0), encoding.begin)
    end = np.where(empty, np.minimum(encoding.end + 1, len(characters)), encoding.end)
    result: NDArray[np.bool_] = trained_before[end] > trained_before[begin]
    return result


def _ends(segment: Segment, encoding: Ids) -> list[int]:
    """Places of the tokens with which the segment's trained ends of answers end."""
    places, at = [], 0
    for span in segment.spans:
        begin, at = at, at + len(span.text)
        if span.end and span.trained and span.text:
            assert encoding.begin is not None and encoding.end is not None
            places += np.flatnonzero((encoding.begin < at) & (encoding.end > begin))[-1:].tolist()
    return places


def resolve_ends(config: DataConfig, tokenizer: Tokenizer) -> tuple[DataConfig, str]:
    """The configuration with add_bos and add_eos decided, and a line that says how and why.

    bos goes in front of a record where the tokenizer itself puts it. eos ends every answer and every document whatever
    the tokenizer does: that rule of a tokenizer is about any text, prompts too, and without eos a model would not learn
    to stop, nor where documents end.
    """
    bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
    eos = tokenizer.eos_id is not None if config.add_eos is None else config.add_eos
    opening = "".join(map(tokenizer.token, tokenizer.opening))
    first = "no bos first" if not bos else f"bos {opening} first"
    if bos and tokenizer.opens_answers:
        first = f"{opening} in front of the last answer, which alone is trained"
    first += f" ({tokenizer.adds_why if config.add_bos is None else 'data.add_bos'})"
    last = f"eos {tokenizer.token(tokenizer.eos_id)} ends" if eos and tokenizer.eos_id is not None else "no eos ends"
    why = "data.add_eos" if config.add_eos is not None else "" if eos else "the tokenizer has none"
    line = (
        f"each record: {first}; {last} answers and documents{f' ({why})' if why else ''}; a chat template has its own"
    )
    return dataclasses.replace(config, add_bos=bos, add_eos=eos), line


def prompt_ids(
    template: Template,
    record: Record,
    tokenizer: Tokenizer,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    for_encoder: bool = False,
) -> list[int]:
    """Token ids of everything before the record's last answer, for inference.

    Args:
        template: the template.
        record: the record.
        tokenizer: the tokenizer.
        add_bos: begin with bos unless the template does; None: if the tokenizer itself does.
        add_eos: earlier answers end with eos; None: if the tokenizer has one.
        for_encoder: an encoder reads the prompt: eos stands at its end alone.

    Raises:
        UserError: for what the template or the tokenizer cannot read.
    """
    rendered = template.render_prompt(record)
    bos = tokenizer.adds_bos if add_bos is None else add_bos
    eos = tokenizer.eos_id is not None if add_eos is None else add_eos
    try:
        inside = eos and not for_encoder
        example = encode_rendered([rendered], tokenizer, add_bos=bos, add_eos=inside, train_on_inputs=False)[0]
    except TextError as error:
        raise UserError(f"{record.name}: {error}") from None
    ids = source_ids(example.input_ids, tokenizer, eos) if for_encoder else example.input_ids
    return [int(index) for index in ids]
