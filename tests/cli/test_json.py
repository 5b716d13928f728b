"""`--json`: one object on standard output, with keys that scripts may rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.prepare import main as prepare
from jaxlm.cli.watch import main as watch
from tests.runs.runs import write_run


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", end={"step": 60, "complete": False, "stopped_by": "SIGTERM"})
    assert watch([str(run), "--once", "--json"]) == 0
    found = printed(capsys)
    for key, value in {
        "state": "stopped",
        "why": "SIGTERM",
        "step": 60,
        "total": 100,
        "seconds_left": None,
        "validation_loss": 2.4,
        "tokens": {"a&b.json": 4800, "[bold]c.json": 1200},
        "tasks": {"mdp/accuracy": 0.55},
        "checkpoints": [20, 40],
        "best_checkpoint": {"step": 40, "validation_loss": 2.6},
        "device_memory": None,
    }.items():
        assert found[key] == value, key
    assert watch([str(run), "--json"]) == 2


def test_prepare_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"A text about mineral {i}."}) + "\n" for i in range(5)))
    assert prepare(["inspect", str(file), "--json", "--samples", "1"]) == 0
    found = printed(capsys)
    assert found.keys() == {"what", "unit", "sources", "facts", "lengths", "samples"}
    assert found["sources"][str(file)]["count"] == 5 and sum(part["count"] for part in found["lengths"]) == 5
    assert len(found["samples"]) == 1
    config = tmp_path / "prepare.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nsources: [{{path: {file}, name: docs}}]\nsteps: [filter]\n")
    assert prepare(["--config", str(config), "--json"]) == 0
    (step,) = printed(capsys)["steps"]
    assert step["step"] == "filter" and step["sources"]["docs"]["read"] == 5
    assert {"kept", "taken", "masked"} <= step["sources"]["docs"].keys()
