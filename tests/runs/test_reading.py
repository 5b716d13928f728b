"""Files of a run that are read while they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.runs.events import EVENTS, EventLog, read_events, resumed_steps
from jaxlm.runs.metrics import Follower, ordered, read_metrics, series, task_names


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [line["step"] for line in follower.read()] == [1]
    assert [line["step"] for line in read_metrics(path)] == [1]
    first = follower.read()[0]
    with path.open("ab") as file:
        file.write(b'ss": 1.5}\n')
    assert [line.get("loss") for line in follower.read()] == [2.0, 1.5]
    assert follower.read()[0] is first


def test_a_file_that_a_resumed_run_has_cut_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(9)))
    follower = Follower(path)
    assert len(follower.read()) == 9
    shorter = tmp_path / "new"
    shorter.write_text("".join(json.dumps({"step": i, "of": "the second start"}) + "\n" for i in range(9)))
    shorter.replace(path)
    assert all("of" in line for line in follower.read()) and len(follower.read()) == 9


def test_series_leave_out_what_cannot_be_drawn() -> None:
    lines = ordered([{"step": 2, "loss": float("nan")}, {"step": 1, "loss": 1.0}, {"no": "step"}, {"step": 3}])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert series(lines, "loss") == [(1, 1.0)]
    lines = [{"step": 1, "mdp/accuracy": 0.5, "mdp/accuracy_stderr": 0.1}, {"step": 1, "loss": 1, "rewards/margins": 2}]
    assert task_names(lines) == ["mdp/accuracy"]


def test_events_are_told_in_order(tmp_path: Path) -> None:
    events = EventLog(tmp_path)
    events.write("start", step=0, total=10)
    (tmp_path / EVENTS).open("a").write('{"time": "half')
    events.write("start", step=4, total=10)
    with pytest.raises(ValueError, match="disk"), events.ending():
        raise ValueError("disk is full\nand more")
    found = read_events(tmp_path / EVENTS)
    assert [event["event"] for event in found] == ["start", "start", "end"]
    assert found[-1]["error"] == "disk is full" and resumed_steps(found) == [4]
    assert "+" in found[0]["time"] or "-" in found[0]["time"][10:]
    EventLog(None).write("start")
    assert read_events(tmp_path / "none.jsonl") == []
