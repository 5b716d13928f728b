"""GeoBench: K2's counting and its prompts, from its files where they are at hand, else from small ones of our own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import geobench, next_token
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers
from jaxlm.evaluation.tasks.geobench import chosen_label
from jaxlm.tokenizer import load_tokenizer
from tests.evaluation.tasks import probabilities, read, requested, text_answers, values

SAMPLES = Path(__file__).parents[2] / "../shared/data"
NPEE = {
    "noun": {"question": ["moraine"], "answer": ["Debris that a glacier leaves."]},
    "choice": {
        "question": [
            "Which rock is igneous:\nChoose from:\n\nA. Basalt\nB. Chalk\nC. Slate",
            "The hardest is:\nChoose from:\n\nA. Talc\nB. Gypsum\nC. Quartz\nD. Calcite",
        ],
        "answer": ["A", "C"],
    },
    "tf": {"question": ["Halite dissolves in water"], "answer": ["True"]},
}
AP = [
    {
        "id": "same",
        "question": {
            "stem": "Chalk is",
            "choices": [{"label": "A", "text": "a rock"}, {"label": "B", "text": "a gas"}],
        },
        "answerKey": "A",
    }
]


def sample(name: str) -> Path:
    path = SAMPLES / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    return path


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "geobench.json"
    path.write_text(json.dumps(content))
    return path


def test_token_ids_are_those_of_k2s_table() -> None:
    """LLaMA's letters and truth values, as K2's table lists them, and as they stand in its examples."""
    tokenizer = load_tokenizer(sample("llama_tokenizer.model"))
    ids = next_token.label_ids(lambda text: tokenizer.encode(text).ids, "ABCDEFGH")
    assert ids["k2"] == (319, 350, 315, 360, 382, 383, 402, 379)
    assert ids["plain"] == (29909, 29933, 29907, 29928, 29923, 29943, 29954, 29950)
    truth = next_token.label_ids(lambda text: tokenizer.encode(text).ids, ["True", "False"])
    assert truth == {"k2": (5852, 7700), "plain": (5574, 8824)}


def test_labels_that_begin_alike_have_no_form() -> None:
    letters = {"A": 1, "B": 2}

    def encode(text: str) -> list[int]:
        """A piece for white space in front, as of a tokenizer whose letters never begin a word."""
        return [0, *(letters.get(sign, 9) for sign in text)]

    assert next_token.label_ids(encode, "AB") == {"plain": (1, 2)}
    assert next_token.label_ids(encode, ["Ax", "Bx"]) == {"plain": (1, 2)}  # the first token of several
    with pytest.raises(UserError, match="A, C, D do not begin with tokens of their own"):
        next_token.label_ids(encode, "ACD")  # C and D are one token


def test_choice_entropy_and_shares_by_hand() -> None:
    values = next_token.with_max({"k2": [0.1, 0.3], "plain": [0.5, 0.0]})
    assert values == {"k2": [0.1, 0.3], "plain": [0.5, 0.0], "max": [0.5, 0.3]}
    assert [next_token.choose(value) for value in values.values()] == [1, 0, 0]
    assert next_token.choose([0.2, 0.2]) == 0  # the first one of equal ones, as argmax
    assert next_token.shares([0.1, 0.3]) == pytest.approx([0.25, 0.75])
    assert next_token.entropy([0.1, 0.3]) == pytest.approx(2 - 0.75 * math.log2(3))
    assert next_token.entropy([0.0, 0.2]) == 0.0 and next_token.entropy([0.0, 0.0]) == 1.0
    with pytest.raises(UserError, match="NaN"):
        next_token.choose([0.1, math.nan])


def test_probabilities_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    """The question is named."""
    records, options = read(TASK, written(tmp_path, AP))
    answers: list[Answers] = [{"wa:plain": Answer(log_probs=(math.nan, -1.0))}]
    with pytest.raises(UserError, match=r"geobench.json: question 1: the model gives .*NaN"):
        TASK.score(records, answers, options)


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=8))
def test_entropy_and_choice_against_numpy_and_scipy(values: list[float]) -> None:
    import numpy as np
    from scipy.stats import entropy

    assert next_token.entropy(values) == pytest.approx(entropy(values, base=2), abs=1e-9)
    assert next_token.choose(values) == int(np.argmax(values))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which:\nA. x\nB. y\nC. z", 3),
        ("Which:\nA. x\nB. y\nD. z", 2),  # {A, B, D}: the third is not C
        ("Which:\nB. y\nC. z", 0),
        ("A-type granite:\nA. x\nB. y", 2),  # a hyphen touches the first A
        ("X-ray\nA. a\nB. b\nC. U-Pb\nD. d", 4),
        ("\nA. a\nB.", 2),
        ("\nA. a\nB. b\nC", 2),  # nothing stands behind the last letter
    ],
)
def test_options_are_counted_by_k2s_rule(text: str, expected: int) -> None:
    assert geobench.num_options(text) == expected


@given(st.text(alphabet="ABCDE .\n-x", max_size=30))
def test_counting_options_against_another_formulation(text: str) -> None:
    """A walk over the signs instead of a pattern, and a walk over the alphabet instead of a sort."""
    letters = {
        sign
        for before, sign, behind in zip(text, text[1:], text[2:], strict=False)
        if sign in "ABCDE" and not (before.isalnum() or before == "-" or behind.isalnum() or behind == "-")
    }
    ranks = [sum(other < letter for other in letters) for letter in letters]
    expected = sum("ABCDE"[rank] == letter for rank, letter in zip(ranks, letters, strict=True))
    assert geobench.num_options(text) == expected


def test_questions_that_can_never_score(tmp_path: Path) -> None:
    """K2's file has two: four options, of which the rule sees three, and the answer is D."""
    text = "Which one\nChoose from:\n\nA. a\nB. b\nC. c\nD-layer"
    (question,) = geobench.read_questions(written(tmp_path, {"choice": {"question": [text], "answer": ["D"]}}))
    assert question.labels == ("A", "B", "C") and question.is_counted and not question.can_score


