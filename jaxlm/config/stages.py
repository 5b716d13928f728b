"""A configuration with stages as several runs, each starting where the one before it ended."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from jaxlm.config.files import merge
from jaxlm.config.reading import build
from jaxlm.config.run import RunConfig
from jaxlm.errors import UserError


def split_stages(
    common: dict[str, Any], stages: list[dict[str, Any]], overrides: dict[str, Any], only: str | None
) -> list[RunConfig]:
    """One configuration per stage.

    Args:
        common: keys of all stages.
        stages: their names and own keys, in order.
        overrides: keys of the command line, which win over both.
        only: the name of the one stage that is wanted; None: all.

    Raises:
        UserError: for names that are missing, equal or unknown, and for values as `build`.
    """
    names = [str(stage.get("name", "")) for stage in stages]
    if "" in names or len(set(names)) != len(names) or any("/" in name for name in names):
        raise UserError(f"stages: each needs a name of its own, without '/'; found {names}")
    if only is not None and only not in names:
        near = difflib.get_close_matches(only, names, 1)
        raise UserError(f"--stage: {only!r} is none of {', '.join(names)}" + (f"; {near[0]!r}?" if near else ""))
    configs: list[RunConfig] = []
    previous_as_written: RunConfig | None = None
    for stage, name in zip(stages, names, strict=True):
        own = {key: value for key, value in stage.items() if key != "name"}
        config = build(merge(merge(common, own), overrides), RunConfig)
        names_own_model = previous_as_written is not None and config.model.path not in (
            None,
            previous_as_written.model.path,
        )
        configs.append(_after(config, name, None if names_own_model or not configs else configs[-1]))
        previous_as_written = config
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
