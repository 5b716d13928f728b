"""What records must hold, and what answers say: shared by the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.evaluation.task import Answers


def missing_text(record: Mapping[str, Any], *names: str) -> str | None:
    """What is wrong with a record that must have texts under these names; None: nothing."""
    for name in names:
        if name not in record:
            columns = ", ".join(map(str, record)) or "none"
            return f"has no {name!r}; columns found: {columns}"
        if not isinstance(record[name], str):
            return f"{name!r} is {type(record[name]).__name__}, expected a text"
    return None


def written(answers: Answers, part: str = "answer") -> str:
    """The text of an answer; empty when there is none, so that it counts as wrong."""
    answer = answers.get(part)
    return answer.texts[0] if answer is not None and answer.texts else ""


def finished(answers: Answers, part: str = "answer") -> bool:
    """Whether an answer came to its end by itself."""
    answer = answers.get(part)
    return answer is not None and bool(answer.finishes) and answer.finishes[0] == "stop"
