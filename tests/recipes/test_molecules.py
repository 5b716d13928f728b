"""Molecules and QLoRA in small: what the recipes' scripts make and count, and that their settings are read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli.parser import parse_run
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from tests.recipes.test_result import ROOT, script

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("name", ["molecules/sft", "molecules/dpo", "molecules/grpo", "qlora/base", "qlora/small"])
def test_settings_are_read(name: str) -> None:
    (config,) = parse_run(["--config", name], prog="", description="").configs
    assert config.output_dir.startswith("out/") and config.model.dtype == "float32"


def test_the_chips_settings_are_the_papers() -> None:
    """QLoRA (arXiv:2305.14314), section 4 and appendix B: 7B and 13B on Alpaca and OASST1."""
    (config,) = parse_run(["--config", "qlora/7b", "--model.shape", "llama-2-7b"], prog="", description="").configs
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (
        64,
        16,
        0.1,
        ("all-linear",),
    )
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.beta2, optimizer.clip_norm) == (
        2e-4,
        "constant",
        0.999,
        0.3,
    )
    assert (config.model.quantize, config.train.global_batch_size, config.train.steps) == ("nf4", 16, 1875)


def test_a_rejected_molecule_is_the_chosen_one_with_a_mistake() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    pairs = script("configs/molecules/pairs.py")
    records = json.loads((CONFIGS / "scimind/train.json").read_text())[:60]
    pairs.RDLogger.DisableLog("rdApp.*")
    wrong = [pairs.corrupted(record["molecule"], random.Random(3)) for record in records]
    assert wrong == [pairs.corrupted(record["molecule"], random.Random(3)) for record in records]
    for record, text in zip(records, wrong, strict=True):
        right = record["molecule"]
        assert chem.MolFromSmiles(text) is None and abs(len(text) - len(right)) <= len("(C)(C)(C)C")


def test_answers_that_are_molecules_are_chosen_before_those_that_are_not() -> None:
    pytest.importorskip("rdkit")
    pairs = script("configs/molecules/pairs.py")
    pairs.RDLogger.DisableLog("rdApp.*")
    record = {"molecule": "CCO", "answers": ["CC", "C(", "CC ", "c1", "", "CCC"]}
    assert pairs.pairs(record, random.Random(0)) == [("CC", "C("), ("CCC", "c1")]
    for answers in (["CC", "CCC"], ["C(", ""], []):
        ((chosen, rejected),) = pairs.pairs(record | {"answers": answers}, random.Random(0))
        assert chosen == "CCO" and not pairs.read(rejected)


def test_figures_count_molecules_and_only_them() -> None:
    pytest.importorskip("rdkit")
    figures = script("configs/molecules/figures.py")
    figures.RDLogger.DisableLog("rdApp.*")
    records = [
        {"molecule": "OCC", "answers": ["CCO", "C(C", "", "C1CC1"]},
        {"molecule": "CC", "answers": ["CC", "CC ", "CCO", "c"]},
    ]
    found = figures.figures(records)
    assert found["valid"] == (2 + 3) / 8 and found["right"] == (1 + 2) / 8
    assert found["different"] == 3 / 5  # ethanol twice, cyclopropane, ethane twice
    assert found["standard_error"] == pytest.approx(0.125)
    assert 0 < figures.chance([{"molecule": "CCO"}, {"molecule": "CC(=O)O"}]) < 1


def test_questions_are_for_facts_that_no_record_says(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, CONFIGS / "qlora/questions.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "40 questions" in done.stdout, done.stderr
    questions = json.loads((tmp_path / "questions.json").read_text())
    told = {record["output"] for record in json.loads((CONFIGS / "quickstart/instructions.json").read_text())}
    assert len({question["question"] for question in questions}) == 40
    assert not told & {question["answers"][0] for question in questions}
    assert {"question": "Name a use of diamond.", "answers": ["Diamond is used for cutting stone."]} in questions
    assert 0.03 < json.loads((tmp_path / "chance.json").read_text())["exact"] < 0.1


def test_another_records_answer_is_never_the_own_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, CONFIGS / "scimind/chance.py", CONFIGS / "scimind/test.json", tmp_path])
    assert done.returncode == 0
    for task, field in (("smiles2text", "caption"), ("text2smiles", "molecule")):
        answers = json.loads((tmp_path / f"chance-{task}.json").read_text())
        assert sorted(answer["answer"] for answer in answers) == sorted(answer[field] for answer in answers)
        assert all(answer["answer"] != answer[field] for answer in answers)


def records(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CONFIGS / "scimind/records.py", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_chebi_and_promoters_become_records_that_the_templates_take(tmp_path: Path) -> None:
    (tmp_path / "chebi.txt").write_text('CID\tSMILES\tdescription\n1\tCCO\tA "small" alcohol.\n')
    (tmp_path / "p.fa").write_text(">p1\nacgt\nACGT\n>p2\nACGN\n")
    (tmp_path / "n.fa").write_text(">n1\nTTTT\n")
    chebi, promoter = tmp_path / "chebi.jsonl", tmp_path / "promoter.jsonl"
    assert records("chebi", tmp_path / "chebi.txt", chebi).returncode == 0
    done = records("promoter", tmp_path / "p.fa", tmp_path / "n.fa", promoter)
    assert done.returncode == 0 and "1 sequences are left out" in done.stderr
    assert [json.loads(line)["answer"] for line in promoter.read_text().splitlines()] == ["Yes.", "No."]
    for path, template, asked, answer in (
        (chebi, "smiles2text", "<smiles>CCO</smiles>", 'A "small" alcohol.'),
        (promoter, str(CONFIGS / "scimind/promoter.json"), "<nucleic>ACGTACGT</nucleic>", "Yes."),
    ):
        record = json.loads(path.read_text().splitlines()[0])
        text = load_template(template, None).render(Record("a", record)).text()
        assert asked in text and answer in text and text.index(asked) < text.index(answer)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "chebi.txt").write_text("CID\tSMILES\tdescription\n1\tCCO\n")
    (tmp_path / "a.tsv").write_text("SMILES,description\n")
    (tmp_path / "p.fa").write_text("ACGT\n")
    out = tmp_path / "out.jsonl"
    assert "chebi.txt:2: 2 cells" in records("chebi", tmp_path / "chebi.txt", out).stderr
    assert "no column 'SMILES'" in records("lpm24", tmp_path / "a.tsv", out).stderr
    assert "p.fa:1: a sequence without a name" in records("promoter", tmp_path / "p.fa", tmp_path / "p.fa", out).stderr
    assert not out.exists()


def test_facts_are_rings_and_groups() -> None:
    pytest.importorskip("rdkit")
    table = script("configs/scimind/table.py")
    text = "The molecule has the formula C3H5ClO. It has no ring. It is or has a ketone, a halogen."
    assert table.facts(text) == {"It has no ring", "a ketone", "a halogen"}
    assert table.facts(table.captioned("<smiles>CC(=O)CCl</smiles>")) == table.facts(text)
    assert table.captioned("<smiles>C(</smiles>") == "" == table.captioned("")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["molecules", "qlora", "scimind", "llm4academic"])
def test_the_metric_moves(name: str, tmp_path: Path) -> None:
    """The whole recipe, as its script runs it: minutes."""
    pytest.importorskip("rdkit")
    words = {"XLA_FLAGS": "", "SEED": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", f"configs/{name}/small.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | words, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["seed"] == 2
    for metric in result["metrics"]:
        assert metric["after"] > 1.1 * max(metric["chance"], metric["before"]), metric
