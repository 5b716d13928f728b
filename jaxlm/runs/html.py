"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from jaxlm.errors import UserError
from jaxlm.runs.events import resumed_steps
from jaxlm.runs.metrics import series, task_names
from jaxlm.runs.overview import CONFIG, Overview
from jaxlm.runs.svg import Curve, chart
from jaxlm.units import disk_size, duration, memory_size, short_number

MARK = "<!-- a report of jaxlm -->"
REPORT = "report.html"
STATES = {
    "starting": "has not made a step yet",
    "running": "is running",
    "complete": "is complete",
    "stopped": "was stopped",
    "failed": "ended with an error",
    "killed": "ended without a word (killed, or its machine went down)",
    "ended": "is not running",
}
_MOST = 400  # points of a curve


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the page shows of one run."""

    name: str
    anchor: str
    path: str
    state: str
    sentence: str
    cards: Sequence[tuple[str, str, str]]
    loss: Markup
    cut: str
    learning_rate: Markup
    speed: Markup
    tasks: Sequence[Sequence[str]]
    task_charts: Sequence[Markup]
    experts: Sequence[tuple[str, Sequence[tuple[float, str]], str]]
    facts: Sequence[tuple[str, str]]
    data: Sequence[str]
    sources: Sequence[Sequence[str]]
    warnings: Sequence[str]
    starts: Sequence[Sequence[str]]
    checkpoints: Sequence[Sequence[str]]
    versions: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    config: str


def page(runs: Sequence[Overview], title: str) -> str:
    """The whole page.

    Args:
        runs: the stages, in order.
        title: of the page.

    Raises:
        UserError: none of them has a line of metrics.
    """
    if not any(run.lines for run in runs):
        raise UserError(f"{runs[0].path}: no step has been made yet, so there is nothing to report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = [_stage(run, number) for number, run in enumerate(runs, 1) if run.lines]
    made = f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    text = environment.get_template(REPORT).render(title=title, stages=stages, made=made)
    return text.replace("<head>", f"<head>\n{MARK}", 1)


def _stage(run: Overview, number: int) -> Stage:
    curve, resumes = run.curve, resumed_steps(run.events)
    low, high, is_cut = curve.loss_range()
    curves = [
        Curve("training, raw", _points(curve.step, curve.loss), "raw", dots=True, line=False),
        Curve("training, smoothed", _points(curve.step, curve.smooth), "train"),
        Curve("validation", _few(curve.validation), "valid", dots=True),
    ]
    seen = curve.seen is not None and len(curve.seen) > 1
    start = run.start or {}
    return Stage(
        name=run.path.absolute().name,
        anchor=f"run-{number}",
        path=str(run.path.absolute()),
        state=run.state,
        sentence=_sentence(run),
        cards=_cards(run),
        loss=chart(
            curves,
            curve.unit,
            height=340,
            y_range=(low, high),
            marks=resumes,
            above=(lambda x: _tokens(float(curve.tokens_at(np.array([x]))[0]))) if seen else None,
        ),
        cut=f"{curve.loss[0]:.4g}" if is_cut else "",
        learning_rate=chart(
            [Curve("learning rate", _few(curve.learning_rate), "quiet")],
            "learning rate",
            height=150,
            zero=True,
            number=lambda value: f"{value:.1e}" if value else "0",
        ),
        speed=chart(
            [Curve("tokens/s", _medians(series(run.lines, "tokens_per_second")), "quiet")],
            "tokens/s",
            height=150,
            zero=True,
            number=lambda value: f"{value:,.0f}",
        ),
        tasks=_tasks(run),
        task_charts=[
            chart([Curve(name, _few(points), f"other{at % 6}", dots=True)], name, height=170)
            for at, name in enumerate(task_names(run.lines))
            if len(points := series(run.lines, name)) > 1
        ],
        experts=_experts(run),
        facts=[(str(name), str(value)) for name, value in (start.get("facts") or {}).items()],
        data=[str(line) for line in start.get("data") or []],
        sources=_sources(run),
        warnings=list(dict.fromkeys(str(e.get("text", "")) for e in run.events if e["event"] == "warning")),
        starts=_starts(run),
        checkpoints=_checkpoints(run),
        versions=[(str(name), str(value)) for name, value in (start.get("versions") or {}).items() if value],
        commands=_commands(run),
        config=_config(run),
    )


def _points(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return _few(list(zip(x.tolist(), y.tolist(), strict=True)))


def _few(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    places = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MOST)).astype(int))
    return [points[place] for place in places]


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of at most 200 groups of neighbours: a single step that waited for a disk says nothing."""
    groups = np.array_split(np.array(points, np.float64).reshape(-1, 2), max(min(len(points), 200), 1))
    return [(float(np.mean(group[:, 0])), float(np.median(group[:, 1]))) for group in groups if len(group)]


def _tokens(number: float) -> str:
    return short_number(max(number, 0.0))


def _sentence(run: Overview) -> str:
    facts: Mapping[str, str] = (run.start or {}).get("facts") or {}
    text = f"The run {STATES[run.state]}{f' ({run.why})' if run.why else ''}"
    text += f" at step {run.step:,}{f' of {run.total:,}' if run.total else ''}."
    if "model" in facts and "trained" in facts:
        text += f" It trains {facts['trained']} of {facts['model']}."
    valid = series(run.lines, "validation_loss")
    if len(valid) > 1:
        text += f" The validation loss went from {valid[0][1]:.4f} to {valid[-1][1]:.4f}"
        step, lowest = min(valid, key=lambda point: point[1])
        text += f"; its lowest was {lowest:.4f} at step {step:,}." if step != valid[-1][0] else ", its lowest."
    return text


