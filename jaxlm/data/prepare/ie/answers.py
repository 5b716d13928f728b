"""Answers back to records: what `instructions` wrote, or a model, as texts with entities, relations and events."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxlm.data.prepare.ie.records import NOTHING, Annotated, Entity, Event, Relation, identity
from jaxlm.data.prepare.ie.schema import COLUMN, TASKS, Task
from jaxlm.data.records import Record
from jaxlm.errors import UserError

# How DeepKE's answers join several values of an attribute in one text.
JOINED = "|||"


@dataclasses.dataclass(frozen=True)
class _Question:
    text: str
    id: str
    source: str
    task: Task
    answer: str


def _question(record: Record, task: Task | None) -> _Question:
    """The question and answer of a line: of make's own, of jaxlm generate, or of jaxlm evaluate's predictions."""
    values, answer = record.data, None
    if isinstance(inner := values.get("record"), dict):  # predictions.jsonl
        answers = values.get("answers")
        texts = answers.get("answer", {}).get("texts") if isinstance(answers, dict) else None
        answer = texts[0] if isinstance(texts, list) and texts else ""
        values = inner
    if answer is None:
        answer = next((values[key] for key in ("answer", "prediction", "output") if key in values), None)
    instruction = values.get("instruction")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        raise UserError(
            f"{record.name}: expected instruction and output, as `make` writes them, or answer, as `jaxlm generate` "
            f"does; columns found: {', '.join(map(str, record.data)) or 'none'}"
        )
    try:
        asked = json.loads(instruction)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or not isinstance(text := asked.get("input"), str):
        raise UserError(f"{record.name}: the instruction is not JSON with an 'input', found {instruction!r:.60}")
    own = task or values.get("task")
    if own not in TASKS:
        raise UserError(f"{record.name}: task is {own!r}; expected one of {', '.join(TASKS)}, or give --task")
    number = values.get("id")
    return _Question(
        text, identity(text) if number is None else str(number), str(values.get("source") or ""), own, answer
    )


def read_answers(
    records: Iterable[Record], task: Task | None = None, counts: Counter[str] | None = None
) -> Iterator[Annotated]:
    """Texts with what was extracted from them; lines of one text that follow one another are put together.

    Args:
        records: lines with an instruction and an answer.
        task: what the answers are; None: each line says it.
        counts: lines, records, and answers of another form (unreadable), whose entries are none; added to.

    Raises:
        UserError: for a line of another form; an answer of another form is a model's, and is only counted.
    """
    counts = Counter() if counts is None else counts
    before: _Question | None = None
    seen: set[str] = set()
    entries: list[Entity | Relation | Event] = []
    for record in records:
        question = _question(record, task)
        counts["lines"] += 1
        asked = record.data.get("instruction") or record.data["record"]["instruction"]
        is_same = before is not None and dataclasses.replace(before, answer=question.answer) == question
        if before is not None and (not is_same or asked in seen):  # a question that comes again begins a text
            counts["records"] += 1
            yield _annotated(before, entries)
            seen, entries = set(), []
        before = question
        seen.add(asked)
        found = parse_answer(question.answer, question.task)
        counts["unreadable"] += found is None
        entries += found or []
    if before is not None:
        counts["records"] += 1
        yield _annotated(before, entries)


def _annotated(question: _Question, entries: list[Entity | Relation | Event]) -> Annotated:
    column = COLUMN[question.task]
    entities = tuple(entry for entry in entries if isinstance(entry, Entity))
    relations = tuple(entry for entry in entries if isinstance(entry, Relation))
    return Annotated(
        text=question.text,
        id=question.id,
        source=question.source,
        entities=entities if question.task in ("NER", "KG") else None,
        relations=relations if column == "relation" else None,
        events=tuple(entry for entry in entries if isinstance(entry, Event)) if column == "event" else None,
    )


def parse_answer(text: str, task: Task) -> list[Entity | Relation | Event] | None:
    """The entries of an answer, in its order; None for one that is not a JSON object. Entries of another form go."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    entries: list[Entity | Relation | Event] = []
    for name, values in content.items():
        if task == "KG":
            entries += _attributes(name, values)
        elif isinstance(values, list):
            entries += [entry for value in values if (entry := _entry(name, value, task)) is not None]
    return entries


def _entry(name: str, value: Any, task: Task) -> Entity | Relation | Event | None:
    if task == "NER":
        return Entity(value, name) if isinstance(value, str) else None
    if task == "EET" and isinstance(value, str):
        return Event(name, value)
    if not isinstance(value, dict):
        return None
    if task in ("RE", "SPO"):
        head, tail = (_first_text(value, *names) for names in (("subject", "head"), ("object", "tail")))
        if head is None or tail is None:
            return None
        types = [_first_text(value, key) for key in ("subject_type", "object_type")]
        return Relation(head, name, tail, *types)
    trigger = value.get("trigger", "")
    if not isinstance(trigger, str):
        return None
    return Event(name, trigger, tuple(_texts(value.get("arguments"))) if task != "EET" else ())


def _first_text(value: Mapping[str, Any], *names: str) -> str | None:
    found = next((value[name] for name in names if name in value), None)
    return found if isinstance(found, str) else None


def _texts(roles: Any) -> list[tuple[str, str]]:
    """Pairs of a text and its role, of {role: text or texts}."""
    return [
        (text, role)
        for role, values in (roles.items() if isinstance(roles, dict) else ())
        for text in (values if isinstance(values, list) else [values])
        if isinstance(text, str) and text != NOTHING
    ]


def _attributes(type_name: str, entities: Any) -> list[Entity | Relation | Event]:
    """The triples of {entity: {attribute: value or values}}; an entity without attributes stays one."""
    entries: list[Entity | Relation | Event] = []
    for head, attributes in entities.items() if isinstance(entities, dict) else ():
        joined = {
            role: values.split(JOINED) if isinstance(values, str) else values
            for role, values in (attributes.items() if isinstance(attributes, dict) else ())
        }
        pairs = _texts(joined)
        if not pairs and isinstance(attributes, dict):
            entries.append(Entity(head, type_name))
        entries += [Relation(head, role, tail, type_name) for tail, role in pairs]
    return entries
