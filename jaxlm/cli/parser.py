"""From a YAML file and command-line words to checked `RunConfig`s.

jsonargparse types the values and writes --help; what stands here merges files, stages and
`--a.b value` words first, so that all of them are checked alike and errors name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jaxlm.config import RunConfig, SourceConfig, flatten, to_dict
from jaxlm.errors import UserError
from jaxlm.locate import find_config, locate_paths
from jaxlm.yamltext import StandsTwice, read_yaml

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Words that belong to the command, not to the run: whether one takes a value, and what it is without one."""

    help: str
    takes: type | None = None
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Origins:
    """Which file set which key, so that a message about a value that nobody typed says where it stands.

    Args:
        files: key -> the YAML file that set it.
        typed: keys given on the command line.
    """

    files: Mapping[str, str]
    typed: frozenset[str]

    def explain(self, message: str) -> str:
        """`message`, and for each key in it that a file has set, which."""
        found = [key for key in self.files if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message)]
        notes = [f"{key} is set in {self.files[key]}" for key in found if self._holds(key)]
        return f"{message} [{', '.join(notes)}]" if notes else message

    def _holds(self, key: str) -> bool:
        """Whether the file's value is the one that counts."""
        return not any(word == key or word.startswith(f"{key}.") or key.startswith(f"{word}.") for word in self.typed)


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
    flags: dict[str, Flags] | None = None,
    aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> ParsedRun:
    """Reads `--config FILE`, `--a.b value` and the command's own flags.

    Args:
        argv: command-line words.
        prog: the command, for messages.
        description: for --help.
        flags: the command's own flags.
        aliases: other names of keys on the command line.

    Raises:
        UserError: for an unknown key (naming the nearest), a wrong type or value, a missing or broken file.
        SystemExit: after --help or --print_config.
    """
    flags = {"print_config": Flags("print the whole configuration, defaults included, and exit")} | (flags or {})
    flags["stage"] = Flags("run only this stage of a config that has stages", str)
    if not argv or "--help" in argv or "-h" in argv:
        _show(_help(prog, description, flags, RunConfig, aliases) + "\n")
        raise SystemExit(0)
    files, overrides, given = _read_words(argv, flags, RunConfig, aliases)
    if "stages" in overrides:
        raise UserError("--stages: stages are given in the configuration file; --stage NAME runs one of them")
    base: dict[str, Any] = {}
    set_in: dict[str, str] = {}
    for file in files:
        content = _read_yaml(file, RunConfig)
        base = _merge(base, content)
        for part in [content, *content.get("stages", [])]:
            set_in |= dict.fromkeys(flatten({k: v for k, v in part.items() if k not in ("stages", "name")}), file)
    origins = Origins(set_in, frozenset(flatten(overrides)))
    stages = base.pop("stages", None)
    try:
        if stages is None:
            if "stage" in given:
                raise UserError(f"--stage: {given['stage']!r}: this configuration has no stages")
            configs = [_typed(_merge(base, overrides), RunConfig)]
        else:
            configs = _stages(base, stages, overrides, given.get("stage"))
    except UserError as error:
        raise UserError(origins.explain(str(error))) from None
    if given.get("print_config"):
        _show("---\n".join(dump_yaml(config) for config in configs))
        raise SystemExit(0)
    return ParsedRun(configs, given, origins)


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
    flags = {"print_config": Flags("print the whole configuration, defaults included, and exit")}
    if not argv or "--help" in argv or "-h" in argv:
        _show(_help(prog, description, flags, root, aliases) + "\n")
        raise SystemExit(0)
    files, overrides, given = _read_words(argv, flags, root, aliases)
    values: dict[str, Any] = {}
    for file in files:
        values = _merge(values, _read_yaml(file, root))
    config = _typed(_merge(values, overrides), root)
    if given.get("print_config"):
        _show(dump_yaml(config))
        raise SystemExit(0)
    return config


