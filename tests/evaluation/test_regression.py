"""Numbers in answers: Darwin's device properties, its Matbench files, and the figures against NumPy's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import regression
from jaxlm.evaluation.metrics.regression import Pair
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Question
from tests.evaluation.tasks import requested, text_answers, values

SAMPLES = Path(__file__).parents[2] / "../shared/data"
ANSWER = " JV default Voc: 1.05 \n JV default Jsc: 20.1 \n JV default FF: 0.75 \n JV default PCE: 15.8@@@"


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=20))
def test_figures_against_numpy(values: list[tuple[float, float]]) -> None:
    pairs = [Pair(*value) for value in values]
    right, found = np.array(values).T
    assert regression.mae(pairs) == pytest.approx(np.abs(right - found).mean())
    assert regression.rmse(pairs) == pytest.approx(np.sqrt(np.square(right - found).mean()))
    if np.var(right) > 1e-6:
        expected = 1 - np.square(right - found).mean() / np.var(right)
        assert regression.r2(pairs) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_figures_by_hand() -> None:
    pairs = [Pair(1.0, 2.0), Pair(3.0, 3.0), Pair(5.0, 3.0)]
    assert regression.mae(pairs) == 1 and regression.rmse(pairs) == pytest.approx((5 / 3) ** 0.5)
    assert regression.r2(pairs) == 1 - 5 / 8
    assert math.isnan(regression.r2([Pair(1.0, 2.0)]))


def test_devices() -> None:
    assert regression.reference_values(ANSWER) == {"Voc": 1.05, "Jsc": 20.1, "PCE": 15.8}
    assert regression.device_pairs(ANSWER, ANSWER.replace("1.05", "1.1")) == {
        "Voc": Pair(1.05, 1.1),
        "Jsc": Pair(20.1, 20.1),
        "PCE": Pair(15.8, 15.8),
    }
    # Lines in another order, one without a number, one missing.
    found = regression.device_pairs(ANSWER, "JV default PCE: about 12.5 %\nJV default Voc: ?@@@ JV default Jsc: 3")
    assert found == {"PCE": Pair(15.8, 12.5)}
    assert regression.device_pairs(ANSWER, "") == {}
    assert regression.device_values("Voc: 1.0\nVoc: 2.0") == {"Voc": 1.0}  # the first line counts


def test_devices_as_published() -> None:
    """Lines by their place: what the model calls Jsc in the first line is compared with the answer's Voc."""
    swapped = " JV default Jsc: 20.0 \n JV default Voc: 1.0 \n JV default FF: 0.7 \n JV default PCE: 15.0@@@"
    assert regression.device_pairs(ANSWER, swapped, as_published=True) == {
        "Jsc": Pair(1.05, 20.0),
        "Voc": Pair(20.1, 1.0),
        "PCE": Pair(15.8, 15.0),
    }
    assert regression.device_pairs(ANSWER, swapped)["Voc"] == Pair(1.05, 1.0)
    assert regression.device_pairs(ANSWER, "JV default Voc: 1.0@@@", as_published=True) is None
    without_ff = ANSWER.replace(" JV default FF: 0.75 \n", "")
    assert len(regression.device_pairs(ANSWER, without_ff, as_published=True) or ()) == 3
    assert regression.device_pairs(ANSWER, ANSWER.replace("20.1", "high"), as_published=True) is None


@pytest.mark.parametrize("name", ["golden/synthetic_darwin_regression.json", "darwin_regression360.json"])
def test_published_devices(name: str) -> None:
    if not (SAMPLES / name).is_file():
        pytest.skip(f"{name} is not here")
    for record in json.loads((SAMPLES / name).read_text()):
        values = regression.reference_values(record["output"])
        pairs = {key: Pair(value, value) for key, value in values.items()}
        assert regression.device_pairs(record["output"], record["output"]) == pairs
        published = regression.device_pairs(record["output"], record["output"], as_published=True)
        # Some of Darwin's records have no Voc and Jsc; they end its script.
        assert published == (pairs if len(pairs) == 3 else None)


@pytest.mark.parametrize(
    "text", ["JV default Voc: high\nYes", "Voc: \nJsc: \nPCE:", "Stability_PCE_initial_value: 5\nVoc: 1"]
)
def test_a_record_of_another_suite_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the output has no lines for Voc, Jsc and PCE"):
        regression.reference_values(text)


@pytest.mark.parametrize(
    ("text", "number", "published"),
    [
        (" 1036.9\n", 1036.9, 1036.9),
        ("-2.5 eV", -2.5, 0.0),
        ("about 3", 3.0, 0.0),
        ("1.2e3 MPa", 1200.0, 1.2),
        ("", None, 0.0),
        ("none", None, 0.0),
        ("inf 1e999 7", 7.0, 0.0),
        (".5", 0.5, 0.0),
    ],
)
def test_numbers(text: str, number: float | None, published: float) -> None:
    assert regression.first_number(text) == number
    assert regression.published_number(text) == published


@pytest.mark.parametrize(
    ("text", "expected", "published"),
    [
        ("Yes", True, True),
        (" No, it is not", False, False),
        ("yes.", True, None),
        ("Nothing", None, False),
        ("It is. Yes", None, None),
        ("", None, None),
    ],
)
def test_yes_or_no(text: str, expected: bool | None, published: bool | None) -> None:
    assert regression.yes_or_no(text) is expected
    assert regression.yes_or_no(text, as_published=True) is published


# --- the tasks --------------------------------------------------------------------------------------------------------

MDP, MATBENCH = get_task("mdp"), get_task("matbench")
DEVICE = {"instruction": "What?", "input": "SLG###", "output": ANSWER}
STEEL = {"instruction": "Strength? ->", "input": " Fe0.8C0.2\n", "output": " 1036.9\n"}
METAL = {"instruction": "Is composition metal? ->", "output": " Yes, Ag is metal.\n"}


