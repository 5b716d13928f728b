"""A run directory at one moment: how far it is, how fast, and what it has saved."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm.errors import UserError
from jaxlm.lock import is_held
from jaxlm.runs.curves import LossCurve, loss_curve
from jaxlm.runs.events import EVENTS, read_events
from jaxlm.runs.metrics import METRICS, Follower, Line, is_number, ordered, task_names
from jaxlm.weights.native.layout import CHECKPOINTS, COMMITTED

LOCK = "run.lock"
CONFIG = "config.yaml"
_RECENT = 50  # steps that speeds are the median of

State = Literal["starting", "running", "complete", "stopped", "failed", "killed", "ended"]


@dataclasses.dataclass(frozen=True)
class Overview:
    """What is known of a run by its files.

    Attributes:
        path: the run directory.
        state: starting (no step yet), running, complete, stopped (by a signal), failed (with an error), killed (it
            ended without a word), ended (by a version that kept no events: not known how).
        why: of what stopped or failed.
        lines: of metrics.jsonl, by step.
        events: of events.jsonl.
        step: the last one with a line; that of the newest start before it.
        total: steps of the run; None where nothing says it.
        checkpoints: complete ones, by step, with the time of writing (seconds since 1970).
        quiet_seconds: since the last line was written; None without lines.
        elapsed: seconds from the newest start to its last line; None where its time is not known.
        processes: of the newest start.
    """

    path: Path
    state: State
    why: str | None
    lines: Sequence[Line]
    events: Sequence[Mapping[str, Any]]
    step: int
    total: int | None
    checkpoints: Mapping[int, float]
    quiet_seconds: float | None
    elapsed: float | None
    processes: int

    @property
    def is_over(self) -> bool:
        return self.state not in ("starting", "running")

    def newest(self, key: str) -> Any:
        """The value of the newest line that has a key; None without any."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def recent(self, key: str) -> float | None:
        """The median over the newest lines of a figure that every training line has."""
        values: list[float] = []
        for line in reversed(self.lines):
            if is_number(line.get(key)):
                values.append(line[key])
            if len(values) == _RECENT:
                break
        return statistics.median(values) if values else None

    def seconds_left(self) -> float | None:
        """Until the last step, with the time that evaluating and saving have taken of this start so far."""
        seconds = self.recent("step_seconds")
        if self.total is None or seconds is None:
            return None
        first = self.start.get("step", 0) if self.start else 0
        stepping = (self.step - first) * seconds
        # The first steps of a start say little about how much of its time passes between steps.
        beside = self.elapsed / stepping if self.elapsed and self.step - first >= 5 and stepping > 0 else 1.0
        return (self.total - self.step) * seconds * min(max(beside, 1.0), 10.0)

    @functools.cached_property
    def curve(self) -> LossCurve:
        """Its loss."""
        return loss_curve(self.lines)

    @property
    def start(self) -> Mapping[str, Any] | None:
        """The event of the newest start."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), None)

    @property
    def warnings(self) -> list[str]:
        """Those of the newest start."""
        texts: list[str] = []
        for event in reversed(self.events):
            if event["event"] == "start":
                break
            if event["event"] == "warning":
                texts.append(str(event.get("text", "")))
        return texts[::-1]

    def best_checkpoint(self) -> tuple[int, float] | None:
        """(step, validation loss) of the checkpoint with the lowest one."""
        losses = {
            line["step"]: line["validation_loss"] for line in self.lines if is_number(line.get("validation_loss"))
        }
        kept = [(losses[step], step) for step in self.checkpoints if step in losses]
        return (min(kept)[1], min(kept)[0]) if kept else None


def figures(run: Overview) -> dict[str, Any]:
    """The run as plain JSON values; null stands for what its files do not say."""
    best = run.best_checkpoint()
    return {
        "path": str(run.path.absolute()),
        "state": run.state,
        "why": run.why,
        "step": run.step,
        "total": run.total,
        "seconds_left": None if run.is_over else run.seconds_left(),
        "seconds_since_last_line": run.quiet_seconds,
        "processes": run.processes,
        "loss": run.newest("loss"),
        "validation_loss": run.newest("validation_loss"),
        "learning_rate": run.newest("learning_rate"),
        "tokens_per_second": run.recent("tokens_per_second"),
        "tokens_per_second_with_pauses": run.newest("tokens_per_second_with_pauses"),
        "tokens": run.newest("consumed_tokens"),
        "host_memory": run.newest("host_memory"),
        "device_memory": run.newest("device_memory"),
        "tasks": {name: run.newest(name) for name in task_names(run.lines)},
        "checkpoints": list(run.checkpoints),
        "best_checkpoint": None if best is None else {"step": best[0], "validation_loss": best[1]},
        "warnings": run.warnings,
    }


def find_runs(path: Path) -> list[Path]:
    """The runs in a directory, the earliest first: itself, or the stages below it.

    Raises:
        UserError: it holds none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; name the output_dir of a run, e.g. out/quickstart")
    if is_run(path):
        return [path]
    below = [child for child in sorted(path.iterdir()) if child.is_dir() and is_run(child)]
    if not below:
        raise UserError(
            f"{path}: holds no run: there is neither {METRICS} nor {LOCK} in it, nor in a directory in it; name the "
            "output_dir of a run"
        )
    return sorted(below, key=_begun)


