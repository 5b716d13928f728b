"""What an evaluation leaves in its directory: predictions.jsonl, scores.json, report.md, figures.png.

All of it is a function of the records, the answers and the settings, so that a run that was killed in between leaves
the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config.plain import to_dict
from jaxlm.errors import UserError
from jaxlm.evaluation.job import Job
from jaxlm.evaluation.journal import from_json, joined, refuse_other_settings, to_json
from jaxlm.evaluation.task import Answers, Figure
from jaxlm.fonts import any_script
from jaxlm.jsontext import read_object

if TYPE_CHECKING:
    import matplotlib.figure

PREDICTIONS = "predictions.jsonl"
JOURNAL = "predictions.jsonl.partial"
SCORES = "scores.json"
REPORT = "report.md"
PLOT = "figures.png"
VERSION = 1  # of scores.json
# Settings that are hashes -> the fact that says what was hashed.
_ORIGINS = {
    "weights (hash of samples)": "model",
    "adapter (hash of samples)": "adapter",
    "data (sha256)": "data",
    "predictions (sha256)": "predictions",
}


def origins(facts: Mapping[str, Any]) -> dict[str, str | None]:
    """For the settings that are hashes the path of what was hashed, as `write_scores` is given facts."""
    return {setting: facts.get(fact) for setting, fact in _ORIGINS.items()}


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_predictions(directory: Path, job: Job, answers: Sequence[Answers]) -> None:
    """predictions.jsonl: a line for each record, with its answers."""
    lines = []
    for number, (record, parts) in enumerate(zip(job.records, answers, strict=True)):
        line = {"number": number, "record": record, "answers": {part: to_json(each) for part, each in parts.items()}}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    write_file(directory / PREDICTIONS, "".join(lines).encode("utf-8", "surrogatepass"))


def read_predictions(directory: Path) -> list[tuple[Any, Answers]]:
    """predictions.jsonl: each record with its answers.

    Raises:
        FileNotFoundError: it is not there.
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    # Not splitlines: it also breaks at characters that stand in the middle of answers.
    text = (directory / PREDICTIONS).read_bytes().decode("utf-8", "surrogatepass")
    lines = [json.loads(line) for line in text.split("\n") if line]
    return [(line["record"], {part: from_json(values) for part, values in line["answers"].items()}) for line in lines]


def read_finished(directory: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Answers] | None:
    """The answers of an evaluation with these settings that has ended; None where there is none.

    Args:
        facts: as of `write_scores`; they say in a message what differs.

    Raises:
        UserError: the directory has one with other settings.
    """
    scores = directory / SCORES
    if not scores.is_file() or not (directory / PREDICTIONS).is_file():
        return None
    before = read_object(scores)
    names = joined(origins(before), origins(facts))
    refuse_other_settings(scores, before.get("settings", {}), settings, "an evaluation was made with", names)
    return [answers for _, answers in read_predictions(directory)]


def write_scores(
    directory: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], figures: Mapping[str, Figure], errors: int
) -> None:
    """scores.json.

    Args:
        settings: what decides the answers.
        facts: what else one wants to know: paths, versions, the first request as it was fed.
        errors: requests without an answer.
    """
    content = {
        "jaxlm scores": VERSION,
        "figures": {
            name: {"value": _number(figure.value), "stderr": _number(figure.stderr), "n": figure.n}
            for name, figure in figures.items()
        },
        "errors": errors,
        **facts,
        "settings": dict(settings),
    }
    write_file(directory / SCORES, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def write_report(
    directory: Path,
    job: Job,
    answers: Sequence[Answers],
    figures: Mapping[str, Figure],
    facts: Mapping[str, Any],
    errors: Sequence[str],
) -> None:
    """report.md, figures.png, and what else the task writes.

    Args:
        facts: as of `write_scores`.
        errors: why requests have no answer.
    """
    task, options = job.task, job.options
    lines = [f"# {task.name}", "", f"{task.summary}", ""]
    told = ("model", "adapter", "predictions", "data", "dtype", "template", "bos")
    lines += [f"* {key}: {facts[key]}" for key in told if facts.get(key) is not None]
    lines += [f"* records: {len(job.records):,}"]
    given = {key: value for key, value in to_dict(options).items() if value not in (None, "")}
    lines += [f"* options: {', '.join(f'{key} {value!r}' for key, value in given.items())}"] * bool(given)
    lines += ["", *table(figures), ""]
    if errors:
        lines += [f"{len(errors):,} requests have no answer, and count as wrong; the first: {errors[0]}", ""]
    lines += [f"![figures]({PLOT})", ""]
    if task.details is not None:
        lines += [task.details(job.records, answers, figures, options).strip(), ""]
    write_file(directory / REPORT, "\n".join(lines).encode("utf-8", "replace"))
    _plot(directory / PLOT, job, answers, figures)
    files = {} if task.files is None else task.files(job.records, answers, options)
    for name, content in files.items():
        if Path(name).name != name:
            raise UserError(f"{task.name}: {name!r} is not the name of a file in {directory}")
        write_file(directory / name, content)


def table(figures: Mapping[str, Figure]) -> list[str]:
    """The figures as lines of a Markdown table."""
    rows = [
        f"| {name} | {figure.value:.4f} | {'' if figure.stderr is None else f'± {figure.stderr:.4f}'} | {figure.n:,} |"
        for name, figure in figures.items()
    ]
    return ["| figure | value | standard error | n |", "|---|---:|---:|---:|", *rows]


@any_script()
def _plot(path: Path, job: Job, answers: Sequence[Answers], figures: Mapping[str, Figure]) -> None:
    # Not pyplot, which would look for a screen.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 1.2 + 0.3 * max(4, len(figures))), layout="constrained")
    draw = job.task.plot
    if draw is None:
        bars(canvas, figures, job.task.name)
    else:
        draw(canvas, job.records, answers, figures, job.options)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}.png")
    canvas.savefig(temporary, dpi=120, metadata={"Software": None})
    temporary.replace(path)


def bars(canvas: matplotlib.figure.Figure, figures: Mapping[str, Figure], title: str) -> None:
    """Draws figures as bars with their standard errors."""
    axes = canvas.subplots()
    names = [name for name, figure in figures.items() if math.isfinite(figure.value)]
    values = [figures[name].value for name in names]
    errors = [figures[name].stderr or 0.0 for name in names]
    axes.barh(names, values, xerr=errors, color="#4477aa", ecolor="#222222", capsize=2)
    axes.invert_yaxis()
    axes.set_title(title)
