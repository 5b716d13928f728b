"""Questions with several answers, one of which is right: files of the shape of MMLU, ARC, C-Eval, CMMLU and others.

Answers are letters that are asked for behind the list of choices (MMLU's way), or the choices' own texts (ARC's). The
figures are lm-evaluation-harness's: `acc` takes the most probable answer, `acc_norm` divides each log-likelihood by the
number of characters first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.errors import UserError
from jaxlm.evaluation.prompting import Example, check_examples, choose_examples, field, filled, prompt_of
from jaxlm.evaluation.task import Answers, Figure, LogLikelihood, Request, Row, Task, mean
from jaxlm.locate import ReadPath
from jaxlm.tokenizer import Tokenizer

QUESTION = ("question", "Question", "query", "stem", "input")
CHOICES = ("choices", "options", "endings")
ANSWER = ("answer", "answerKey", "Answer", "answer_idx", "label", "gold", "target")
GROUP = ("subject", "category", "Subject")
LETTERS = "ABCDEFGHIJ"
MOST = 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How questions are asked.

    Args:
        answers: letters: the choices are listed and a letter is asked for; texts: each choice is an answer itself.
        shots: the number of examples before each question, the first ones of its own subject.
        examples: the file that they are taken from.
        description: stands before everything; {subject} and other fields in braces are filled in.
        chat: ask in the model's own template (examples are earlier turns), else as plain text.
        question: what stands before the question.
        cue: what stands before the answer.
    """

    answers: Literal["letters", "texts"] = "letters"
    shots: int = 0
    examples: ReadPath | None = None
    description: str = ""
    chat: bool = False
    question: str | None = None
    cue: str = "Answer:"


class Item(NamedTuple):
    """A question as every file's shape has it.

    Attributes:
        labels: the choices' names in the file: letters or numbers.
        right: place of the right choice.
    """

    question: str
    labels: tuple[str, ...]
    choices: tuple[str, ...]
    right: int


def read_item(record: Row) -> Item | str:
    """The question of a record, or what is wrong with it."""
    question = field(record, QUESTION)
    if isinstance(question, Mapping):  # OpenBookQA's and CommonsenseQA's {"stem": …, "choices": […]}
        record = {**record, **question}
        question = question.get("stem")
    if not isinstance(question, str) or not question.strip():
        return f"has no text in {', '.join(QUESTION)}"
    pair = _choices(record)
    if isinstance(pair, str):
        return pair
    labels, choices = pair
    if not 2 <= len(choices) <= MOST:
        return f"has {len(choices)} choices; 2 to {MOST} are expected"
    answer = field(record, ANSWER)
    if answer is None:
        return f"has no right answer in {', '.join(ANSWER)}"
    right = _place(answer, labels, choices)
    if right is None:
        return f"has the answer {answer!r}, which is none of its choices ({', '.join(labels)})"
    return Item(question.strip(), labels, choices, right)


def _choices(record: Row) -> tuple[tuple[str, ...], tuple[str, ...]] | str:
    """(labels, texts) of {"text": […], "label": […]}, a list of texts, {"A": …}, or columns A, B, ...."""
    value = field(record, CHOICES)
    if value is None:
        columns = [letter for letter in LETTERS if record.get(letter) not in (None, "")]
        if columns != list(LETTERS[: len(columns)]) or not columns:
            return f"has no choices in {', '.join(CHOICES)} or columns A, B, …"
        return tuple(columns), tuple(str(record[letter]).strip() for letter in columns)
    if isinstance(value, Mapping) and isinstance(value.get("text"), (list, tuple)):
        texts = value["text"]
        labels = value.get("label", value.get("labels", list(LETTERS[: len(texts)])))
        if not isinstance(labels, (list, tuple)) or len(labels) != len(texts):
            return f"has {len(texts)} choices, and not as many labels"
        return tuple(map(str, labels)), tuple(str(text).strip() for text in texts)
    if isinstance(value, Mapping):
        return tuple(map(str, value)), tuple(str(text).strip() for text in value.values())
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, Mapping) for each in value):
        labels = [each.get("label") for each in value]
        texts = [each.get("text") for each in value]
        if None in labels or None in texts:
            return "has choices without a label or a text"
        return tuple(map(str, labels)), tuple(str(text).strip() for text in texts)
    if isinstance(value, (list, tuple)):
        letters = [chr(ord("A") + at) for at in range(len(value))]
        return tuple(letters), tuple(str(text).strip() for text in value)
    return f"has choices of the type {type(value).__name__}; a list is expected"


def _place(answer: Any, labels: Sequence[str], choices: Sequence[str]) -> int | None:
    """The place of the right choice: by its label, a number from 0, or its text."""
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool):
        return None
    if isinstance(answer, int) and str(answer) not in labels:
        return answer if 0 <= answer < len(choices) else None
    text = str(answer).strip()
    for names in (labels, [label.upper() for label in labels]):
        if text in names or text.upper() in names:
            return list(names).index(text if text in names else text.upper())
    if text.isdigit() and text not in choices:
        return int(text) if int(text) < len(choices) else None
    return list(choices).index(text) if text in choices else None


def _item(record: Row) -> Item:
    item = read_item(record)
    assert isinstance(item, Item), item
    return item


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    item = read_item(record)
    return item if isinstance(item, str) else None


def _asked(item: Item, options: Options) -> str:
    """The question as text, with its cue."""
    first = options.question if options.question is not None else "" if options.answers == "letters" else "Question: "
    if options.answers == "texts":
        return f"{first}{item.question}\n{options.cue}"
    letters = _names(item, options)
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, item.choices, strict=True))
    return f"{first}{item.question}\n{listed}\n{options.cue}"


