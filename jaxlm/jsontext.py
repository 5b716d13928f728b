"""JSON as people's files hold it: what Python's reader does not refuse, or refuses without a word that helps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError


def parse(text: str) -> Any:
    """The value that a JSON text holds; NaN, which pandas and others write though it is not JSON, is null.

    Raises:
        ValueError: (json.JSONDecodeError where there is a place) for broken JSON, a name that stands twice in an
            object, integers of thousands of digits, and nesting that is too deep.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _readable(error) from None


def parse_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a character, and where it ends; raises as `parse`."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _readable(error) from None


def read_value(path: Path) -> Any:
    """The value that a JSON file holds, read as Python's `json` reads it: a name may stand twice, NaN is a number.

    Raises:
        UserError: when the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and deep nesting
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; UserError as `read_value`, and for any other value."""
    value = read_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object with named fields, found {type(value).__name__}")
    return value


def _readable(error: ValueError) -> ValueError:
    if "integer string conversion" in str(error):
        return ValueError(
            f"an integer of more than {sys.get_int_max_str_digits():,} digits; put it in quotation marks if it is text"
        )
    return error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object; rename or remove one")
    return values


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=lambda name: None if name == "NaN" else float(name)
)
