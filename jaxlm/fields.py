"""Dataclasses from plain values: the walk over both together, which configurations and JSON files share.

What a reader makes of a single value, and how its errors read, is its own: see `Reader`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

NOTHING = object()  # no value: None is one


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    return typing.get_type_hints(cls)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def shown(value: Any) -> str:
    """A value for messages, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


class Reader:
    """Reads values by the types that annotations give them; subclasses read what has neither keys nor elements."""

    def section(self, values: Mapping[str, Any], cls: type, key: str) -> Any:
        """The dataclass `cls` with these values."""
        raise NotImplementedError

    def leaf(self, value: Any, kind: Any, key: str) -> Any:
        """A value that no member of `kind` has a structure for; raises where it does not fit."""
        raise NotImplementedError

    def element_key(self, key: str, number: int) -> str:
        """The name of an element of a list, for errors."""
        return f"{key}[{number}]"

    def name(self, name: Any, key: str) -> str:
        """The key of an entry of a dict."""
        return str(name)

    def value(self, value: Any, kind: Any, key: str) -> Any:
        """The value as `kind` has it: sections as dataclasses, lists as tuples where it says so.

        Args:
            key: its full name, for errors.
        """
        # A mapping or a list says which member of a union is meant, so that its errors name the inner key.
        for member in alternatives(kind):
            read = self._structured(value, member, key)
            if read is not NOTHING:
                return read
        return self.leaf(value, kind, key)

    def _structured(self, value: Any, kind: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(value, Mapping):
            if dataclasses.is_dataclass(kind):
                return self.section(value, typing.cast(type, kind), key)
            if origin in (dict, Mapping):
                names = {self.name(name, key): inner for name, inner in value.items()}
                return {name: self.value(inner, arguments[1], f"{key}.{name}") for name, inner in names.items()}
        if isinstance(value, (list, tuple)) and origin in (list, tuple):
            kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else list(arguments)
            if len(kinds) == len(value):
                pairs = enumerate(zip(value, kinds, strict=True))
                elements = [self.value(inner, part, self.element_key(key, n)) for n, (inner, part) in pairs]
                return elements if origin is list else tuple(elements)
        return NOTHING
