"""What tests of tasks share: a tokenizer of letters, records from a file, answers made up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxlm.evaluation.task import Answer, Answers, Figure, Request, Row, Task


class Letters:
    """Each sign is a token, True and False are tokens, and a text of its own begins with another form of its sign."""

    words = ("True", "False")

    def encode(self, text: str) -> Any:
        ids, at = [], 0
        while at < len(text):
            word = next((word for word in self.words if text.startswith(word, at)), text[at])
            ids.append((5000 + self.words.index(word) if word in self.words else ord(word)) + (10000 if at == 0 else 0))
            at += len(word)
        return SimpleNamespace(ids=ids)


def read(task: Task, path: Path, **options: Any) -> tuple[list[Row], Any]:
    """The records of a file, checked."""
    given = task.options(**options)
    if task.check_options is not None:
        task.check_options(given)
    if task.read is not None:
        records = task.read(path, given)
    else:
        content = json.loads(path.read_text())
        records = content
    for record in records:
        problem = task.check(record, given)
        assert problem is None, problem
    return list(records), given


def requested(task: Task, records: Sequence[Row], options: Any) -> list[Request]:
    """The requests, as the command checks them."""
    requests = task.requests(records, options, Letters())  # type: ignore[arg-type]
    keys = [(request.record, request.part) for request in requests]
    assert len(set(keys)) == len(keys)
    return requests


def text_answers(texts: Sequence[str]) -> list[Answers]:
    """Answers that were made elsewhere."""
    return [{"answer": Answer(texts=(text,))} for text in texts]


def probabilities(*values: float) -> Answer:
    """An answer to a request for the next token."""
    return Answer(log_probs=tuple(math.log(value) for value in values))


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """The figures without their errors."""
    return {name: figure.value for name, figure in figures.items()}
