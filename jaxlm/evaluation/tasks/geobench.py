"""GeoBench, K2's benchmark of geoscience: choices by the next token's probability, and free answers.

`geobench` is K2's own measure, on geobench_npee.json (choices, true or false) and geobench_apstudy.json. For the free
answers K2 published no measure but people's judgement of 50 of them; `geobench_subjective` is jaxlm's own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import geobench, next_token, text
from jaxlm.evaluation.task import (
    Answers,
    Figure,
    Generate,
    LogLikelihood,
    NextToken,
    Question,
    Request,
    Row,
    Task,
    mean,
)
from jaxlm.locate import ReadPath
from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import matplotlib.figure

CHOICES = ("choice", "tf", "apstudy")
_ASKED = {  # jaxlm's own wording: K2 published none
    "noun": "Explain this term of geoscience: {}",
    "completion": "Complete the sentence, in which empty brackets stand for what is missing: {}",
    "discussion": "{}",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of GeoBench.

    Args:
        few_shot: file of examples that stand in front of each question, K2's multiple_choice_samples_wa.txt or one of
            its form; null: none. True-or-false questions, for which K2 published none, have none.
    """

    few_shot: ReadPath | None = None


@dataclasses.dataclass(frozen=True)
class SubjectiveOptions:
    """Options of GeoBench's free answers.

    Args:
        max_new_tokens: most tokens of an answer.
    """

    max_new_tokens: int = 256


def _question(record: Row) -> geobench.Question:
    return geobench.Question(**{**record, "labels": tuple(record["labels"])})


def _check(record: Row, options: object) -> str | None:
    """What is wrong with a record; those of `_read` are right, others come with answers of an earlier run."""
    fields = {field.name for field in dataclasses.fields(geobench.Question)}
    if set(record) != fields:
        return f"must have the fields {', '.join(sorted(fields))}"
    if not record["answer"].strip():
        return "has an empty answer"
    return None


def _read(path: Path, kinds: Sequence[str], task: str) -> list[Row]:
    questions = [question for question in geobench.read_questions(path) if question.kind in kinds]
    if not questions:
        other = "geobench_subjective" if task == "geobench" else "geobench"
        raise UserError(f"data: {path} has no question of the kinds {', '.join(kinds)}; for others: --task {other}")
    return [
        {field.name: getattr(question, field.name) for field in dataclasses.fields(question)} for question in questions
    ]


def _examples(options: Options) -> dict[str, str]:
    """What stands in front of choices, by the ending of the prompt."""
    path = None if options.few_shot is None else Path(options.few_shot)
    return {ending: geobench.few_shot(path, ending) for ending in geobench.PROMPTS}


def _check_options(options: Options) -> None:
    _examples(options)


def prompts(records: Sequence[Row], options: Options) -> Iterator[tuple[int, geobench.Question, dict[str, str]]]:
    """The questions that count: number of the record, question, and its prompts by their ending."""
    examples = _examples(options)
    for number, record in enumerate(records):
        question = _question(record)
        if question.is_counted:
            texts = {
                ending: geobench.choice_prompt(question, ending, "" if question.kind == "tf" else examples[ending])
                for ending in geobench.PROMPTS
            }
            yield number, question, texts


def _requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    forms: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    requests: list[Request] = []
    for number, question, texts in prompts(records, options):
        if question.labels not in forms:
            forms[question.labels] = next_token.label_ids(lambda text: tokenizer.encode(text).ids, question.labels)
        ids = forms[question.labels]
        for ending, prompt in texts.items():
            requests.append(
                NextToken(
                    record=number,
                    part=_part(ending, ids),
                    context=prompt,
                    ids=tuple(token for tokens in ids.values() for token in tokens),
                )
            )
    return requests


def _part(ending: str, forms: Mapping[str, object]) -> str:
    """The name of a request says which forms of the labels its ids are, since figures are made without a tokenizer."""
    return f"{ending}:{'+'.join(forms)}"


def _probabilities(part: str, log_probs: Sequence[float], labels: Sequence[str]) -> dict[str, list[float]]:
    """The probabilities of the options, by form."""
    values = [math.exp(value) for value in log_probs]
    names, count = part.partition(":")[2].split("+"), len(labels)
    by_form = {name: values[place * count : (place + 1) * count] for place, name in enumerate(names)}
    return next_token.with_max(by_form)


def _score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Accuracy and entropy, by kind of question, ending of the prompt and form of the labels' tokens."""
    right: dict[str, dict[int, float]] = {}
    spread: dict[str, dict[int, float]] = {}
    guessed: dict[str, dict[int, float]] = {}
    for number, (record, parts) in enumerate(zip(records, answers, strict=True)):
        question = _question(record)
        if not question.is_counted:
            continue
        guessed.setdefault(question.kind, {})[number] = 1 / len(question.labels)
        for part, answer in parts.items():
            if answer.texts:
                chosen = chosen_label(answer.texts[0], question.labels)
                right.setdefault(f"{question.kind}_text", {})[number] = float(chosen == question.answer)
                continue
            ending, _, names = part.partition(":")
            forms = _probabilities(part, answer.log_probs, question.labels) if answer.log_probs else {}
            for form in [*names.split("+"), "max"]:
                name = f"{question.kind}_{ending}_{form}"
                hit = (
                    form in forms and question.labels[next_token.choose(forms[form], question.name)] == question.answer
                )
                right.setdefault(name, {})[number] = float(hit)
                if form in forms:
                    spread.setdefault(name, {})[number] = next_token.entropy(forms[form])
    figures = {f"{name}_accuracy": mean(values) for name, values in right.items()}
    figures |= {f"{kind}_random": mean(values, None) for kind, values in guessed.items()}
    return figures | {f"{name}_entropy": mean(values, None) for name, values in spread.items()}


