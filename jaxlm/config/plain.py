"""A configuration as plain values."""

from __future__ import annotations

import dataclasses
import numbers
import os
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML or JSON values (tuples become lists)."""
    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: a tuple as a list, a `Path` as text, a number of NumPy's as Python's."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level: {'a': {'b': 1}} as {'a.b': 1}."""
    if isinstance(values, dict) and values:
        return {key: v for name, inner in values.items() for key, v in flatten(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}
