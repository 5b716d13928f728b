"""The text of `--help`: all keys by section, each with its type, default and meaning, wrapped for a terminal."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import docstring_parser

from jaxlm.cli.words import Flag
from jaxlm.config.data import SourceConfig
from jaxlm.config.model import ModalityConfig
from jaxlm.config.run import RunConfig, TaskConfig
from jaxlm.config.schema import section_of
from jaxlm.fields import alternatives, field_types

WIDEST = 100


def help_text(prog: str, description: str, flags: Mapping[str, Flag], root: type, aliases: Mapping[str, str]) -> str:
    """What `prog --help` prints.

    Args:
        prog: the command as it was called.
        description: what it does.
        flags: its own flags.
        root: the dataclass of its keys.
        aliases: other names of keys.
    """
    lines = [f"usage: {prog} [--config FILE] [--key value ...]", "", *textwrap.wrap(description, _width()), ""]
    lines += _entry("--config FILE", "YAML with the keys below; several are merged in order")
    for name, flag in flags.items():
        lines += _entry(f"--{name}{' VALUE' if flag.takes else ''}", flag.help)
    lines += ["", "keys", *_entries(root, "--", sections=False), ""]
    for name, kind in field_types(root).items():
        section = section_of(kind)
        if section is not None:
            absent = " (absent unless given)" if type(None) in alternatives(kind) else ""
            lines += [f"{name}{absent}", *_entries(section, f"--{name}."), ""]
            for inner, inner_kind in field_types(section).items():
                if (nested := _absent_section(inner_kind)) is not None:
                    lines += [f"{name}.{inner} (absent unless given)", *_entries(nested, f"--{name}.{inner}."), ""]
    if root is RunConfig:
        lines += ["a source, in data.train and data.validation (in YAML)", *_entries(SourceConfig, ""), ""]
        lines += ["a modality, in tokenizer.modalities (in YAML)", *_entries(ModalityConfig, ""), ""]
        lines += ["a task, in train.tasks (in YAML)", *_entries(TaskConfig, ""), ""]
    if aliases:
        lines += ["other names", *(f"  --{alias}: --{name.replace('=', ' ')}" for alias, name in aliases.items())]
    return "\n".join(lines).rstrip()


def options_text(title: str, meaning: str, options: type) -> str:
    """What `--options.NAME` may be, for one task.

    Args:
        title: the task, as it is asked for.
        meaning: what it does, and what it expects.
        options: its dataclass of options.
    """
    entries = list(_entries(options, "--options.")) or ["  no options"]
    return "\n".join([title, *textwrap.wrap(meaning, _width(), initial_indent="  ", subsequent_indent="  "), *entries])


def _width() -> int:
    """Columns of the terminal, but not so many that lines are hard to read; into a file or a pipe the most."""
    return max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def _absent_section(kind: Any) -> type | None:
    """The dataclass of a section that may be absent."""
    members = alternatives(kind)
    return section_of(kind) if len(members) == 2 and members[1] is type(None) else None


def _entry(head: str, meaning: str) -> Iterator[str]:
    yield f"  {head}"
    yield from textwrap.wrap(meaning, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)


def _entries(cls: type, prefix: str, sections: bool = True) -> Iterator[str]:
    """The keys of a dataclass, with or without those that are sections themselves."""
    meanings = {
        parameter.arg_name: parameter.description or ""
        for base in reversed(cls.__mro__)
        for parameter in docstring_parser.parse(base.__doc__ or "").params
    }
    for field in dataclasses.fields(cls):
        kind = field_types(cls)[field.name]
        if sections or section_of(kind) is None:
            yield from _entry(f"{prefix}{field.name}: {_kind(kind)} = {_default(field)}", meanings.get(field.name, ""))


def _kind(kind: Any) -> str:
    members = alternatives(kind)
    if len(members) > 1:
        return "|".join(_kind(member) for member in members)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin is tuple:
        is_section = dataclasses.is_dataclass(arguments[0])
        return f"[{arguments[0].__name__.removesuffix('Config').lower() if is_section else _kind(arguments[0])}, ...]"
    if origin is dict:
        return "{key: value}"
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return "required"
    is_plain = isinstance(default, str) and default.isprintable() and default == default.strip() != ""
    return default if is_plain else json.dumps(default, ensure_ascii=False)
