"""What is asked for: types of entities, relations, events with their roles, attributes of entities.

A schema of a task is an ordered mapping. Its keys are the names that are asked for: (type,), (relation,), and for SPO
(subject type, relation, object type). Its values are the roles of an event type or the attributes of an entity type.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from jaxlm.data.prepare.ie.records import Annotated
from jaxlm.errors import UserError
from jaxlm.jsontext import parse

Task = Literal["NER", "RE", "SPO", "EE", "EET", "EEA", "KG"]
TASKS: tuple[Task, ...] = get_args(Task)
Key = tuple[str, ...]
Schema = dict[Key, tuple[str, ...]]

WITH_ROLES = ("EE", "EEA", "KG")
# Task -> the key of a record that it reads.
COLUMN: dict[Task, str] = {
    "NER": "entity",
    "RE": "relation",
    "SPO": "relation",
    "EE": "event",
    "EET": "event",
    "EEA": "event",
    "KG": "relation",
}
_FORMS = (
    'expected either one object, {"entity": [types], "relation": [names], "event": {type: [roles]}, "attribute": '
    "{entity type: [names]}}, or DeepKE's three lines: types, roles or relations, {type: [roles]}"
)


def read_schema(path: Path, task: Task) -> Schema:
    """The part of a schema file that is about a task, in the order of the file.

    An event or entity type of which the file does not say the roles or attributes has none here.

    Raises:
        UserError: for a file of another form, or one that has nothing for this task.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"schema: {path} is not UTF-8 ({error}); convert it, e.g. with iconv") from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if text.lstrip().startswith("{"):
            schema = _of_object(parse(text), task, path)
        elif len(lines) == 3:
            schema = _of_lines([parse(line) for line in lines], task, path)
        else:
            raise UserError(f"schema: {path} has {len(lines)} lines; {_FORMS}")
    except ValueError as error:
        raise UserError(f"schema: {path} is not valid JSON ({error}); {_FORMS}") from None
    if not schema:
        raise UserError(f"schema: {path} says nothing that {task} asks for; {_FORMS}")
    return schema


def _of_object(content: Any, task: Task, path: Path) -> Schema:
    known = ("entity", "relation", "event", "attribute")
    unknown = next((key for key in content if key not in known), None)
    if unknown is not None:
        raise UserError(f"schema: {path} has the key {unknown!r}; {_FORMS}")
    if task == "NER":
        return {(name,): () for name in _names(content.get("entity", []), "entity", path)}
    if task in ("RE", "SPO"):
        return _relations(content.get("relation", []), task, path)
    column = "attribute" if task == "KG" else "event"
    return _with_roles(content.get(column, {}), column, path)


def _of_lines(content: list[Any], task: Task, path: Path) -> Schema:
    types, roles, by_type = content
    if task == "RE":
        return {(name,): () for name in _names(roles, "the second line", path)}
    if task == "SPO":
        raise UserError(
            f"schema: {path} has three lines, which do not say between which types a relation is; write one object, "
            '{"relation": [{"subject_type": …, "predicate": …, "object_type": …}]}'
        )
    given = _with_roles(by_type, "the third line", path)
    schema: Schema = {}
    for name in _names(types, "the first line", path):
        schema[name,] = given.get((name,), ()) if task in WITH_ROLES else ()
    return schema


