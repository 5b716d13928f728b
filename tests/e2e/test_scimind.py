"""SciMind's recipe in small, as its script runs it: from data to figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli.parser import parse_run
from jaxlm.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "../shared/data"
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run_recipe(data: Path, tmp_path: Path) -> Path:
    """The script with a tiny model and few steps; the directory of its results."""
    shape = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "shape.json").write_text(json.dumps(shape | tiny | {"vocab_size": 600}))
    words = {
        "DATA": str(data),
        "BASE": f"--model.shape {tmp_path / 'shape.json'}",
        "TRAIN": "--train.steps 2",
        "GENERATE": "--max_new_tokens 4 --batch_size 8",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", "configs/scimind/small.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / "out"


def check(out: Path, records: int) -> None:
    tokenizer = load_tokenizer(out / "tuned" / "checkpoints" / "2" / "jaxlm" / "tokenizer")
    (smiles,) = tokenizer.modalities
    assert smiles.name == "smiles" and smiles.range[1] - smiles.range[0] == 66
    steps = [json.loads(line) for line in (out / "tuned" / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "expert_share" in step]
    assert trained[0]["dropped"] == 0
    assert sum(trained[0]["expert_share"]["smiles"]) == pytest.approx(2, abs=0.01)
    assert sum(trained[0]["expert_share"]["text"]) == pytest.approx(14, abs=0.01)
    for task, figure in (("smiles2text", "bleu_2"), ("text2smiles", "validity")):
        for name in ("chance", "before", "after"):
            assert len(json.loads((out / f"{name}-{task}.json").read_text())) == records
            found = json.loads((out / f"{name}-{task}-figures.json").read_text())
            assert found["answers"] == records and 0 <= found[figure] <= 1
            assert found["exact"] == 0  # also of guessing: no record got its own answer
    (metric,) = json.loads((out / "result.json").read_text())["metrics"]
    assert metric["name"] == "captions, F1 of facts" and 0 < metric["chance"] < 1
    assert (out / "moe-coverage" / "coverage.png").is_file()


def test_on_the_molecules_that_come_along(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    for name in ("train", "test"):
        records = json.loads((ROOT / "configs/scimind" / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(records[:40]))
    check(run_recipe(tmp_path, tmp_path), 40)


@pytest.mark.nightly
def test_on_published_molecules(tmp_path: Path) -> None:
    """LPM-24's, with captions that RDKit makes."""
    pytest.importorskip("rdkit")
    file = SAMPLES / "lpm24_smiles_3000.txt"
    if not file.is_file():
        pytest.skip("the real samples are not at hand")
    short = [line for line in file.read_text().split() if len(line) < 60]
    (tmp_path / "smiles.txt").write_text("\n".join([*short[:80], "not a molecule"]))
    command = [sys.executable, "configs/scimind/prepare.py", tmp_path / "smiles.txt", tmp_path / "data", "--test", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "60 records" in done.stdout and "3 lines are no SMILES" in done.stdout, done.stderr
    record = json.loads((tmp_path / "data" / "train.json").read_text())[0]
    assert record["caption"].startswith("The molecule has the formula C")
    check(run_recipe(tmp_path / "data", tmp_path), 20)


@pytest.mark.parametrize("name", ["base", "small", "finetune", "pretrain"])
def test_configurations_are_valid(name: str) -> None:
    (config,) = parse_run(["--config", str(ROOT / f"configs/scimind/{name}.yaml")], prog="", description="").configs
    if name == "finetune":  # SciMind's published numbers
        assert config.optimizer.learning_rate == 5e-5 and config.train.global_batch_size == 64
        assert config.data.train_on_inputs and config.data.drop_unknown and config.data.sequence_length == 2048
