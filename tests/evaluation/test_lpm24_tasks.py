"""LPM-24 as tasks: METEOR with data at a path, properties, molecules, FCD; against hand work and other formulations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.lpm24 import Pair, caption_metrics, molecule_metrics
from jaxlm.evaluation.metrics import molecules, properties, text
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Question
from jaxlm.evaluation.tasks.lpm24 import tagged
from tests.evaluation.tasks import read, requested, text_answers, values

pytest.importorskip("rdkit")
CAPTIONS, MOLECULES = get_task("lpm24_captions"), get_task("lpm24_molecules")
RECORD = {"molecule": "CCO", "caption": "The molecule is an alcohol and a polar solvent."}
PROPERTIES = {"Use": [{"Solvents": ["polar solvent", "solvent"]}, "fuel"], "Class": ["alcohol", "acid"]}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """A WordNet without words, so that METEOR matches equal words and equal stems only."""
    folder = tmp_path / "nltk_data/corpora/wordnet"
    folder.mkdir(parents=True)
    parts = ("adj", "adv", "noun", "verb")
    files = [f"{kind}.{part}" for kind in ("index", "data") for part in parts] + [f"{part}.exc" for part in parts]
    for name in ("cntlist.rev", "lexnames", "index.sense", *files):
        (folder / name).write_text("")
    return tmp_path / "nltk_data"


def hierarchy(tmp_path: Path, content: Any = PROPERTIES) -> Path:
    path = tmp_path / "nested_props.json"
    path.write_text(json.dumps(content))
    return path


# --- captions ---------------------------------------------------------------------------------------------------------


def test_meteor_by_hand(wordnet: Path) -> None:
    """All three words match, of four, in two pieces; (Banerjee and Lavie, 2005)."""
    mean_of_both = 10 * 1 * 0.75 / (0.75 + 9 * 1)
    expected = mean_of_both * (1 - 0.5 * (2 / 3) ** 3)
    assert text.meteor(["a", "b", "c", "d"], ["a", "b", "d"], wordnet) == pytest.approx(expected)
    assert text.meteor(["solvents"], ["solvent"], wordnet) == text.meteor(["x"], ["x"], wordnet)  # one stem
    with pytest.raises(UserError, match=r"nltk_data: .* has no corpora/wordnet"):
        text.meteor(["a"], ["a"], wordnet / "none")


def test_properties_by_hand(tmp_path: Path) -> None:
    """Groups are averaged from the innermost; what no caption names is left out, and an empty group is 1."""
    paths = properties.read_properties(hierarchy(tmp_path))
    assert paths == [
        ("Use", "Solvents", "polar solvent"),
        ("Use", "Solvents", "solvent"),
        ("Use", "fuel"),
        ("Class", "alcohol"),
        ("Class", "acid"),
    ]
    references = ["a polar solvent, an alcohol", "an acid", "a fuel"]
    answers = ["a solvent and an Alcohol", "an alcohol", "a fuel"]
    figures = properties.property_figures(references, answers, paths, str.split)
    # str.split leaves the comma at "solvent,": the references name alcohol, acid, fuel, and no solvent.
    assert figures["recall"] == pytest.approx(((1 + 1) / 2 + (1 + 0) / 2) / 2)
    # Precision: solvent is named wrongly (0), polar solvent never; fuel 1; alcohol 1 of 2, acid never given.
    assert figures["precision"] == pytest.approx(((0 + 1) / 2 + 0.5) / 2)


TOKENS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(" ".join)


@given(
    st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5), st.lists(TOKENS, min_size=1, max_size=4, unique=True)
)
def test_properties_against_a_second_formulation(pairs: list[tuple[str, str]], names: list[str]) -> None:
    """Slices compared one by one, and one group."""

    def holds(name: str, caption: str) -> bool:
        wanted, words = name.split(), caption.split()
        return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))

    scores = []
    for name in names:
        sides = [(holds(name, right), holds(name, answer)) for right, answer in pairs]
        hits, total = sides.count((True, True)), sum(map(sum, sides))
        if total:
            scores.append(2 * hits / total)
    references, answers = ([pair[at] for pair in pairs] for at in (0, 1))
    paths = [("group", name) for name in names]
    figures = properties.property_figures(references, answers, paths, str.split)
    assert figures["f1"] == pytest.approx(sum(scores) / len(scores) if scores else 1)


def test_pairs_of_properties(tmp_path: Path) -> None:
    path = tmp_path / "combos.txt"
    path.write_text("('Class__alcohol', 'Use__fuel')\t3\n('Class__acid', 'Use__fuel')\n\n")
    pairs = properties.read_combinations(path)
    assert pairs == [("Class__alcohol", "Use__fuel"), ("Class__acid", "Use__fuel")]
    references = ["alcohol fuel", "acid fuel", "acid"]
    answers = ["fuel alcohol", "acid", "acid fuel"]
    figures = properties.combination_figures(references, answers, pairs, str.split)
    assert figures == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert properties.combination_figures(references, answers, [], str.split)["f1"] == 0
    path.write_text("('a', 'b')\n__import__('os')\n")
    with pytest.raises(UserError, match=r"combos.txt:2: expected"):
        properties.read_combinations(path)


@pytest.mark.parametrize("content", [[], {}, {"a": "b"}, {"a": [3]}, {"a": [{"b": "c"}]}])
def test_other_hierarchies_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match="is not a hierarchy of properties"):
        properties.read_properties(hierarchy(tmp_path, content))


def test_captions(tmp_path: Path, wordnet: Path) -> None:
    """The figures are those of `lpm24.caption_metrics`, and the further ones stand beside them."""
    options = CAPTIONS.options(nltk_data=str(wordnet), properties=str(hierarchy(tmp_path)))
    CAPTIONS.check_options(options)  # type: ignore[misc]
    records = [RECORD, {"SMILES": "C", "ground truth": "a fuel"}]
    assert [CAPTIONS.check(record, options) for record in records] == [None, None]
    answers = ["The molecule is an alcohol and a solvent.", "a fuel"]
    figures = values(CAPTIONS.score(records, text_answers(answers), options))
    pairs = [Pair(RECORD["caption"], answers[0]), Pair("a fuel", answers[1])]
    old = caption_metrics(pairs)
    assert {name: figures[name] for name in old if name != "exact"} == pytest.approx(
        {name: value for name, value in old.items() if name != "exact"}
    )
    assert 0.5 < figures["meteor"] < 1 and figures["property_precision"] == 1
    plain = CAPTIONS.score(records, text_answers(answers), CAPTIONS.options())
    assert set(plain) == {"bleu_2", "bleu_4", "rouge_1", "rouge_2", "rouge_l"}
    assert "METEOR needs WordNet" in CAPTIONS.details(records, [], plain, CAPTIONS.options())  # type: ignore[misc]


# --- molecules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("caption", "molecule"), ("description", "ground truth")])
def test_molecules(names: Sequence[str]) -> None:
    smiles = ["CCO", "CC(=O)O", "c1ccccc1"]
    given_answers = ["OCC", "It is <smiles>CC(=O)N</smiles>.", "nothing"]
    records = [dict(zip(names, ("x", each), strict=True)) for each in smiles]
    figures = MOLECULES.score(records, text_answers(given_answers), MOLECULES.options())
    pairs = [Pair(*pair) for pair in zip(smiles, map(tagged, given_answers), strict=True)]
    assert values(figures) == pytest.approx(molecule_metrics(pairs))
    assert figures["exact"].values == {0: 1, 1: 0, 2: 0} and figures["levenshtein"].higher_is_better is False
    assert [MOLECULES.check(record, MOLECULES.options()) for record in records] == [None] * 3


def test_likeness_against_rdkits_older_functions() -> None:
    """As the shared task's script calls them."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import AllChem, MACCSkeys

    first, second = "CC(=O)Oc1ccccc1C(=O)O", "OC(=O)c1ccccc1O"
    mols = [Chem.MolFromSmiles(each) for each in (first, second)]
    alike = molecules.compare(first, second)
    keys = [MACCSkeys.GenMACCSKeys(mol) for mol in mols]
    assert alike.maccs == DataStructs.FingerprintSimilarity(*keys)
    assert alike.rdk == DataStructs.FingerprintSimilarity(*map(Chem.RDKFingerprint, mols))
    morgan = [AllChem.GetMorganFingerprint(mol, 2) for mol in mols]
    assert alike.morgan == DataStructs.TanimotoSimilarity(*morgan)
    assert alike.exact == 0 and alike.validity == 1 and molecules.compare(first, "").validity == 0


