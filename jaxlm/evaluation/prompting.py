"""Questions with examples before them, for tasks that ask in a few lines of text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jaxlm.config import Decoding, SourceConfig
from jaxlm.data.records import read_records
from jaxlm.errors import UserError
from jaxlm.evaluation.task import Generate, Prompt, Question, Request, Row
from jaxlm.locate import ReadPath


class Example(NamedTuple):
    """A question with its answer, as text."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """How questions that are answered in writing are asked.

    Args:
        shots: the number of examples before each question.
        examples: the file that they are taken from.
        description: stands before everything; fields in braces are filled in.
        chat: ask in the model's own template (examples are earlier turns), else as plain text.
        question: what stands before the question.
        cue: what stands before the answer.
        max_new_tokens: most tokens of an answer.
        stop: texts that end an answer; null: the task's own, in a chat nothing.
    """

    shots: int = 0
    examples: ReadPath | None = None
    description: str = ""
    chat: bool = False
    question: str = "Question: "
    cue: str = "Answer:"
    max_new_tokens: int = 64
    stop: tuple[str, ...] | None = None


def written_answers(
    records: Sequence[Row],
    options: QuestionOptions,
    *,
    ask: Callable[[Row], str],
    solve: Callable[[Row], str],
    check: Callable[[Row], str | None],
    group: Sequence[str],
    end: str,
) -> list[Request]:
    """An answer to each question, written greedily.

    Args:
        ask: a record as a question, with its cue.
        solve: the answer of an example.
        check: what is wrong with an example, else None.
        group: fields that name the group whose examples are a question's own.
        end: ends an answer where `options.stop` is null, but not in a chat.

    Raises:
        UserError: for examples or descriptions that cannot be used.
    """
    stop = (() if options.chat else (end,)) if options.stop is None else options.stop
    settings = Decoding(max_new_tokens=options.max_new_tokens, stop=stop)
    result: list[Request] = []
    for number, record in enumerate(records):
        examples = []
        for chosen in choose_examples(options.examples, options.shots, record, group):
            problem = check(chosen)
            if problem is not None:
                raise UserError(f"options.examples: {options.examples}: an example {problem}")
            examples.append(Example(ask(chosen), solve(chosen)))
        description = filled(options.description, record, "options.description")
        context = prompt_of(ask(record), examples, description, options.chat, options.cue)
        result.append(Generate(record=number, context=context, settings=settings))
    return result


def field(record: Row, names: Sequence[str]) -> Any:
    """The value of the first of several names that a record has; None where it has none."""
    return next((record[name] for name in names if record.get(name) is not None), None)


@lru_cache(maxsize=8)
def read_examples(path: str) -> tuple[Row, ...]:
    """The records of a file of examples.

    Raises:
        UserError: it is missing, broken or empty.
    """
    try:
        return tuple(record.data for record in read_records(SourceConfig(path=path)))
    except UserError as error:
        raise UserError(f"options.examples: {str(error).removeprefix('data: ')}") from None


def check_examples(path: str | None, shots: int) -> None:
    """Raises UserError where there are not that many examples."""
    choose_examples(path, shots, {}, ())


def choose_examples(path: str | None, shots: int, record: Row, group: Sequence[str]) -> list[Row]:
    """The examples before a question: the first ones of the file, of the question's own group where it names one.

    Args:
        path: the file; needed where `shots` is not 0.
        shots: their number.
        group: fields that name the group, e.g. subject.

    Raises:
        UserError: there are fewer.
    """
    if shots < 0:
        raise UserError(f"options.shots: {shots} must be 0 or more")
    if shots == 0:
        return []
    if path is None:
        raise UserError(f"options.examples: name the file that the {shots} examples are taken from")
    examples = read_examples(path)
    own = field(record, group)
    if own is not None and any(field(example, group) is not None for example in examples):
        examples = tuple(example for example in examples if field(example, group) == own)
    if len(examples) < shots:
        of = "" if own is None else f" of {own!r}"
        raise UserError(f"options.shots: {shots}, but {path} has {len(examples)} examples{of}")
    return list(examples[:shots])


def prompt_of(
    question: str, examples: Sequence[Example], description: str, chat: bool, cue: str = "", gap: str = "\n\n"
) -> Prompt:
    """A question behind its examples.

    Args:
        question: with its cue ("Answer:") at the end.
        description: stands first.
        chat: ask in the model's own template, examples as earlier turns.
        cue: taken off the end of each question in a chat, where the turn itself asks.
        gap: between examples, in a text.

    Returns:
        a text without white space at its end, or a question.
    """
    if chat:
        turns = tuple((_without(example.question, cue), example.answer) for example in examples)
        text = _without(question, cue)
        if description and turns:
            turns = ((f"{description}\n\n{turns[0][0]}", turns[0][1]), *turns[1:])
        elif description:
            text = f"{description}\n\n{text}"
        return Question(text, turns=turns)
    parts = [description] * bool(description) + [f"{each.question} {each.answer}" for each in examples]
    return gap.join([*parts, question])


def _without(text: str, cue: str) -> str:
    return text.removesuffix(cue).rstrip()


def filled(form: str, record: Row, key: str) -> str:
    """A text with {names} as a record's fields.

    Args:
        key: the option that the form is, for messages.

    Raises:
        UserError: for a name that the record does not have.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if record.get(name) is None:
            known = ", ".join(map(str, record))
            raise UserError(f"{key}: {{{name}}}: the record has no field {name!r}; it has {known}")
        return str(record[name])

    return re.sub(r"\{(\w+)\}", value, form)
