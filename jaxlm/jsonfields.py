"""Dataclasses from JSON files that jaxlm wrote and someone may have edited: every field checked, errors by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from jaxlm.errors import UserError

T = TypeVar("T")


def read_fields(cls: type[Any], values: Any, where: str) -> dict[str, Any]:
    """What a frozen dataclass takes, from JSON values.

    Args:
        cls: the dataclass, with annotations of plain types, tuples, dicts, literals and other dataclasses.
        values: what the file has for it.
        where: the file and the section, for errors: 'out/jaxlm/model.json: model'; a file alone ends with ':'.

    Returns:
        the fields by name, lists as tuples; sections of other dataclasses stay dicts, checked too.

    Raises:
        UserError: when a field is unknown, missing, or of another type.
    """
    if not isinstance(values, dict):
        known = ", ".join(_fields(cls))
        raise UserError(f"{where.removesuffix(':')} is {_shown(values)}; expected an object with the fields {known}")
    fields = _fields(cls)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise UserError(
                f"{_named(where, name)}: no such field; {hint} (a newer jaxlm may have written it; then use that one)"
            )
    hints = typing.get_type_hints(cls)
    fields_read = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UserError(f"{_named(where, name)}: is missing; copy the file again")
            continue
        if not fits(values[name], hints[name], f"{_named(where, name)}"):
            raise UserError(f"{_named(where, name)} is {_shown(values[name])}; expected {described(hints[name])}")
        fields_read[name] = _tuples(values[name])
    return fields_read


def build(cls: type[T], values: Any, where: str) -> T:
    """A frozen dataclass, and those within it, from JSON values.

    Args:
        cls, values, where: as for `read_fields`.

    Raises:
        UserError: when a field is unknown, missing, of another type, or a dataclass refuses its values.
    """
    fields = read_fields(cls, values, where)
    hints = typing.get_type_hints(cls)
    fields = {name: _built(value, hints[name], f"{_named(where, name)}") for name, value in fields.items()}
    try:
        return cls(**fields)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None


def _built(value: Any, kind: Any, where: str) -> Any:
    """A value that fits its type, with its JSON objects as the dataclasses that the type says."""
    parts = get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type[Any], kind), value, where)
    if isinstance(value, dict) and get_origin(kind) in (Union, types.UnionType):
        section = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        return value if section is None else _built(value, section, where)
    if isinstance(value, tuple) and dataclasses.is_dataclass(parts[0] if parts else None):
        return tuple(_built(inner, parts[0], f"{where}[{number}]") for number, inner in enumerate(value))
    return value


def check_format(content: Mapping[str, Any], name: str, version: int, where: Path) -> None:
    """Refuses a file of another format, or of a newer version than this jaxlm reads."""
    if content.get("format") != name:
        raise UserError(f"{where}: its format is {_shown(content.get('format'))}; expected {name!r}")
    check_version({"version": content.get("version")}, version, where)


def check_version(content: Mapping[str, Any], version: int, where: Path) -> None:
    """Refuses a file of a newer version than this jaxlm reads; a file that does not say its version has the first."""
    own = content.get("version", 1)
    if type(own) is not int or not 1 <= own <= version:
        raise UserError(
            f"{where}: its version is {_shown(own)}; this jaxlm reads versions up to {version}: use a newer one, or "
            "copy the file again"
        )


def fits(value: Any, kind: Any, where: str) -> bool:
    """Whether a JSON value is of a type as annotations have it; a dataclass's own fields raise by name."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        plain = [part for part in parts if not dataclasses.is_dataclass(part)]
        if any(fits(value, part, where) for part in plain):
            return True
        return any(fits(value, part, where) for part in parts if dataclasses.is_dataclass(part))
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        pairs = enumerate(zip(value, kinds, strict=False))
        return len(value) == len(kinds) and all(fits(v, k, f"{where}[{number}]") for number, (v, k) in pairs)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(inner, parts[1], where) for inner in value.values())
    if dataclasses.is_dataclass(kind):
        read_fields(typing.cast(type[Any], kind), value, where)
        return True
    if kind is float:
        # Bounded, because an integer of JSON may be too large to become a float.
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 1000)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return value is None if kind is type(None) else type(value) is kind


def _named(where: str, name: str) -> str:
    return f"{where} {name}" if where.endswith(":") else f"{where}.{name}"


def _fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(inner) for inner in value)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def described(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        return f"a list of {' and '.join(described(part) for part in parts if part is not Ellipsis)}"
    if origin in (dict, Mapping):
        return f"an object of {described(parts[1])} by name"
    return _NAMES.get(kind, "an object")
