"""What a step did to the documents of each source."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.data.prepare.shards import Document

_SHOWN = 500  # characters of an example
Numbers = collections.Counter[str]


class Counts:
    """Counts of one task, by source.

    Args:
        most_examples: documents shown for each rule.

    Attributes:
        numbers: by source: read, kept, characters_read, characters_kept, and what a step counts besides.
        taken: by source and rule: documents taken out.
        masked: by source and kind: places masked.
        examples: by rule, the first documents taken out.
    """

    def __init__(self, most_examples: int) -> None:
        self.most_examples = most_examples
        self.numbers: dict[str, Numbers] = collections.defaultdict(Numbers)
        self.taken: dict[str, Numbers] = collections.defaultdict(Numbers)
        self.masked: dict[str, Numbers] = collections.defaultdict(Numbers)
        self.examples: dict[str, list[dict[str, str]]] = collections.defaultdict(list)

    def add(self, source: str, name: str, number: int) -> None:
        """More of something."""
        self.numbers[source][name] += number

    def read(self, document: Document) -> None:
        """A document comes in."""
        self.add(document.source, "read", 1)
        self.add(document.source, "characters_read", len(document.text))

    def keep(self, document: Document) -> None:
        """A document goes on."""
        self.add(document.source, "kept", 1)
        self.add(document.source, "characters_kept", len(document.text))

    def take(self, document: Document, rule: str) -> None:
        """A document is taken out by a rule."""
        self.taken[document.source][rule] += 1
        examples = self.examples[rule]
        if len(examples) < self.most_examples:
            examples.append({"source": document.source, "id": document.id, "text": document.text[:_SHOWN]})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a mark."""
        return {
            "numbers": {source: dict(numbers) for source, numbers in self.numbers.items()},
            "taken": {source: dict(rules) for source, rules in self.taken.items()},
            "masked": {source: +kinds for source, kinds in self.masked.items() if +kinds},
            "examples": dict(self.examples),
        }


def add_up(marks: Iterable[Mapping[str, Any]], most_examples: int) -> Counts:
    """The counts of all tasks together; examples are the first ones in the tasks' order."""
    total = Counts(most_examples)
    for mark in marks:
        for name in ("numbers", "taken", "masked"):
            for source, numbers in mark.get(name, {}).items():
                getattr(total, name)[source].update(numbers)
        for rule, examples in mark.get("examples", {}).items():
            room = most_examples - len(total.examples[rule])
            total.examples[rule] += examples[: max(room, 0)]
    return total
