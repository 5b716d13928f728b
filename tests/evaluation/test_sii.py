"""Darwin's structured information: the notebook's figures, and every one of them formed in another way."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import sii
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers, Question
from tests.evaluation.tasks import requested

SAMPLES = Path(__file__).parents[2] / "../shared/data"
GOLDEN = SAMPLES / "golden/golden_sii_synthetic.json"
golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="the notebook's figures are not here")
ANSWER = dict.fromkeys(sii.KEYS, "Unknown") | {
    "Substrate_stack_sequence": "SLG | ITO",
    "ETL_stack_sequence": "C60; BCP",
    "Perovskite_composition_long_form": "MAPbI3",
    "Stability_temperature_range": "nan; nan",
    "Perovskite_deposition_thermal_annealing_time": "10.0",
    "Cell_area_measured": "0.1",
    "Cell_architecture": "pin",
}


def written(values: dict[str, str]) -> str:
    """A record's output as Darwin's files have it."""
    return "<s> " + ",\n ".join(f"{key}: {value}" for key, value in values.items()) + "</s>"


@golden
@pytest.mark.parametrize("as_published", [True, False])
def test_figures_of_the_notebook(as_published: bool) -> None:
    """All of them as published; corrected, those that the corrections do not touch."""
    content = json.loads(GOLDEN.read_text())
    answer = sii.parse_reference(written(content["answer"]))
    for name, expected in content["expected(P,R,F1,acc)"].items():
        change = content["predictions_change"][name]
        if change is None:
            missing = {key: value for key, value in answer.items() if key != "Module"}
            figures = sii.document(answer, missing, as_published)
            assert ("ie" in figures) is (not as_published) and expected is None
            continue
        figures = sii.document(answer, answer | change, as_published)
        for group, values in expected.items():
            rounded = tuple(round(value, 4) for value in figures[group])
            if not as_published and (group == "abc_d" or name == "charset_composition"):
                continue
            assert rounded == tuple(values), (name, group)


def test_a_composition_that_matches_by_its_characters() -> None:
    """As published it is right, and its place in the changed list counts as wrong besides."""
    key = "Perovskite_composition_long_form"
    assert sii.match_value(key, "MAPbI3", "MAPbI3Cl").counts == (1, 0, 0, 1)
    assert sii.match_value(key, "MAPbI3", "MAPbI3Cl", as_published=True).counts == (1, 1, 0, 1)
    assert sii.match_value(key, "MAPbI3", "CsSnBr3").counts == (0, 1, 1, 1)
    assert sii.match_value(key, "", "MAPbI3").counts == (0, 1, 1, 1)
    assert sii.match_value(key, "", "MAPbI3", as_published=True).counts[0] == 1
    assert sii.match_value(key, "", "").counts == (1, 0, 0, 1)


def test_words_of_values() -> None:
    assert sii.words("ETL_stack_sequence", "PCBM-60 | BCP; BCP") == ["PCBM", "60", "BCP"]
    assert sii.words("ETL_stack_sequence", "PCBM - 60", as_published=True) == ["PCBM ", " 60"]
    assert sii.words("HTL_deposition_procedure", "Spin-coating >> CVD") == ["spin-coated", "cvd"]
    assert sii.words("Stability_time_total_exposure", "100; 1e2 >> Unknown; nan; soon") == [
        "100.0",
        "Unknown",
        "nan",
        "soon",
    ]
    assert sii.words("HTL_additives_compounds", "TBP; TBP:Li") == ["TBP", "TBP", "Li"]
    assert sii.words("HTL_stack_sequence", "") == [""]


def test_spaces_around_a_hyphen() -> None:
    same = sii.match_value("ETL_stack_sequence", "PCBM - 60", "PCBM - 60")
    assert same.counts == (2, 0, 0, 2)
    published = sii.match_value("ETL_stack_sequence", "PCBM - 60", "PCBM - 60", as_published=True)
    assert published.counts == (0, 2, 2, 2)


def test_a_missing_value_counts_as_not_found() -> None:
    given_values = {key: value for key, value in ANSWER.items() if key != "ETL_stack_sequence"}
    figures = sii.document(ANSWER, given_values)
    total = sum(len(sii.words(key, value)) for key, value in ANSWER.items())
    assert figures["ie"].precision == 1 and figures["ie"].recall == pytest.approx((total - 2) / total)
    published = sii.document(ANSWER, given_values, as_published=True)
    assert set(published) == {"ie_b", "ie_c", "ie_d"}
    assert set(sii.document(ANSWER, {})["ie"]) == {0.0}


VALUE = st.sampled_from(
    [
        "Unknown",
        "",
        "nan",
        "C60",
        "C60; BCP",
        "PCBM-60 | BCP",
        "BCP:C60",
        "CVD >> Spin-coating",
        "10",
        "10.0; 20",
        "MAPbI3",
        "Ag; Ag; Au",
        "Ag",
    ]
)
DOCUMENT = st.fixed_dictionaries(dict.fromkeys(sii.KEYS, VALUE))


@given(DOCUMENT, DOCUMENT)
def test_relations_against_products_written_out(answer: dict[str, str], found: dict[str, str]) -> None:
    """Every combination as a tuple, counted one by one."""
    matches = sii.match_values(answer, found)
    groups = {
        "ab": list(itertools.product(sii.A, sii.B)),
        "ac": [pair for pair in itertools.product(sii.A, sii.C) if pair[0].split("_")[0] == pair[1].split("_")[0]],
    }
    groups["abc_d"] = [(a, sii.B[0], c, sii.D[2]) for a, c in groups["ac"]]
    counted = sii.relations(matches)
    for name in ("ab", "ac"):
        assert counted[name] == _sum(matches, groups[name])
    assert _sum(matches, groups["abc_d"]) == tuple(
        sum(values)
        for values in zip(*(sii.related([matches[key] for key in keys]) for keys in groups["abc_d"]), strict=True)
    )
    ways = len(sii.B) * len(sii.D) * len(groups["ac"])
    assert ways == 6 * 7 * (2 + 3 * 4 + 2 + 2)


def _sum(matches: dict[str, sii.Match], groups: list[tuple[str, ...]]) -> tuple[int, ...]:
    total: Counter[str] = Counter()
    for keys in groups:
        right = list(itertools.product(*(matches[key].answer for key in keys)))
        made = list(itertools.product(*(matches[key].given for key in keys)))
        total["right"] += len([one for one in made if one in right])
        total["wrong"] += len([one for one in made if one not in right])
        total["missing"] += len([one for one in right if one not in made])
        total["answers"] += len(right)
    return total["right"], total["wrong"], total["missing"], total["answers"]


@given(DOCUMENT, DOCUMENT)
def test_extraction_against_multisets(answer: dict[str, str], found: dict[str, str]) -> None:
    """Values outside of compositions: shares of words by their number on each side."""
    for key in sii.KEYS:
        if "composition" in key:
            continue
        match = sii.match_value(key, answer[key], found[key])
        mine, theirs = Counter(match.given), Counter(match.answer)
        right = sum(number for word, number in mine.items() if theirs[word])
        missing = sum(number for word, number in theirs.items() if not mine[word])
        assert match.counts == (right, mine.total() - right, missing, theirs.total())


@given(DOCUMENT)
def test_a_document_equals_itself(values: dict[str, str]) -> None:
    for scores in sii.document(values, values).values():
        assert scores == (1, 1, 1, 1)


def test_relations_are_counted_once() -> None:
    """One word for each value, one wrong material: each relation loses its share, and nothing stale is added."""
    values = dict.fromkeys(sii.KEYS, "x")
    wrong = values | {"ETL_stack_sequence": "y"}
    counts = sii.relations(sii.match_values(values, wrong))
    assert counts["ab"] == (54, 6, 6, 60) and counts["ac"] == (17, 1, 1, 18)
    assert counts["abc_d"] == (17 * 42, 42, 42, 18 * 42)
    stale = sii.relations(sii.match_values(values, wrong), as_published=True)
    assert stale["ab"] == counts["ab"] and stale["ac"] == counts["ac"]
    assert stale["abc_d"].answers == 10 * 6 * 7  # once for each a, b and c


def test_answers_are_parsed() -> None:
    text = written(ANSWER)
    assert sii.parse_answer(text) == ANSWER == sii.parse_reference(text)
    assert sii.parse_answer("Here: Cell_area_measured: 0.1,\nModule:TRUE ### \nModule: no") == {
        "Cell_area_measured": "0.1",
        "Module": "TRUE",
    }
    assert sii.parse_answer("") == {}
    # A value that goes on in the next line, as one of Darwin's own; what stands behind the last value is none.
    broken = text.replace("HTL_additives_compounds: Unknown", "HTL_additives_compounds: TBP,\n\nLi") + "\nThat is all."
    values = sii.parse_answer(broken)
    assert values == ANSWER | {"HTL_additives_compounds": "TBP, Li", "Module": "Unknown"}
    assert sii.parse_reference(broken.removesuffix("\nThat is all.")) == values
    assert sii.parse_answer(broken, as_published=True)["HTL_additives_compounds"] == "TBP"
    # The wavelengths' line is not the value of a shorter key, but the notebook takes it.
    line = "Cell_semitransparent_wavelength_range: 300; 800,"
    assert set(sii.parse_answer(line)) == {"Cell_semitransparent_wavelength_range"}
    assert set(sii.parse_answer(line, as_published=True)) == {
        "Cell_semitransparent",
        "Cell_semitransparent_wavelength_range",
    }


@pytest.mark.skipif(not (SAMPLES / "darwin_sii_120.json").is_file(), reason="Darwin's records are not here")
def test_published_records() -> None:
    records = json.loads((SAMPLES / "darwin_sii_120.json").read_text())
    for record in records:
        reference = sii.parse_reference(record["output"])
        assert sii.parse_answer(record["output"]) == reference
        assert sii.document(reference, reference)["abc_d"].f1 == 1


@pytest.mark.parametrize("text", ["", "JV default Voc: 1.0", written(dict(reversed(ANSWER.items())))])
def test_a_record_of_another_suite_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="line 1 of the output must be 'Substrate_stack_sequence: …'"):
        sii.parse_reference(text)


def test_abilities_by_hand() -> None:
    text = "ITO on SLG, annealed for 10 min; area 0.1"
    answer = ANSWER | {"Perovskite_deposition_thermal_annealing_time": "10.04; 20", "Cell_architecture": "pin"}
    same = sii.abilities(answer, answer, text)
    # "0.1" is in the text. Hidden: architecture and transparency; the two times; C60, BCP and four Unknown words.
    assert same["deduction"] == (2, 2)
    assert same["normalisation"] == (2, 2)
    assert same["summarisation"] == (4, 4)
    other = answer | {"Perovskite_deposition_thermal_annealing_time": "10; 20; 20.01", "ETL_stack_sequence": "C60"}
    found = sii.abilities(answer, other, text)
    assert found["normalisation"] == (2, 2) and found["summarisation"] == (3, 4)
    assert sii.abilities(answer, other, text, as_published=True)["normalisation"] == (4, 2)
    assert sii.abilities(answer, {}, text)["deduction"] == (0, 2)
    assert sii.abilities(answer, {}, text, as_published=True)["deduction"] == (0, 0)


# --- the task ---------------------------------------------------------------------------------------------------------

TASK = get_task("sii")
RECORD = {"instruction": "Summarize.", "input": "ITO on SLG; area 0.1", "output": written(ANSWER)}


def test_a_model_is_asked_in_its_own_template_or_as_published() -> None:
    (own,) = requested(TASK, [RECORD], TASK.options(max_new_tokens=9))
    assert own.context == Question("Summarize.", "ITO on SLG; area 0.1")
    assert own.settings.temperature == 0 and own.settings.max_new_tokens == 9  # type: ignore[attr-defined]
    (published,) = requested(TASK, [RECORD], TASK.options(as_published=True))
    assert published.context == (
        "instruction: Summarize.If prediction is finished, add </s> at the end of the output., input: "
        "ITO on SLG; area 0.1"
    )
    settings = published.settings  # type: ignore[attr-defined]
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.8, 0.75, 40)


def test_figures_of_documents() -> None:
    wrong = written(ANSWER | {"Cell_architecture": "nip"})
    answers: list[Answers] = [
        {"answer": Answer(texts=(RECORD["output"],), finishes=("stop",))},
        {"answer": Answer(texts=(wrong,), finishes=("length",))},
        {"answer": Answer(error="too long")},
    ]
    figures = TASK.score([RECORD] * 3, answers, TASK.options())
    total = sum(len(sii.words(key, value)) for key, value in ANSWER.items())
    share = (total - 1) / total
    assert figures["ie_recall"].value == pytest.approx((1 + share + 0) / 3) and figures["ie_recall"].n == 3
    assert figures["ie_f1"].values == pytest.approx({0: 1.0, 1: share, 2: 0.0})
    assert figures["deduction"].n == 6 and figures["deduction"].value == pytest.approx(3 / 6)
    assert figures["complete"].value == pytest.approx(2 / 3) and figures["finished"].value == 0.5
    published = TASK.score([RECORD] * 3, answers, TASK.options(as_published=True))
    assert published["ie_f1"].n == 2 and published["ie_f1"].value == round((1 + round(share, 4)) / 2, 4)
    for options in (TASK.options(), TASK.options(as_published=True)):
        assert TASK.details([RECORD] * 3, answers, published, options)  # type: ignore[misc]


def test_records_are_checked() -> None:
    options = TASK.options()
    assert TASK.check(RECORD, options) is None
    assert TASK.check({"question": "x"}, options) == "has no 'instruction'; columns found: question"
    assert TASK.check(RECORD | {"output": 3}, options) == "'output' is int, expected a text"
    assert "line 1 of the output" in str(TASK.check(RECORD | {"output": "JV default Voc: 1"}, options))
