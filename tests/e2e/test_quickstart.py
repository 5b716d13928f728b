"""The README's first command, and what its model has learned. Minutes long: with JAXLM_SLOW_TESTS=1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart"
pytestmark = pytest.mark.e2e


def test_the_data_are_what_the_script_makes(tmp_path: Path) -> None:
    copy = tmp_path / "prepare.py"
    copy.write_bytes((QUICKSTART / "prepare.py").read_bytes())
    subprocess.run([sys.executable, str(copy)], check=True)
    for name in ("corpus.txt", "instructions.json", "questions.json"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_no_record_gives_a_question_away() -> None:
    records = json.loads((QUICKSTART / "instructions.json").read_text())
    questions = json.loads((QUICKSTART / "questions.json").read_text())
    assert len(questions) == 20
    asked = {record["instruction"] for record in records}
    told = {record["output"] for record in records}
    for question in questions:
        assert question["instruction"] not in asked
        name = mineral(question["instruction"])
        assert not any(name in answer.lower() and question["right"] in answer for answer in told)


def mineral(question: str) -> str:
    script = (QUICKSTART / "prepare.py").read_text().split('MINERALS = """')[1].split('"""')[0]
    names = [line.split("|")[0].strip() for line in script.strip().splitlines()]
    (name,) = (name for name in names if f" {name}" in question)
    return name


@pytest.mark.skipif("JAXLM_SLOW_TESTS" not in os.environ, reason="takes minutes; set JAXLM_SLOW_TESTS=1")
def test_most_questions_are_answered_right(tmp_path: Path) -> None:
    def run(module: str, *words: str) -> str:
        command = [sys.executable, "-m", f"jaxlm.{module}", *words]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    said = run("train", "--config", "quickstart")
    assert "have learned a little text by heart, mistakes included" in said
    questions = QUICKSTART / "questions.json"
    words = ["--predict_data", str(questions), "--save_file", "answers.json"]
    run("generate", "--model", "out/quickstart/sft", *words)
    answers = json.loads((tmp_path / "answers.json").read_text())
    right = [
        mineral(item["instruction"]) in item["answer"].lower() and item["right"] in item["answer"] for item in answers
    ]
    print(f"{sum(right)} of {len(right)} right")
    assert sum(right) >= len(right) / 2
