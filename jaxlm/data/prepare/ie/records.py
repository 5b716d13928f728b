"""Texts with what is to be extracted from them, in the form of DeepKE's `InstructKGC/data` and of InstructIE:

    {"id": …, "source": …, "text": "…",
     "entity":   [{"entity": "quartz", "entity_type": "mineral"}],
     "relation": [{"head": "quartz", "head_type": "mineral", "relation": "formula",
                   "tail": "SiO2", "tail_type": "formula"}],
     "event":    [{"event_type": "eruption", "event_trigger": "erupted",
                   "arguments": [{"argument": "Etna", "role": "place"}]}]}

All but the text may be missing, and so may the types of a relation's ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.config import SourceConfig
from jaxlm.data.records import Record, read_records
from jaxlm.errors import UserError

NOTHING = "NAN"  # how answers say that an argument is not there
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Entity:
    """An entity, as the text has it."""

    text: str
    type: str


@dataclasses.dataclass(frozen=True)
class Relation:
    """A triple; the types of its ends where they are known."""

    head: str
    relation: str
    tail: str
    head_type: str | None = None
    tail_type: str | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """An event; arguments are pairs of a text and its role."""

    type: str
    trigger: str
    arguments: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Annotated:
    """A text and what is to be extracted from it.

    Args:
        text: the text.
        name: the file and the line that it comes from, for messages.
        id: its own, else a hash of the text.
        source: the data set that it belongs to; empty where the record does not say it.
        entities, relations, events: None where the record has no such key, which says that nobody looked for them.
    """

    text: str
    name: str = ""
    id: str = ""
    source: str = ""
    entities: tuple[Entity, ...] | None = None
    relations: tuple[Relation, ...] | None = None
    events: tuple[Event, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record of a file."""
        record: dict[str, Any] = {"id": self.id, **({"source": self.source} if self.source else {}), "text": self.text}
        if self.entities is not None:
            record["entity"] = [entity_json(entity) for entity in self.entities]
        if self.relations is not None:
            record["relation"] = [relation_json(relation) for relation in self.relations]
        if self.events is not None:
            record["event"] = [event_json(event) for event in self.events]
        return record


def entity_json(entity: Entity) -> dict[str, Any]:
    """An entry of `entity`."""
    return {"entity": entity.text, "entity_type": entity.type}


def relation_json(relation: Relation) -> dict[str, Any]:
    """An entry of `relation`; types that are not known are left out."""
    entry = {
        "head": relation.head,
        "head_type": relation.head_type,
        "relation": relation.relation,
        "tail": relation.tail,
        "tail_type": relation.tail_type,
    }
    return {key: value for key, value in entry.items() if value is not None}


def event_json(event: Event) -> dict[str, Any]:
    """An entry of `event`."""
    arguments = [{"argument": text, "role": role} for text, role in event.arguments]
    return {"event_type": event.type, "event_trigger": event.trigger, "arguments": arguments}


def identity(text: str) -> str:
    """The id of a text that has none."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_annotated(path: Path | str) -> Iterator[Annotated]:
    """The records of a file, in order, one at a time.

    Raises:
        UserError: for a record of another form, with its file and line.
    """
    for record in read_records(SourceConfig(path=str(path))):
        yield annotated(record)


def annotated(record: Record) -> Annotated:
    """A record's text and annotations.

    Raises:
        UserError: for a record of another form.
    """
    values, where = record.data, record.name
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        columns = ", ".join(map(str, values)) or "none"
        what = "has no 'text'" if text is None else f"'text' is {text!r:.60}"
        raise UserError(f"{where}: {what}; expected a record with a text; columns found: {columns}")
    source = values.get("source")
    return Annotated(
        text=text,
        name=where,
        id=identity(text) if values.get("id") is None else str(values["id"]),
        source="" if source is None else str(source),
        entities=_entries(values, "entity", where, _entity),
        relations=_entries(values, "relation", where, _relation),
        events=_entries(values, "event", where, _event),
    )


def _entries(
    values: Mapping[str, Any], key: str, where: str, read: Callable[[Mapping[str, Any], str], T]
) -> tuple[T, ...] | None:
    entries = values.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f"{where}: {key} is {type(entries).__name__}; expected a list of objects")
    read_entries = []
    for number, entry in enumerate(entries, 1):
        at = f"{where}: {key} {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{at} is {entry!r:.60}; expected an object")
        read_entries.append(read(entry, at))
    return tuple(read_entries)


def _text(entry: Mapping[str, Any], key: str, at: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        what = f"has no {key!r}" if key not in entry else f"has {key!r}: {value!r:.60}"
        raise UserError(f"{at} {what}; expected a text there; keys found: {', '.join(map(str, entry)) or 'none'}")
    return value


def _entity(entry: Mapping[str, Any], at: str) -> Entity:
    return Entity(_text(entry, "entity", at), _text(entry, "entity_type", at))


def _relation(entry: Mapping[str, Any], at: str) -> Relation:
    types = [None if entry.get(key) is None else _text(entry, key, at) for key in ("head_type", "tail_type")]
    head, relation, tail = (_text(entry, key, at) for key in ("head", "relation", "tail"))
    return Relation(head, relation, tail, *types)


def _event(entry: Mapping[str, Any], at: str) -> Event:
    arguments = []
    given = entry.get("arguments", [])
    if not isinstance(given, list):
        raise UserError(f"{at}: arguments is {type(given).__name__}; expected a list of objects")
    for number, argument in enumerate(given, 1):
        within = f"{at}, argument {number}"
        if not isinstance(argument, dict):
            raise UserError(f"{within} is {argument!r:.60}; expected an object")
        text = _text(argument, "argument", within)
        if text == NOTHING:
            raise UserError(f"{within} is {NOTHING!r}, by which answers say that there is none; leave it out")
        arguments.append((text, _text(argument, "role", within)))
    return Event(_text(entry, "event_type", at), _text(entry, "event_trigger", at), tuple(arguments))
