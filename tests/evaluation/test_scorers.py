"""The figures of multiple_choice, qa and numbers, against second formulations and the field's own definitions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation import prompting
from jaxlm.evaluation.job import check_options, read_options
from jaxlm.evaluation.registry import MODULES, get_task
from jaxlm.evaluation.task import Answer, Generate, LogLikelihood, Question, mean
from jaxlm.evaluation.tasks import multiple_choice, numbers, qa

# --- multiple choice --------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "mmlu": {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2},
    "arc": {"question": "q", "choices": {"text": ["w", "x", "y", "z"], "label": list("ABCD")}, "answerKey": "C"},
    "arc with numbers": {"question": "q", "choices": {"text": list("wxyz"), "label": list("1234")}, "answerKey": "3"},
    "c-eval": {"id": 0, "question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"},
    "cmmlu": {"Question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "Answer": "C"},
    "hellaswag": {"query": "q", "endings": ["w", "x", "y", "z"], "label": "2"},
    "by text": {"question": "q", "options": ["w", "x", "y", "z"], "answer": "y"},
    "openbookqa": {
        "question": {"stem": "q", "choices": [{"text": t, "label": n} for t, n in zip("wxyz", "ABCD", strict=True)]},
        "answerKey": "C",
    },
    "medqa": {"question": "q", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer_idx": "C"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_files_are_read(shape: str) -> None:
    item = multiple_choice.read_item(SHAPES[shape])
    assert isinstance(item, multiple_choice.Item)
    assert (item.question, item.choices, item.right) == ("q", ("w", "x", "y", "z"), 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"choices": ["w"]}, "has 1 choices"),
        ({"choices": "wxyz"}, "of the type str"),
        ({"answer": "E"}, "'E', which is none of its choices"),
        ({"answer": -1}, "-1, which is none"),
        ({"answer": True}, "True, which is none"),
        ({"answer": None}, "has no right answer"),
        ({"question": " "}, "has no text"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "not as many labels"),
        ({"choices": None, "A": "w", "C": "x"}, "has no choices"),
    ],
)
def test_what_is_no_question_is_named(change: dict[str, Any], problem: str) -> None:
    assert problem in str(multiple_choice.check(SHAPES["mmlu"] | change, multiple_choice.Options()))


@given(st.lists(st.tuples(st.lists(st.floats(-50, 0), min_size=2, max_size=6), st.integers(0, 5)), min_size=1))
def test_accuracies_are_those_of_argmax(drawn: list[tuple[list[float], int]]) -> None:
    """By NumPy: acc is the argmax, acc_norm that of log-likelihoods by characters."""
    records, answers, acc, norm = [], [], [], []
    for values, at in drawn:
        right = at % len(values)
        choices = [f"{'x' * (1 + 3 * n)}{n}" for n in range(len(values))]
        records.append({"question": "q", "choices": choices, "answer": right})
        answers.append({"answer": Answer(log_probs=tuple(values))})
        acc.append(np.argmax(values) == right)
        norm.append(np.argmax(np.array(values) / [len(choice) for choice in choices]) == right)
    figures = multiple_choice.score(records, answers, multiple_choice.Options(answers="texts"))
    assert figures["acc"].value == pytest.approx(np.mean(acc))
    assert figures["acc_norm"].value == pytest.approx(np.mean(norm))
    if len(acc) > 1:
        stderr = np.std(acc, ddof=1) / math.sqrt(len(acc))  # lm_eval's mean_stderr
        assert figures["acc"].stderr == pytest.approx(stderr)
    assert 0 <= figures["probability"].value <= 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" (B) sand, because", 1),
        ("The answer is C.", 2),
        ("答案是D", 3),
        ("A rock is not alive. Answer: B", 1),
        ("sand", 1),
        ("I think it is sand", 1),
        ("A rock or so", None),
        ("clay or sand", None),
        ("", None),
    ],
)
def test_answers_in_words_name_a_choice(text: str, place: int | None) -> None:
    item = multiple_choice.Item("q", tuple("ABCD"), ("pebble", "sand", "clay", "silt"), 0)
    assert multiple_choice.place_in_text(text, item) == place


def test_questions_are_asked_as_the_field_does(tmp_path: Any) -> None:
    """MMLU's few-shot prompt, ARC's question, and a conversation."""
    dev = tmp_path / "dev.csv"
    dev.write_text("question,A,B,C,D,answer,subject\nolder,1,2,3,4,D,geology\nother,5,6,7,8,A,physics\n")
    record = SHAPES["mmlu"] | {"subject": "geology"}
    values = {"shots": 1, "examples": str(dev), "description": "About {subject}."}
    task = get_task("multiple_choice")
    (request,) = task.requests([record], read_options(task, values), None)  # type: ignore[arg-type]
    assert isinstance(request, LogLikelihood)
    assert request.context == (
        "About geology.\n\nolder\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\nq\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert request.continuations == (" A", " B", " C", " D")
    (request,) = task.requests([record], read_options(task, {"answers": "texts"}), None)  # type: ignore[arg-type]
    assert (request.context, request.continuations) == ("Question: q\nAnswer:", (" w", " x", " y", " z"))  # type: ignore[attr-defined]
    (request,) = task.requests([record], read_options(task, values | {"chat": True}), None)  # type: ignore[arg-type]
    first = "About geology.\n\nolder\nA. 1\nB. 2\nC. 3\nD. 4"
    assert request.context == Question("q\nA. w\nB. x\nC. y\nD. z", turns=((first, "D"),))
    assert request.continuations == ("A", "B", "C", "D")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"options.shots: 2, but .*dev.csv has 1 examples of 'geology'"):
        task.requests([record], read_options(task, values | {"shots": 2}), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\{topic\}: the record has no field 'topic'"):
        prompting.filled("About {topic}", record, "options.description")


# --- qa ---------------------------------------------------------------------------------------------------------------


def squad_f1(prediction: str, truth: str) -> float:
    """SQuAD 1.1's evaluate script, written anew from its paper's definition."""

    def tokens(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    mine, right = tokens(prediction), tokens(truth)
    same = sum((Counter(mine) & Counter(right)).values())
    if not mine or not right:
        return float(mine == right)
    if same == 0:
        return 0.0
    precision, recall = same / len(mine), same / len(right)
    return 2 * precision * recall / (precision + recall)


WORD = st.sampled_from(["the", "a", "rock", "Rock!", "sand", "an", "lava.", "gas", "ion-ic"])


@given(st.lists(WORD, max_size=8).map(" ".join), st.lists(WORD, max_size=8).map(" ".join))
def test_f1_is_that_of_squad(prediction: str, truth: str) -> None:
    assert qa.f1(prediction, truth) == pytest.approx(squad_f1(prediction, truth))


def test_the_nearest_of_several_answers_counts() -> None:
    records = [
        {"question": "q", "answers": {"text": ["igneous rock", "granite"]}},
        {"question": "q", "answer": "火成岩"},
        {"question": "q", "answer": ["x", "y"]},
    ]
    assert [qa.check(record, None) for record in records] == [None] * 3
    answers = [{"answer": Answer(texts=(text,))} for text in ("The Granite.", "火山岩", "")]
    figures = qa.score(records, answers, None)
    assert figures["exact"].value == pytest.approx(1 / 3)
    assert figures["f1"].value == pytest.approx((1 + 2 / 3 + 0) / 3)
    unanswered = qa.score(records, [{"answer": Answer(error="too long")}] * 3, None)
    assert unanswered["exact"].value == 0 and unanswered["exact"].n == 3


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.5 m", 1234.5),
        ("-3e-4", -3e-4),
        (r"2.5 \times 10^{-3}", 2.5e-3),
        ("x = 2.5 × 10^-3 J", 2.5e-3),
        (r"so \boxed{\frac{3}{4}}, not 7", 0.75),
        (r"\boxed{2} then \boxed{\text{about } -5}", -5),
        ("between 10-20", 20),
        ("−5", -5),
        ("6.02x10^23 per mol", 6.02e23),
        ("H2O", None),
        ("none", None),
        (r"\frac{1}{0}", None),
    ],
)
def test_numbers_are_found_in_texts(text: str, number: float | None) -> None:
    assert numbers.answer_in(text) == (None if number is None else pytest.approx(number))


@given(st.floats(-1e9, 1e9).filter(lambda x: abs(x) > 1e-6), st.floats(-0.2, 0.2))
def test_the_tolerance_is_that_of_scibench(right: float, error: float) -> None:
    """Its script calls math.isclose(rel_tol=0.05) with the right answer and the model's."""
    answer = right * (1 + error)
    expected = math.isclose(right, answer, rel_tol=0.05)
    records = [{"problem_text": "q", "answer_number": repr(right)}]
    answers = [{"answer": Answer(texts=(f"It is {answer!r}.",))}]
    assert numbers.score(records, answers, numbers.Options())["acc"].value == expected


def test_bad_options_are_refused() -> None:
    for name, values, message in (
        ("numbers", {"tolerance": 5}, "options.tolerance: 5 must be"),
        ("qa", {"shots": -1}, "options.shots: -1"),
        ("qa", {"shots": 1, "examples": "/none.json"}, "options.examples: /none.json does not exist"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_options(get_task(name), values)
    with pytest.raises(UserError, match="qa, numbers have no such option; known: chat"):
        check_options([get_task("qa"), get_task("numbers")], {"letters": 1})


def test_every_task_has_its_name() -> None:
    for name in MODULES:
        task = get_task(name)
        assert task.name == name and task.summary and task.expects


def test_a_mean_without_records_is_no_number() -> None:
    assert math.isnan(mean({}).value) and mean({}).n == 0 and mean({3: 1.0}).stderr is None


def test_generated_answers_end_at_a_line() -> None:
    task = get_task("qa")
    (request,) = task.requests([{"question": "q", "answer": "a", "context": "c"}], task.options(), None)  # type: ignore[arg-type]
    assert isinstance(request, Generate)
    assert request.context == "c\n\nQuestion: q\nAnswer:" and request.settings.stop == ("\n",)
