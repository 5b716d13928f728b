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
    assert regression.reference_values("r", ANSWER) == {"Voc": 1.05, "Jsc": 20.1, "PCE": 15.8}
    assert regression.device_pairs(ANSWER, ANSWER.replace("1.05", "1.1")) == {
        "Voc": Pair(1.05, 1.1),
        "Jsc": Pair(20.1, 20.1),
        "PCE": Pair(15.8, 15.8),
    }
    # Lines in another order, one without a number, one missing.
    found = regression.device_pairs(ANSWER, "JV default PCE: about 12.5 %\nJV default Voc: ?@@@ JV default Jsc: 3")
    assert found == {"PCE": Pair(15.8, 12.5)}
    assert regression.device_pairs(ANSWER, "") == {}


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
    assert regression.device_pairs(ANSWER, ANSWER.replace("20.1", "high"), as_published=True) is None


@pytest.mark.parametrize("name", ["golden/synthetic_darwin_regression.json", "darwin_regression360.json"])
def test_published_devices(name: str) -> None:
    if not (SAMPLES / name).is_file():
        pytest.skip(f"{name} is not here")
    for record in json.loads((SAMPLES / name).read_text()):
        values = regression.reference_values("r", record["output"])
        pairs = {key: Pair(value, value) for key, value in values.items()}
        assert regression.device_pairs(record["output"], record["output"]) == pairs
        published = regression.device_pairs(record["output"], record["output"], as_published=True)
        # Some of Darwin's records have no Voc and Jsc; they end its script.
        assert published == (pairs if len(pairs) == 3 else None)


def test_a_record_of_another_suite_is_refused() -> None:
    with pytest.raises(UserError, match="record 2: the output names no number for Voc, Jsc or PCE"):
        regression.reference_values("record 2", "JV default Voc: high\nYes")


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
    ("text", "expected"), [("Yes", True), (" No, it is not", False), ("Yes/No", True), ("It is. Yes", None), ("", None)]
)
def test_yes_or_no(text: str, expected: bool | None) -> None:
    assert regression.yes_or_no(text) is expected
