"""metrics.jsonl read back, also while it is written."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
Line = Mapping[str, Any]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    return list(whole_lines(path.read_text(encoding="utf-8", errors="replace")))


def whole_lines(text: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, up to the first that is not one: it is being written, or was cut short."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(value, dict):
            return
        yield value


class Follower:
    """Reads a growing file of JSON lines; each call of `read` parses what is new.

    Args:
        path: the file, which may not be there yet. When it becomes shorter or another file takes its place (a resumed
            run drops later lines), it is read from its beginning again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._file_number = -1
        self._lines: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far; those before the last call are the same objects."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_size < self._place or status.st_ino != self._file_number:
                    self._place, self._lines, self._file_number = 0, [], status.st_ino
                file.seek(self._place)
                new = file.read()
        except FileNotFoundError:
            return self._lines
        end = new.rfind(b"\n") + 1  # what follows is half a line
        self._lines += whole_lines(new[:end].decode("utf-8", errors="replace"))
        self._place += end
        return self._lines


def ordered(lines: Sequence[Line]) -> list[Line]:
    """By step; where two lines of one kind (training, validation, tasks) have the same step, the later one counts."""
    whole = [line for line in lines if isinstance(line.get("step"), int)]
    keys = [(line["step"], 0 if "loss" in line else 1 if "validation_loss" in line else 2) for line in whole]
    if all(first < second for first, second in itertools.pairwise(keys)):
        return whole
    kept: dict[tuple[int, int], dict[str, Any]] = {}
    for key, line in zip(keys, whole, strict=True):
        kept.setdefault(key, {}).update(line)
    return [kept[key] for key in sorted(kept)]


def is_number(value: Any) -> bool:
    """Whether a value of a line can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def series(lines: Sequence[Line], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a finite number under a key."""
    return [(line["step"], float(line[key])) for line in lines if is_number(line.get(key))]


# What lines say that is not a figure of a task.
_OWN = ("rewards/",)


def task_names(lines: Sequence[Line]) -> list[str]:
    """TASK/FIGURE of the tasks that ran while the model was trained, without their standard errors."""
    names: dict[str, None] = {}
    for line in lines:
        if "loss" in line or "validation_loss" in line:
            continue
        for key, value in line.items():
            if "/" in key and not key.endswith("_stderr") and not key.startswith(_OWN) and is_number(value):
                names[key] = None
    return list(names)
