"""What a task of `jaxlm evaluate` is: requests to a model, figures from its answers, and what the report shows.

A task is a `Task` named TASK in a module of `jaxlm.evaluation.tasks`. All of its parts are pure functions of the data
file's records, of answers (a model's, or a file's) and of the task's own options, so that answers can be scored again,
beside others' answers, and on resamples of the records.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import Decoding
from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import matplotlib.figure

# A record of a data file: its fields by name.
Row = Mapping[str, Any]


# --- what a model is asked --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt in the model's own template (the one of its training, else its chat template, else as it stands).

    Attributes:
        text: the question.
        input: goes with it where the template has a place for one (alpaca's input).
        system: the system message, for templates of conversations.
        turns: earlier questions and answers, oldest first, for templates of conversations.
    """

    text: str
    input: str | None = None
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()


# A text that is read as it stands, behind the tokenizer's own bos; token ids as they stand; or a question.
Prompt = str | tuple[int, ...] | Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A question to the model that belongs to a record.

    Attributes:
        record: number of the record in the file, from 0.
        part: which of the record's requests this is; `score` finds the answer under this name.
        context: what the model reads.
    """

    record: int
    part: str = "answer"
    context: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLikelihood(Request):
    """How probable is each of several texts behind the context? The context is read once.

    Attributes:
        continuations: texts, with the white space that separates them from the context.
    """

    continuations: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Request):
    """How probable is each of several tokens behind the context?

    Attributes:
        ids: token ids.
    """

    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Request):
    """What does the model write behind the context?

    Attributes:
        settings: how it writes; `stop` texts end an answer, `samples` answers are given.
    """

    settings: Decoding


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request; which fields it has goes by the request's kind.

    Attributes:
        log_probs: natural logarithm of the probability of each continuation, or of each token of a `NextToken` (over
            the whole vocabulary).
        is_greedy: for each continuation, whether every one of its tokens was the most probable.
        num_tokens: tokens of each continuation.
        num_correct, num_bytes, num_characters: of a text that is scored as a whole: tokens that were the most probable,
            and the length of what was scored, as UTF-8 and as Unicode.
        texts: what was written, one for each sample. Answers that were made elsewhere have only this field.
        finishes: why each text ends: 'stop', 'length' or 'context'.
        error: why there is no answer, e.g. a prompt beyond the model's context. It counts as wrong, and is reported.
    """

    log_probs: tuple[float, ...] = ()
    is_greedy: tuple[bool, ...] = ()
    num_tokens: tuple[int, ...] = ()
    num_correct: tuple[int, ...] = ()
    num_bytes: tuple[int, ...] = ()
    num_characters: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    error: str | None = None


# The answers to the requests of one record, by part.
Answers = Mapping[str, Answer]


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure with its uncertainty.

    Attributes:
        value: the figure.
        stderr: standard error; None where none is known.
        n: number of records (or tokens, or pairs) that it is taken over.
        values: for a mean over records, the value of each that counts, by its number; else empty. Several models are
            compared record by record through it; without it, by scoring resampled records.
        higher_is_better: whether more is better; None where neither is.
    """

    value: float
    stderr: float | None
    n: int
    values: Mapping[int, float] = dataclasses.field(default_factory=dict, repr=False)
    higher_is_better: bool | None = True


def mean(values: Mapping[int, float], higher_is_better: bool | None = True) -> Figure:
    """The mean over records, with the standard error of a sample, s / sqrt(n) (as lm-evaluation-harness has it).

    Args:
        values: by number of the record. NaN of no records.
    """
    count = len(values)
    if not count:
        return Figure(math.nan, None, 0, {}, higher_is_better)
    average = math.fsum(values.values()) / count
    stderr = None
    if count > 1:
        variance = math.fsum((value - average) ** 2 for value in values.values()) / (count - 1)
        stderr = math.sqrt(variance / count)
    return Figure(average, stderr, count, dict(values), higher_is_better)


# --- a task -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a task that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task; the functions are pure, and are given the task's options last.

    Attributes:
        name: the word for --task.
        summary: a line for --help.
        expects: what a record holds, in words, for messages about a file that is another task's.
        version: counts up when figures of the same answers change.
        requests: (records, options, tokenizer) -> requests, in any order; the tokenizer is the model's.
        score: (records, answers, options) -> figures by name. `answers[i]` are those of `records[i]`, by part. Records
            may come resampled (some twice), so numbers of records count positions in the list.
        check: (record, options) -> what is wrong with it, else None; e.g. "has no 'question'". Every record of a file
            is checked before anything is asked.
        options: a frozen dataclass whose fields have defaults; they are given as --options.NAME VALUE.
        check_options: raises UserError for options that cannot be meant, before a model is looked at; None: all can.
        read: (path, options) -> records; the default reads .json (a list), .jsonl, .csv, .tsv and .parquet.
        key: a field that must differ between records, where they have it.
        details: (records, answers, figures, options) -> Markdown for report.md, behind the table; None: nothing.
        plot: (empty matplotlib figure, records, answers, figures, options): draws the PNG; None: bars of the figures.
        files: (records, answers, options) -> contents of further files of the output directory, by name.
    """

    name: str
    summary: str
    expects: str
    version: int = 1
    requests: Callable[[Sequence[Row], Any, Tokenizer], list[Request]]
    score: Callable[[Sequence[Row], Sequence[Answers], Any], dict[str, Figure]]
    check: Callable[[Row, Any], str | None]
    options: type = NoOptions
    check_options: Callable[[Any], None] | None = None
    read: Callable[[Path, Any], list[Row]] | None = None
    key: str | None = "id"
    details: Callable[[Sequence[Row], Sequence[Answers], Mapping[str, Figure], Any], str] | None = None
    plot: (
        Callable[[matplotlib.figure.Figure, Sequence[Row], Sequence[Answers], Mapping[str, Figure], Any], None] | None
    ) = None
    files: Callable[[Sequence[Row], Sequence[Answers], Any], dict[str, bytes]] | None = None
