"""`jaxlm.train` from Python: what the command does, without what belongs to a process of its own."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

import jaxlm
from convert.commands.main import main as convert
from jaxlm.cli.train import main
from jaxlm.config.reading import build
from jaxlm.errors import UserError
from tests.e2e.conftest import write_config


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> jaxlm.RunConfig:
    return build({**base_config, "output_dir": str(tmp_path / "run")}, jaxlm.RunConfig)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_run_is_that_of_the_command_and_leaves_the_process_alone(
    config: jaxlm.RunConfig, base_config: dict[str, Any], tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = jaxlm.train(config)
    assert (outcome.step, outcome.interrupted, outcome.complete) == (6, None, True)
    assert outcome.checkpoint == tmp_path / "run" / "checkpoints" / "6"
    assert [step for step, _ in outcome.validation] == [0, 3, 6]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    # A second time in the same process: the run is complete, and another one trains.
    assert jaxlm.train(config).step == 6
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    assert jaxlm.train(longer).step == 8

    file = write_config(tmp_path / "command", base_config)
    assert main(["--config", str(file), "--output_dir", str(tmp_path / "by_command")]) == 0
    assert losses(tmp_path / "run")[:6] == losses(tmp_path / "by_command")


def test_a_mistake_is_raised_as_the_command_says_it(config: jaxlm.RunConfig) -> None:
    wrong = dataclasses.replace(config, train=dataclasses.replace(config.train, keep=0))
    with pytest.raises(UserError, match=r"train\.keep: 0 must be at least 1"):
        jaxlm.train(wrong)
    with pytest.raises(UserError, match=r"train\.steps: expected a whole number, found 1\.5"):
        jaxlm.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1.5)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model: give either path .* or shape"):
        jaxlm.train(dataclasses.replace(config, model=dataclasses.replace(config.model, shape=None)))
    with pytest.raises(UserError, match=r"stages: jaxlm\.train trains one run"):
        jaxlm.train(dataclasses.replace(config, stages=[{"name": "a"}]))
    with pytest.raises(UserError, match=r"unknown key 'lora\.targts'; did you mean 'lora\.targets'"):
        jaxlm.train(dataclasses.replace(config, lora={"targts": ["q_proj"]}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected a jaxlm\.RunConfig, found dict"):
        jaxlm.train({"model": "x"})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_docs_example_runs(
    base_config: dict[str, Any], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build({**base_config, "output_dir": str(tmp_path / "run")}, jaxlm.RunConfig)
    one_step = dataclasses.replace(model.train, steps=1, eval_every=0)
    jaxlm.train(dataclasses.replace(model, train=one_step))
    (tmp_path / "models").mkdir()
    assert convert(["jax-to-hf", str(tmp_path / "run"), str(tmp_path / "models" / "geo")]) == 0
    (tmp_path / "records.json").write_text((inputs / "records.json").read_text())
    text = (Path(__file__).parents[2] / "docs" / "python_api.md").read_text()
    block = text.partition("tests/e2e/test_python_api.py runs this block")[2].partition("```python\n")[2]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.partition("```")[0], names)
    assert names["outcome"].step == 4 and (tmp_path / "out" / "mine" / "loss.png").exists()
