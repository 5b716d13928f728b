"""GeoBench (K2): its files, its prompts to the byte, and its way of counting.

Facts: `evaluation/run_eval.py` and `post_process.py` of davendw49/k2. The file that K2 read its prompts from is not
published; the published examples (`multiple_choice_samples_wa.txt`) show their form, which is written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_value

SUBJECTIVE = ("noun", "completion", "discussion")  # K2's 939; `qa` is not counted among them
KINDS = ("noun", "choice", "completion", "tf", "qa", "discussion")
ANSWER_IS = "The answer is:\n"
PROMPTS = {"wa": ANSWER_IS, "woa": ""}
_CHOOSE = "Identify the choice that best completes the statement or answers the question."
_JUDGE = "Decide whether the statement is true or false. Answer with True or False."  # jaxlm's own: K2 published none
_LETTER = re.compile(r"(?<=[^\w\-])[A-Z](?=[^\w\-])")


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        name: "file: choice 3", for messages and for files of answers.
        kind: a key of the npee file, or "apstudy".
        text: the question; with its options, where it has some.
        labels: the options that can be chosen, as K2 counts them; empty for a question with a free answer.
        answer: the right label, or the right text.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]
    answer: str

    @property
    def is_counted(self) -> bool:
        """Whether K2 counts it: a choice whose answer is not one letter is passed over."""
        return self.kind == "tf" or len(self.answer) == 1

    @property
    def can_score(self) -> bool:
        """Whether the right answer is among the options that K2's rule finds."""
        return self.answer in self.labels


def num_options(text: str) -> int:
    """The number of options of a question by K2's rule.

    Single capital letters that neither a letter, a digit nor a hyphen touches are options; of the sorted different
    ones, those are counted that stand at their own place of the alphabet: {A, B, C} is 3, {A, B, D} 2, {B, C} 0.
    """
    letters = sorted(set(_LETTER.findall(text)))
    return sum(letter == chr(ord("A") + place) for place, letter in enumerate(letters))


def read_questions(path: Path) -> list[Question]:
    """The questions of geobench_npee.json or geobench_apstudy.json.

    Raises:
        UserError: for a file of another form, a missing key, columns of different lengths, or an answer that is not an
            option.
    """
    content = read_value(path)
    if isinstance(content, dict):
        return _npee(path, content)
    if isinstance(content, list) and content:
        return [_apstudy(f"{path}: question {number}", entry) for number, entry in enumerate(content, 1)]
    raise UserError(
        f"data: {path} is not a file of GeoBench; expected geobench_npee.json, an object with {', '.join(KINDS)}, or "
        "geobench_apstudy.json, a list of {id, question: {stem, choices}, answerKey}"
    )


def _npee(path: Path, content: Mapping[str, Any]) -> list[Question]:
    strange = [key for key in content if key not in KINDS]
    if strange or not content:
        what = f"found the key {strange[0]!r}" if strange else "it is empty"
        raise UserError(f"data: {path} is not GeoBench's npee file: expected keys among {', '.join(KINDS)}; {what}")
    questions = []
    for kind, columns in content.items():
        lists: list[Any] = [columns.get(key) if isinstance(columns, dict) else None for key in ("question", "answer")]
        if not all(isinstance(column, list) and all(isinstance(text, str) for text in column) for column in lists):
            raise UserError(f"data: {path}: {kind}: expected {{question: [texts], answer: [texts]}}")
        texts, answers = lists
        if len(texts) != len(answers):
            raise UserError(f"data: {path}: {kind}: {len(texts)} questions and {len(answers)} answers; one is missing")
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), 1):
            name = f"{path}: {kind} {number}"
            labels: tuple[str, ...] = ()
            if kind == "tf":
                labels = ("True", "False")
                if answer not in labels:
                    raise UserError(f"data: {name}: the answer is {answer!r}; expected True or False")
            elif kind == "choice":
                labels = tuple(chr(ord("A") + place) for place in range(num_options(text)))
                if not labels:
                    raise UserError(f"data: {name}: has no options; expected lines that begin with 'A. ', 'B. ', …")
            questions.append(Question(name, kind, text, labels, answer))
    return questions


def _apstudy(name: str, entry: Any) -> Question:
    question = entry.get("question") if isinstance(entry, dict) else None
    choices = question.get("choices") if isinstance(question, dict) else None
    answer: Any = entry.get("answerKey") if isinstance(entry, dict) else None
    try:
        labels = tuple(choice["label"] for choice in choices)  # type: ignore[union-attr]
        options = [choice["text"] for choice in choices]  # type: ignore[union-attr]
        stem = question["stem"]  # type: ignore[index]
    except (TypeError, KeyError):
        raise UserError(
            f"data: {name} is not a question of GeoBench's apstudy file: expected "
            "{id, question: {stem, choices: [{text, label}, …]}, answerKey}"
        ) from None
    if not all(isinstance(text, str) for text in (stem, *labels, *options)) or not labels:
        raise UserError(f"data: {name}: stem, texts and labels must be texts, and there must be choices")
    if answer not in labels or len(set(labels)) != len(labels):
        raise UserError(f"data: {name}: answerKey is {answer!r}; expected one of {', '.join(labels)}, each once")
    return Question(name, "apstudy", question_text(stem, dict(zip(labels, options, strict=True))), labels, answer)


def question_text(stem: str, options: Mapping[str, str]) -> str:
    """Stem and options, as K2's examples write them."""
    return "\n".join([stem, "Choose from:", *(f"{label}. {text}" for label, text in options.items())])


def choice_prompt(question: Question, ending: str, examples: str = "") -> str:
    """What the model is asked; the next token is its answer.

    Args:
        question: a choice, a tf or an apstudy question.
        ending: "wa", with "The answer is:" as the last line, or "woa", without.
        examples: of `few_shot`, "" for none.
    """
    task = _JUDGE if question.kind == "tf" else _CHOOSE
    return f"{examples}### Instruction:\n{task}\n{question.text}\n\n### Response:\n{PROMPTS[ending]}"


def answered(question: Question, ending: str) -> str:
    """An example: a question with its answer, as K2's file of examples has it."""
    return f"{choice_prompt(question, ending)}{question.answer}\n"


def few_shot(path: Path | None, ending: str) -> str:
    """What stands in front of a prompt: the examples of a file, whose form is K2's multiple_choice_samples_wa.txt.

    Two empty lines part them, also from the question, which the file's own end has one of. Without the line "The answer
    is:" for "woa".

    Raises:
        UserError: when the file is missing, or is not of this form.
    """
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"options.few_shot: {path} cannot be read ({error})") from None
    if not text.startswith("### Instruction:\n") or "### Response:\n" + ANSWER_IS not in text:
        raise UserError(
            f"options.few_shot: {path} is not of the form of multiple_choice_samples_wa.txt: '### Instruction:', the "
            "task, the question, 'Choose from:', options, an empty line, '### Response:', 'The answer is:', the letter"
        )
    return text.rstrip("\n").replace("### Response:\n" + ANSWER_IS, "### Response:\n" + PROMPTS[ending]) + "\n\n\n"


def random_line(questions: Sequence[Question]) -> float:
    """The expected accuracy of guessing, over the questions that count."""
    counted = [question for question in questions if question.is_counted]
    return sum(1 / len(question.labels) for question in counted) / len(counted)
