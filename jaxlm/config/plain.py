"""A configuration as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML or JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level: {'a': {'b': 1}} as {'a.b': 1}."""
    if isinstance(values, dict) and values:
        return {key: v for name, inner in values.items() for key, v in flatten(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}
