"""Tables of another program's flags: what each means here, or why it means nothing."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxlm.errors import UserError

Verdict = Literal["taken", "not needed", "refused"]
Values = dict[str, Any]  # dotted keys of a configuration of ours


@dataclasses.dataclass(frozen=True)
class Line:
    """What becomes of a word of the old command.

    Args:
        word: the flag with its value, as it was given; "(default) …" for what the program does unasked.
        text: the keys that it sets, or why it is not needed or refused.
    """

    word: str
    verdict: Verdict
    text: str


@dataclasses.dataclass(frozen=True)
class Translation:
    """A command of ours.

    Args:
        verb: words in front, e.g. ("train",) or ("convert", "apply-delta"); () where nothing is left to run.
        values: its configuration, by dotted keys; written to a file where the verb takes --config.
        words: further words.
        lines: what became of the old words.
        base: a configuration of ours that the values are laid over.
    """

    verb: tuple[str, ...]
    values: Values
    lines: Sequence[Line]
    words: tuple[str, ...] = ()
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of another program.

    Args:
        kind: how its value is read: str, int, float, bool, or list (nargs="+", or a list in brackets).
        meaning: the values of ours that a value stands for; a text: the reason why it is not needed.
        default: what the program takes when it is not given; it is translated as if it had been. None: nothing.
        refused: `meaning` is the reason why it cannot be done, and the way out.
        unless: the one value that is no reason for a refusal, e.g. False.
    """

    kind: type
    meaning: Callable[[Any], Values] | str
    default: Any = None
    refused: bool = False
    unless: Any = None


def key(name: str, kind: type = str, default: Any = None) -> Flag:
    """A flag that is a key of ours."""
    return Flag(kind, lambda value: {name: value}, default)


def idle(why: str, kind: type = str) -> Flag:
    """A flag that is not needed here."""
    return Flag(kind, why)


def refused(why: str, kind: type = str, unless: Any = None) -> Flag:
    """A flag that cannot be honoured."""
    return Flag(kind, why, refused=True, unless=unless)


def read_flags(words: Sequence[str], table: Mapping[str, Flag], positional: Sequence[str] = ()) -> dict[str, Any]:
    """The values given, by the table's names.

    Understood are --a b, --a=b, --a-b for --a_b, several words for a list, a beginning of a name that only one
    flag has (argparse), and a flag alone for true.

    Args:
        words: behind the script's name.
        table: by long names with underscores; short ones as they are ("n").
        positional: names of the words without a flag, in order.

    Raises:
        UserError: for a word that the program does not know, a missing value or one of the wrong kind.
    """
    given: dict[str, Any] = {}
    free, rest = list(positional), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word.lstrip("-") == "":
            if not free:
                raise UserError(f"{word!r}: it belongs to no flag of this command")
            given[free.pop(0)] = word
            continue
        name, equals, attached = word.lstrip("-").partition("=")
        name = _full_name(name.replace("-", "_"), table)
        kind = table[name].kind
        values = [attached] if equals else []
        while not equals and rest and not _is_flag(rest[0]) and (kind is list or not values):
            if kind is bool and rest[0].lower() not in _BOOLEANS:
                break  # fire and argparse: a flag alone is true, what follows is another's
            values.append(rest.pop(0))
        given[name] = _value(name, values, kind)
    if free:
        raise UserError(f"{', '.join(free)}: missing behind the script's name")
    return given


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (
        word.startswith("-") and len(word) > 1 and not (word[1].isdigit() or word[1] == ".")
    )


def _full_name(name: str, table: Mapping[str, Flag]) -> str:
    if name in table:
        return name
    longer = [known for known in table if len(known) > 1 and known.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    near = longer or difflib.get_close_matches(name, table, 1)
    hint = f"did you mean {' or '.join('--' + n for n in near)}?" if near else "the original has no such flag either"
    raise UserError(f"--{name}: not a flag of this command; {hint}")


def _value(name: str, values: Sequence[str], kind: type) -> Any:
    if kind is bool:
        return _BOOLEANS[values[0].lower()] if values and values[0].lower() in _BOOLEANS else True
    if not values:
        raise UserError(f"--{name}: needs a value")
    if kind is list:
        return _listed(values)
    try:
        return float(values[0]) if kind is float else int(float(values[0])) if kind is int else values[0]
    except ValueError:
        raise UserError(f"--{name}: {values[0]!r} is not a number") from None


def _listed(values: Sequence[str]) -> list[Any]:
    """Words of nargs="+", or one text like [q_proj,v_proj], ['a', 'b'] or [424,80]."""
    if len(values) > 1 or not values[0].startswith("["):
        return list(values)
    try:
        return list(ast.literal_eval(values[0]))
    except (ValueError, SyntaxError):
        return [part.strip().strip("\"'") for part in values[0].strip("[]").split(",") if part.strip()]


def translate(given: Mapping[str, Any], table: Mapping[str, Flag]) -> tuple[Values, list[Line]]:
    """The values of ours for what was given and for the program's defaults, and a line for each."""
    values: Values = {}
    lines: list[Line] = []
    for name, flag in table.items():
        asked = name in given
        value = given.get(name, flag.default)
        if value is None:
            continue
        word = f"{'-' if len(name) == 1 else '--'}{name} {shown(value)}"
        if isinstance(flag.meaning, str):
            bad = flag.refused and value != flag.unless
            lines.append(
                Line(word, "refused" if bad else "not needed", flag.meaning if bad or not flag.refused else "")
            )
            continue
        meant = flag.meaning(value)
        values |= meant
        # A name with _ in front is a part of a key that is put together later.
        text = ", ".join(f"{k.lstrip('_')}: {shown(v)}" for k, v in meant.items())
        lines.append(Line(word if asked else f"(default) {word}", "taken", text or "this is how it is here"))
    return values, lines


def shown(value: Any) -> str:
    """A value as it is written in YAML, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {shown(v)}' for k, v in value.items())}}}"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
