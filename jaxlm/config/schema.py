"""Questions to the dataclasses of a configuration: which keys there are, and which types a key may have."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any, Literal

from jaxlm.fields import alternatives, field_types


def section_of(kind: Any) -> type | None:
    """The dataclass in `X`, `X | None`, `tuple[X, ...]` or `int | tuple[X, ...]`."""
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)
    sections = (section_of(inner) for inner in typing.get_args(kind))
    return next((section for section in sections if section is not None), None)


def element_of(kind: Any) -> Any:
    """The X of `tuple[X, ...]`, also in a union; None where no list is allowed."""
    lists = (member for member in alternatives(kind) if typing.get_origin(member) is tuple)
    return next((typing.get_args(member)[0] for member in lists), None)


def has_path(kind: Any) -> bool:
    """Whether a bare path may stand for this section."""
    return dataclasses.is_dataclass(kind) and "path" in field_types(typing.cast(type, kind))


def type_of(key: str, root: type) -> Any:
    """The type of a dotted key below `root`; None for an unknown key."""
    kind: Any = root
    for name in key.split("."):
        section = section_of(kind)
        kind = None if section is None else field_types(section).get(name)
    return kind


def is_within_list(key: str, root: type) -> bool:
    """Whether a key belongs to the sections in a list, as data.train.template does."""
    parent = key.rpartition(".")[0]
    return bool(parent) and dataclasses.is_dataclass(element_of(type_of(parent, root)))


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below a section."""
    keys = []
    for name, kind in field_types(cls).items():
        keys.append(prefix + name)
        section = section_of(kind)
        if section is not None:
            keys += all_keys(section, f"{prefix}{name}.")
    return keys


def suggest(key: str, root: type) -> str:
    """The nearest known key, or the keys of its section, as the end of a message about an unknown one."""
    section, _, name = key.rpartition(".")
    known = all_keys(root)
    beside = [full.rpartition(".")[2] for full in known if full.rpartition(".")[0] == section]
    # By the last part alone: a long section that is right would make any two keys of it alike.
    near = [f"{section}.{each}" for each in difflib.get_close_matches(name, beside, 1)] if section else []
    near = near or [full for full in known if full.rpartition(".")[2] == name]  # a right key in a wrong section
    near = near or ([] if section and beside else difflib.get_close_matches(key, known, 1, cutoff=0.7))
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; {section} has {', '.join(beside)}" if section and beside else "; --help lists all keys"


def expected(kind: Any) -> str:
    """A type in words, for messages."""
    members = alternatives(kind)
    if len(members) > 1:
        members = tuple(member for member in members if member is not type(None))
    return " or ".join(dict.fromkeys(_in_words(member) for member in members))


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    if origin in (tuple, list):
        return "a list"
    return _WORDS.get(kind, "keys and values, {key: value}")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
