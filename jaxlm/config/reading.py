"""From plain values, as YAML has them, to checked dataclasses; errors name the key, the value and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import yaml

from jaxlm.config.ranges import check_ranges
from jaxlm.config.run import RunConfig
from jaxlm.config.schema import element_of, expected, has_path, section_of, suggest
from jaxlm.errors import UserError
from jaxlm.fields import Reader, alternatives, field_types, is_required, shown
from jaxlm.yamltext import read_yaml

Config = TypeVar("Config")

# YAML reads {a:1} as a key `a:1` without a value.
COLON = "put a space behind the colon, {key: value}"


def build(values: Mapping[str, Any], root: type[Config]) -> Config:
    """The dataclass `root` with these values, all sections typed.

    Numbers, true and false may also stand as text ("1e-4", which YAML takes for text without quotation marks too).

    Args:
        values: nested keys and values, lists as lists; `unfold_paths` has been applied, and `check_keys`.
        root: the dataclass.

    Raises:
        UserError: for a value of a wrong type, null where a value belongs, a source without a path, or a value out
            of its range.
    """
    config = _ConfigReader().section(values, root, "")
    if isinstance(config, RunConfig):
        config = _with_records(config)
        check_ranges(config)
    return typing.cast(Config, config)


def _with_records(config: RunConfig) -> RunConfig:
    """The run with the kind of records that its objective takes."""
    if config.objective == "cross_entropy":
        return config
    if config.objective == "grpo":  # a record asks, and may say what is right: a row each
        too_long: Any = "drop" if config.data.too_long == "auto" else config.data.too_long
        return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False, too_long=too_long))
    labelled = config.preference is not None and config.preference.loss == "kto"
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, records="labelled" if labelled else "pairs")
    )


def check_keys(values: Any, root: type, origin: str) -> dict[str, Any]:
    """Refuses keys that `root` does not have; returns `values`.

    Args:
        values: what should be keys and values.
        root: the dataclass of the whole.
        origin: where the values stand, for the message: a file, or the command line.

    Raises:
        UserError: with the nearest known key.
    """
    _check_keys(values, root, "", origin, root)
    return typing.cast(dict[str, Any], values)


def unfold_paths(values: Any, cls: type) -> Any:
    """`values` with `train: my.json` written out as `train: [{path: my.json}]`, and `model: DIR` as its path."""
    if not isinstance(values, dict):
        return values
    unfolded = {}
    for key, value in values.items():
        kind = field_types(cls).get(key)
        if has_path(element_of(kind)):
            value = number_in_text(value, kind)
            value = [value] if isinstance(value, (str, dict)) else value
            if isinstance(value, list):
                value = [{"path": source} if isinstance(source, str) else source for source in value]
        elif isinstance(value, str) and any(has_path(member) for member in alternatives(kind)):
            value = {"path": value}
        elif dataclasses.is_dataclass(kind):
            value = unfold_paths(value, typing.cast(type, kind))
        elif key == "stages" and isinstance(value, list):
            value = [unfold_paths(stage, cls) for stage in value]
        unfolded[key] = value
    return unfolded


def number_in_text(value: Any, kind: Any) -> Any:
    """The number that a text is, where `kind` allows one beside a list of paths; else `value`."""
    if not isinstance(value, str) or float not in alternatives(kind):
        return value
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _check_keys(values: Any, cls: type, prefix: str, origin: str, root: type) -> None:
    if not isinstance(values, dict):
        where = f"{origin}: {prefix.rstrip('.')}" if prefix else origin
        raise UserError(f"{where}: expected keys and values, found {shown(values)}")
    types = field_types(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types:
            way_out = f"; {COLON}" if isinstance(name, str) and ":" in name else suggest(key, root)
            raise UserError(f"{origin}: unknown key {key!r}{way_out}")
        section = section_of(types[name])
        if section is None:
            continue
        only_section = set(alternatives(types[name])) <= {section, type(None)}
        if isinstance(value, list) and not only_section:
            for element in value:
                _check_keys(element, section, f"{key}.", origin, root)
        elif isinstance(value, dict) or (value is not None and only_section):
            _check_keys(value, section, f"{key}.", origin, root)


class _ConfigReader(Reader):
    """Texts may stand for numbers; `key` is empty for the root."""

    def section(self, values: Mapping[str, Any], cls: type, key: str) -> Any:
        for field in dataclasses.fields(cls):
            if is_required(field) and values.get(field.name) is None:
                raise UserError(f"{key}: {dict(values)!r} has no {field.name}; write {{{field.name}: …}}")
        prefix, kinds = f"{key}." if key else "", field_types(cls)
        return cls(**{name: self.value(value, kinds[name], f"{prefix}{name}") for name, value in values.items()})

    def element_key(self, key: str, number: int) -> str:
        return key  # a list's sections are set together on the command line, without numbers

    def name(self, name: Any, key: str) -> str:
        if not isinstance(name, str):
            raise UserError(f"{key}: the name {name!r} is not a text; put it in quotation marks")
        return name

    def leaf(self, value: Any, kind: Any, key: str) -> Any:
        members = alternatives(kind)
        if value is None and type(None) not in members and Any not in members:
            way_out = COLON if ":" in key else "leave the key out for its default"
            raise UserError(f"{key}: expected {expected(kind)}, found null; {way_out}")
        for member in members:
            if _is(value, member):
                return value
        for member in members:
            converted = _converted(value, member)
            if _is(converted, member):
                return converted
        if isinstance(value, Mapping) and section_of(kind) is not None:
            inner = f"{key}.{next(iter(value), '')}".rstrip(".")
            raise UserError(f"{inner}: there is no list {key} that it could be set for; give {key} too")
        raise UserError(f"{key}: expected {expected(kind)}, found {shown(value)}{_nearest_choice(value, members)}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value that is neither keys nor list is of this very type: true is not a number here."""
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    return kind is Any or type(value) is kind


def _converted(value: Any, kind: Any) -> Any:
    """A text as the number or truth value that YAML would read from it, a whole number as a float."""
    if isinstance(value, str) and kind in (int, float, bool, type(None)):
        try:
            value = read_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            return value
    if kind is float and (isinstance(value, str) or type(value) is int):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value


def _nearest_choice(value: Any, members: tuple[Any, ...]) -> str:
    choices = [
        str(choice) for kind in members if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)
    ]
    near = difflib.get_close_matches(value.strip().lower(), choices, 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
