"""Modalities of a run's configuration: a fresh model gets the tokens, another must have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.commands.main import main as convert
from jaxlm.cli.train import main
from jaxlm.tokenizer import load_tokenizer
from tests.e2e.conftest import write_config

RECORDS = [{"text": f"rock <smiles>{'C' * n}O</smiles> sand"} for n in range(1, 30)]


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> Any:
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))

    def written(**changes: Any) -> list[str]:
        data = {"train": [{"path": str(tmp_path / "records.json"), "template": "text"}], "validation": 0}
        changes = {"data": data, "train": {"steps": 1}} | changes
        return ["--config", str(write_config(tmp_path, base_config, **changes))]

    return written


def kept(run: Path) -> Any:
    return load_tokenizer(run / "checkpoints" / "1" / "jaxlm" / "tokenizer")


def test_a_fresh_model_and_what_follows(
    config: Any, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {**base_config["tokenizer"], "modalities": [{"preset": "smiles_atoms"}]}
    model = {**base_config["model"], "shape": str(_larger(base_config["model"]["shape"], tmp_path))}
    moe = {"experts": 4, "router": "modality", "top_k": {"text": 2, "smiles": 1}}
    run = tmp_path / "run"
    assert main([*config(tokenizer=tokenizer, model=model, moe=moe), "--output_dir", str(run)]) == 0
    (smiles,) = kept(run).modalities
    assert (
        smiles.tag_tokens and kept(run).decode(kept(run).encode("<smiles>CCl</smiles>").ids) == "<smiles>CCl</smiles>"
    )
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert sum(line["expert_share"]["smiles"]) == pytest.approx(1)

    # Goes on by itself; how texts are read may be changed, the tokens may not.
    capsys.readouterr()
    again = {"path": str(run), "shape": None}
    words = config(
        tokenizer={"path": None, "modalities": [{"preset": "smiles_atoms", "fallback": "text"}]}, model=again
    )
    assert main([*words, "--output_dir", str(tmp_path / "second")]) == 0
    assert kept(tmp_path / "second").modalities[0].fallback == "text"
    words = config(tokenizer={"path": None, "modalities": [{"preset": "smiles"}]}, model=again)
    assert main([*words, "--output_dir", str(tmp_path / "third")]) == 2
    assert "tokenizer.modalities: differ from those that the tokenizer has (smiles" in capsys.readouterr().err
    assert convert(["inspect", str(run)]) == 0


def _larger(shape: str, folder: Path) -> Path:
    content = json.loads(Path(shape).read_text())
    content["vocab_size"] = 700
    (folder / "larger.json").write_text(json.dumps(content))
    return folder / "larger.json"


def test_a_model_without_the_tokens(
    config: Any, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*config(), "--output_dir", str(run)]) == 0  # the tags are only text
    words = config(
        model={"path": str(run), "shape": None}, tokenizer={"path": None, "modalities": [{"preset": "smiles"}]}
    )
    assert main([*words, "--output_dir", str(tmp_path / "second")]) == 2
    assert f"convert extend-vocab {run} OUT --modality smiles" in capsys.readouterr().err
