"""The data of Darwin's small recipe: what its tasks read, by the formula, and the test apart from the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.evaluation.registry import get_task
from tests.evaluation.tasks import text_answers, values
from tests.recipes.test_result import script

darwin = script("configs/darwin/prepare.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare.py", str(folder), "--sii", "40", "--mdp", "60"])
        darwin.main()
    return folder


@pytest.mark.parametrize("name", ["sii", "mdp"])
def test_cells_go_with_darwins_tasks(name: str, made: Path) -> None:
    task = get_task(name)
    options = task.options()
    train, test = (json.loads((made / f"{name}-{part}.json").read_text()) for part in ("train", "test"))
    assert all(task.check(record, options) is None for record in [*train, *test])
    assert not {record["input"] for record in train} & {record["input"] for record in test}
    right = values(task.score(test, text_answers([record["output"] for record in test]), options))
    others = json.loads((made / f"{name}-others.json").read_text())
    chance = values(task.score(test, text_answers(others), options))
    if name == "sii":
        assert right["ie_f1"] == 1 and right["complete"] == 1 and chance["ie_f1"] < 0.75
    else:
        assert right["pce_mae"] == 0 and right["pce_answered"] == 1 and chance["pce_r2"] < 0


def test_numbers_follow_from_the_formula(tmp_path: Path) -> None:
    cell = {
        "bromide": 20,
        "etl": "ZnO",
        "htl": "PTAA",
        "substrate": "PET | ITO",
        "additive": "MACl",
        "temperature": "80",
    }
    # Eg 1.6612; Voc 1.6612 - 0.52 - 0.06 + 0.02; Jsc 64 - 43.1912 - 4; FF 0.66 + 0.05.
    assert darwin.properties(cell) == pytest.approx((1.1012, 16.8088, 0.71, 13.142), abs=1e-3)
    assert darwin.mdp(cell)["output"].split("\n")[0] == " JV default Voc: 1.10 "
    lines = [
        {"record": {"output": "Voc: 1\nJsc: 2\nPCE: 10.0"}, "answers": {"answer": {"texts": [f"PCE: {number}"]}}}
        for number in ("10.5", "10.6", "none")
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    darwin.close(tmp_path / "p.jsonl", tmp_path / "close.json")
    assert json.loads((tmp_path / "close.json").read_text()) == {"share": pytest.approx(1 / 3), "answers": 3}
