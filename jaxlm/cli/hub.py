"""Names of the Hugging Face hub in a configuration: which commit each means, and their files on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jaxlm.errors import UserError
from jaxlm.hub import HubName, Want, is_address, pinned, read_address
from jaxlm.locate import at_home, hub_name, not_found, on_disk, pin_names

if TYPE_CHECKING:
    from jaxlm.processes.distributed import Hosts

Config = TypeVar("Config")

# Keys, by their last words, whose path may be a plain owner/name; elsewhere that is a path of this machine.
_MODELS = ("model.path", "model.adapter", "init_from", "reward_model")
_TOKENIZERS = ("tokenizer.path", "tokenizer", "metric_tokenizer")
_PINNED = re.compile(r"hf://[^\s'\"]+@[0-9a-f]{40}(?:/[^\s'\"]*)?")


def with_commits(
    config: Config,
    say: Callable[[str], None],
    hosts: Hosts | None = None,
    output_dir: str | None = None,
    made: Collection[Path] = (),
) -> Config:
    """A configuration in which every name of the hub has the commit that it means today, the same on all processes.

    Process 0 asks the hub. A run that goes on keeps the commits that it began with; a name with a revision of its own
    is looked up again, so that another one is noticed.

    Args:
        config: the configuration.
        say: gets a line for each name.
        hosts: the processes; None: this one alone.
        output_dir: of a run, or of what is prepared, whose files say what it began with.
        made: directories that will be there when they are read, as those of earlier stages.

    Raises:
        UserError: on every process; see `jaxlm.hub.pinned`.
    """
    meant: dict[str, str] = {}
    problem = None
    if hosts is None or hosts.process == 0:
        try:
            meant = {key: str(name) for key, name in _commits(config, output_dir, made).items()}
        except UserError as error:
            problem = str(error)
    if hosts is not None:
        hosts.check("names of the hub", problem)
        meant = json.loads(hosts.exchange("names of the hub", json.dumps(meant))[0])
    elif problem is not None:
        raise UserError(problem)
    for key, address in meant.items():
        say(f"hub        {key}: {address}")
    return pin_names(config, lambda path, key: meant.get(key, path))


def download_all(configs: Iterable[object], hosts: Hosts | None = None) -> None:
    """Fetches what configurations with commits name; process 0 first, then the others, which all wait.

    Raises:
        UserError: on every process; see `jaxlm.hub.download`.
    """
    names: dict[str, tuple[str, Want]] = {}

    def note(path: str, key: str) -> str:
        if is_address(path):
            names[path] = (key, _want(key, path))
        return path

    for config in configs:
        pin_names(config, note)
    if not names:
        return

    def fetch() -> None:
        for path, (key, want) in names.items():
            on_disk(path, want, key)

    if hosts is None:
        fetch()
    else:
        hosts.first_then_all("downloads", fetch)


def _commits(config: object, output_dir: str | None, made: Collection[Path]) -> dict[str, HubName]:
    """The names of the hub by their keys, each with its commit."""
    named: dict[str, HubName] = {}

    plain: dict[str, str] = {}

    def note(path: str, key: str) -> str:
        takes_plain = key.endswith(_MODELS) or key in _TOKENIZERS
        if is_address(path) or (takes_plain and at_home(path).absolute() not in made):
            name = hub_name(path, key)
            if name is not None:
                named[key] = name
                if not is_address(path):
                    plain[key] = path
        return path

    pin_names(config, note)
    began = _began_with(output_dir) if named and output_dir is not None else {}
    commits = {}
    for key, name in named.items():
        if name.revision is None and name in began:
            commits[key] = began[name]
            continue
        try:
            commits[key] = pinned(name, key)
        except UserError as error:
            # Without hf:// it may be a path with a mistake in it.
            raise UserError(str(error) if key not in plain else f"{key}: {not_found(plain[key], error)}") from None
    return commits


def _began_with(output_dir: str) -> Mapping[HubName, HubName]:
    """The names that a run's files record with their commits: name without revision -> the same with the commit.

    A repository that the run has in several commits is left out.
    """
    from jaxlm.training.run_tokenizer import newest_small_files
    from jaxlm.weights.native.layout import RUN_YAML

    folder = at_home(output_dir)
    newest = newest_small_files(folder)
    plans = sorted(folder.glob("*/plan.json"))  # of the steps of prepare
    file = newest / RUN_YAML if newest is not None else plans[0] if plans else folder / "config.yaml"
    if not file.is_file():
        return {}
    commits: dict[HubName, set[HubName]] = {}
    for address in _PINNED.findall(file.read_text(encoding="utf-8")):
        name = read_address(address, str(file))
        bare = HubName(name.kind, name.repo, None, name.inside)
        commits.setdefault(bare, set()).add(name)
    return {bare: next(iter(names)) for bare, names in commits.items() if len(names) == 1}


def _want(key: str, path: str) -> Want:
    if key in _TOKENIZERS:
        return "small"
    return "model" if key.endswith(_MODELS) else "data"
