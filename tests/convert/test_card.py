"""The model card: what is known of a model is in it, and a card that a user wrote stays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.conversion import Opened, convert, write
from convert.formats.card import FILE, MARK, read_license
from convert.source import open_model
from convert.transforms.merge import MergedSource
from jaxlm.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig
from jaxlm.config.files import dump_yaml
from tests.convert.gguf_models import RandomSource, spec_of

CARD = "---\nlicense: other\nlicense_name: llama2\nlicense_link: https://x\n---\n# Base\n"


def head_of(card: Path) -> dict[str, Any]:
    """The YAML in front of a card."""
    _, head, _ = card.read_text().split("---\n", 2)
    values = yaml.safe_load(head)
    assert isinstance(values, dict)
    return values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, of a base on the hub, and an evaluation."""
    checkpoint = tmp_path / "out" / "geo-lora" / "checkpoints" / "40"
    checkpoint.parent.mkdir(parents=True)
    write("jax", RandomSource(spec_of("llama")), checkpoint)
    config = RunConfig(
        model=ModelConfig(path="hf://huggyllama/llama-7b@" + "a" * 40),
        lora=LoraConfig(rank=8, alpha=16.0, targets=("q_proj",)),
        data=DataConfig(
            train=(
                SourceConfig(path="hf://datasets/daven3/geosignal", template="alpaca"),
                SourceConfig(path="/home/somebody/secret/notes.json", weight=0.5),
            )
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=30),
    )
    (checkpoint / "jaxlm" / "run.yaml").write_text(dump_yaml(config))
    scores = {"jaxlm scores": 1, "figures": {"accuracy": {"value": 0.4321, "stderr": 0.01, "n": 500}}, "settings": {}}
    folder = checkpoint.parents[1] / "evaluation" / "geobench"
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    return checkpoint.parents[1]


def test_what_a_run_records_is_in_the_card(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf")
    card = tmp_path / "hf" / FILE
    assert head_of(card) == {
        "base_model": "huggyllama/llama-7b",
        "library_name": "transformers",
        "datasets": ["daven3/geosignal"],
        "tags": ["jaxlm"],
    }
    text = card.read_text()
    for line in (
        "# geo-lora",
        f"| base | hf://huggyllama/llama-7b@{'a' * 40} |",
        "| licence of the base | not known here; see the base |",
        "| hf://datasets/daven3/geosignal | template alpaca |",
        "| notes.json | template auto, weight 0.5 |",
        "| method | LoRA, rank 8, alpha 16, cross_entropy |",
        "| optimizer | adamw, learning rate 0.0001, cosine |",
        "| evaluation/geobench | accuracy | 0.4321 | 0.01 | 500 |",
    ):
        assert line in text.splitlines(), line
    assert "secret" not in text
    assert FILE in json.loads((tmp_path / "hf" / "manifest.json").read_text())["files"]


def test_a_users_card_goes_along_and_ours_is_written_anew(tmp_path: Path) -> None:
    write("hf", RandomSource(spec_of("llama")), tmp_path / "hf")
    assert MARK in (tmp_path / "hf" / FILE).read_text()
    (tmp_path / "hf" / FILE).write_text(CARD)
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert (tmp_path / "meta" / FILE).read_text() == CARD
    convert(tmp_path / "hf", tmp_path / "jax")
    assert not (tmp_path / "jax" / FILE).exists()


def test_a_model_that_was_made_of_another_has_its_licence_not_its_card(tmp_path: Path) -> None:
    write("hf", RandomSource(spec_of("llama")), tmp_path / "base")
    (tmp_path / "base" / FILE).write_text(CARD)
    base = open_model(tmp_path / "base")
    changed = MergedSource.__mro__[1](base)  # any transform: a DerivedSource
    write("hf", Opened(changed), tmp_path / "tuned")
    head = head_of(tmp_path / "tuned" / FILE)
    assert {key: head[key] for key in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "llama2",
        "license_link": "https://x",
    }
    text = (tmp_path / "tuned" / FILE).read_text()
    assert "| base | base |" in text and "| licence of the base | llama2 |" in text


def test_cards_without_a_head_have_no_licence(tmp_path: Path) -> None:
    for text in ("# A model\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", ""):
        (tmp_path / FILE).write_text(text)
        assert read_license([tmp_path]) == {}
    (tmp_path / FILE).write_text("---\nlicense: mit\n---")
    assert read_license([tmp_path / "nowhere", tmp_path]) == {"license": "mit"}
    assert dataclasses.is_dataclass(RunConfig)
