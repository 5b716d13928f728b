"""A dense model divided into experts, trained, asked, and made dense again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.commands.main import main as convert
from convert.source import open_model
from jaxlm.cli.generate import main as generate
from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("experts")]


def test_from_dense_to_experts_and_back(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"steps": 2, "eval_every": 0, "save_every": 0}
    config = write_config(tmp_path / "a", base_config, train=short)
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "dense")]) == 0
    options = ["--experts", "4", "--top-k", "text=2,salt=1", "--range", "salt=300:320"]
    assert convert(["moefy", str(tmp_path / "dense"), str(tmp_path / "moe"), *options]) == 0
    model = {"path": str(tmp_path / "moe"), "shape": None}
    config = write_config(tmp_path / "b", base_config, train=short, model=model, tokenizer=None)
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["expert_share"]["text"] for line in lines if "expert_share" in line]
    assert len(shares) == 2 and all(abs(sum(share) - 2) < 1e-2 for share in shares)
    capsys.readouterr()
    ask = ["--prompt", "rock sand", "--max_new_tokens", "4", "--compilation_cache", "none"]
    assert generate(["--model", str(tmp_path / "run"), *ask]) == 0
    assert "4 written" in capsys.readouterr().err

    # The run's checkpoint kept the order of the neurons: dense again, it is what training made of each.
    assert convert(["demoefy", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    trained, back = open_model(tmp_path / "run"), open_model(tmp_path / "back")
    order = np.load(tmp_path / "moe" / "jaxlm" / "partition.npy")
    assert (order != np.arange(order.shape[1])).any()
    for layer, row in enumerate(order):
        for name in ("gate_proj", "up_proj"):
            path = f"layers/mlp/{name}/kernel"
            np.testing.assert_array_equal(back.read(path, ())[layer][:, row], trained.read(path, ())[layer])
        path = "layers/mlp/down_proj/kernel"
        np.testing.assert_array_equal(back.read(path, ())[layer][row], trained.read(path, ())[layer])
    assert back.config == open_model(tmp_path / "dense").config
    assert generate(["--model", str(tmp_path / "back"), "--template", "alpaca_short", *ask]) == 0
