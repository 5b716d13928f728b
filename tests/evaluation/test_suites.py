"""Every suite as a user runs it: on a tiny model, and on answers that were made elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.evaluate import main
from jaxlm.evaluation.job import read_answers
from jaxlm.evaluation.registry import MODULES, get_task
from tests.evaluation.test_geobench import NPEE
from tests.evaluation.test_ie import OLD
from tests.evaluation.test_lpm24_tasks import RECORD as LPM24
from tests.evaluation.test_molinstructions import record
from tests.evaluation.test_regression import DEVICE, METAL, STEEL
from tests.evaluation.test_sii import RECORD as SII
from tests.evaluation.test_zbench import TABLE

SELFIES = record("[C][C][O]", "retrosynthesis")
# Task -> what its file holds, one of its figures, files of its own.
SUITES: dict[str, tuple[Any, str, list[str]]] = {
    "geobench": (NPEE, "choice_wa_max_accuracy", []),
    "geobench_subjective": (NPEE, "noun_perplexity", []),
    "sii": ([SII], "abc_d_f1", []),
    "mdp": ([DEVICE] * 2, "voc_answered", []),
    "matbench": ([STEEL, METAL], "accuracy", ["matbench.json"]),
    "ie": ([OLD], "f1", ["submission.jsonl"]),
    "zbench": (TABLE, "people: GPT", ["zbench.csv"]),
    "molinstructions": ([SELFIES], "molecule_validity", []),
    "lpm24_captions": ([LPM24], "rouge_l", []),
    "lpm24_molecules": ([LPM24], "exact", []),
}


def written(path: Path, content: Any) -> Path:
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def test_all_suites_on_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """One run asks for all of them; answers give the same figures when they are scored again without the model."""
    words = ["--task", ",".join(SUITES), "--model", str(tiny_model), "--output", str(tmp_path / "a")]
    for task, (content, _, _) in SUITES.items():
        words += ["--data", f"{task}={written(tmp_path / f'{task}.json', content)}"]
    words += ["--template", "alpaca", "--options.max_new_tokens", "3", "--compilation_cache", "none"]
    assert main(words) == 0
    for task, (_, figure, files) in SUITES.items():
        folder = tmp_path / "a" / task
        scores = json.loads((folder / "scores.json").read_text())
        assert figure in scores["figures"] and scores["errors"] == 0, task
        present = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        assert present == sorted(["figures.png", "predictions.jsonl", "report.md", "scores.json", *files])
        job, answers = read_answers(folder / "predictions.jsonl", None, get_task(task), {})
        again = {name: figure.value for name, figure in job.score(answers).items()}
        assert {name: None if math.isnan(value) else value for name, value in again.items()} == {
            name: figure["value"] for name, figure in scores["figures"].items()
        }


@pytest.mark.parametrize("task", sorted(MODULES))
def test_data_of_another_suite(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named, and what was expected."""
    path = written(tmp_path / "other.json", [{"premise": "x", "hypothesis": "y"}])
    assert main(["--task", task, "--data", str(path), "--predictions", str(path)]) == 2
    message = capsys.readouterr().err
    assert "other.json" in message and "expect" in message
