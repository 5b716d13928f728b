"""JSON as people's files hold it: what Python's reader does not refuse, or refuses without a word that helps."""

from __future__ import annotations

import json
import sys
from typing import Any


def parse(text: str) -> Any:
    """The value that a JSON text holds; NaN, which is no JSON but is written by pandas and others, is null.

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


def _readable(error: ValueError) -> ValueError:
    if "integer string conversion" in str(error):
        return ValueError(
            f"an integer of more than {sys.get_int_max_str_digits():,} digits; put it in quotation marks if it is text"
        )
    return error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object; rename or remove one")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=lambda name: None if name == "NaN" else float(name)
)
