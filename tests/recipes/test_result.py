"""What a small recipe came to: `configs/result.py`, and the table that `benchmarks/small_recipes.py` makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jaxlm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


result, small_recipes = script("configs/result.py"), script("benchmarks/small_recipes.py")


def write_run(folder: Path, first_step: int = 0) -> Path:
    folder.mkdir()
    lines = [
        {"step": first_step, "validation_loss": 2.5},
        *({"step": step, "loss": 1.0, "tokens_per_second": speed} for step, speed in enumerate([1, 2, 30, 40, 50], 1)),
        {"step": 5, "validation_loss": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_losses_speed_and_figures_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "3")
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"figures": {"acc": {"value": 0.75}, "mae": [0.5, 0.25]}}))
    words = [
        str(tmp_path / "new/result.json"), "--run", str(write_run(tmp_path / "run")),
        "--metric", "accuracy", "--chance", "0.25", "--before", "0.3", "--after", f"{scores}:figures.acc.value",
        "--error", "MAE", "--chance", "1", "--before", f"{scores}:figures.mae.0", "--after", f"{scores}:figures.mae.1",
    ]  # fmt: skip
    assert result.main(words) == 0
    written = json.loads((tmp_path / "new/result.json").read_text())
    assert written["seed"] == 3 and written["steps"] == 5
    assert written["tokens_per_second"] == 40  # the first two steps waited for the compiler
    assert written["validation_loss"] == {"before": 2.5, "after": 0.5}
    assert written["metrics"] == [
        {"name": "accuracy", "less_is_better": False, "chance": 0.25, "before": 0.3, "after": 0.75},
        {"name": "MAE", "less_is_better": True, "chance": 1.0, "before": 0.5, "after": 0.25},
    ]
    assert [small_recipes.by(metric, "before") > 0 for metric in written["metrics"]] == [True, True]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"figures": {"acc": {"value": "high"}}}))
    with pytest.raises(UserError, match=r"no 'f1' on the way to 'figures\.f1'; there is acc"):
        result.figure(f"{scores}:figures.f1")
    with pytest.raises(UserError, match="is 'high'; expected a number"):
        result.figure(f"{scores}:figures.acc.value")
    with pytest.raises(UserError, match="eval_every above 0"):
        result.of_run(write_run(tmp_path / "run", first_step=2))


def test_the_table_has_the_quickest_run_and_mean_and_spread_of_the_seeds() -> None:
    def run(seconds: int, after: float) -> dict[str, Any]:
        metric = {"name": "F1", "less_is_better": False, "chance": 0.1, "before": 0.2, "after": after}
        losses = {"before": 2.0, "after": 1.0}
        measured = {
            "seconds": seconds,
            "peak_bytes": 2**30,
            "tokens_per_second": 6e4 / seconds,
            "validation_loss": losses,
        }
        return {**measured, "metrics": [metric]}

    (row,) = small_recipes.rows("knowlm", {"runs": [run(60, 0.5), run(120, 0.7)]})
    assert row == (
        "`knowlm`", "F1", "0.100", "0.200", "0.600", "0.500 to 0.700 (2)", "1.0", "1,024 MiB", "1,000", "2.000 → 1.000",
    )  # fmt: skip


def test_the_table_is_what_was_measured() -> None:
    page = small_recipes.README.read_text(encoding="utf-8")
    assert small_recipes.with_table(page) == page, "python benchmarks/small_recipes.py --table"
