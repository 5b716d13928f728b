"""Command-line words to plain values: `--config FILE`, `--a.b value`, and flags of the command itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from jaxlm.config.files import merge
from jaxlm.config.reading import check_keys, number_in_text, unfold_paths
from jaxlm.config.schema import element_of, has_path, is_within_list, type_of
from jaxlm.errors import UserError
from jaxlm.fields import alternatives
from jaxlm.locate import locate_paths
from jaxlm.yamltext import DuplicateKeyError, read_yaml


@dataclasses.dataclass(frozen=True)
class Flag:
    """A word that belongs to the command, not to the run.

    Args:
        help: what it does.
        takes: the type of its value; None where it takes none.
        default: its value when it is given without one; None where it needs one.
    """

    help: str
    takes: type | None = None
    default: Any = None


class Words(NamedTuple):
    """What the words of a command line say.

    Args:
        files: the `--config` files, in order.
        overrides: keys of the configuration, as nested plain values.
        flags: the command's own flags that were given.
    """

    files: list[str]
    overrides: dict[str, Any]
    flags: dict[str, Any]


def read_words(argv: Sequence[str], flags: Mapping[str, Flag], root: type, aliases: Mapping[str, str]) -> Words:
    """Reads a command line.

    Args:
        argv: the words.
        flags: the command's own flags by name.
        root: the dataclass whose keys may be given.
        aliases: other names of keys; 'key=value' for a switch that sets a key to a value.

    Raises:
        UserError: for a word that is not an option, an unknown key, or a missing value.
    """
    files: list[str] = []
    own: dict[str, Any] = {}
    of_all: dict[str, Any] = {}  # keys for every element of a list: --data.train.template chat
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --key value; see --help")
        name, equals, attached = word[2:].partition("=")
        name = name.replace("-", "_")
        name, _, preset = aliases.get(name, name).partition("=")
        value = attached if equals else words.pop(0) if words and not words[0].startswith("--") else None
        if preset:
            if _parsed(word[2:], value, bool, None) is not True:
                continue  # said not to be set
            value = preset
        if name == "config":
            if not value:
                raise UserError("--config: needs a file")
            files.append(value)
        elif name in flags:
            given[name] = _flag_value(name, flags[name], value)
        elif is_within_list(name, root) and not name.endswith(".path"):
            _set(of_all, name, value, root)
        else:
            name = name.removesuffix(".path") if is_within_list(name, root) else name
            _set(own, name, value, root)
            while element_of(type_of(name, root)) is not None and words and not words[0].startswith("--"):
                _set(own, name, words.pop(0), root)
    parts = [check_keys(part, root, "command line") for part in (unfold_paths(own, root), of_all)]
    return Words(files, merge(*(locate_paths(part, root) for part in parts)), given)


def _flag_value(name: str, flag: Flag, value: str | None) -> Any:
    if flag.takes is None:
        if value is not None:
            raise UserError(f"--{name}: takes no value, found {value!r}")
        return True
    if value is None:
        if flag.default is None:
            raise UserError(f"--{name}: needs a value")
        return flag.default
    try:
        return flag.takes(value)
    except ValueError:
        kind = "number" if flag.takes is float else "whole number"
        raise UserError(f"--{name}: {value!r} is not a {kind}") from None


def _set(tree: dict[str, Any], key: str, word: str | None, root: type) -> None:
    """Puts the value that a word stands for into nested `tree`."""
    if word is not None and not word.startswith("{") and any(has_path(m) for m in alternatives(type_of(key, root))):
        key = f"{key}.path"  # --model DIR
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = _parsed(key, word, type_of(key, root), tree.get(leaf))


def _parsed(key: str, word: str | None, kind: Any, before: Any) -> Any:
    """The plain value of a word.

    Args:
        key: the key, for messages.
        word: the text after it; None where there is none.
        kind: the type of the key; None for an unknown key.
        before: what an earlier word has set, which a list is added to.
    """
    if word is None and kind is None:
        return True  # whatever its value, the key is refused
    members = alternatives(kind)
    takes_text = any(member is str or typing.get_origin(member) is tuple for member in members)
    if word is None or (not word.strip() and not takes_text):
        if word is not None or bool not in members:
            raise UserError(f"--{key}: needs a value{'' if word is None else f', found {word!r}'}")
        return True
    before = before if isinstance(before, list) else []
    element = element_of(kind)
    if element is not None and has_path(element):
        # A path as it stands, an object or a list of them; a number where that is allowed.
        looks_like_yaml = word.startswith(("[", "{")) or word in ("null", "None")
        value = number_in_text(_loaded(key, word) if looks_like_yaml else word, kind)
        if value is None or (isinstance(value, (int, float)) and int in members):
            return value
        return [*before, *(value if isinstance(value, list) else [value])]
    if typing.get_origin(kind) is tuple:
        if word.startswith("["):
            return _loaded(key, word)
        # One element, or several numbers with commas; the option again adds to them.
        return [*before, *([word] if element is str else _loaded(key, f"[{word}]"))]
    if kind is str or (str in members and word not in ("null", "None")):
        return word  # a path or name is taken as it stands, also when it looks like a number
    return _loaded(key, word)


def _loaded(key: str, word: str) -> Any:
    try:
        return read_yaml(word)
    except DuplicateKeyError as error:
        raise UserError(f"--{key}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # also numbers of thousands of digits, brackets without end
        raise UserError(f"--{key}: {word!r:.80} is not a valid value") from None