def is_run(path: Path) -> bool:
    return (path / METRICS).is_file() or (path / LOCK).is_file()


def _begun(path: Path) -> tuple[bool, float]:
    """Stages that have not begun, of which there is only a lock, come last."""
    config = path / CONFIG
    return (not config.is_file(), config.stat().st_mtime if config.is_file() else 0.0)


def current_run(runs: Sequence[Path]) -> Path:
    """That of several stages which is trained now, or was last."""
    begun = [run for run in runs if (run / METRICS).is_file()]
    return max(begun, key=lambda run: (run / METRICS).stat().st_mtime) if begun else runs[0]


class Observer:
    """Looks at a run again and again, and reads only what is new.

    Args:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Follower(path / METRICS)

    def look(self) -> Overview:
        held = is_held(self.path / LOCK)  # first: what is read afterwards is then complete when nobody holds it
        events = read_events(self.path / EVENTS)
        lines = ordered(self._metrics.read())
        written, now = _written(self.path / METRICS), datetime.datetime.now().timestamp()
        start = next((event for event in reversed(events) if event["event"] == "start"), None)
        begun = None if start is None else _seconds(start.get("time"))
        last = max((line["step"] for line in lines), default=0)
        step = max(last, int(start["step"])) if start is not None and is_number(start.get("step")) else last
        state, why = _state(held, events, step)
        return Overview(
            path=self.path,
            state=state,
            why=why,
            lines=lines,
            events=events,
            step=step,
            total=None if start is None else start.get("total"),
            checkpoints=_checkpoints(self.path / CHECKPOINTS),
            quiet_seconds=None if written is None else max(now - written, 0.0),
            elapsed=None if begun is None or written is None else max(written - begun, 0.0),
            processes=1 if start is None else int(start.get("processes", 1)),
        )


def _state(held: bool, events: Sequence[Mapping[str, Any]], step: int) -> tuple[State, str | None]:
    last = next((event for event in reversed(events) if event["event"] in ("start", "end")), None)
    if last is not None and last["event"] == "end" and not (held and "error" not in last and not last.get("complete")):
        if "error" in last:
            return "failed", str(last["error"])
        return ("complete", None) if last.get("complete") else ("stopped", str(last.get("stopped_by")))
    if held:
        return ("running", None) if last is not None or step else ("starting", None)
    return ("ended", None) if last is None else ("killed", None)


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _seconds(time: Any) -> float | None:
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(str(time)).timestamp()
    return None


def _checkpoints(folder: Path) -> dict[int, float]:
    found = {}
    if folder.is_dir():
        for child in folder.iterdir():
            written = _written(child / COMMITTED) if child.name.isdigit() else None
            if written is not None:
                found[int(child.name)] = written
    return dict(sorted(found.items()))