@pytest.mark.slow
def test_fcd_is_that_of_its_package() -> None:
    """0 for the same molecules, written in whatever way; more for others."""
    pytest.importorskip("fcd")
    records = [{"caption": "x", "molecule": smiles} for smiles in ("CCO", "CCN", "CCC", "c1ccccc1O")]
    options = MOLECULES.options(fcd=True)
    same = MOLECULES.score(records, text_answers(["OCC", "NCC", "CCC", "Oc1ccccc1"]), options)["fcd"]
    other = MOLECULES.score(records, text_answers(["CCCC", "C1CC1", "bad", "CCCCCC"]), options)["fcd"]
    assert same.value == pytest.approx(0, abs=1e-3) and other.value > 1 and other.n == 3
    assert math.isnan(MOLECULES.score(records, text_answers(["C", "", "", ""]), options)["fcd"].value)


def test_fcd_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fcd", None)
    with pytest.raises(UserError, match="needs the package fcd: pip install fcd"):
        molecules.frechet_distance(["C", "CC"], ["C", "CC"])


# --- both -------------------------------------------------------------------------------------------------------------


def test_questions() -> None:
    (caption,) = requested(CAPTIONS, [RECORD], CAPTIONS.options(max_new_tokens=3))
    assert caption.context == Question("Please describe the molecule below:\n<smiles>CCO</smiles>")
    (molecule,) = requested(MOLECULES, [RECORD], MOLECULES.options(question="Draw: {caption} {x}"))
    assert molecule.context == Question(f"Draw: {RECORD['caption']} {{x}}")
    with pytest.raises(UserError, match=r"options.question: 'Describe' has no {molecule}"):
        CAPTIONS.check_options(CAPTIONS.options(question="Describe"))  # type: ignore[misc]
    with pytest.raises(UserError, match="morgan_radius: -1"):
        MOLECULES.check_options(MOLECULES.options(morgan_radius=-1))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        (CAPTIONS, {"caption": "x"}, "has no text in molecule, SMILES, smiles; columns found: caption"),
        (CAPTIONS, {"molecule": "C", "caption": None}, "has no text in caption, description, ground truth"),
        (MOLECULES, {"caption": "x", "molecule": "C1C"}, "'C1C' is not a SMILES"),
        (MOLECULES, {"caption": "x", "molecule": ""}, "'' is not a SMILES"),
        (MOLECULES, {"instruction": "x"}, "has no text in caption, description"),
    ],
)
def test_other_records_are_refused(task: Any, record: dict[str, Any], said: str) -> None:
    assert said in task.check(record, task.options())


def test_tables_of_the_shared_task(tmp_path: Path) -> None:
    """Columns divided by tabs, with quotation marks as they stand; and JSON."""
    table = tmp_path / "eval.txt"
    table.write_text('SMILES\tground truth\toutput\nCCO\tan "alcohol\tx\nC\ta gas\ty\n')
    records, _ = read(CAPTIONS, table)
    assert [record["ground truth"] for record in records] == ['an "alcohol', "a gas"]
    table.with_suffix(".json").write_text(json.dumps([RECORD]))
    assert read(CAPTIONS, table.with_suffix(".json"))[0] == [RECORD]