def read_section(file: str, root: type[Config]) -> Config:
    """A YAML (or JSON) file that holds one section of a configuration, checked like the whole.

    Raises:
        UserError: for an unknown key, a wrong type, a missing or broken file.
    """
    return _typed(_read_yaml(file, root), root)


def _show(text: str) -> None:
    """Prints a long text, of which a reader such as `head` may take only the beginning."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end goes nowhere


def dump_yaml(config: Any) -> str:
    """The config as YAML that `--config` reads back."""
    values = to_dict(config)
    if values.get("stages", 0) is None:
        del values["stages"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def load_run_yaml(text: str, origin: str) -> RunConfig:
    """Reads what `dump_yaml` wrote; `origin` names it in errors."""
    return _typed(_check_keys(yaml.safe_load(text), RunConfig, "", origin, RunConfig), RunConfig)


def _stages(
    base: dict[str, Any], stages: list[dict[str, Any]], overrides: dict[str, Any], only: str | None
) -> list[RunConfig]:
    names = [str(stage.get("name", "")) for stage in stages]
    if "" in names or len(set(names)) != len(names) or any("/" in name for name in names):
        raise UserError(f"stages: each needs a name of its own, without '/'; found {names}")
    if only is not None and only not in names:
        near = difflib.get_close_matches(only, names, 1)
        raise UserError(f"--stage: {only!r} is none of {', '.join(names)}" + (f"; {near[0]!r}?" if near else ""))
    configs: list[RunConfig] = []
    written: RunConfig | None = None  # the stage before, as it was written
    for stage, name in zip(stages, names, strict=True):
        own = {key: value for key, value in stage.items() if key != "name"}
        config = _typed(_merge(_merge(base, own), overrides), RunConfig)
        moved_on = written is not None and config.model.path not in (None, written.model.path)
        configs.append(_after(config, name, None if moved_on or not configs else configs[-1]))
        written = config
    return configs if only is None else [configs[names.index(only)]]


def _after(config: RunConfig, name: str, previous: RunConfig | None) -> RunConfig:
    """A stage writes below output_dir and starts where `previous` ended, if that is given."""
    model, lora = config.model, config.lora
    if previous is not None:
        if previous.lora is None:
            model = dataclasses.replace(model, path=previous.output_dir, shape=None)
        elif lora is not None:
            model = dataclasses.replace(model, path=previous.model.path, shape=None)
            if lora.init_from is None:
                lora = dataclasses.replace(lora, init_from=previous.output_dir)
        else:
            raise UserError(
                f"stages: {name!r} trains in full after a LoRA stage; give it a model.path, "
                "e.g. what `convert merge` wrote"
            )
    output_dir = str(Path(config.output_dir) / name)
    return dataclasses.replace(config, model=model, lora=lora, output_dir=output_dir)


def _read_words(
    argv: Sequence[str], flags: dict[str, Flags], root: type, aliases: Mapping[str, str]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    files: list[str] = []
    overrides: dict[str, Any] = {}
    shared: dict[str, Any] = {}  # keys of all sources: --data.train.template chat
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --key value; see --help")
        name, equals, attached = word[2:].partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        value = attached if equals else words.pop(0) if words and not words[0].startswith("--") else None
        if name == "config":
            if value is None:
                raise UserError("--config: needs a file")
            files.append(value)
        elif name in flags:
            takes = flags[name].takes
            if takes is None and value is not None:
                raise UserError(f"--{name}: takes no value, found {value!r}")
            if takes is not None and value is None and flags[name].default is None:
                raise UserError(f"--{name}: needs a value")
            try:
                given[name] = (flags[name].default or True) if takes is None or value is None else takes(value)
            except ValueError:
                kind = "number" if takes is float else "whole number"
                raise UserError(f"--{name}: {value!r} is not a {kind}") from None
        elif _within_list(name, root) and not name.endswith(".path"):
            _set(shared, name, value, root)
        else:
            name = name.removesuffix(".path") if _within_list(name, root) else name
            _set(overrides, name, value, root)
            while _takes_several(name, root) and words and not words[0].startswith("--"):
                _set(overrides, name, words.pop(0), root)
    parts = [_with_paths(overrides, root), shared]
    for part in parts:
        _check_keys(part, root, "", "command line", root)
    return files, _merge(*(locate_paths(part, root) for part in parts)), given


def _within_list(name: str, root: type) -> bool:
    """Whether a key is one of the sections in a list: data.train.template."""
    above = name.rpartition(".")[0]
    return bool(above) and dataclasses.is_dataclass(_listed(_hint_of(above, root)))


def _set(tree: dict[str, Any], name: str, value: str | None, root: type) -> None:
    hint = _hint_of(name, root)
    if _has_path(hint) and value is not None and not value.startswith("{"):
        name = f"{name}.path"  # --model DIR
    *parents, leaf = name.split(".")
    hint = _hint_of(name, root)
    if value is None or (not value.strip() and not _takes_text(hint)):
        if value is not None or (hint is not bool and bool not in typing.get_args(hint)):
            raise UserError(f"--{name}: needs a value{'' if value is None else f', found {value!r}'}")
        parsed: Any = True
    elif (element := _listed(hint)) is not None and _has_path(element):
        # Sources: a path as it stands, an object or a list of them; where a number will do, that.
        loaded = _loaded(name, value) if value.startswith(("[", "{")) or value in ("null", "None") else value
        loaded = _number(loaded, hint)
        if loaded is None or (isinstance(loaded, (int, float)) and int in typing.get_args(hint)):
            parsed = loaded
        else:
            parsed = [*_given(tree, parents, leaf), *(loaded if isinstance(loaded, list) else [loaded])]
    elif typing.get_origin(hint) is tuple:
        # A list; or one of it, or several with commas where they are numbers, and the word again adds to it.
        if value.startswith("["):
            parsed = _loaded(name, value)
        else:
            parsed = [value] if typing.get_args(hint)[0] is str else _loaded(name, f"[{value}]")
            parsed = [*_given(tree, parents, leaf), *parsed]
    elif hint is str or (str in _choices(hint) and value not in ("null", "None")):
        parsed = value  # a path or name is taken as it stands, also when it looks like a number
    else:
        parsed = _loaded(name, value)
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = parsed


def _takes_several(name: str, root: type) -> bool:
    return _listed(_hint_of(name, root)) is not None


def _listed(hint: Any) -> Any:
    """X of `tuple[X, ...]`, also in a union; None where there is no list."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    return next((found for part in _choices(hint) if part is not hint and (found := _listed(part)) is not None), None)