def test_the_random_line_of_k2s_file() -> None:
    """153 questions of four options, 28 of three and one of five: 0.26255."""
    groups = ((153, "ABCD"), (28, "ABC"), (1, "ABCDE"))
    questions = [geobench.Question("q", "choice", "", tuple(labels), "A") for n, labels in groups for _ in range(n)]
    assert geobench.random_line(questions) == pytest.approx(0.26255, abs=5e-6)
    passed_over = geobench.Question("q", "choice", "", ("A",), "AB")
    assert geobench.random_line([*questions, passed_over]) == geobench.random_line(questions)


def test_the_examples_are_written_to_the_byte() -> None:
    """Each block of K2's file again, from its stem, options and answer."""
    text = sample("k2_multiple_choice_samples_wa.txt").read_bytes().decode()
    blocks = text.rstrip("\n").split("\n\n\n")
    assert len(blocks) == 4
    for block in blocks:
        lines = block.split("\n")
        options = dict(line.split(". ", 1) for line in lines[4:8])
        question = geobench.Question("q", "apstudy", geobench.question_text(lines[2], options), (), lines[-1])
        assert geobench.answered(question, "wa") == block + "\n"
    path = SAMPLES / "k2_multiple_choice_samples_wa.txt"
    with_line, without = geobench.few_shot(path, "wa"), geobench.few_shot(path, "woa")
    assert with_line.startswith(text) and with_line == text + "\n"
    assert with_line.count("The answer is:\n") == 4 and without == with_line.replace("The answer is:\n", "")


def test_prompts(tmp_path: Path) -> None:
    choice, _, tf = geobench.read_questions(written(tmp_path, NPEE))[1:]
    assert geobench.choice_prompt(choice, "wa") == (
        "### Instruction:\nIdentify the choice that best completes the statement or answers the question.\n"
        "Which rock is igneous:\nChoose from:\n\nA. Basalt\nB. Chalk\nC. Slate\n\n### Response:\nThe answer is:\n"
    )
    assert geobench.choice_prompt(choice, "woa", "EXAMPLES").startswith("EXAMPLES### Instruction:\n")
    assert geobench.choice_prompt(choice, "woa").endswith("C. Slate\n\n### Response:\n")
    assert "True or False" in geobench.choice_prompt(tf, "wa")


def test_questions_are_read(tmp_path: Path) -> None:
    questions = geobench.read_questions(written(tmp_path, NPEE))
    assert [(q.kind, q.labels, q.answer) for q in questions][1:] == [
        ("choice", ("A", "B", "C"), "A"),
        ("choice", ("A", "B", "C", "D"), "C"),
        ("tf", ("True", "False"), "True"),
    ]
    (question,) = geobench.read_questions(written(tmp_path, AP))
    assert question.text == "Chalk is\nChoose from:\nA. a rock\nB. a gas" and question.labels == ("A", "B")


