"""Dataclasses from JSON files that jaxlm wrote and someone may have edited: every field checked, errors by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from jaxlm.errors import UserError
from jaxlm.fields import Reader, alternatives, field_types, is_required, shown

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str) -> T:
    """A frozen dataclass, and those within it, from JSON values.

    Args:
        cls: the dataclass, with annotations of plain types, tuples, dicts, literals and other dataclasses.
        values: what the file has for it.
        where: the file and the section, for errors: 'out/jaxlm/model.json: model'; a file alone ends with ':'.

    Raises:
        UserError: when a field is unknown, missing, of another type, or a dataclass refuses its values.
    """
    if not isinstance(values, dict):
        known = ", ".join(field.name for field in dataclasses.fields(cast(type[Any], cls)))
        raise UserError(f"{where.removesuffix(':')} is {shown(values)}; expected an object with the fields {known}")
    return cast(T, _JsonReader().section(values, cls, where))


def checked(value: Any, kind: Any, key: str) -> Any:
    """A JSON value, refused where it is not of the type `kind`: an annotation as those of `build`'s dataclasses."""
    return _JsonReader().value(value, kind, key)


class _JsonReader(Reader):
    """No conversions: 1 is a number, but "1" and true are not."""

    def section(self, values: Mapping[str, Any], cls: type, key: str) -> Any:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
                raise UserError(
                    f"{_named(key, name)}: no such field; {hint} (a newer jaxlm may have written it; then use that one)"
                )
        for name, field in fields.items():
            if name not in values and is_required(field):
                raise UserError(f"{_named(key, name)}: is missing; copy the file again")
        kinds = field_types(cls)
        read = {name: self.value(values[name], kinds[name], _named(key, name)) for name in fields if name in values}
        try:
            return cls(**read)
        except UserError as error:
            raise UserError(f"{key.removesuffix(':')}: {error}") from None

    def leaf(self, value: Any, kind: Any, key: str) -> Any:
        if any(is_of(value, member) for member in alternatives(kind)):
            return value
        raise UserError(f"{key} is {shown(value)}; expected {described(kind)}")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value that is neither object nor list is of this type: 1 is a float too, true is not a number."""
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is float:
        # Bounded, because an integer of JSON may be too large to become a float.
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 1000)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return type(value) is kind


def check_format(content: Mapping[str, Any], name: str, version: int, where: Path) -> None:
    """Refuses a file of another format, or of a newer version than this jaxlm reads."""
    if content.get("format") != name:
        raise UserError(f"{where}: its format is {shown(content.get('format'))}; expected {name!r}")
    check_version({"version": content.get("version")}, version, where)


def check_version(content: Mapping[str, Any], version: int, where: Path) -> None:
    """Refuses a file of a newer version than this jaxlm reads; a file that does not say its version has the first."""
    own = content.get("version", 1)
    if type(own) is not int or not 1 <= own <= version:
        raise UserError(
            f"{where}: its version is {shown(own)}; this jaxlm reads versions up to {version}: use a newer one, or "
            "copy the file again"
        )


def _named(where: str, name: str) -> str:
    return f"{where} {name}" if where.endswith(":") else f"{where}.{name}"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def described(kind: Any) -> str:
    """A type in words."""
    members, origin, parts = alternatives(kind), get_origin(kind), get_args(kind)
    if len(members) > 1:
        return " or ".join(described(member) for member in members)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        return f"a list of {' and '.join(described(part) for part in parts if part is not Ellipsis)}"
    if origin in (dict, Mapping):
        return f"an object of {described(parts[1])} by name"
    return _NAMES.get(kind, "an object")