def _has_path(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and "path" in _fields(typing.cast(type, hint))


def _number(value: Any, hint: Any) -> Any:
    """The number that a text is, where a list may also be one: YAML takes 1e-1 for a text."""
    if not isinstance(value, str) or float not in typing.get_args(hint):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _takes_text(hint: Any) -> bool:
    """Whether an empty word can be a value: a text, or a list of them."""
    return any(part is str or typing.get_origin(part) is tuple for part in _choices(hint))


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: the parts of a union, or the type itself."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _with_paths(values: Any, cls: type) -> Any:
    """Values in which a path that stands where a section or a source belongs has become one: `train: my.json`."""
    if not isinstance(values, dict):
        return values
    hints = _fields(cls)
    result = {}
    for key, value in values.items():
        hint = hints.get(key)
        element = _listed(hint)
        if _has_path(element):
            value = _number(value, hint)
            value = [value] if isinstance(value, (str, dict)) else value
            value = [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value
        elif _has_path(hint) and isinstance(value, str):
            value = {"path": value}
        elif dataclasses.is_dataclass(hint):
            value = _with_paths(value, typing.cast(type, hint))
        elif key == "stages" and isinstance(value, list):
            value = [_with_paths(stage, cls) for stage in value]
        result[key] = value
    return result


def _loaded(name: str, value: str) -> Any:
    try:
        return read_yaml(value)
    except StandsTwice as error:
        raise UserError(f"--{name}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # also numbers of thousands of digits, brackets without end
        raise UserError(f"--{name}: {value!r:.80} is not a valid value") from None


def _given(tree: dict[str, Any], parents: list[str], leaf: str) -> list[Any]:
    """What an earlier word has put into a list."""
    for parent in parents:
        tree = tree.get(parent, {})
    before = tree.get(leaf, [])
    return before if isinstance(before, list) else []


def _fields(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _section(hint: Any) -> type | None:
    """The dataclass in `X`, `X | None`, `tuple[X, ...]` or `int | tuple[X, ...]`."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    for inner in typing.get_args(hint):
        found = _section(inner)
        if found is not None:
            return found
    return None


def _hint_of(name: str, root: type) -> Any:
    hint: Any = root
    for part in name.split("."):
        section = _section(hint)
        hint = _fields(section).get(part) if section is not None else None
    return hint


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _fields(cls).items():
        keys.append(prefix + name)
        section = _section(hint)
        if section is not None:
            keys += _all_keys(section, f"{prefix}{name}.")
    return keys


def _check_keys(values: Any, cls: type, prefix: str, origin: str, root: type) -> dict[str, Any]:
    if not isinstance(values, dict):
        where = f"{origin}: {prefix.rstrip('.')}" if prefix else origin
        raise UserError(f"{where}: expected keys and values, found {values!r}")
    hints = _fields(cls)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"{origin}: unknown key {name!r}{_suggest(name, key, root)}")
        section = _section(hints[key])
        if section is None:
            continue
        if isinstance(value, list):
            for item in value:
                _check_keys(item, section, f"{name}.", origin, root)
        elif isinstance(value, dict) or (
            value is not None and set(typing.get_args(hints[key])) <= {section, type(None)}
        ):
            _check_keys(value, section, f"{name}.", origin, root)
    return typing.cast(dict[str, Any], values)


def _suggest(name: str, key: str, root: type) -> str:
    known = _all_keys(root)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.7)
    if not near:  # a right key in a wrong section
        near = [full for full in known if full.split(".")[-1] == key][:1]
    return f"; did you mean {near[0]!r}?" if near else "; --help lists all keys"


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, list):  # keys for each of a list, as of data.train
            merged[key] = [_merge(item, value) if isinstance(item, dict) else item for item in below]
        else:
            merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _read_yaml(file: str, root: type) -> dict[str, Any]:
    path = find_config(file)
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"{file}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also UnicodeDecodeError, numbers without end
        raise UserError(f"{file}: not valid YAML: {error}") from None
    content = _with_paths(content, root)
    _check_keys(content, root, "", file, root)
    stages = content.get("stages", [{}])
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{file}: stages: expected a list of at least one stage, found {stages!r}")
    for stage in stages:
        own = {k: v for k, v in stage.items() if k != "name"} if isinstance(stage, dict) else stage
        _check_keys(own, root, "", f"{file}: stages", root)
    located: dict[str, Any] = locate_paths(content, root, path.parent)
    if "stages" in located:
        located["stages"] = [locate_paths(stage, root, path.parent) for stage in stages]
    return located


def _typed(values: dict[str, Any], root: type[Config]) -> Config:
    import argparse

    import jsonargparse

    _check_presence(values, root, "")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(root)
    try:
        typed = parser.instantiate(parser.parse_object(values))
    except argparse.ArgumentError as error:
        raise UserError(_explain(str(error))) from None
    hints = _fields(root)
    # jsonargparse reads a text once more as YAML where null is allowed too, and finds a comment in "# Heading".
    texts = {name: v for name, v in values.items() if isinstance(v, str) and str in typing.get_args(hints[name])}
    config = root(**({name: typed[name] for name in hints} | texts))
    if isinstance(config, RunConfig):
        _check_values(config)
    return config


def _check_presence(values: Mapping[str, Any], cls: type, prefix: str) -> None:
    """Refuses null where a value belongs, what is no section where one does, and sources without a path."""
    hints = _fields(cls)
    for key, value in values.items():
        hint, name = hints[key], f"{prefix}{key}"
        parts = _choices(hint)
        section, element = _section(hint), _listed(hint)
        if value is None:
            if type(None) not in parts:
                wanted = " or ".join(dict.fromkeys(_wanted(part) for part in parts))
                raise UserError(f"{name}: expected {wanted}, found null; leave the key out for its default")
        elif section is not None and section in parts:
            if not isinstance(value, Mapping):
                raise UserError(f"{name}: expected keys and values, found {value!r}")
            _check_presence(value, section, f"{name}.")
        elif section is not None and isinstance(value, Mapping):
            key = f"{name}.{next(iter(value), '')}".rstrip(".")
            raise UserError(f"{key}: there is no list {name} that it could be set for; give {name} too")
        elif section is not None and isinstance(value, list):
            for item in value:
                if _has_path(element) and item.get("path") is None:
                    raise UserError(f"{name}: {item!r} has no path; write {{path: records.json, …}}")
                _check_presence(item, section, f"{name}.")


def _wanted(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return _KINDS.get(str(origin or hint), "keys and values, {key: value}")


_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
    "<class 'tuple'>": "a list",
    "<class 'list'>": "a list",
    "<class 'dict'>": "keys and values, {key: value}",
}


def _explain(message: str) -> str:
    """One line from jsonargparse's tree of messages: key, value found, what was expected."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    found = re.findall(r"(?:Got|Given) value: (.*)", message)
    wanted = []
    for kind in re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", message, flags=re.MULTILINE):
        kind = re.sub(r"^tuple with (\d+) elements$", r"a list of \1", kind)
        choices = re.findall(r"'([^']+)'", kind) if kind.startswith("typing.Literal") else []
        wanted.append(f"one of {', '.join(choices)}" if choices else _KINDS.get(kind, kind))
    if len(wanted) > 1 and key.count(".") > 0:
        wanted = [kind for kind in wanted if kind != "null"]
    if not key or not wanted:
        return " ".join(message.split())
    value = found[0] if found else "?"
    return f"{key}: expected {' or '.join(dict.fromkeys(wanted))}, found {value}"


def _check_values(config: RunConfig) -> None:
    checks: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("data.sequence_length", config.data.sequence_length, lambda v: v >= 2, "at least 2"),
        ("data.workers", config.data.workers, lambda v: v >= 0, "0 or more"),
        ("optimizer.learning_rate", config.optimizer.learning_rate, lambda v: 0 <= v <= 1000, "between 0 and 1000"),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, lambda v: v >= 0, "0 or more"),
        ("optimizer.weight_decay", config.optimizer.weight_decay, lambda v: v >= 0, "0 or more"),
        ("optimizer.beta1", config.optimizer.beta1, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.beta2", config.optimizer.beta2, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.eps", config.optimizer.eps, lambda v: v > 0, "more than 0"),
        ("optimizer.warmup_ratio", config.optimizer.warmup_ratio, lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("optimizer.end_ratio", config.optimizer.end_ratio, lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("optimizer.power", config.optimizer.power, lambda v: v >= 0, "0 or more"),
        ("optimizer.clip_norm", config.optimizer.clip_norm, lambda v: v >= 0, "0 (off) or more"),
        ("train.epochs", config.train.epochs, lambda v: v > 0, "more than 0"),
        ("train.steps", config.train.steps, lambda v: v is None or 1 <= v < 2**31, "between 1 and 2147483647"),
        ("train.global_batch_size", config.train.global_batch_size, lambda v: 1 <= v < 2**31, "at least 1, below 2^31"),
        ("train.micro_batch_size", config.train.micro_batch_size, lambda v: v >= 1, "at least 1"),
        ("train.seed", config.train.seed, lambda v: 0 <= v < 2**63, "between 0 and 2^63 - 1"),
        ("train.eval_every", config.train.eval_every, lambda v: v >= 0, "0 or more"),
        ("train.save_every", config.train.save_every, lambda v: v >= 0, "0 or more"),
        ("train.keep", config.train.keep, lambda v: v >= 1, "at least 1"),
        ("train.log_every", config.train.log_every, lambda v: v >= 1, "at least 1"),
        ("train.sample_tokens", config.train.sample_tokens, lambda v: v >= 1, "at least 1"),
        ("distributed.timeout", config.distributed.timeout, lambda v: v >= 1, "at least 1 (seconds)"),
        ("distributed.heartbeat", config.distributed.heartbeat, lambda v: v >= 5, "at least 5 (seconds)"),
        (
            "distributed.interrupted_status",
            config.distributed.interrupted_status,
            lambda v: v == 0 or 3 <= v <= 125,
            "0 or 3 to 125",
        ),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, lambda v: v >= 300, "at least 300"),
    ]
    if config.lora is not None:
        checks.append(("lora.rank", config.lora.rank, lambda v: v >= 1, "at least 1"))
        checks.append(("lora.dropout", config.lora.dropout, lambda v: 0 <= v < 1, "between 0 and 1"))
    for source in config.data.train:
        wanted = "more than 0, at most 1e6"
        checks.append((f"data.train: {source.path}: weight", source.weight, lambda v: 0 < v <= 1e6, wanted))
    for source in config.data.validation if isinstance(config.data.validation, tuple) else ():
        wanted = "1: every validation record counts once"
        checks.append((f"data.validation: {source.path}: weight", source.weight, lambda v: v == 1, wanted))
    for key, value, holds, wanted in checks:
        if not holds(value):
            raise UserError(f"{key}: {value} must be {wanted}")
    if config.optimizer.warmup_steps and config.optimizer.warmup_ratio:
        raise UserError("optimizer: give warmup_steps or warmup_ratio, not both")


def _help(
    prog: str, description: str, flags: dict[str, Flags], root: type, aliases: Mapping[str, str] | None = None
) -> str:
    """All keys by section, each with its default and meaning; wrapped for a terminal."""
    import textwrap

    import docstring_parser

    def kind(hint: Any) -> str:
        if typing.get_origin(hint) is typing.Literal:
            return "|".join(str(choice) for choice in typing.get_args(hint))
        if typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)[0]
            return f"[{'source' if dataclasses.is_dataclass(inner) else kind(inner)}, ...]"
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            return "|".join(kind(part) for part in typing.get_args(hint))
        if typing.get_origin(hint) is dict:
            return "{key: value}"
        return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))

    def shown(item: dataclasses.Field[Any]) -> str:
        if item.default is not dataclasses.MISSING:
            default = item.default
        elif item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            return "required"
        return default if isinstance(default, str) else json.dumps(default)

    lines = [f"usage: {prog} --config FILE [--key value ...]", "", *textwrap.wrap(description, 100), ""]
    entries = [("--config FILE", "YAML with the keys below; several are merged in order")]
    entries += [(f"--{n}{' VALUE' if f.takes else ''}", f.help) for n, f in flags.items()]

    def section(title: str, cls: type, prefix: str) -> None:
        lines.append(title)
        docs = {
            param.arg_name: param.description or ""
            for base in reversed(cls.__mro__)
            for param in docstring_parser.parse(base.__doc__ or "").params
        }
        hints = _fields(cls)
        for item in dataclasses.fields(cls):
            inner = _section(hints[item.name])
            if cls is root and inner is not None:
                continue
            head = f"  {prefix}{item.name}: {kind(hints[item.name])} = {shown(item)}"
            lines.append(head)
            lines.extend(textwrap.wrap(docs.get(item.name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
        lines.append("")

    for head, text in entries:
        lines.append(f"  {head}")
        lines.extend(textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    lines.append("")
    section("keys", root, "--")
    for name, hint in _fields(root).items():
        inner = _section(hint)
        if inner is not None:
            absent = " (absent unless given)" if type(None) in typing.get_args(hint) else ""
            section(f"{name}{absent}", inner, f"--{name}.")
    if root is RunConfig:
        section("a source, in data.train and data.validation (in YAML)", SourceConfig, "")
    if aliases:
        lines.append("other names")
        lines.extend(f"  --{alias}: --{name}" for alias, name in aliases.items())
    return "\n".join(lines).rstrip()
