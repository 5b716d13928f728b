"""The data of K2's small recipe: what is asked can be known from plain facts, and from nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxlm.evaluation.metrics.geobench import choice_prompt, random_line, read_questions
from tests.recipes.test_result import script

ROOT = Path(__file__).resolve().parents[2]


k2 = script("configs/k2/prepare.py")


def stem(question: str) -> str:
    return question.partition("\n")[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_but_plain_facts_answers_the_test(seed: int, tmp_path: Path) -> None:
    k2.main(tmp_path, seed)
    questions = read_questions(tmp_path / "geobench_npee.json")
    stems = {stem(question.text) for question in questions}
    assert len(stems) == len(questions) == 96 and random_line(questions) == 0.25
    # Each letter is right equally often among the questions with the same options, also among those that are trained.
    tuned: list[dict[str, Any]] = json.loads((tmp_path / "geosignal.json").read_text())
    right = Counter((question.text.split("\n", 1)[1], question.answer) for question in questions)
    trained = Counter(
        (record["instruction"].split("\n", 2)[2], record["output"].rpartition("\n")[2]) for record in tuned
    )
    assert set(right.values()) == {12} and set(trained.values()) == {48} and set(right) == set(trained)
    # No exercise and no instruction is about a fact that is asked.
    texts = [json.loads(line)["text"] for line in (tmp_path / "raw.jsonl").open()]
    exercises = {stem(part) for text in texts if "Choose from:" in text for part in text.split("\n\n")}
    instructions = {record["instruction"].split("\n")[1] for record in tuned}
    assert not stems & exercises and not stems & instructions
    assert len(instructions) == 384 and instructions >= exercises - {"The answer is:"}
    # And each of them is told.
    facts = " ".join(text for text in texts if "Choose from:" not in text)
    for question in questions:
        options = dict(line.split(". ") for line in question.text.split("\n")[2:])
        mineral, value = stem(question.text).split()[3], options[question.answer]
        assert any(way.format(mineral, value) in facts for ways in k2.FACTS.values() for way in ways), mineral


def test_the_instructions_have_the_prompt_of_the_test(tmp_path: Path) -> None:
    k2.main(tmp_path, 0)
    record = json.loads((tmp_path / "geosignal.json").read_text())[0]
    template = json.loads((ROOT / "jaxlm/data/templates/alpaca_short.json").read_text())["prompt_no_input"]
    question = read_questions(tmp_path / "geobench_npee.json")[0]
    prompt = template.format(instruction=record["instruction"]) + record["output"]
    assert prompt.replace(record["instruction"].split("\n", 1)[1], question.text).startswith(
        choice_prompt(question, "wa")
    )
