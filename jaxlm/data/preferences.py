"""Records of preferences: two answers to one prompt, or one answer with a label.

All that belongs to a record is one document, so that packing, order and stores treat it like any other. In it the texts
stand one behind the other, each with its prompt in front: what is not trained, then what is. A trained token before one
that is not ends a text; `training/objectives/sequences.py` takes them apart again by that.

Pairs: the chosen text, then the rejected one. Labelled answers: the text, then its prompt with the answer of a
neighbouring record (which KTO needs), and behind an answer that is not wanted one more token.

Layouts: TRL's (prompt, chosen, rejected; prompt, completion, label; also conversations, and pairs whose prompt is what
both begin with), LLaMA-Factory's (a conversation or an instruction beside chosen and rejected, or ending in an answer
with a label) and hh-rlhf's (chosen and rejected, which begin with the same dialogue).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig
from jaxlm.data.encoding import Example, encode_rendered
from jaxlm.data.messages import ROLE_KEYS, messages_column, unused
from jaxlm.data.records import Record
from jaxlm.data.rendering import Rendered, Segment, Span, Template
from jaxlm.data.report import SourceReport
from jaxlm.data.templates import PromptTemplate, TextTemplate
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Tokenizer

FIELDS = ("prompt", "chosen", "rejected", "completion", "label")
HH_RLHF = "\n\nAssistant:"


def own_columns(columns: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Columns of the fields of preferences, and those of the template's."""
    return {k: v for k, v in columns.items() if k in FIELDS}, {k: v for k, v in columns.items() if k not in FIELDS}


def preference_examples(
    records: Sequence[Record],
    template: Template,
    columns: Mapping[str, str],
    config: DataConfig,
    tokenizer: Tokenizer,
    report: SourceReport,
) -> list[list[Example]]:
    """The document of each record, counted in the report; nothing for a record that is left out.

    A pair of equal answers says nothing, and half of a pair that is longer than a row says something else: both are
    left out.

    Raises:
        UserError: a record that holds no preference, or is too long with data.too_long: error.
    """
    own, rest = own_columns(columns)
    labelled = config.records == "labelled"
    read = [_read(record, own, rest, labelled) for record in records]
    texts: list[Rendered] = []
    for number, (record, (prompt, answers)) in enumerate(zip(records, read, strict=True)):
        if labelled:
            # Neighbours by twos, so that it depends on no other record of a batch; the last of an odd number has the
            # one before it.
            neighbour = number ^ 1 if number ^ 1 < len(read) else number - 1
            answers = [*answers, read[max(neighbour, 0)][1][0]]
        rendered = [_rendered(template, record, prompt, answer, rest) for answer in answers]
        used = template.used(_side(template, record, prompt, answers[0], rest)) | {
            own.get(name, name) for name in FIELDS
        }
        for column in unused(record, used):
            report.unused[column] = report.unused.get(column, 0) + 1
        report.answered += 1
        report.empty += not any(answer.strip() for text in rendered for answer in text.answers)
        texts += rendered
    assert config.add_bos is not None and config.add_eos is not None
    ends = dict(add_bos=config.add_bos, add_eos=config.add_eos)
    try:
        encoded = [_answer(each) for each in encode_rendered(texts, tokenizer, **ends, train_on_inputs=False)]
    except TextError as error:
        raise UserError(f"data: {records[error.number // 2].name}: {error}") from None
    documents = []
    for record, first, second in zip(records, encoded[::2], encoded[1::2], strict=True):
        more = (_MARK,) if labelled and not _label(record, own) else ()
        documents.append(_fitting(record, _joined(first, second, *more), config, report, first, second))
    return documents


_MARK = Example(np.zeros(1, np.int32), np.zeros(1, np.bool_))


def _fitting(
    record: Record, document: Example, config: DataConfig, report: SourceReport, first: Example, second: Example
) -> list[Example]:
    report.records += 1
    length = len(document.input_ids)
    if config.records == "pairs" and np.array_equal(first.input_ids, second.input_ids):
        report.dropped_equal += 1
    elif not (first.loss_mask.any() and second.loss_mask.any()):
        report.dropped_without_target += 1
    elif length > config.sequence_length:
        if config.too_long == "error":
            raise UserError(
                f"data: {record.name} has {length} tokens in both of its texts, data.sequence_length is "
                f"{config.sequence_length}; raise it, or set data.too_long: drop"
            )
        report.dropped_too_long += 1
    else:
        report.tokens += length
        report.trained_tokens += int(document.loss_mask.sum())
        report.ends += len(document.ends)
        report.end_ids |= {int(document.input_ids[end]) for end in document.ends}
        return [document]
    return []


def _answer(example: Example) -> Example:
    """A text up to the end of its last answer, which alone is trained."""
    start, stop = last_answer(example.loss_mask)
    if start == stop:
        return example
    mask = np.arange(stop) >= max(1, start)
    return Example(example.input_ids[:stop], mask, tuple(end for end in example.ends if end < stop and mask[end]))


