"""Darwin's structured information (SII): 31 values of a solar cell, and the relations between them.

Facts: `SII_MDP/sii_evaluate.ipynb` of MasterAI-EAM/Darwin. With `as_published` the figures are those of the notebook;
without, what follows is put right:

- abc_d: the notebook adds the counts of a relation once for each a, b and c, behind its loop over d. So the last d
  alone counts, and for materials and procedures of different layers, which have no relation, the counts of the last
  relation that was formed are added again (a stale variable). Here every combination of one layer counts, once.
- Compositions: the list of predictions changes while it is read, so that a matched composition also counts as wrong.
  An empty composition is contained in every other one; here it matches an empty one only.
- The parts of a stack ("PCBM - 60") keep their spaces, so that they match nothing.
- A document in which one of the values is missing is left out; here the value counts as not found. So do values that
  the notebook passes over in `deduction` and `normalisation`, where it can also count several hits for one value.
- The figures of a document are rounded to four places before their mean is taken.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.errors import UserError

LAYERS = ("Substrate", "ETL", "Perovskite", "HTL", "Backcontact")
KEYS = (
    "Substrate_stack_sequence",
    "ETL_stack_sequence",
    "ETL_additives_compounds",
    "ETL_deposition_procedure",
    "Perovskite_composition_long_form",
    "Perovskite_composition_short_form",
    "Perovskite_additives_compounds",
    "Perovskite_deposition_solvents",
    "Perovskite_deposition_procedure",
    "Perovskite_deposition_thermal_annealing_temperature",
    "Perovskite_deposition_thermal_annealing_time",
    "HTL_stack_sequence",
    "HTL_additives_compounds",
    "HTL_deposition_procedure",
    "Backcontact_stack_sequence",
    "Backcontact_additives_compounds",
    "Backcontact_deposition_procedure",
    "Stability_measured",
    "Stability_average_over_n_number_of_cells",
    "Stability_temperature_range",
    "Stability_atmosphere",
    "Stability_time_total_exposure",
    "Stability_PCE_initial_value",
    "Stability_PCE_end_of_experiment",
    "Cell_area_measured",
    "Cell_number_of_cells_per_substrate",
    "Cell_architecture",
    "Cell_flexible",
    "Cell_semitransparent",
    "Cell_semitransparent_wavelength_range",
    "Module",
)
# The sets of the notebook: a materials, b the cell, c procedures, d stability. The order decides what is stale.
A = tuple(key for key in KEYS if key.startswith(LAYERS) and "_deposition_" not in key)
B = tuple(key for key in KEYS if key.startswith("Cell_"))
C = (
    "ETL_deposition_procedure",
    "HTL_deposition_procedure",
    "Backcontact_deposition_procedure",
    "Perovskite_deposition_procedure",
    "Perovskite_deposition_solvents",
    "Perovskite_deposition_thermal_annealing_temperature",
    "Perovskite_deposition_thermal_annealing_time",
)
D = tuple(key for key in KEYS if key.startswith("Stability_"))
SETS = {"a": A, "b": B, "c": C, "d": D}
DEDUCTION = ("Cell_area_measured", "Cell_architecture", "Cell_semitransparent")
NORMALISATION = ("Perovskite_deposition_thermal_annealing_time", "Stability_time_total_exposure", "Cell_area_measured")
SUMMARISATION = (
    "Substrate_stack_sequence",
    "ETL_stack_sequence",
    "Perovskite_composition_short_form",
    "HTL_stack_sequence",
)
_SPLIT_AT_HYPHENS = ("Substrate_stack_sequence", "ETL_stack_sequence", "HTL_stack_sequence")
_COMPOSITIONS = ("Perovskite_composition_long_form", "Perovskite_composition_short_form")
_NOT_NUMBERS = ("nan", "", "Unknown")

Values = Mapping[str, str]


class Counts(NamedTuple):
    """Words that are right, wrongly given, and missing; and the number of words of the right answer."""

    right: int = 0
    wrong: int = 0
    missing: int = 0
    answers: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sums."""
        return Counts(*(mine + more for mine, more in zip(self, other, strict=True)))


class Scores(NamedTuple):
    """Precision, recall, their harmonic mean, and right words over words of the answer; 0 where nothing is counted."""

    precision: float
    recall: float
    f1: float
    accuracy: float


def scores(counts: Counts) -> Scores:
    """The figures of one document; the notebook ends with a division by zero where these are 0."""

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    precision = share(counts.right, counts.right + counts.wrong)
    recall = share(counts.right, counts.right + counts.missing)
    f1 = share(2 * precision * recall, precision + recall)
    return Scores(precision, recall, f1, share(counts.right, counts.answers))


# --- texts to values --------------------------------------------------------------------------------------------------


