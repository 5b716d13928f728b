"""Configuration files: YAML, read strictly into dataclasses and written from them."""

from __future__ import annotations

from typing import Any, TypeVar

import yaml

from jaxlm.config.plain import to_dict
from jaxlm.config.reading import build, check_keys, unfold_paths
from jaxlm.config.run import RunConfig
from jaxlm.errors import UserError
from jaxlm.locate import find_config, locate_paths
from jaxlm.yamltext import read_yaml

Config = TypeVar("Config")


def read_section(file: str, root: type[Config]) -> Config:
    """A YAML (or JSON) file that holds one section of a configuration, checked like the whole.

    Raises:
        UserError: for an unknown key, a wrong type, a missing or broken file.
    """
    return build(read_values(file, root), root)


def load_run_yaml(text: str, origin: str) -> RunConfig:
    """Reads what `dump_yaml` wrote; `origin` names it in errors."""
    return build(check_keys(yaml.safe_load(text), RunConfig, origin), RunConfig)


def dump_yaml(config: Any) -> str:
    """The config as YAML that `--config` reads back."""
    values = to_dict(config)
    if values.get("stages", 0) is None:
        del values["stages"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def read_values(file: str, root: type) -> dict[str, Any]:
    """The plain values of a YAML file: keys checked, paths found, types not checked yet.

    Args:
        file: a path, or the name of a configuration that comes with jaxlm.
        root: the dataclass whose keys it has.

    Raises:
        UserError: for an unknown key, a missing or broken file.
    """
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
    content = check_keys(unfold_paths(content, root), root, file)
    stages = content.get("stages", [{}])
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{file}: stages: expected a list of at least one stage, found {stages!r}")
    for stage in stages:
        own_keys = {key: value for key, value in stage.items() if key != "name"} if isinstance(stage, dict) else stage
        check_keys(own_keys, root, f"{file}: stages")
    located: dict[str, Any] = locate_paths(content, root, path.parent)
    if "stages" in located:
        located["stages"] = [locate_paths(stage, root, path.parent) for stage in stages]
    return located


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values of two origins, those of `above` winning; keys for each of a list, as of data.train, too."""
    merged = dict(below)
    for key, value in above.items():
        lower = merged.get(key)
        if isinstance(value, dict) and isinstance(lower, list):
            merged[key] = [merge(element, value) if isinstance(element, dict) else element for element in lower]
        else:
            merged[key] = merge(lower, value) if isinstance(value, dict) and isinstance(lower, dict) else value
    return merged
