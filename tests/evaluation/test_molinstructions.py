"""Mol-Instructions: each kind of answer by hand, and in a second formulation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.evaluation.metrics import molecules, text
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Question
from jaxlm.evaluation.tasks.molinstructions import chosen, kind_of, right_choice
from tests.evaluation.tasks import requested, text_answers, values

pytest.importorskip("selfies")
TASK = get_task("molinstructions")


def record(output: str, task: str = "", **more: Any) -> dict[str, Any]:
    return {"instruction": "Do it.", "input": "x", "output": output, "metadata": {"task": task}, **more}


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("description guided molecule design", "molecule"),
        ("forward_reaction_prediction", "molecule"),
        ("retrosynthesis", "molecule"),
        ("reagent prediction", "molecule"),
        ("molecular description generation", "caption"),
        ("property prediction", "property"),
        ("protein_function", "protein"),
        ("catalytic activity", "protein"),
        ("domain/motif", "protein"),
        ("functional description", "protein"),
        ("chemical_entity_recognition", "entities"),
        ("chemical-disease interaction extraction", "pairs"),
        ("chemical-protein interaction extraction", "pairs"),
        ("multi_choice_question", "choice"),
        ("true_or_false_question", "verdict"),
        ("open_question", "open"),
        ("protein design", None),
    ],
)
def test_kinds(task: str, kind: str | None) -> None:
    assert kind_of(record("", task), TASK.options()) == kind
    assert kind_of(record("", task), TASK.options(kind="open")) == "open"


def test_molecules() -> None:
    """[C][C][O] is ethanol; text behind the last bracket is no part of it; what is no molecule has similarity 0."""
    records = [record("[C][C][O]", "retrosynthesis")] * 4
    answers = text_answers(["[O][C][C]", "[C][C][N] is it", "none", "[C][Foo]"])
    figures = TASK.score(records, answers, TASK.options())
    similar = molecules.compare("CCO", "CCN")
    assert values(figures) == pytest.approx(
        {
            "molecule_exact": 0.25,
            "molecule_bleu": figures["molecule_bleu"].value,
            "molecule_levenshtein": (0 + 1 + 3 + 3) / 4,
            "molecule_validity": 0.5,
            "molecule_maccs": (1 + similar.maccs) / 4,
            "molecule_rdk": (1 + similar.rdk) / 4,
            "molecule_morgan": (1 + similar.morgan) / 4,
            "molecule_unique": 1.0,
        }
    )
    assert figures["molecule_exact"].values == {0: 1, 1: 0, 2: 0, 3: 0}
    published = TASK.score(records, answers, TASK.options(as_published=True))
    assert published["molecule_validity"].value == 1 and published["molecule_exact"].value == 0.5
    assert published["molecule_exact"].n == 2
    nothing = TASK.score(records[:1], text_answers([""]), TASK.options(as_published=True))
    assert nothing["molecule_validity"].n == 0


def test_stereochemistry_is_left_out() -> None:
    """As in the scripts: the two forms of alanine are one molecule, written in one way."""
    left, right = "[C][C@@H1][Branch1][C][N][C][=Branch1][C][=O][O]", "[C][C@H1][Branch1][C][N][C][=Branch1][C][=O][O]"
    figures = TASK.score([record(left, "retrosynthesis")], text_answers([right]), TASK.options())
    assert figures["molecule_exact"].value == 1 and figures["molecule_levenshtein"].value == 0


def test_bleu_of_molecules_is_over_signs() -> None:
    from nltk.translate.bleu_score import corpus_bleu

    right, answer = "[C][C][O][C][C]", "[C][C][N][C][C]"
    figures = TASK.score([record(right, "reagent")], text_answers([answer]), TASK.options())
    assert figures["molecule_bleu"].value == pytest.approx(corpus_bleu([[list(right)]], [list(answer)]))


@given(st.lists(st.tuples(*[st.lists(st.sampled_from("abc"), max_size=7)] * 2), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_bleu_from_counts_of_pairs_is_that_of_nltk(pairs: list[tuple[list[str], list[str]]]) -> None:
    """To the last bit, a pair that comes again included, as it does in resamples."""
    from nltk.translate.bleu_score import corpus_bleu

    pairs = [(["a", *right], written) for right, written in [*pairs, pairs[0]]]
    references, answers = zip(*pairs, strict=True)
    for weights in ((0.5, 0.5), (0.25,) * 4):
        expected = corpus_bleu([[each] for each in references], answers, weights=weights)
        assert text.corpus_bleu(references, answers, weights) == expected


def test_numbers() -> None:
    records = [record("-0.25", "property prediction")] * 3
    figures = values(TASK.score(records, text_answers(["-0.5 eV", "0.25", "low"]), TASK.options()))
    assert figures == pytest.approx({"property_mae": (0.25 + 0.5) / 2, "property_answered": 2 / 3})


def test_texts() -> None:
    """A caption ends with its last full stop; ROUGE of proteins; open questions."""
    caption = record("It is an acid.", "molecular description generation")
    protein = record("binds zinc ions", "protein function")
    question = record("one two three four five", "open question")
    answers = text_answers(["It is an acid. And the", "binds ions", "One two three four six"])
    figures = values(TASK.score([caption, protein, question], answers, TASK.options()))
    assert figures["caption_rouge_l"] == figures["caption_bleu_4"] == 1
    assert figures["protein_rouge_1"] == pytest.approx(0.8) and figures["protein_rouge_l"] == pytest.approx(0.8)
    assert figures["open_bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert figures["open_rouge_1"] == pytest.approx(0.8)


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd"))), min_size=1))
def test_sets_against_precision_and_recall(sets: list[tuple[set[str], set[str]]]) -> None:
    """F1 of each record, and the mean of them; entities have commas, pairs have parentheses."""
    expected = []
    for right, found in sets:
        # An empty answer is one entity without letters.
        hits, given_number = len(right & found), max(len(found), 1)
        precision, recall = hits / given_number, hits / len(right)
        expected.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    named = [record(", ".join(sorted(right)).upper(), "chemical entity recognition") for right, _ in sets]
    figures = TASK.score(named, text_answers([", ".join(sorted(found)) for _, found in sets]), TASK.options())
    assert figures["entities_f1"].value == pytest.approx(sum(expected) / len(expected))
    in_pairs = [record("".join(f"({each}, x)" for each in sorted(right)), "disease interaction") for right, _ in sets]
    given_answers = ["; ".join(f"({each}, X)" for each in sorted(found)) for _, found in sets]
    figures = TASK.score(in_pairs, text_answers(given_answers), TASK.options())
    assert figures["pairs_f1"].value == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("(B) because", "B"), ("C) it", "C"), ("It is A or", "A"), ("Dunno", "D"), ("", ""), (" x", "x")],
)
def test_choices(answer: str, letter: str) -> None:
    assert chosen(answer) == letter
    assert right_choice("The answer is (B) zinc") == "B"
    figures = TASK.score([record("(B) zinc", "multi choice question")], text_answers([answer]), TASK.options())
    assert figures["choice_accuracy"].value == float(letter == "B")


@given(
    st.lists(
        st.tuples(st.sampled_from(["Yes", "No", "Maybe"]), st.sampled_from(["yes", "no", "maybe", "?"])), min_size=1
    )
)
def test_verdicts_against_precision_and_recall(said: list[tuple[str, str]]) -> None:
    """As scikit-learn's precision_recall_fscore_support defines them, 0 where nothing is there."""
    records = [record(f"{right}, since", "true_or_false_question") for right, _ in said]
    figures = values(TASK.score(records, text_answers([f"{answer}, it is" for _, answer in said]), TASK.options()))
    f1 = []
    for verdict in ("yes", "no", "maybe"):
        hits = sum(right.lower() == answer == verdict for right, answer in said)
        found, wanted = (sum(each[at].lower() == verdict for each in said) for at in (1, 0))
        precision, recall = hits / found if found else 0, hits / wanted if wanted else 0
        f1.append(2 * precision * recall / (precision + recall) if hits else 0)
    assert figures["verdict_macro_f1"] == pytest.approx(sum(f1) / 3)
    right = sum(one.lower() == other for one, other in said) / len(said)
    assert figures["verdict_accuracy"] == pytest.approx(right)


def test_records_of_several_kinds_keep_their_numbers() -> None:
    records = [record("1", "property"), record("(A) x", "multi choice"), record("2", "property")]
    figures = TASK.score(records, text_answers(["1", "(A)", "3"]), TASK.options())
    assert figures["property_mae"].values == {0: 0, 2: 1} and figures["choice_accuracy"].values == {1: 1}
    first = requested(TASK, records, TASK.options())[0]
    assert first.context == Question("Do it.", "x")


@pytest.mark.parametrize(
    ("given_record", "said"),
    [
        (record("x", "protein design"), "names no task with a measure"),
        ({"instruction": "x"}, "has no 'output'"),
        (record("x", "retrosynthesis"), "'x' is not a molecule in SELFIES"),
        (record("high", "property"), "'high' has no number"),
        (record("B", "multi choice"), "has no letter in parentheses"),
        (record("Perhaps", "true or false"), "does not begin with yes, no, maybe"),
        (record("1", "property", input=3), "'input' is int"),
    ],
)
def test_other_records_are_refused(given_record: dict[str, Any], said: str) -> None:
    assert said in str(TASK.check(given_record, TASK.options()))
