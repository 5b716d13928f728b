"""LPM-24's figures: against definitions worked by hand, and against the libraries that the task's scripts use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.cli.evaluate import main
from jaxlm.errors import UserError
from jaxlm.evaluation.lpm24 import Pair, caption_metrics, molecule_metrics, word_tokens
from jaxlm.evaluation.pairs import read_pairs

pytest.importorskip("rdkit")


def test_molecules_by_hand() -> None:
    """Ethanol written the other way round, no molecule, another molecule, nothing."""
    pairs = [Pair("CCO", "OCC"), Pair("CCO", "C1CC"), Pair("CCO", "CCN"), Pair("CCO", "")]
    found = molecule_metrics(pairs)
    assert found["validity"] == 0.5 and found["exact"] == 0.25 and found["unique"] == 1.0
    # To OCC: delete one, insert one. To C1CC: replace O, insert 1 (CC1C -> ...), i.e. 2. To CCN: 1. To nothing: 3.
    assert found["levenshtein"] == pytest.approx((2 + 2 + 1 + 3) / 4)
    # The same molecule has similarity 1, what is not valid 0, another something between.
    for name in ("maccs", "rdk", "morgan"):
        assert 0.25 < found[name] < 0.5, name


def test_equal_molecules() -> None:
    found = molecule_metrics([Pair("CC(=O)Oc1ccccc1C(=O)O", "CC(=O)Oc1ccccc1C(=O)O")])
    expected = {"exact": 1, "validity": 1, "maccs": 1, "rdk": 1, "morgan": 1, "bleu": 1, "levenshtein": 0, "unique": 1}
    assert found == pytest.approx(expected)


def test_morgan_is_a_count_fingerprint_of_radius_two() -> None:
    """As AllChem.GetMorganFingerprint(molecule, 2), which the task's script calls."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import AllChem

    first, second = "CCCCCCO", "CCCO"
    old = [AllChem.GetMorganFingerprint(Chem.MolFromSmiles(s), 2) for s in (first, second)]
    expected = DataStructs.TanimotoSimilarity(*old)
    assert molecule_metrics([Pair(first, second)])["morgan"] == pytest.approx(expected)
    assert molecule_metrics([Pair(first, second)], morgan_radius=1)["morgan"] != pytest.approx(expected)


def test_a_reference_that_is_no_molecule() -> None:
    with pytest.raises(UserError, match="'C1C' is not a SMILES"):
        molecule_metrics([Pair("C1C", "C")])


def test_captions() -> None:
    assert word_tokens("The C2H6O, it's.") == ["the", "c2h6o", ",", "it", "'", "s", "."]
    same = caption_metrics([Pair("The molecule is an alcohol.", "The molecule is an alcohol.")])
    assert all(value == pytest.approx(1.0) for value in same.values())
    # BLEU-2 by hand: 4 of 5 words and 3 of 4 pairs match, lengths are equal: sqrt(4/5 * 3/4).
    one = caption_metrics([Pair("a b c d e", "a b c d f")])
    assert one["bleu_2"] == pytest.approx((4 / 5 * 3 / 4) ** 0.5)
    assert one["bleu_4"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert one["rouge_1"] == pytest.approx(0.8) and one["rouge_2"] == pytest.approx(0.75)
    assert one["rouge_l"] == pytest.approx(0.8) and one["exact"] == 0
    letters = caption_metrics([Pair("a b", "a b")], tokens=list)
    assert letters["bleu_2"] == pytest.approx(1.0)


def test_tables(tmp_path: Path) -> None:
    """What jaxlm.generate writes, and the task's own table; a molecule may stand between tags."""
    written = tmp_path / "a.json"
    records = [{"molecule": "CC", "caption": "x", "answer": "It is <smiles>CCO</smiles>."}]
    written.write_text(json.dumps(records))
    assert read_pairs(written, "text2smiles") == ([Pair("CC", "CCO")], 0)
    assert read_pairs(written, "smiles2text") == ([Pair("x", "It is <smiles>CCO</smiles>.")], 0)
    table = tmp_path / "b.txt"
    table.write_text('description\tground truth\toutput\na "b\tCC\tCCO\n'.replace('"', "'"))
    assert read_pairs(table, "text2smiles") == ([Pair("CC", "CCO")], 0)
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"q": "1", "p": "2"}\n')
    assert read_pairs(lines, "smiles2text", "q", "p") == ([Pair("1", "2")], 0)
    written.write_text(json.dumps([*records, {"molecule": "C", "error": "was too long"}]))
    assert read_pairs(written, "text2smiles") == ([Pair("CC", "CCO"), Pair("C", "")], 1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, figures = tmp_path / "a.json", tmp_path / "figures.json"
    written.write_text(json.dumps([{"molecule": "CCO", "answer": "OCC"}]))
    words = ["--task", "text2smiles", "--predictions", str(written), "--save_file", str(figures)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "text2smiles: 1 answers" in out and "levenshtein" in out
    content = json.loads(figures.read_text())
    assert content["exact"] == 1 and content["answers"] == 1


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ([], "[]", "name one or several, e.g. --task multiple_choice"),
        (["--task", "text2smiles"], '[{"molecule": "C"}]', "record 1 has no text in prediction or answer or output"),
        (["--task", "text2smiles"], "[]", "holds no answer"),
        (["--task", "text2smiles"], "[1]", "must hold a list of records"),
        (["--task", "text2smiles"], "[", "broken JSON: Expecting value"),
        (["--task", "captions"], "[]", "did you mean 'lpm24_captions'?"),
        (
            ["--task", "smiles2text", "--metric_tokenizer", "/none"],
            '[{"caption": "a", "answer": "b"}]',
            "/none holds no",
        ),
    ],
)
def test_mistakes(
    words: list[str], content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    assert main([*words, "--predictions", str(file)]) == 2
    assert message in capsys.readouterr().err
