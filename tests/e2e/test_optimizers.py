"""Runs with optimizers that keep more than two moments: resumed to the bit, and what is kept as their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config
from tests.e2e.test_resume import arrays

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("optimizers")]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in lines(run) if name in line]


@pytest.mark.parametrize("name", ["muon", "schedule_free", "adamw_8bit"])
def test_a_resumed_run_has_the_same_bits(name: str, base_config: dict[str, Any], tmp_path: Path) -> None:
    settings = {"name": name, "schedule": "constant", "weight_decay": 0.1}
    config = write_config(tmp_path, base_config, optimizer=settings)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(["--config", str(config), "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert train(["--config", str(config), "--output_dir", str(resumed)]) == 0
    assert losses(resumed) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    last, again = (arrays(run / "checkpoints" / "6") for run in (whole, resumed))
    assert last.keys() == again.keys()
    for key, value in last.items():
        assert value.tobytes() == again[key].tobytes(), key
    if name != "schedule_free":
        return
    # The model is the average: what is evaluated, and what the next run begins with.
    after = write_config(tmp_path / "after", base_config, model={"shape": None, "path": str(whole)}, tokenizer=None)
    assert train(["--config", str(after), "--output_dir", str(tmp_path / "next"), "--train.steps", "1"]) == 0
    assert losses(tmp_path / "next", "validation_loss")[0] == losses(whole, "validation_loss")[-1]
    kernel = "['params']['lm_head']['kernel']"
    model, trained, z = (
        next(value for key, value in last.items() if part in key and key.endswith(kernel))
        for part in ("['model']", "['trained']", "['z']")
    )
    np.testing.assert_allclose(model, (trained - 0.1 * z) / 0.9, rtol=0, atol=1e-6)
    assert np.abs(model - trained).max() > 1e-5
