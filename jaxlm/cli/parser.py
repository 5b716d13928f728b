"""From YAML files and command-line words to checked configurations.

Files, stages and `--a.b value` words are merged first, so that all of them are checked alike and errors name the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxlm.cli.words import Flag, Words, read_words
from jaxlm.config.files import dump_yaml, merge, read_values
from jaxlm.config.plain import flatten
from jaxlm.config.reading import build
from jaxlm.config.run import RunConfig
from jaxlm.config.stages import split_stages
from jaxlm.errors import UserError, show

Config = TypeVar("Config")

PRINT_CONFIG = Flag("print the whole configuration, defaults included, and exit")


@dataclasses.dataclass(frozen=True)
class Origins:
    """Which file set which key, so that a message about a value that nobody typed says where it stands.

    Args:
        files: key -> the YAML file that set it.
        typed: keys given on the command line.
    """

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    typed: frozenset[str] = frozenset()

    def explain(self, message: str) -> str:
        """`message`, and for each key in it that a file has set, which."""
        named = [key for key in self.files if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message)]
        notes = [f"{key} is set in {self.files[key]}" for key in named if not self._is_overridden(key)]
        return f"{message} [{', '.join(notes)}]" if notes else message

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A block whose `UserError`s are explained."""
        try:
            yield
        except UserError as error:
            raise UserError(self.explain(str(error))) from None

    def _is_overridden(self, key: str) -> bool:
        return any(word == key or word.startswith(f"{key}.") or key.startswith(f"{word}.") for word in self.typed)


class ParsedRun(typing.NamedTuple):
    """What the words of a command come to.

    Args:
        configs: one per stage; a single one without `stages`.
        flags: the values of the command's own flags that were given.
        origins: where the values come from.
    """

    configs: list[RunConfig]
    flags: dict[str, Any]
    origins: Origins


def parse_run(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    flags: Mapping[str, Flag] = types.MappingProxyType({}),
    aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> ParsedRun:
    """Reads `--config FILE`, `--a.b value` and the command's own flags.

    Args:
        argv: command-line words.
        prog: the command, for --help.
        description: for --help.
        flags: the command's own flags.
        aliases: other names of keys on the command line.

    Raises:
        UserError: for an unknown key (naming the nearest), a wrong type or value, a missing or broken file.
        SystemExit: after --help or --print_config.
    """
    flags = {
        "print_config": PRINT_CONFIG,
        **flags,
        "stage": Flag("run only this stage of a config that has stages", str),
    }
    words = _words(argv, prog, description, flags, RunConfig, aliases)
    if "stages" in words.overrides:
        raise UserError("--stages: stages are given in the configuration file; --stage NAME runs one of them")
    values: dict[str, Any] = {}
    set_in: dict[str, str] = {}
    for file in words.files:
        content = read_values(file, RunConfig)
        values = merge(values, content)
        for part in [content, *content.get("stages", [])]:
            own = {key: value for key, value in part.items() if key not in ("stages", "name")}
            set_in |= dict.fromkeys(_keys(own), file)
    origins = Origins(set_in, frozenset(flatten(words.overrides)))
    stages = values.pop("stages", None)
    only = words.flags.get("stage")
    with origins.explained():
        if stages is not None:
            configs = split_stages(values, stages, words.overrides, only)
        elif only is not None:
            raise UserError(f"--stage: {only!r}: this configuration has no stages")
        else:
            configs = [build(merge(values, words.overrides), RunConfig)]
        _check_length(configs, origins.typed)
    _print_config_if_asked(words, *configs)
    return ParsedRun(configs, words.flags, origins)


def _check_length(configs: Sequence[RunConfig], typed: frozenset[str]) -> None:
    """In files steps may win over another file's epochs; epochs that somebody typed must not be without effect."""
    if "train.epochs" in typed and "train.steps" not in typed and all(config.train.steps for config in configs):
        raise UserError(
            f"train.epochs: {configs[0].train.epochs:g} does nothing where train.steps is {configs[0].train.steps}; "
            "add --train.steps null, or leave --train.epochs out"
        )


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of nested values, also those of the sections in a list, as data.train.weight."""
    for key, value in flatten(values).items():
        yield key
        for element in value if isinstance(value, list) else ():
            if isinstance(element, dict):
                yield from (f"{key}.{inner}" for inner in flatten(element))


def parse_config(
    argv: Sequence[str], root: type[Config], *, prog: str, description: str, aliases: Mapping[str, str]
) -> Config:
    """Reads the configuration of a command that has one dataclass `root` of keys and no stages.

    Args:
        argv, prog, description: as `parse_run`.
        aliases: other names of keys on the command line, e.g. those that other systems use.

    Raises:
        As `parse_run`.
    """
    return parse_config_and_flags(argv, root, prog=prog, description=description, aliases=aliases, flags={})[0]


def parse_config_and_flags(
    argv: Sequence[str],
    root: type[Config],
    *,
    prog: str,
    description: str,
    aliases: Mapping[str, str],
    flags: Mapping[str, Flag],
) -> tuple[Config, dict[str, Any]]:
    """As `parse_config`, and the values of the command's own flags that were given."""
    words = _words(argv, prog, description, {"print_config": PRINT_CONFIG, **flags}, root, aliases)
    values: dict[str, Any] = {}
    for file in words.files:
        values = merge(values, read_values(file, root))
    config = build(merge(values, words.overrides), root)
    _print_config_if_asked(words, config)
    return config, words.flags


def _words(
    argv: Sequence[str],
    prog: str,
    description: str,
    flags: Mapping[str, Flag],
    root: type,
    aliases: Mapping[str, str],
) -> Words:
    if not argv or "--help" in argv or "-h" in argv:
        from jaxlm.cli.help import help_text

        show(help_text(prog, description, flags, root, aliases) + "\n")
        raise SystemExit(0)
    return read_words(argv, flags, root, aliases)


def _print_config_if_asked(words: Words, *configs: Any) -> None:
    if words.flags.get("print_config"):
        show("---\n".join(dump_yaml(config) for config in configs))
        raise SystemExit(0)