def parse_answer(text: str, as_published: bool = False) -> dict[str, str]:
    """The values in a model's answer, by key; keys that it does not name are absent.

    The first line that names a key gives its value: what stands behind "KEY: ", without a last comma and without '#'.
    As published, a line names a key also where it stands inside of another one (Cell_semitransparent in
    Cell_semitransparent_wavelength_range) or without a colon, and a value ends with its line.
    """
    text = text.replace("Fig. 1. ", "").replace("<s>", "").replace("</s>", "")
    lines = text.split("\n") if as_published else _whole_lines(text)
    values = {}
    for key in KEYS:
        for line in lines:
            if as_published and key in line:
                value = line[line.find(f"{key}: ") + len(key) + 2 :]
            elif not as_published and (match := re.search(rf"(?<!\w){key}\s*:", line)):
                value = line[match.end() :]
            else:
                continue
            values[key] = (value if as_published else value.rstrip()).removesuffix(",").replace("#", "").strip()
            break
    return values


def _whole_lines(text: str) -> list[str]:
    """Lines; one that names no key belongs to the line before it, where lines that name keys stand around it."""
    lines = [line for line in text.split("\n") if line.strip()]
    names_key = [any(re.match(rf"\W*{key}\s*:", line) for key in KEYS) for line in lines]
    whole: list[str] = []
    for number, line in enumerate(lines):
        if not names_key[number] and any(names_key[:number]) and any(names_key[number:]):
            whole[-1] = f"{whole[-1].rstrip()} {line.strip()}"
        else:
            whole.append(line)
    return whole


def parse_reference(text: str) -> dict[str, str]:
    """The 31 values of the right answer.

    Raises:
        UserError: when a key is missing, or is not in its place.
    """
    lines = _whole_lines(text.replace("<s>", "").replace("</s>", ""))
    values = {}
    for place, key in enumerate(KEYS):
        line = lines[place].strip() if place < len(lines) else ""
        if not line.startswith(f"{key}:"):
            raise UserError(f"line {place + 1} of the output must be '{key}: …', found {line[:60]!r}")
        values[key] = line.removeprefix(f"{key}:").strip().removesuffix(",").strip()
    return values


def words(key: str, value: str, as_published: bool = False) -> list[str]:
    """The words of a value, as they are compared.

    '|', ':' and '>>' part words like ';' does. Stacks are also split at hyphens, procedures and the atmosphere are
    in small letters, temperatures and times are numbers; the words of these are a set, in the order of their first
    appearance. A temperature or time that is not a number, which ends the notebook, stays as it is.
    """
    for sign in ("|", ":", ">>"):
        value = value.replace(sign, ";")
    parts = [word.strip() for word in value.replace("Spin-coating", "spin-coated").split(";")]
    if key in _SPLIT_AT_HYPHENS:
        parts = [part if as_published else part.strip() for word in parts for part in word.split("-")]
    elif "procedure" in key or key == "Stability_atmosphere":
        parts = [word.lower() for word in parts]
    elif "temperature" in key or "time" in key:
        parts = [_number(word) for word in parts]
    else:
        return parts
    return list(dict.fromkeys(parts))


def _number(word: str) -> str:
    if word in _NOT_NUMBERS:
        return word
    try:
        return str(float(word))
    except ValueError:
        return word


# --- values to counts -------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """One value compared: the counts, and the words of both sides with which relations are formed."""

    counts: Counts
    answer: list[str]
    given: list[str]


def match_value(key: str, answer: str, given: str | None, as_published: bool = False) -> Match:
    """Compares one value. A value that is not given (None) has no words."""
    wanted = words(key, answer, as_published)
    given_words = [] if given is None else words(key, given, as_published)
    if key in _COMPOSITIONS:
        return (
            _match_composition_as_published(wanted, given_words)
            if as_published
            else _match_composition(wanted, given_words)
        )
    # As published, words of a stack keep their spaces on one side of the comparison only.
    right = sum(word.strip() in wanted for word in given_words)
    missing = sum(word.strip() not in given_words for word in wanted)
    return Match(Counts(right, len(given_words) - right, missing, len(wanted)), wanted, given_words)


def _contains(first: str, second: str) -> bool:
    """Whether the characters of one composition are among those of the other."""
    return set(first) <= set(second) or set(second) <= set(first)


def _match_composition(wanted: list[str], given_words: list[str]) -> Match:
    """Compositions match when they are equal, or the characters of one are among those of the other."""

    def matches(first: str, second: str) -> bool:
        return first == second or (bool(first) and bool(second) and _contains(first, second))

    right, given = 0, []
    for word in given_words:
        partner = next((want for want in wanted if word == want), None)
        if partner is None:
            partner = next((want for want in wanted if matches(word, want)), None)
        right += partner is not None
        given.append(word if partner is None else partner)
    missing = sum(not any(matches(word, want) for word in given_words) for want in wanted)
    return Match(Counts(right, len(given_words) - right, missing, len(wanted)), wanted, given)


def _match_composition_as_published(wanted: list[str], given_words: list[str]) -> Match:
    """The notebook's loop: the list that it walks over is the one that it changes."""
    right: list[str] = []
    partners: list[str] = []
    place = 0
    while place < len(given_words):
        word = given_words[place]
        for want in wanted:
            if word == want:
                right.append(word)
            elif _contains(want, word):
                right.append(word)
                partners.append(want)
                if word in given_words:  # the notebook ends with an error when one composition matches two
                    given_words.remove(word)
                given_words.append(want)
        place += 1
    wrong = sum(word not in right for word in given_words)
    missing = sum(want not in partners and want not in right for want in wanted)
    return Match(Counts(len(right), wrong, missing, len(wanted)), wanted, given_words)


