"""Numbers in answers: how far they are from the right ones."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.errors import UserError

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


class Pair(NamedTuple):
    """A right number, and the number that a model gave."""

    answer: float
    given: float


def first_number(text: str) -> float | None:
    """The first finite number in a text; None when there is none."""
    for match in _NUMBER.finditer(text):
        value = float(match.group())
        if math.isfinite(value):
            return value
    return None


def mae(pairs: Sequence[Pair]) -> float:
    """Mean absolute error."""
    return sum(abs(pair.answer - pair.given) for pair in pairs) / len(pairs)


def rmse(pairs: Sequence[Pair]) -> float:
    """Root of the mean squared error."""
    return math.sqrt(sum((pair.answer - pair.given) ** 2 for pair in pairs) / len(pairs))


def r2(pairs: Sequence[Pair]) -> float:
    """1 minus squared errors over squared deviations of the right numbers from their mean; NaN where these are 0."""
    mean = sum(pair.answer for pair in pairs) / len(pairs)
    deviations = sum((pair.answer - mean) ** 2 for pair in pairs)
    if deviations == 0:
        return math.nan
    return 1 - sum((pair.answer - pair.given) ** 2 for pair in pairs) / deviations


# --- Darwin's device properties (MDP) ---------------------------------------------------------------------------------

# Name in the answer -> title of its panel, unit, range of the panel (`SII_MDP/regression_evaluate.py`).
PROPERTIES = {
    "Voc": ("Voc (V)", (0.5, 1.2)),
    "Jsc": ("Jsc (mA/cm$^2$)", (5.0, 25.0)),
    "PCE": ("PCE (%)", (0.0, 20.0)),
}


def device_values(text: str) -> dict[str, float | None]:
    """Voc, Jsc and PCE in an answer: the number behind the first colon of the first line that names each.

    '@' ends the answer. None for a line without a number; a property that no line names is absent.
    """
    values: dict[str, float | None] = {}
    for line in text.split("@")[0].split("\n"):
        label, colon, number = line.partition(":")
        for name in PROPERTIES:
            if colon and name in label and name not in values:
                values[name] = first_number(number)
    return values


def reference_values(text: str) -> dict[str, float]:
    """The values of the right answer; Darwin's own records leave some empty.

    Raises:
        UserError: when there is none.
    """
    named = device_values(text)
    values = {key: value for key in PROPERTIES if (value := named.get(key)) is not None}
    if not values or len(named) < len(PROPERTIES):
        raise UserError(
            "the output has no lines for Voc, Jsc and PCE, e.g. 'JV default Voc: 1.05', with a number in one"
        )
    return values


def device_pairs(answer: str, given: str, as_published: bool = False) -> dict[str, Pair] | None:
    """The right numbers beside a model's, by property, for one device.

    As published, lines are paired by their place and named by the model's label, FF's line left out; a device whose
    number of lines differs is left out (None). A line without a number, which ends the script, leaves it out too.
    Else each property is paired by its name, and one that the model gives no number for is absent.
    """
    if not as_published:
        right, given_values = reference_values(answer), device_values(given)
        return {
            name: Pair(value, guess) for name, value in right.items() if (guess := given_values.get(name)) is not None
        }
    sides = [
        [line for line in text.split("@")[0].strip("\n").split("\n") if "FF" not in line] for text in (answer, given)
    ]
    if len(sides[0]) != len(sides[1]):
        return None
    pairs = {}
    for right_line, given_line in zip(*sides, strict=True):
        try:
            pair = Pair(*(float(line.split(":")[-1].strip()) for line in (right_line, given_line)))
        except ValueError:
            return None
        label = given_line.split(":")[0]
        name = next((key for key in PROPERTIES if key in label), None)
        if name is not None:
            pairs[name] = pair
    return pairs


# --- Darwin's Matbench files ------------------------------------------------------------------------------------------


def yes_or_no(text: str, as_published: bool = False) -> bool | None:
    """What the first word of an answer says; None when it says neither. As published, "Yes" or "No" is a part of it."""
    word = (text.split() or [""])[0]
    if as_published:
        return True if "Yes" in word else False if "No" in word else None
    return {"yes": True, "no": False}.get(word.strip(".,;:!?\"'()*").lower())


def published_number(text: str) -> float:
    """As `evaluate_matbench.py` reads an answer: a number at the beginning of its first word, without sign; else 0."""
    match = re.match(r"\d+(\.\d+)?", (text.split() or [""])[0])
    return float(match.group()) if match else 0.0
