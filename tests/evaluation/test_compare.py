"""`jaxlm evaluate compare`: differences between evaluations of the same questions, and their intervals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.evaluate import main
from jaxlm.evaluation import compare
from jaxlm.evaluation.task import Figure
from jaxlm.evaluation.tasks import multiple_choice

COUNT = 200


def evaluation(folder: Path, name: str, wrong: set[int], count: int = COUNT) -> Path:
    """A model that answers all questions but some."""
    data, file = folder / f"q{count}.json", folder / f"{name}.json"
    data.write_text(json.dumps([{"question": "q", "choices": ["x", "y"], "answer": n % 2} for n in range(count)]))
    file.write_text(json.dumps(["AB"[(n + (n in wrong)) % 2] for n in range(count)]))
    words = ["--task", "multiple_choice", "--data", str(data), "--predictions", str(file)]
    assert main([*words, "--output", str(folder / name)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    easy, hard = set(range(40)), set(range(20)) | set(range(100, 106))
    return evaluation(folder, "a", easy), evaluation(folder, "b", hard), evaluation(folder, "c", easy)


def test_a_table_with_differences(models: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    """The interval is the bootstrap's, which for so many records is near the normal one of paired differences."""
    for name in ("table.md", "table.json"):
        words = ["compare", *map(str, models), "--seed", "3", "--save_file", str(tmp_path / name)]
        assert main(words) == 0
    assert "multiple_choice, 200 records" in capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())["tasks"]["multiple_choice"]
    assert main(["compare", *map(str, models), "--seed", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["multiple_choice"] == table
    assert [table["figures"][name]["acc"]["value"] for name in "abc"] == pytest.approx([0.8, 0.87, 0.8])
    change = table["differences"]["b"]["acc"]
    assert change["value"] == pytest.approx(0.07)
    signs = np.array([1] * 20 + [-1] * 6 + [0] * (COUNT - 26))
    half = 1.96 * signs.std(ddof=1) / math.sqrt(COUNT)
    assert change["low"] == pytest.approx(0.07 - half, abs=0.006) and change["high"] == pytest.approx(
        0.07 + half, abs=0.006
    )
    # The sign test of 20 to 6 has a p of 0.009; unpaired, the two would not differ (p 0.06).
    # Of the normal approximation: twice the tail beyond 2.8 standard errors.
    assert change["p"] == pytest.approx(0.0046, abs=0.0018)
    assert table["differences"]["c"]["acc"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    text = (tmp_path / "table.md").read_text()
    assert "| figure | a | b | c | b - a | c - a |" in text and "seed 3" in text


def test_the_same_seed_gives_the_same_interval(models: tuple[Path, Path, Path]) -> None:
    first, other = (compare.read_evaluation(path / "multiple_choice") for path in models[:2])
    assert compare.differences(first, other, 500, 7) == compare.differences(first, other, 500, 7)
    assert compare.differences(first, other, 500, 7) != compare.differences(first, other, 500, 8)


def test_figures_that_are_no_means_are_scored_on_each_draw(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the values of records, the interval comes from scoring draws, and is about as wide."""

    def score(records: Any, answers: Any, options: Any) -> dict[str, Figure]:
        figures = multiple_choice.score(records, answers, options)
        return {"acc": dataclasses.replace(figures["acc"], values={}, stderr=None), "chance": figures["chance"]}

    first, other = (compare.read_evaluation(path / "multiple_choice") for path in models[:2])
    whole = compare.differences(first, other, 10_000, 0)["acc"]
    task = dataclasses.replace(multiple_choice.TASK, score=score)
    bare = [dataclasses.replace(each, task=task) for each in (first, other)]
    drawn = compare.differences(*bare, 5_000, 0)
    assert set(drawn) == {"acc"}
    assert drawn["acc"].value == pytest.approx(whole.value)
    assert drawn["acc"].low == pytest.approx(whole.low, abs=0.015)
    assert drawn["acc"].high == pytest.approx(whole.high, abs=0.015)


def test_what_cannot_be_compared_is_named(models: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    short = evaluation(tmp_path, "short", set(), 10)
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged" / "multiple_choice"
    damaged.mkdir(parents=True)
    (damaged / "scores.json").write_bytes((short / "multiple_choice" / "scores.json").read_bytes())
    (damaged / "predictions.jsonl").write_text('{"number": 0}\n')
    for paths, message in (
        ([models[0]], "name two directories or more"),
        ([models[0], short], "only answers to the same questions can be compared"),
        ([models[0], tmp_path / "empty"], "holds no evaluation"),
        ([short, tmp_path / "damaged"], "is damaged; evaluate again"),
        ([*models, "--resamples", "0"], "resamples: 0"),
        ([*models, "--save_file", "x.txt"], "the ending must be .md or .json"),
    ):
        capsys.readouterr()
        assert main(["compare", *map(str, paths)]) == 2
        assert message in capsys.readouterr().err
