"""Runs that earlier versions left behind, each archive named by its day.

In each: a full run and a LoRA run with dropout on its checkpoint, both stopped at step 4 of 8; `expected.json` has what
that version went on to. runs-2026-11-21 is by the commit "Tests: the libtpu that JAX names is found in one place",
runs-2026-11-27 by "Quickstart: how long it takes".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from convert.commands.main import main as convert
from convert.source import open_model
from jaxlm.cli.generate import main as generate

pytestmark = pytest.mark.slow

ARCHIVES = sorted(Path(__file__).parent.glob("runs-*.tar.gz"))


@pytest.fixture(params=ARCHIVES, ids=lambda file: file.name.split(".")[0])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # their paths are relative
    return tmp_path


@pytest.mark.parametrize("name", ["full", "lora"])
def test_they_go_on_with_the_same_losses(name: str, runs: Path) -> None:
    command = [sys.executable, "-m", "jaxlm.train", "--config", f"{name}/config.yaml"]
    # As they ran: on one device, which decides what dropout draws.
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stdout
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    found = {
        f"{line['step']} {key}": line[key]
        for line in lines
        for key in ("loss", "grad_norm", "validation_loss")
        if key in line and line["step"] > 4
    }
    expected = json.loads((runs / "expected.json").read_text())[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # A norm is a long sum, which processors round in their own ways: 2e-7 apart without AVX2.
        rtol = 1e-5 if "norm" in key else 1e-6
        np.testing.assert_allclose(found[key], value, rtol=rtol, err_msg=key)


def test_they_can_be_asked_and_taken_away(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["jax-to-hf", "full", "full-hf"], ["jax-to-peft", "lora", "lora-peft"]):
        assert convert(words) == 0
    assert convert(["merge", "full", "lora", "merged", "--format", "hf"]) == 0
    capsys.readouterr()
    answers = []
    ask = ["--prompt", "rock sand", "--max_new_tokens", "6", "--compilation_cache", "none"]
    for model in (["lora"], ["full-hf", "--model.adapter", "lora-peft", "--template", "alpaca_short"]):
        assert generate(["--model", *model, *ask]) == 0, capsys.readouterr().err
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    kernel = "layers/self_attn/q_proj/kernel"
    before, merged = (open_model(path).read(kernel, ()) for path in ("full", "merged"))
    assert before.shape == merged.shape and not np.array_equal(before, merged)
