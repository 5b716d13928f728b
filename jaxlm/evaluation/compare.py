"""Several evaluations of one task side by side: figures, and differences with intervals from a paired bootstrap.

The records are drawn again, the same ones for both models, so that what all models find hard does not count as noise
(Koehn 2004, "Statistical significance tests for machine translation evaluation"). Figures that are means over records
are drawn from the records' values; others are scored anew on every draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.evaluation.job import read_options
from jaxlm.evaluation.outputs import PREDICTIONS, SCORES, read_predictions
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answers, Figure, Row, Task
from jaxlm.jsontext import read_object

# Settings that must agree: the questions.
SAME = ("task", "version", "data (sha256)", "records", "options")
CHUNK = 1000  # draws of all records in memory at a time


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `jaxlm evaluate` has left in a directory."""

    directory: Path
    task: Task
    options: Any
    records: list[Row]
    answers: list[Answers]
    settings: Mapping[str, Any]

    def figures(self) -> dict[str, Figure]:
        """The figures, from the answers."""
        return self.task.score(self.records, self.answers, self.options)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much a model is above another.

    Attributes:
        value: of its figure, less that of the other.
        low, high: 95 % of the draws lie between.
        p: twice the share of the draws on the other side of 0; at most 1.
    """

    value: float
    low: float
    high: float
    p: float


def find_evaluations(path: Path) -> dict[str, Path]:
    """The directories of evaluations below a path by the name of their task; the path may be one itself.

    Raises:
        UserError: there is none.
    """
    if (path / SCORES).is_file():
        return {str(read_object(path / SCORES).get("settings", {}).get("task", path.name)): path}
    found = {each.parent.name: each.parent for each in sorted(path.glob(f"*/{SCORES}"))} if path.is_dir() else {}
    if not found:
        raise UserError(f"{path}: holds no evaluation: no {SCORES} in it or in a directory of it")
    return found


def read_evaluation(directory: Path) -> Evaluation:
    """Reads an evaluation that has ended.

    Raises:
        UserError: a file is missing or damaged.
    """
    settings = read_object(directory / SCORES).get("settings")
    if not isinstance(settings, dict) or "task" not in settings:
        raise UserError(f"{directory / SCORES}: is not what `jaxlm evaluate` writes")
    task = get_task(settings["task"])
    path = directory / PREDICTIONS
    try:
        lines = read_predictions(directory)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; evaluate again") from None
    records, answers = [record for record, _ in lines], [each for _, each in lines]
    return Evaluation(directory, task, read_options(task, settings.get("options", {})), records, answers, settings)


def check_same_questions(evaluations: Sequence[Evaluation]) -> None:
    """Raises UserError for evaluations of other questions, which cannot be compared."""
    first = evaluations[0]
    for other in evaluations[1:]:
        key = next((key for key in SAME if first.settings.get(key) != other.settings.get(key)), None)
        if key is not None:
            raise UserError(
                f"{other.directory}: {key} is {other.settings.get(key)!r}, in {first.directory} "
                f"{first.settings.get(key)!r}; only answers to the same questions can be compared"
            )


def differences(first: Evaluation, other: Evaluation, resamples: int, seed: int) -> dict[str, Difference]:
    """How much `other` is above `first`, by figure.

    Args:
        resamples: draws of the records; for figures that are no means over records a tenth of them.
        seed: the same one gives the same draws.
    """
    before, after = first.figures(), other.figures()
    paired = {
        name
        for name in before
        if name in after and before[name].values and before[name].values.keys() == after[name].values.keys()
    }
    result = {}
    for name in paired:
        keys = sorted(before[name].values)
        change = np.array([after[name].values[key] - before[name].values[key] for key in keys])
        draws = _means(change, resamples, np.random.default_rng(seed))
        result[name] = _difference(after[name].value - before[name].value, draws)
    rest = [name for name in before if name in after and name not in paired]
    rest = [name for name in rest if before[name].higher_is_better is not None]
    if rest:
        drawn = _scored_draws(first, other, rest, max(1, resamples // 10), np.random.default_rng(seed))
        for name in rest:
            result[name] = _difference(after[name].value - before[name].value, drawn[name])
    return {name: result[name] for name in before if name in result}


def _means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means [resamples] of draws of as many values, with replacement."""
    parts = []
    for start in range(0, resamples, CHUNK):
        drawn = rng.integers(0, len(values), (min(CHUNK, resamples - start), len(values)))
        parts.append(values[drawn].mean(axis=1))
    return np.concatenate(parts)


def _scored_draws(
    first: Evaluation, other: Evaluation, names: Sequence[str], resamples: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    drawn: dict[str, list[float]] = {name: [] for name in names}
    score: Callable[..., dict[str, Figure]] = first.task.score
    for _ in range(resamples):
        places = rng.integers(0, len(first.records), len(first.records))
        records = [first.records[at] for at in places]
        mine, theirs = (score(records, [each.answers[at] for at in places], first.options) for each in (first, other))
        for name in names:
            if name in mine and name in theirs:
                drawn[name].append(theirs[name].value - mine[name].value)
    return {name: np.array(values) for name, values in drawn.items()}


def _difference(value: float, draws: np.ndarray) -> Difference:
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Difference(value, float("nan"), float("nan"), float("nan"))
    low, high = (float(each) for each in np.quantile(draws, [0.025, 0.975]))
    # The draws themselves are one more, so that no p is 0.
    side = min(np.sum(draws <= 0), np.sum(draws >= 0))
    return Difference(value, low, high, float(min(1.0, 2 * (side + 1) / (len(draws) + 1))))