def _names(item: Item, options: Options) -> list[str]:
    """What may follow: letters, or the choices' texts."""
    if options.answers == "texts":
        return list(item.choices)
    return [chr(ord("A") + at) for at in range(len(item.choices))]


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """A log-likelihood of each answer of each question."""
    result: list[Request] = []
    for number, record in enumerate(records):
        item = _item(record)
        examples = []
        for chosen in choose_examples(options.examples, options.shots, record, GROUP):
            other = read_item(chosen)
            if isinstance(other, str):
                raise UserError(f"options.examples: {options.examples}: an example {other}")
            examples.append(Example(_asked(other, options), _names(other, options)[other.right]))
        description = filled(options.description, record, "options.description")
        context = prompt_of(_asked(item, options), examples, description, options.chat, options.cue)
        space = "" if options.chat else " "
        continuations = tuple(f"{space}{name}" for name in _names(item, options))
        result.append(LogLikelihood(record=number, context=context, continuations=continuations))
    return result


def chosen(item: Item, answers: Answers, options: Options, normalised: bool) -> int | None:
    """The place of the choice that an answer takes; None where it takes none.

    Args:
        normalised: by log-likelihood for each character of a choice.
    """
    answer = answers.get("answer")
    if answer is None or answer.error is not None:
        return None
    if answer.texts:
        return place_in_text(answer.texts[0], item)
    if len(answer.log_probs) != len(item.choices):
        return None
    sizes = [len(name) if normalised else 1 for name in _names(item, options)]
    values = [value / max(size, 1) for value, size in zip(answer.log_probs, sizes, strict=True)]
    return values.index(max(values))


def place_in_text(text: str, item: Item) -> int | None:
    """The choice that a text names: it is one; else the first letter said as an answer; else the only choice in it."""
    bare = text.strip()
    texts = [choice.casefold() for choice in item.choices]
    if bare.casefold() in texts:
        return texts.index(bare.casefold())
    letters = [chr(ord("A") + at) for at in range(len(item.choices))]
    last = letters[-1]
    # "The answer is (B)"; then a letter by itself that does not begin a sentence, as in "A rock".
    for pattern in (
        rf"(?i:answer|答案)\W*(?:(?i:is|是|为)\W*)?([A-{last}])(?![A-Za-z0-9'])",
        rf"(?<![A-Za-z0-9])([A-{last}])(?![A-Za-z0-9'])(?!\s+[a-z])",
    ):
        if match := re.search(pattern, bare):
            return letters.index(match.group(1))
    named = [at for at, choice in enumerate(texts) if choice and choice in bare.casefold()]
    return named[0] if len(named) == 1 else None


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """acc; with texts acc_norm; with letters the probability of the right one among them; accuracy by chance."""
    items = [_item(record) for record in records]
    figures = {"acc": mean(dict(enumerate(_hits(items, answers, options, False))))}
    has_scores = any(answer.log_probs for parts in answers for answer in parts.values())
    if options.answers == "texts" and has_scores:
        figures["acc_norm"] = mean(dict(enumerate(_hits(items, answers, options, True))))
    if has_scores:
        figures["probability"] = mean(dict(enumerate(map(_probability, items, answers))))
    by_chance = math.fsum(1 / len(item.choices) for item in items) / len(items)
    figures["chance"] = Figure(by_chance, None, len(items), higher_is_better=None)
    return figures


def _hits(items: Sequence[Item], answers: Sequence[Answers], options: Options, normalised: bool) -> list[float]:
    pairs = zip(items, answers, strict=True)
    return [float(chosen(item, each, options, normalised) == item.right) for item, each in pairs]


def _probability(item: Item, answers: Answers) -> float:
    """Share of the right answer in the probability of all of them; 0 without scores."""
    answer = answers.get("answer")
    if answer is None or len(answer.log_probs) != len(item.choices):
        return 0.0
    most = max(answer.log_probs)
    shares = [math.exp(value - most) for value in answer.log_probs]
    return shares[item.right] / math.fsum(shares)


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """Accuracy by subject, and how often each place is chosen and right."""
    items = [_item(record) for record in records]
    hits = _hits(items, answers, options, False)
    groups: dict[str, dict[int, float]] = {}
    for number, record in enumerate(records):
        name = field(record, GROUP)
        if name is not None:
            groups.setdefault(str(name), {})[number] = hits[number]
    lines = []
    if groups:
        lines += ["| subject | acc | n |", "|---|---:|---:|"]
        lines += [f"| {name} | {mean(values).value:.4f} | {len(values):,} |" for name, values in sorted(groups.items())]
        macro = sum(mean(values).value for values in groups.values()) / len(groups)
        lines += ["", f"Mean over subjects: {macro:.4f}", ""]
    taken = [chosen(item, each, options, False) for item, each in zip(items, answers, strict=True)]
    most = max(len(item.choices) for item in items)
    lines += ["| choice | taken | right |", "|---|---:|---:|"]
    for at in range(most):
        right = sum(item.right == at for item in items)
        lines.append(f"| {chr(ord('A') + at)} | {taken.count(at):,} | {right:,} |")
    lines.append(f"| none | {taken.count(None):,} | |")
    return "\n".join(lines)


TASK = Task(
    name="multiple_choice",
    summary="Questions with several answers (MMLU, ARC, C-Eval, CMMLU, …): accuracy by log-likelihood.",
    expects="a question, choices (a list, ARC's text and label, or columns A, B, …) and an answer",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    check_options=lambda options: check_examples(options.examples, options.shots),
    details=details,
)