def test_the_published_questions() -> None:
    questions = geobench.read_questions(sample("k2_geobench_apstudy.json"))
    answers = [question.answer for question in questions]
    counts = {letter: answers.count(letter) for letter in "ABCDE"}
    assert len(questions) == 1395 and counts == {"C": 315, "B": 301, "D": 295, "E": 249, "A": 235}
    assert geobench.random_line(questions) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "not a file of GeoBench"),
        (
            [{"instruction": "Summarize", "input": "", "output": ""}],
            "question 1 is not a question of GeoBench's apstudy",
        ),
        ({}, "it is empty"),
        ({"data": []}, "found the key 'data'"),
        ({"choice": {"question": ["A"]}}, "choice: expected {question"),
        ({"tf": {"question": ["a", "b"], "answer": ["True"]}}, "2 questions and 1 answers"),
        ({"tf": {"question": ["a"], "answer": ["yes"]}}, "tf 1: the answer is 'yes'"),
        ({"choice": {"question": ["none"], "answer": ["A"]}}, "choice 1: has no options"),
        ([{**AP[0], "answerKey": "C"}], "answerKey is 'C'; expected one of A, B"),
        ([{**AP[0], "answerKey": None}], "answerKey is None"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        geobench.read_questions(written(tmp_path, content))


def test_other_examples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("A question\nA\n")
    with pytest.raises(UserError, match=r"few_shot: .*few.txt is not of the form"):
        geobench.few_shot(path, "wa")
    with pytest.raises(UserError, match="cannot be read"):
        geobench.few_shot(tmp_path / "none.txt", "wa")
    assert geobench.few_shot(None, "wa") == ""


# --- the tasks --------------------------------------------------------------------------------------------------------

TASK, SUBJECTIVE = get_task("geobench"), get_task("geobench_subjective")


def test_questions_to_a_model(tmp_path: Path) -> None:
    """Both endings of each question, with the ids of its labels in both forms; other kinds are left alone."""
    records, options = read(TASK, written(tmp_path, NPEE))
    requests = requested(TASK, records, options)
    assert [record["kind"] for record in records] == ["choice", "choice", "tf"]
    assert [(request.record, request.part) for request in requests[:3]] == [
        (0, "wa:k2+plain"),
        (0, "woa:k2+plain"),
        (1, "wa:k2+plain"),
    ]
    assert requests[0].ids == (10065, 10066, 10067, 65, 66, 67)  # type: ignore[attr-defined]
    assert requests[-1].ids == (15000, 15001, 5000, 5001)  # type: ignore[attr-defined]
    assert requests[-1].context.endswith("### Response:\n")  # type: ignore[union-attr]


def test_examples_stand_in_front_of_choices_only(tmp_path: Path) -> None:
    examples = tmp_path / "few.txt"
    shot = geobench.answered(geobench.Question("q", "choice", "Q\nChoose from:\nA. a\nB. b", ("A", "B"), "B"), "wa")
    examples.write_text(shot + "\n\n" + shot)
    records, options = read(TASK, written(tmp_path, NPEE), few_shot=str(examples))
    wa, woa, *_, tf = [str(request.context) for request in requested(TASK, records, options)]
    assert wa.startswith(shot + "\n\n" + shot + "\n\n### Instruction:\n")
    assert woa.count("The answer is:") == 0 and woa.count("### Response:\n") == 3
    assert tf.count("### Instruction:") == 1


def test_scores_by_hand(tmp_path: Path) -> None:
    records, options = read(TASK, written(tmp_path, NPEE))
    answers: list[Answers] = [
        {"wa:k2+plain": probabilities(0.2, 0.1, 0.1, 0.1, 0.5, 0.1), "woa:k2+plain": Answer(error="too long")},
        {"wa:k2+plain": probabilities(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1)},
        {"wa:plain": probabilities(0.3, 0.1)},
    ]
    figures = TASK.score(records, answers, options)
    assert values(figures) == pytest.approx(
        {
            "choice_wa_k2_accuracy": 0.5,
            "choice_wa_plain_accuracy": 0.5,
            "choice_wa_max_accuracy": 0.5,
            "choice_woa_k2_accuracy": 0.0,
            "choice_woa_plain_accuracy": 0.0,
            "choice_woa_max_accuracy": 0.0,
            "tf_wa_plain_accuracy": 1.0,
            "tf_wa_max_accuracy": 1.0,
            "choice_random": (1 / 3 + 1 / 4) / 2,
            "tf_random": 0.5,
            "choice_wa_k2_entropy": (1.5 + 2) / 2,
            "choice_wa_plain_entropy": (next_token.entropy([1, 5, 1]) + next_token.entropy([1, 1, 2, 1])) / 2,
            "choice_wa_max_entropy": (next_token.entropy([2, 5, 1]) + next_token.entropy([1, 1, 2, 1])) / 2,
            "tf_wa_plain_entropy": next_token.entropy([3, 1]),
            "tf_wa_max_entropy": next_token.entropy([3, 1]),
        }
    )
    assert figures["choice_wa_k2_accuracy"].values == {0: 1.0, 1: 0.0}
    # Records of an earlier run's file of answers: lists in place of tuples.
    again = json.loads(json.dumps(records))
    assert TASK.check(again[0], options) is None and TASK.score(again, answers, options) == figures
    assert "Can never score, because K2's rule does not see the right option: 0" in TASK.details(  # type: ignore[misc]
        records, answers, figures, options
    )


def test_answers_of_several_letters_are_passed_over(tmp_path: Path) -> None:
    """As in K2's script; a question that can never score counts as wrong."""
    text = "Which\nA. a\nB. b"
    records, options = read(TASK, written(tmp_path, {"choice": {"question": [text] * 3, "answer": ["AB", "A", "C"]}}))
    requests = requested(TASK, records, options)
    assert {request.record for request in requests} == {1, 2}
    figures = TASK.score(records, [{"wa:plain": probabilities(0.9, 0.1)}] * 3, options)
    assert figures["choice_wa_plain_accuracy"].values == {1: 1, 2: 0} and figures["choice_random"].n == 2
    details = TASK.details(records, [], figures, options)  # type: ignore[misc]
    assert "one letter: 1" in details and "the right option: 1" in details


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    import matplotlib.figure

    records, options = read(TASK, written(tmp_path, NPEE))
    answers: list[Answers] = [{"wa:plain": probabilities(*[0.1] * len(record["labels"]))} for record in records]
    figure = matplotlib.figure.Figure(layout="constrained")
    TASK.plot(figure, records, answers, TASK.score(records, answers, options), options)  # type: ignore[misc]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["choice_wa_plain", "choice_wa_max"]
    assert len(axes.lines) >= 2  # where guessing is


def test_written_answers(tmp_path: Path) -> None:
    records, options = read(TASK, written(tmp_path, NPEE))
    figures = TASK.score(records, text_answers(["The answer is A.", "B, not C", "It is True"]), options)
    assert figures["choice_text_accuracy"].value == 0.5 and figures["tf_text_accuracy"].value == 1
    assert chosen_label("none of them", ["A"]) is None and chosen_label("A-type, so B", ["A", "B"]) == "B"


def test_free_answers(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    records, options = read(SUBJECTIVE, written(tmp_path, NPEE), max_new_tokens=7)
    generate, likelihood = requested(SUBJECTIVE, records, options)
    assert generate.settings.max_new_tokens == 7 and "moraine" in generate.context.text  # type: ignore[attr-defined, union-attr]
    assert likelihood.continuations == (NPEE["noun"]["answer"][0],)  # type: ignore[attr-defined]
    answers: list[Answers] = [
        {
            "answer": Answer(texts=("Debris of a glacier",)),
            "reference": Answer(log_probs=(-6.0,), num_tokens=(4,), is_greedy=(False,)),
        }
    ]
    figures = SUBJECTIVE.score(records, answers, options)
    # Words: debris that a glacier leaves, and debris of a glacier: three in common, of five and four; pairs: one.
    assert values(figures) == pytest.approx(
        {"noun_rouge_1": 6 / 9, "noun_rouge_2": 2 / 7, "noun_rouge_l": 6 / 9, "noun_perplexity": math.exp(1.5)}
    )
    assert figures["noun_perplexity"].higher_is_better is False and figures["noun_perplexity"].n == 4


def test_a_file_without_the_tasks_questions(tmp_path: Path) -> None:
    path = written(tmp_path, AP)
    with pytest.raises(UserError, match="no question of the kinds noun, completion, discussion"):
        read(SUBJECTIVE, path)
    assert TASK.check({"instruction": "x"}, TASK.options()) == "must have the fields answer, kind, labels, name, text"
