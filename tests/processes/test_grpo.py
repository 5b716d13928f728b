"""Rewards of the model's own answers, with two processes beside one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import base_config, inputs, write_config
from tests.processes.test_distributed_training import end, start_words

__all__ = ["base_config", "inputs"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.xdist_group("distributed")]


def test_two_processes_learn_from_rewards_as_one_does(
    inputs: Path, base_config: dict[str, Any], tmp_path: Path
) -> None:
    """Process 0 alone asks the rewards, which need not give the same twice; what they raise ends the run on all."""
    from jaxlm.cli.train import main

    reward, calls, log = tmp_path / "mine.py", tmp_path / "calls", tmp_path / "log"
    reward.write_text(
        "import os\n"
        "def es(prompts, answers, right):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n"
        "        file.write('x')\n"
        "    if os.environ.get('FAILS'):\n"
        "        raise KeyError('no such answer')\n"
        "    return [min(a.count('e'), 5) for a in answers]\n"
    )
    grpo = {"rewards": [f"{reward}:es", "exact"], "weights": [1, 0.5], "group": 2, "max_new_tokens": 6, "kl": 0.001}
    data = {"train": [{"path": str(inputs / "records.json"), "template": "alpaca_short"}], "sequence_length": 64}
    steps = {"steps": 3, "global_batch_size": 8, "micro_batch_size": 1, "save_every": 0, "eval_every": 0}
    changes = {"objective": "grpo", "grpo": grpo, "data": data, "train": steps, "mesh": {"data": 2, "fsdp": 2}}
    given = write_config(tmp_path / "c", base_config | {"data": {}}, **changes)
    words = ["--config", str(given), "--output_dir"]
    assert main([*words, str(tmp_path / "one"), "--mesh.tensor", "2", "--train.compilation_cache", "none"]) == 0
    assert calls.read_text() == "xxx"
    words = [*words, str(tmp_path / "two"), "--train.compilation_cache", str(tmp_path / "xla")]
    end(start_words(log, *words), log)
    assert calls.read_text() == "x" * 6  # three of one process, three of process 0
    found = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, theirs in zip(*found, strict=True):
        for key in ("reward", "answer_tokens", "loss", "grad_norm", "ratio/max"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    text = end(start_words(log, *words, "--train.steps", "4", environment={"FAILS": "1"}), log, 2)
    assert "mine.py:es' raised KeyError: 'no such answer'" in text, text
