"""`jaxlm watch`: frames of runs in every state."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jaxlm.cli.watch import main
from jaxlm.lock import Lock
from jaxlm.runs.overview import Observer, find_runs
from jaxlm.runs.watch import Frame, sparkline, status_line
from tests.runs.runs import write_run


def frame(run: Path, width: int = 80, height: int = 40, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=False, legacy_windows=False)
    console.print(Frame(Observer(run).look()))
    file.seek(0)
    return file.read().splitlines()


def test_a_running_job_is_told_by_its_files_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with Lock(run / "run.lock", "output_dir", "choose another"):
        lines = frame(run)
        look = Observer(run).look()
    text = "\n".join(lines)
    assert lines[0].endswith("running, 2 processes")
    assert lines[1].startswith("step 60 of 100") and "60%" in lines[1]
    # 40 steps of 2 s are left, and the time beside the steps is not known yet.
    assert look.seconds_left() == pytest.approx(80) and "1:20 left" in lines[1]
    rows = [re.sub(" +", " ", line).rstrip() for line in lines]
    for line in (
        "validation ● 2.4000 at step 60",
        "mdp/accuracy 0.55 at step 60, 0.25 at step 0",
        "speed 1,000 tokens/s (910 with pauses), 2 s a step",
        "learning rate 1.00e-03, gradient norm 0.5",
        "tokens 6 k",
        " 4.8 k, 0.50 passes: a&b.json",
        " 1.2 k, 0.10 passes: [bold]c.json",
        "peak memory host 3.0 GiB",
        "experts: text █▅▃▂ even 90%",
        "warning <script>alert(1)</script> [red]is no markup[/red]",
    ):
        assert line in rows, f"{line}\n{text}"
    assert any(re.fullmatch(r"checkpoint step 40, 0:\d\d ago, 2 kept", row) for row in rows), text


def test_rewards_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": 0.0, "reward": reward}) for step, reward in ((1, 0.25), (62, 0.5))]
    (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert any(re.fullmatch(r"reward +0\.500 at step 62, 0\.250 at step 1 *", line) for line in frame(run))


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    run = write_run(tmp_path / ("a long name of a directory " * 5) / "run")
    for encoding in ("utf-8", "ascii"):
        lines = frame(run, width, 24, encoding)
        assert max(map(len, lines)) <= width
        assert any("*" in line if encoding == "ascii" else "●" in line for line in lines)


def test_how_a_run_ended(tmp_path: Path) -> None:
    ends = {
        "complete": {"step": 60, "complete": True, "stopped_by": None},
        "stopped": {"step": 60, "complete": False, "stopped_by": "SIGTERM"},
        "failed": {"error": "the disk is full"},
        "killed": None,
    }
    for state, end in ends.items():
        run = Observer(write_run(tmp_path / state, end=end)).look()
        assert run.state == state and run.is_over
    assert "stopped: SIGTERM" in frame(tmp_path / "stopped")[0]
    assert "failed: the disk is full" in frame(tmp_path / "failed")[0]
    assert "left" not in frame(tmp_path / "failed")[1]
    older = write_run(tmp_path / "older")
    (older / "events.jsonl").unlink()
    assert Observer(older).look().state == "ended" and "not running" in frame(older)[0]


def test_a_run_without_a_step_yet(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    with Lock(run / "run.lock", "output_dir", "choose another"):
        assert Observer(run).look().state == "starting"
        assert "starting: no step yet" in frame(run)[0]
        assert status_line(Observer(run).look()) == "step 0"


def test_the_stage_that_was_trained_last_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "first", end={"step": 100, "complete": True})
    write_run(tmp_path / "second", end={"step": 100, "complete": True})
    assert [run.name for run in find_runs(tmp_path)] == ["first", "second"]
    assert main([str(tmp_path), "--once"]) == 0
    assert "other stages: first" in capsys.readouterr().out


def test_into_a_pipe_it_writes_lines_until_the_run_is_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", end={"step": 60, "complete": False, "stopped_by": "SIGTERM"})
    words = [sys.executable, "-m", "jaxlm", "watch", str(run)]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1 and result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert line.startswith("step 60/100  loss 2.0996  validation 2.4000  1,000 tokens/s")
    assert line.endswith("stopped: SIGTERM")


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([str(tmp_path / "none")], "no such directory"),
        ([str(tmp_path)], "holds no run"),
        ([str(tmp_path), "--every", "0"], "--every: 0.0 must be at least 0.1"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_bars_go_from_nothing_to_the_largest() -> None:
    assert sparkline([0, 1, 2]) == " ▄█" and sparkline([0.0, 0.0]) == "  " and sparkline([]) == ""