def test_devices_are_asked() -> None:
    (own,) = requested(MDP, [DEVICE], MDP.options())
    assert own.context == Question("What?", "SLG###")
    (published,) = requested(MDP, [DEVICE], MDP.options(as_published=True))
    assert published.context == "instruction: What?, input: SLG###"
    steel, metal = requested(MATBENCH, [STEEL, METAL], MATBENCH.options(as_published=True))
    assert str(steel.context).endswith("\n    ### Input:\n     Fe0.8C0.2\n\n    ### Response:")
    assert str(metal.context).endswith(
        "request.\n    ### Instruction:\n    Is composition metal? ->\n    ### Response:"
    )


def test_figures_of_devices() -> None:
    answers = text_answers([ANSWER, "JV default Voc: 1.15\nJV default PCE: none", ""])
    figures = MDP.score([DEVICE] * 3, answers, MDP.options())
    assert figures["voc_mae"].value == pytest.approx(0.05) and figures["voc_mae"].n == 2
    assert figures["voc_rmse"].value == pytest.approx(0.1 / 2**0.5)
    assert figures["voc_mae"].higher_is_better is False and figures["voc_r2"].higher_is_better
    assert [figures[f"{name}_answered"].value for name in ("voc", "jsc", "pce")] == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    published = MDP.score([DEVICE] * 3, answers, MDP.options(as_published=True))
    assert published["voc_mae"].value == 0 and published["voc_mae"].n == 1
    nothing = MDP.score([DEVICE], text_answers([""]), MDP.options())
    assert math.isnan(nothing["voc_mae"].value) and nothing["voc_answered"].value == 0


def test_devices_are_drawn_in_three_panels() -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure()
    answers = text_answers([ANSWER.replace("1.05", "1.5")])
    MDP.plot(figure, [DEVICE], answers, {}, MDP.options())  # type: ignore[misc]
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "Experimental Voc (V)",
        "Experimental Jsc (mA/cm$^2$)",
        "Experimental PCE (%)",
    ]
    assert figure.axes[0].get_xlim() == (0.5, 1.5) and figure.axes[1].get_ylim() == (5, 25)
    assert "| Jsc | 20.1 | 0 |" in MDP.details([DEVICE], answers, {}, MDP.options())  # type: ignore[misc]


def test_figures_of_matbench() -> None:
    answers = text_answers(["about 1030.9 MPa", "unknown"])
    figures = values(MATBENCH.score([STEEL] * 2, answers, MATBENCH.options()))
    assert figures["mae"] == pytest.approx(6) and figures["answered"] == 0.5
    published = values(MATBENCH.score([STEEL] * 2, answers, MATBENCH.options(as_published=True)))
    assert published["mae"] == pytest.approx(1036.9)  # both are read as 0


def test_verdicts_of_matbench() -> None:
    other = METAL | {"output": " No, C is not metal.\n"}
    records = [METAL, METAL, other, other, METAL]
    answers = text_answers(["Yes", "No.", "Yes, it is", "no", "perhaps"])
    figures = values(MATBENCH.score(records, answers, MATBENCH.options()))
    # Right: 2 of 5. Yes: 1 hit, 1 wrong, 2 missed.
    assert figures == pytest.approx({"accuracy": 0.4, "f1": 2 / (2 + 3), "answered": 0.8})
    published = MATBENCH.score(records, answers, MATBENCH.options(as_published=True))
    assert published["accuracy"].n == 3 and published["accuracy"].value == pytest.approx(1 / 3)
    content = MATBENCH.files(records, answers, MATBENCH.options())["matbench.json"]  # type: ignore[misc]
    assert json.loads(content)[1] == {"input": "", "output": False} and len(json.loads(content)) == 4


def test_words_that_are_not_compositions_are_not_counted() -> None:
    """Darwin mixes some in."""
    word = METAL | {"output": " chalk is not a composition and it is not metal.\n"}
    options = MATBENCH.options()
    assert MATBENCH.check(word, options) is None
    figures = MATBENCH.score([METAL, word], text_answers(["Yes", "No"]), options)
    assert figures["accuracy"].values == {0: 1} and figures["answered"].n == 1
    assert "not counted: 1" in MATBENCH.details([METAL, word], [], figures, options)  # type: ignore[misc]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["Yes", "No", "?"])), min_size=1))
def test_f1_of_verdicts_against_precision_and_recall(pairs: list[tuple[bool, str]]) -> None:
    records = [METAL if right else METAL | {"output": " No, C.\n"} for right, _ in pairs]
    figures = MATBENCH.score(records, text_answers([text for _, text in pairs]), MATBENCH.options())
    hits = sum(right and text == "Yes" for right, text in pairs)
    said, positive = sum(text == "Yes" for _, text in pairs), sum(right for right, _ in pairs)
    precision, recall = hits / said if said else 0.0, hits / positive if positive else 0.0
    expected = 2 * precision * recall / (precision + recall) if hits else 0.0
    value = figures["f1"].value
    assert value == pytest.approx(expected) or (math.isnan(value) and not said and not positive)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (STEEL | {"output": " hard\n"}, "the output ' hard\\n' neither is a number nor begins with Yes or No"),
        (STEEL | {"output": "nan"}, "neither is a number"),
        (STEEL | {"input": 3}, "'input' is int"),
        ({"text": "x"}, "has no 'instruction'"),
    ],
)
def test_other_records_are_refused(record: dict[str, object], said: str) -> None:
    assert said in str(MATBENCH.check(record, MATBENCH.options()))
    assert MDP.check(record, MDP.options()) is not None