def _names(value: Any, where: str, path: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(f"schema: {path}: {where} is {json.dumps(value, ensure_ascii=False)[:60]}; {_FORMS}")
    twice = next((name for at, name in enumerate(value) if name in value[:at]), None)
    if twice is not None:
        raise UserError(f"schema: {path}: {where} has {twice!r} twice; remove one")
    return value


def _with_roles(value: Any, where: str, path: Path) -> Schema:
    if isinstance(value, list):
        return {(name,): () for name in _names(value, where, path)}
    if not isinstance(value, dict):
        raise UserError(f"schema: {path}: {where} is {json.dumps(value, ensure_ascii=False)[:60]}; {_FORMS}")
    return {(name,): tuple(_names(roles, f"{where} of {name!r}", path)) for name, roles in value.items()}


def _relations(value: Any, task: Task, path: Path) -> Schema:
    if not isinstance(value, list):
        raise UserError(f"schema: {path}: relation is {json.dumps(value, ensure_ascii=False)[:60]}; {_FORMS}")
    schema: Schema = {}
    for entry in value:
        parts = ("subject_type", "predicate", "object_type")
        if isinstance(entry, dict) and all(isinstance(entry.get(part), str) for part in parts):
            key = tuple(entry[part] for part in parts)
            schema[key if task == "SPO" else key[1:2]] = ()
        elif isinstance(entry, str) and entry.strip() and task == "RE":
            schema[entry,] = ()
        else:
            expected = '{"subject_type": …, "predicate": …, "object_type": …}' + (" or a name" if task == "RE" else "")
            shown = json.dumps(entry, ensure_ascii=False)[:80]
            raise UserError(f"schema: {path}: relation has the entry {shown}; {task} expects {expected}")
    return schema


def gather_schema(records: Iterable[Annotated], task: Task) -> Schema:
    """All that the records have for a task, sorted.

    Raises:
        UserError: for a record that lacks what the task needs.
    """
    names: dict[Key, set[str]] = {}
    for record in records:
        for key, roles in keys_of(record, task):
            names.setdefault(key, set()).update(roles)
    return {key: tuple(sorted(names[key])) for key in sorted(names)}


def keys_of(record: Annotated, task: Task) -> list[tuple[Key, list[str]]]:
    """What a record has for a task: for each entry its key, and its roles or attributes."""
    check_column(record, task)
    if task == "NER":
        return [((entity.type,), []) for entity in record.entities or ()]
    if task in ("EE", "EET", "EEA"):
        with_roles = task in WITH_ROLES
        return [
            ((event.type,), [role for _, role in event.arguments] if with_roles else [])
            for event in record.events or ()
        ]
    if task == "RE":
        return [((relation.relation,), []) for relation in record.relations or ()]
    types = entity_types(record)
    keys: list[tuple[Key, list[str]]] = []
    for relation in record.relations or ():
        head = relation.head_type or types.get(relation.head)
        tail = relation.tail_type or types.get(relation.tail)
        if head is None or (task == "SPO" and tail is None):
            end, text = ("head", relation.head) if head is None else ("tail", relation.tail)
            raise UserError(
                f"{record.name}: the relation {relation.relation!r} of {relation.head!r} says no type of its {end}, "
                f"which {task} needs; give it {end}_type, or {text!r} in entity"
            )
        keys.append(((head,), [relation.relation]) if task == "KG" else ((head, relation.relation, str(tail)), []))
    if task == "KG":
        keys += [((entity.type,), []) for entity in record.entities or ()]
    return keys


def entity_types(record: Annotated) -> dict[str, str]:
    """The type of each entity of a record, the first where it has several."""
    types: dict[str, str] = {}
    for entity in record.entities or ():
        types.setdefault(entity.text, entity.type)
    return types


def check_column(record: Annotated, task: Task) -> None:
    """Refuses a record that was not annotated for a task.

    Raises:
        UserError: the record has no such key.
    """
    column = COLUMN[task]
    value = {"entity": record.entities, "relation": record.relations, "event": record.events}[column]
    if value is None:
        raise UserError(
            f"{record.name}: has no {column!r}, which {task} reads; give an empty list where the text holds none"
        )


def asked(key: Key, roles: tuple[str, ...], task: Task, triggers: list[str]) -> Any:
    """What stands in an instruction's schema for a key.

    Args:
        key: the key.
        roles: its roles or attributes.
        task: the task.
        triggers: for EEA, those that the text has.
    """
    if task == "SPO":
        return dict(zip(("subject_type", "predicate", "object_type"), key, strict=True))
    if task == "KG":
        return {"entity_type": key[0], "attributes": list(roles)}
    if task in ("EE", "EEA"):
        return {"event_type": key[0], "trigger": True if task == "EE" else triggers, "arguments": list(roles)}
    return key[0]