def match_values(answer: Values, given: Values, as_published: bool = False) -> dict[str, Match]:
    """Every value of a document compared, by key."""
    return {key: match_value(key, answer[key], given.get(key), as_published) for key in answer}


def related(matches: Sequence[Match]) -> Counts:
    """Counts of a relation: all combinations of a word of each value, on both sides.

    A combination is right when each of its words is among the words of the other side's value, so nothing has to be
    written out.
    """
    right = math.prod(sum(word in match.answer for word in match.given) for match in matches)
    common = math.prod(sum(word in match.given for word in match.answer) for match in matches)
    given = math.prod(len(match.given) for match in matches)
    answers = math.prod(len(match.answer) for match in matches)
    return Counts(right, given - right, answers - common, answers)


def _layer(key: str) -> str:
    return key.split("_")[0]


def relations(matches: Mapping[str, Match], as_published: bool = False) -> dict[str, Counts]:
    """Counts of the relations ab, ac and abc_d of a document."""
    ab = ac = abc_d = Counts()
    for a, b in itertools.product(A, B):
        ab = ab.plus(related([matches[a], matches[b]]))
    last = Counts()
    for a, c in itertools.product(A, C):
        if _layer(a) == _layer(c):
            last = related([matches[a], matches[c]])
            ac = ac.plus(last)
    for a, b, c in itertools.product(A, B, C):
        if _layer(a) == _layer(c):
            for d in D:
                last = related([matches[key] for key in (a, b, c, d)])
                abc_d = abc_d if as_published else abc_d.plus(last)
        if as_published:
            abc_d = abc_d.plus(last)
    return {"ab": ab, "ac": ac, "abc_d": abc_d}


def document(answer: Values, given: Values, as_published: bool = False) -> dict[str, Scores]:
    """The figures of one document: ie (all 31 values), ie_a … ie_d (the values of a set), ab, ac, abc_d.

    As published, figures that need a missing value are absent, and the others are rounded to four places.
    """
    matches = match_values(answer, given, as_published)
    groups = {"ie": KEYS, **{f"ie_{name}": keys for name, keys in SETS.items()}}
    figures: dict[str, Scores] = {}
    for name, keys in groups.items():
        if as_published and any(key not in given for key in keys):
            continue
        counts = Counts()
        for key in keys:
            counts = counts.plus(matches[key].counts)
        figures[name] = scores(counts)
    if not as_published or all(key in given for key in KEYS):
        figures |= {name: scores(counts) for name, counts in relations(matches, as_published).items()}
    if as_published:
        figures = {name: Scores(*(round(value, 4) for value in values)) for name, values in figures.items()}
    return figures


# --- what the text does not say ---------------------------------------------------------------------------------------


class Hits(NamedTuple):
    """Number of values that were found, and of those that were looked for."""

    found: int = 0
    all: int = 0


def abilities(answer: Values, given: Values, text: str, as_published: bool = False) -> dict[str, Hits]:
    """Values that do not stand in the text as the answer has them, and had to be inferred.

    deduction: equal values. normalisation: equal values, or a part of one in common, as a text or as a number rounded
    to one place. summarisation: words of stacks and compositions that are not in the text, found among the given ones.

    Args:
        answer, given: values by key.
        text: what the model read.
    """
    deduced = normalised = summarised = Hits()
    for key in answer:
        value = given.get(key)
        if value is None and as_published:
            continue
        hidden = answer[key] not in text
        if key in DEDUCTION and hidden:
            deduced = Hits(deduced.found + (value == answer[key]), deduced.all + 1)
        if key in NORMALISATION and hidden:
            hits = 0 if value is None else _normalised(answer[key], value)
            normalised = Hits(normalised.found + (hits if as_published else min(hits, 1)), normalised.all + 1)
        if key in SUMMARISATION:
            given_words = [] if value is None else _plain_words(value)
            new = [word for word in _plain_words(answer[key]) if word not in text]
            summarised = Hits(summarised.found + sum(word in given_words for word in new), summarised.all + len(new))
    return {"deduction": deduced, "normalisation": normalised, "summarisation": summarised}


def _plain_words(value: str) -> list[str]:
    return words("", value)


def _normalised(answer: str, value: str) -> int:
    """The number of the parts of a value that the answer has too."""
    if value == answer:
        return 1
    wanted = answer.replace("; ", " >> ").replace(" | ", " >> ").split(" >> ")
    hits = 0
    for part in value.replace("; ", " >> ").replace("'", "").split(" >> "):
        if part in wanted:
            hits += 1
        else:
            hits += sum(_tenths(part) is not None and _tenths(part) == _tenths(want) for want in wanted)
    return hits


def _tenths(text: str) -> float | None:
    try:
        return round(float(text), 1)
    except ValueError:
        return None
