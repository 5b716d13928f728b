"""Which examples of a store a run was given, against what its batches hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, RunConfig, SourceConfig, TrainConfig
from jaxlm.config.files import dump_yaml
from jaxlm.config.prepare import BuildConfig, DocumentsConfig, EngineConfig, PrepareConfig
from jaxlm.data.loader import build_data
from jaxlm.data.prepare.pipeline import Share, run_steps
from jaxlm.data.store.stored import StoredTokens
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxlm.training.consumed import consumed_examples
from jaxlm.weights.native.layout import CHECKPOINTS, COMMITTED, DATA_STATE, MODEL_JSON, RUN_YAML, SMALL_FILES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text(
        "\n".join(f"rock {number} is granite" for number in range(300)), encoding="utf-8"
    )
    train_sentencepiece([folder / "corpus.txt"], 300, folder / "out")
    return load_tokenizer(folder / "out" / "tokenizer.model")


@pytest.fixture(scope="module")
def store(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts, no two alike, and one without anything to learn."""
    folder = tmp_path_factory.mktemp("store")
    texts = [f"rock {number} is" + " granite" * (number % 7) for number in range(40)]
    (folder / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    config = PrepareConfig(
        sources=(DocumentsConfig(path=str(folder / "a.txt")),),
        steps=("build",),
        tokenizer=str(tokenizer.path),
        output_dir=str(folder / "out"),
        build=BuildConfig(sequence_length=64),
        engine=EngineConfig(workers=1),
    )
    run_steps(config, None, Share(), lambda *_: None)
    return folder / "out/build/store"


def write_run(folder: Path, config: RunConfig, state: dict[str, Any]) -> Path:
    """A run's directory with what is read of it."""
    small = folder / CHECKPOINTS / str(state["step"]) / SMALL_FILES
    small.mkdir(parents=True)
    (small.parent / COMMITTED).write_text("")
    (small / MODEL_JSON).write_text("{}")
    (small / RUN_YAML).write_text(dump_yaml(config), encoding="utf-8")
    (small / DATA_STATE).write_text(json.dumps(state), encoding="utf-8")
    return folder


def run_on(store: Path, **data: Any) -> RunConfig:
    sources = (SourceConfig(path=str(store), weight=data.pop("weight", 1.0)),)
    return RunConfig(
        data=DataConfig(train=sources, **{"sequence_length": 64, "cache": "none", **data}),
        train=TrainConfig(global_batch_size=3, epochs=2, seed=5),
    )


@pytest.mark.parametrize(
    "data",
    [{}, {"packing": False}, {"packing": "group_texts"}, {"validation": 6}, {"weight": 0.4}, {"weight": 1.7}],
    ids=str,
)
def test_they_are_those_in_its_batches(store: Path, tokenizer: Tokenizer, tmp_path: Path, data: dict[str, Any]) -> None:
    config = run_on(store, **data)
    made = build_data(config.data, tokenizer, seed=5, vocab_size=300, max_positions=64)
    batches = made.train_batches(3, epochs=2)
    tokens = StoredTokens(store)
    texts = [tuple(tokens[number].input_ids.tolist()) for number in range(len(tokens))]
    for done in (0, 1, 2):
        run = write_run(
            tmp_path / str(done), config, {"step": done, **batches.counters(done), "packing": made.packing_version}
        )
        rows = [row for step in range(done) for row in batches[step]["input_ids"].reshape(-1, 64).tolist()]
        in_rows = {text for text in texts if any(_holds(row, text) for row in rows)}
        given = consumed_examples(store, run)
        of_run = {texts[number] for number in np.flatnonzero(given)}
        # Rows of running text hold the beginning of a text whose end is in another.
        assert in_rows <= of_run if data.get("packing") == "group_texts" else in_rows == of_run
    assert 3 <= given.sum() <= 40
    np.testing.assert_array_equal(consumed_examples(store, run, steps=0), np.zeros(len(tokens), np.bool_))


def _holds(row: list[int], text: tuple[int, ...]) -> bool:
    return any(tuple(row[at : at + len(text)]) == text for at in range(len(row) - len(text) + 1))


def test_other_runs_are_refused(store: Path, tmp_path: Path) -> None:
    config = run_on(store)
    cases = {
        "trains on elsewhere": dataclasses.replace(
            config, data=dataclasses.replace(config.data, train=(SourceConfig(path="elsewhere"),))
        ),
        "cuts the store's examples": run_on(store, sequence_length=8),
    }
    for number, (message, case) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            consumed_examples(store, write_run(tmp_path / str(number), case, {"step": 1}))
    with pytest.raises(UserError, match=r"--steps: 9; .* has done 1 steps"):
        consumed_examples(store, write_run(tmp_path / "short", config, {"step": 1}), 9)
    with pytest.raises(UserError, match="holds no checkpoint of a run"):
        consumed_examples(store, tmp_path / "nothing")
