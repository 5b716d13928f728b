"""The small recipes go the whole way, and what they teach is better than before and than guessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("configs/*/small.sh")))
def test_a_small_recipe_moves_its_metric(name: str, tmp_path: Path) -> None:
    script = ROOT / "configs" / name / "small.sh"
    if "configs/result.py" not in script.read_text(encoding="utf-8"):
        pytest.skip("this recipe writes no result.json")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(script), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "out/result.json").read_text())
    loss = result["validation_loss"]
    assert loss["after"] < loss["before"]
    for metric in result["metrics"]:
        sign = -1 if metric["less_is_better"] else 1
        assert sign * metric["after"] > max(sign * metric["before"], sign * metric["chance"]), metric