def last_answer(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Where the last trained tokens that stand side by side begin and end; twice the end where none is trained."""
    stop = len(mask) - int(np.argmax(mask[::-1])) if mask.any() else len(mask)
    before = np.flatnonzero(~mask[:stop])
    return int(before[-1]) + 1 if len(before) else 0, stop


def _joined(*parts: Example) -> Example:
    starts = np.cumsum([0, *(len(part.input_ids) for part in parts)])
    ends = tuple(int(start) + end for start, part in zip(starts[:-1], parts, strict=True) for end in part.ends)
    ids, masks = ([getattr(part, name) for part in parts] for name in ("input_ids", "loss_mask"))
    return Example(np.concatenate(ids), np.concatenate(masks), ends)


def _read(record: Record, own: Mapping[str, str], rest: Mapping[str, str], labelled: bool) -> tuple[Any, list[Any]]:
    """(prompt, answers): texts or messages as the record has them; the prompt is None where the template reads it."""
    data = record.data
    prompt = data.get(own.get("prompt", "prompt"))
    conversation = messages_column(record, rest)
    if prompt is None and conversation is not None:
        prompt = data[conversation]
    names = [own.get(name, name) for name in (("completion",) if labelled else ("chosen", "rejected"))]
    answers = [data.get(name) for name in names]
    if labelled:
        _label(record, own)
        if answers == [None] and isinstance(prompt, list) and prompt:
            prompt, answers = prompt[:-1], prompt[-1:]
        elif answers == [None]:
            answers = [data.get(rest.get("output", "output"))]
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, (str, list, Mapping)) or not answer:
            raise UserError(
                f"data: {record.name}: its column {name!r} must be an answer: a text, a message or a list of messages; "
                f"found {answer!r:.60}. Columns found: {', '.join(map(str, data)) or 'none'}; others are named with "
                f"columns: {{{'completion' if labelled else 'chosen'}: NAME}}"
            )
    if prompt is None and rest.get("instruction", "instruction") not in data:
        prompt, answers = _common(record, answers)
    return prompt, [_single(record, name, answer) for name, answer in zip(names, answers, strict=True)]


def _common(record: Record, answers: list[Any]) -> tuple[Any, list[Any]]:
    """What two texts or conversations begin with, and the rest of each."""
    if len(answers) == 2 and all(isinstance(each, str) for each in answers):
        first, second = answers
        at = first.rfind(HH_RLHF) + len(HH_RLHF)
        if at < len(HH_RLHF) or first[:at] != second[:at]:
            at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
            at -= at > 0 and first[at - 1] == " "  # as TRL's extract_prompt: a space goes with the word behind it
    elif len(answers) == 2 and all(isinstance(each, list) for each in answers):
        at = next((n for n, (a, b) in enumerate(zip(*answers, strict=False)) if a != b), len(answers[0]) - 1)
    else:
        at = 0
    if at < 1:
        raise UserError(
            f"data: {record.name}: has no prompt: there is no column 'prompt', and its answers do not begin alike; "
            "name the column: columns: {prompt: NAME}"
        )
    return answers[0][:at], [answer[at:] for answer in answers]


def _single(record: Record, name: str, answer: Any) -> Any:
    if not isinstance(answer, list):
        return answer
    if len(answer) != 1:
        raise UserError(
            f"data: {record.name}: its column {name!r} has {len(answer)} messages behind the prompt; an answer is one"
        )
    return answer[0]


def _label(record: Record, own: Mapping[str, str]) -> bool:
    column = own.get("label", "label")
    value = record.data.get(column)
    if value not in (True, False) or value is None:
        raise UserError(
            f"data: {record.name}: its column {column!r} must be true (wanted) or false, found {value!r:.40}; another "
            "column is named with columns: {label: NAME}"
        )
    return bool(value)


def _side(template: Template, record: Record, prompt: Any, answer: Any, columns: Mapping[str, str]) -> Record:
    """The record as the template reads it, with this answer."""
    data = {k: v for k, v in record.data.items() if k not in FIELDS}
    if isinstance(template, PromptTemplate) or prompt is None:
        question, output = (columns.get(name, name) for name in ("instruction", "output"))
        texts = [_text(record, "answer", answer)]
        texts += [] if prompt is None else [_text(record, "prompt", _single(record, "prompt", prompt))]
        return Record(record.name, data | dict(zip((output, question), texts, strict=False)))
    messages = prompt if isinstance(prompt, list) else [_message("user", prompt)]
    column = messages_column(record, columns) or "messages"
    return Record(record.name, data | {column: [*messages, _message("assistant", answer)]})


def _rendered(template: Template, record: Record, prompt: Any, answer: Any, columns: Mapping[str, str]) -> Rendered:
    if not isinstance(template, TextTemplate):
        return template.render(_side(template, record, prompt, answer, columns))
    texts = _text(record, "prompt", prompt), _text(record, "answer", answer)
    return Rendered((Segment((Span(texts[0], False), Span(texts[1], True)), True),), answers=texts[1:])


def _text(record: Record, what: str, value: Any) -> str:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("content", "value") if key in value), value)
    if not isinstance(value, str):
        raise UserError(
            f"data: {record.name}: its {what} must be a text for this template, found {value!r:.60}; a conversation "
            "needs template: chat, or another with roles"
        )
    return value


def _message(role: str, value: Any) -> Any:
    return value if isinstance(value, Mapping) else {ROLE_KEYS[0]: role, "content": value}