def chosen_label(answer: str, labels: Sequence[str]) -> str | None:
    """The first label that stands alone in a written answer; None when there is none."""
    match = re.search(rf"(?<![\w\-])(?:{'|'.join(map(re.escape, labels))})(?![\w\-])", answer)
    return match.group() if match else None


def _details(
    records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options
) -> str:
    questions = [_question(record) for record in records]
    never = sum(question.is_counted and not question.can_score for question in questions)
    passed = sum(not question.is_counted for question in questions)
    lines = [
        '`wa`: the prompt ends with "The answer is:"; `woa`: without. `k2`: the token of the label as a text of its own'
        ", which K2's tables list; `plain`: its token at the beginning of a line, which is how K2's examples show "
        "answers; `max`: the larger probability of the two. Entropy is in bits, over the options. `random` is what "
        "guessing gives.",
        "",
        f"- Passed over, as in K2's script, because the answer is not one letter: {passed}",
        f"- Can never score, because K2's rule does not see the right option: {never}",
    ]
    return "\n".join(lines) + "\n"


def _plot(
    figure: matplotlib.figure.Figure,
    records: Sequence[Row],
    answers: Sequence[Answers],
    figures: Mapping[str, Figure],
    options: Options,
) -> None:
    """Accuracies with their standard errors, and lines where guessing is."""
    names = [name for name in figures if name.endswith("_accuracy")]
    axes = figure.add_subplot()
    values, errors = [figures[name].value for name in names], [figures[name].stderr or 0.0 for name in names]
    axes.barh([name.removesuffix("_accuracy") for name in names], values, xerr=errors)
    for name in (name for name in figures if name.endswith("_random")):
        axes.axvline(figures[name].value, linestyle="--", color="grey", label=name.replace("_", ", "))
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center")


def _subjective_requests(records: Sequence[Row], options: SubjectiveOptions, tokenizer: Tokenizer) -> list[Request]:
    requests: list[Request] = []
    settings = Decoding(max_new_tokens=options.max_new_tokens)
    for number, record in enumerate(records):
        question = Question(_ASKED[record["kind"]].format(record["text"]))
        requests.append(Generate(record=number, part="answer", context=question, settings=settings))
        requests.append(
            LogLikelihood(record=number, part="reference", context=question, continuations=(record["answer"],))
        )
    return requests


def _subjective_score(
    records: Sequence[Row], answers: Sequence[Answers], options: SubjectiveOptions
) -> dict[str, Figure]:
    """ROUGE of the answers, and perplexity of the reference answers, by kind of question."""
    figures: dict[str, Figure] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        numbers = [number for number, record in enumerate(records) if record["kind"] == kind]
        rouge: dict[str, dict[int, float]] = {name: {} for name in text.ROUGE}
        for number in numbers:
            written = answers[number].get("answer")
            scores = text.rouge(records[number]["answer"], written.texts[0] if written and written.texts else "")
            for name, value in scores.items():
                rouge[name][number] = value
        figures |= {f"{kind}_{name}": mean(values) for name, values in rouge.items()}
        read = [answers[number]["reference"] for number in numbers if "reference" in answers[number]]
        tokens = sum(sum(answer.num_tokens) for answer in read)
        if tokens:
            loss = -math.fsum(value for answer in read for value in answer.log_probs) / tokens
            figures[f"{kind}_perplexity"] = Figure(math.exp(min(loss, 700)), None, tokens, higher_is_better=False)
    return figures


def _subjective_details(
    records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: SubjectiveOptions
) -> str:
    return (
        "These are jaxlm's own figures. K2's authors had people judge 50 of the 939 free answers, and published "
        "neither the answers nor a program.\n"
    )


_EXPECTS = (
    "GeoBench's geobench_npee.json (noun, choice, completion, tf, qa, discussion) or geobench_apstudy.json "
    "(question: {stem, choices}, answerKey)"
)
TASKS = {
    task.name: task
    for task in (
        Task(
            name="geobench",
            summary="GeoBench of K2: choices, and true or false, by the probability of the next token.",
            expects=_EXPECTS,
            requests=_requests,
            score=_score,
            check=_check,
            options=Options,
            check_options=_check_options,
            read=lambda path, options: _read(path, CHOICES, "geobench"),
            key=None,  # every question of the apstudy file has the same id
            details=_details,
            plot=_plot,
        ),
        Task(
            name="geobench_subjective",
            summary="GeoBench's free answers: ROUGE, and perplexity of the reference (jaxlm's own figures).",
            expects=_EXPECTS,
            requests=_subjective_requests,
            score=_subjective_score,
            check=_check,
            options=SubjectiveOptions,
            read=lambda path, options: _read(path, geobench.SUBJECTIVE, "geobench_subjective"),
            key=None,
            details=_subjective_details,
        ),
    )
}
