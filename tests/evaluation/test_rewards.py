"""What an answer is worth, by name and by a user's function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import GrpoConfig
from jaxlm.errors import UserError
from jaxlm.evaluation.rewards import checked, load_reward
from jaxlm.evaluation.rollouts import GroupRollouts


def worth(name: str, answer: str, right: str = "") -> float:
    return next(iter(load_reward(name)(["?"], [answer], [right])))


def test_rewards_by_name(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["name"]}))
    triples = '{"in": [{"head": "a", "tail": "b"}, {"head": "c", "tail": "d"}]}'
    for name, answer, right, expected in (
        ("exact", " 12 \n", "12", 1),
        ("exact", "12.", "12", 0),
        ("number", "about 2.005 eV", "2.0", 1),
        ("number", "about 2.1 eV", "2.0", 0),
        ("number:0.1", "about 2.1 eV", "2.0", 1),
        ("number", "none", "2.0", 0),
        ("valid_smiles", "c1ccccc1", "", 1),
        ("valid_smiles", "c1ccccc", "", 0),
        ("valid_smiles", "", "", 0),
        ("valid_json", '{"a": 1}', "", 1),
        ("valid_json", "{a: 1}", "", 0),
        (f"json_schema:{schema}", '{"name": 1}', "", 1),
        (f"json_schema:{schema}", "{}", "", 0),
        ("triple_f1", '{"in": [{"head": "a", "tail": "b"}]}', triples, 2 / 3),
    ):
        assert worth(name, answer, right) == pytest.approx(expected), (name, answer)


def test_a_function_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(prompts, answers, right):\n    return [len(each) for each in answers]\n")
    assert worth(f"{file}:length", "four") == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exacct", "'exacct' is unknown; choose exact"),
        ("number:x", "the tolerance is a number"),
        ("none.py:f", "none.py is not a file"),
        ("json_schema:none.json", "none.json is not a JSON schema"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_numbers_that_are_none_are_refused_with_the_answer() -> None:
    with pytest.raises(UserError, match=r"'mine' gave nan for the answer 'b'; a reward is a finite number"):
        checked("mine", [1.0, float("nan")], ["a", "b"])
    with pytest.raises(UserError, match="must return a list of 2 numbers"):
        checked("mine", [1.0], ["a", "b"])


class TwoHosts:
    """What a process sees of two; the values of the first are `given`."""

    processes = 2

    def __init__(self, process: int, given: str = "") -> None:
        self.process, self.given = process, given

    def check(self, what: str, problem: str | None) -> None:
        if problem is not None:
            raise UserError(problem)

    def exchange(self, name: str, value: str) -> list[str]:
        self.given = self.given or value
        return [self.given, value]


def test_the_first_process_asks_the_rewards_and_the_others_are_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def odd(prompts, answers, right):\n    return [int(answer) % 2 for answer in answers]\n")
    tokenizer: Any = None

    def values(hosts: Any, *answers: str) -> list[list[float]]:
        settings = GrpoConfig(rewards=(f"{file}:odd", "exact"))
        drawn = GroupRollouts(settings, 0, tokenizer, (), hosts)
        return drawn._values(["?"] * len(answers), answers, ["3"] * len(answers)).tolist()

    first = TwoHosts(0)
    assert values(first, "3", "4") == [[1, 0], [1, 0]]
    assert values(TwoHosts(1, first.given), "no number", "4") == [[1, 0], [1, 0]]
    with pytest.raises(UserError, match=r"mine.py:odd' raised ValueError: invalid literal .*'no number'"):
        values(TwoHosts(0), "no number", "4")
