"""The small recipes go the whole way, and what they teach is better than before and than guessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_adapter, open_model
from jaxlm.weights.leaves import LeafSource

ROOT = Path(__file__).resolve().parents[2]


def run_recipe(name: str, out: Path, **words: str) -> dict[str, Any]:
    """Runs a recipe's script, with words for its commands in variables; what it came to."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / "configs" / name / "small.sh"), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **words}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def whole(source: LeafSource, path: str) -> np.ndarray:
    return source.read(path, (slice(None),) * len(source.leaves[path].shape))


@pytest.mark.slow
def test_qlora_by_all_of_its_steps(tmp_path: Path) -> None:
    """A few steps and questions; what goes into the original weights is the adapter, and nothing else."""
    result = run_recipe("qlora", tmp_path, TRAIN="--train.steps 3", EVALUATE="--limit 4 --options.max_new_tokens 4")
    assert result["steps"] == 3
    assert result["validation_loss"]["after"] < result["validation_loss"]["before"]
    for metric, part in zip(result["metrics"], ("tuned", "merged"), strict=True):
        scores = json.loads((tmp_path / f"{part}-evaluation/qa/scores.json").read_text())
        assert scores["figures"]["exact"]["n"] == 4 and scores["figures"]["exact"]["value"] == metric["after"]
    base, merged, adapter = (
        open_model(tmp_path / "base"),
        open_model(tmp_path / "merged"),
        open_adapter(tmp_path / "tuned"),
    )
    added = set()
    for path in base.leaves:
        before, after = whole(base, path), whole(merged, path)
        stem = path.removesuffix("/kernel")
        if f"{stem}/lora_A" in adapter.leaves:
            a, b = (whole(adapter, f"{stem}/lora_{factor}") for factor in "AB")
            layers, rank = len(a), b.shape[1]
            update = 2 * a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)  # alpha 16 over rank 8
            assert np.abs(update).max() > 1e-4
            np.testing.assert_allclose(after, before + update.reshape(before.shape), atol=1e-6)
            added.add(stem.rpartition("/")[2])
        else:
            np.testing.assert_array_equal(after, before)
    assert added == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("configs/*/small.sh")))
def test_a_small_recipe_moves_its_metric(name: str, tmp_path: Path) -> None:
    script = ROOT / "configs" / name / "small.sh"
    if "configs/result.py" not in script.read_text(encoding="utf-8"):
        pytest.skip("this recipe writes no result.json")
    result = run_recipe(name, tmp_path / "out")
    loss = result["validation_loss"]
    assert loss["after"] < loss["before"]
    for metric in result["metrics"]:
        sign = -1 if metric["less_is_better"] else 1
        assert sign * metric["after"] > max(sign * metric["before"], sign * metric["chance"]), metric