def _cards(run: Overview) -> list[tuple[str, str, str]]:
    """(name, value, remark)."""
    cards = [("step", f"{run.step:,}", f"of {run.total:,}" if run.total else "")]
    valid = series(run.lines, "validation_loss")
    if valid:
        step, lowest = min(valid, key=lambda point: point[1])
        cards.append(("validation loss", f"{valid[-1][1]:.4f}", f"lowest {lowest:.4f} at step {step:,}"))
    if (loss := run.newest("loss")) is not None:
        smooth = run.curve.smooth
        cards.append(("training loss", f"{smooth[-1]:.4f}" if len(smooth) else str(loss), "smoothed"))
    if consumed := run.newest("consumed_tokens"):
        cards.append(("tokens", short_number(sum(consumed.values())), "of the data, padding not counted"))
    if (speed := run.recent("tokens_per_second")) is not None:
        mfu = run.recent("mfu")
        cards.append(("tokens/s", f"{speed:,.0f}", f"MFU {mfu:.1%}" if mfu is not None else "median of the last steps"))
    seconds = [line["step_seconds"] for line in run.lines if "step_seconds" in line]
    if seconds:
        cards.append(("time in steps", duration(sum(seconds) * max(run.step / max(len(seconds), 1), 1)), "all starts"))
    for key, name, remark in (
        ("device_memory", "device memory", "peak of the fullest device"),
        ("host_memory", "host memory", "peak of process 0"),
    ):
        if (peak := run.newest(key)) is not None:
            cards.append((name, memory_size(peak), remark))
    return cards


def _tasks(run: Overview) -> list[list[str]]:
    """Figure, first, last, highest and lowest."""
    rows = []
    for name in task_names(run.lines):
        points = series(run.lines, name)
        values = [value for _, value in points]
        error = run.newest(f"{name}_stderr")
        last = f"{values[-1]:.4g}" + (f" ± {error:.2g}" if error is not None else "")
        first = f"{values[0]:.4g} (step {points[0][0]:,})" if len(points) > 1 else ""
        rows.append([name, first, f"{last} (step {points[-1][0]:,})", f"{min(values):.4g} … {max(values):.4g}"])
    return rows


def _experts(run: Overview) -> list[tuple[str, list[tuple[float, str]], str]]:
    """(modality, (share of the largest, text) of each expert, how even)."""
    evenness = run.newest("router_entropy") or {}
    found = []
    for name, shares in (run.newest("expert_share") or {}).items():
        top = max(shares, default=0.0) or 1.0
        bars = [(share / top, f"expert {number}: {share:.1%}") for number, share in enumerate(shares)]
        found.append((name, bars, f"{evenness[name]:.0%}" if name in evenness else ""))
    return found


def _sources(run: Overview) -> list[list[str]]:
    consumed, passes = run.newest("consumed_tokens") or {}, run.newest("passes") or {}
    total = sum(consumed.values()) or 1
    return [
        [name, f"{tokens:,}", f"{tokens / total:.1%}", f"{passes.get(name, 0.0):.2f}"]
        for name, tokens in consumed.items()
    ]


def _starts(run: Overview) -> list[list[str]]:
    """When each start began, from which step, and how it ended."""
    rows: list[list[str]] = []
    for event in run.events:
        when = _time(event.get("time"))
        if event["event"] == "start":
            rows.append([when, f"{event.get('step', 0):,}", "", "no end was written: killed, or still running"])
        elif event["event"] == "end" and rows:
            how = "complete" if event.get("complete") else str(event.get("error") or event.get("stopped_by"))
            rows[-1][2:] = [when, how]
    if rows and run.state == "running":
        rows[-1][3] = "running"
    return rows


def _time(text: Any) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(str(text)):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return str(text)


def _checkpoints(run: Overview) -> list[list[str]]:
    losses = dict(series(run.lines, "validation_loss"))
    rows = []
    for step, written in run.checkpoints.items():
        folder = run.path / "checkpoints" / str(step)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        when = f"{datetime.datetime.fromtimestamp(written).astimezone():%Y-%m-%d %H:%M:%S}"
        rows.append([f"{step:,}", when, disk_size(size), f"{losses[step]:.4f}" if step in losses else ""])
    return rows


def _settings(run: Overview) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run.path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _commands(run: Overview) -> list[tuple[str, str]]:
    """What is usually typed next."""
    out, settings = shlex.quote(str(run.path)), _settings(run)
    beside = str(run.path)
    commands = []
    if run.state != "complete":
        commands.append(("go on from the newest checkpoint", f"jaxlm train --config {out}/config.yaml"))
    if run.checkpoints:
        commands.append(("ask it", f"jaxlm generate --model {out} --interactive"))
        commands.append(("serve it", f"jaxlm serve --model {out}"))
        best = run.best_checkpoint()
        if best is not None and best[0] != max(run.checkpoints):
            what = f"ask the checkpoint of the lowest validation loss ({best[1]:.4f})"
            commands.append((what, f"jaxlm generate --model {out}/checkpoints/{best[0]} --interactive"))
        if settings.get("lora"):
            base = shlex.quote(str((settings.get("model") or {}).get("path")))
            commands.append(("as a PEFT adapter", f"convert jax-to-peft {out} {shlex.quote(f'{beside}-peft')}"))
            commands.append(("merged", f"convert merge {base} {out} {shlex.quote(f'{beside}-merged')}"))
        else:
            commands.append(("for Hugging Face", f"convert jax-to-hf {out} {shlex.quote(f'{beside}-hf')}"))
    return commands


def _config(run: Overview) -> str:
    path = run.path / CONFIG
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
