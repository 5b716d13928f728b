"""Checks of a run that need its configuration and a look at the file system, and read no data and no model."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from jaxlm.config import RunConfig, SourceConfig
from jaxlm.data.records import check_source, is_token_source
from jaxlm.data.templates import template_names
from jaxlm.errors import UserError
from jaxlm.hub import is_address
from jaxlm.locate import at_home, missing
from jaxlm.models.adapters import check_names
from jaxlm.models.families import load_shape

# key -> the module that it needs, and the extra that installs it.
OPTIONAL = {"tensorboard": ("tensorboardX", "jaxlm[tensorboard]"), "wandb": ("wandb", "jaxlm[wandb]")}
VALIDATION = (
    "it must be a number of records (e.g. 2000), a share of them between 0 and 1 (e.g. 0.1), or a list of sources"
)


def check_config(config: RunConfig) -> None:
    """Checks the settings by themselves.

    Raises:
        UserError: the first thing that is wrong.
    """
    if (config.model.path is None) == (config.model.shape is None):
        both = "; model.path and model.shape are both given" if config.model.path is not None else ""
        raise UserError(f"model: give either path (a model to start from) or shape (a fresh model){both}")
    if config.lora is not None and config.model.path is None:
        raise UserError("lora: an adapter needs a trained base: set model.path")
    check_quantize(config)
    check_offload(config)
    if not config.data.train:
        raise UserError("data.train: no source; give at least one, e.g. [{path: records.json, template: alpaca}]")
    share = config.data.validation
    if isinstance(share, (int, float)) and not (share >= 0 and (isinstance(share, int) or share < 1)):
        raise UserError(f"data.validation is {share}; {VALIDATION}")
    if config.lora is not None:
        check_names(config.lora)
    if config.train.local_checkpoints is not None and config.train.local_every < 1:
        raise UserError(f"train.local_every: {config.train.local_every}; give a positive number of steps")


def check_quantize(config: RunConfig) -> None:
    """Checks that what is quantised is not trained; an adapter never trains a linear layer of its base.

    Raises:
        UserError: it is.
    """
    kind = config.model.quantize
    if kind is None:
        return
    if config.lora is None:
        raise UserError(
            f"model.quantize: {kind} keeps weights that nothing trains, and without lora all weights are trained; add "
            "lora, or leave quantize out"
        )


def check_offload(config: RunConfig) -> None:
    """Checks that what lies in the hosts' memory is frozen, and is fetched by nothing but a step.

    Raises:
        UserError: it is trained, kept on the devices for the backward pass, or used to draw answers.
    """
    if config.model.offload is None:
        return
    if config.lora is None:
        raise UserError(
            "model.offload: frozen keeps weights that nothing trains in the hosts' memory, and without lora all are "
            "trained; add lora, or leave offload out"
        )
    if config.model.remat == "none":
        raise UserError(
            "model.remat: none keeps the weights of all layers for the backward pass, so that model.offload would save "
            "no memory; set it to full, or leave offload out"
        )
    for key, draws in (
        ("objective", config.objective == "grpo"),
        ("train.sample_prompts", bool(config.train.sample_prompts)),
        ("train.tasks", bool(config.train.tasks)),
    ):
        if draws:
            raise UserError(
                f"{key}: with model.offload: frozen no answers are drawn, as each token would fetch all weights anew; "
                "leave one of them out"
            )


def check_stage(config: RunConfig, stage: str) -> None:
    """Checks that the stage before one that runs alone, from which it starts, has been run.

    Raises:
        UserError: it has not.
    """
    for name in (config.model.path, None if config.lora is None else config.lora.init_from):
        if name is None or Path(name).exists() or Path(name).parent != Path(config.output_dir).parent:
            continue
        raise UserError(
            f"--stage {stage}: it starts from the stage before, and {name} is not there; run that one first, with "
            f"--stage {Path(name).name}, or all of them without --stage"
        )


def check_files(configs: Sequence[RunConfig], first_host: bool) -> None:
    """Checks that the files of all stages exist, also of later ones, and on process 0 the packages that reports need.

    Raises:
        UserError: the first thing that is missing.
    """
    made: set[Path] = set()  # output directories of the stages before
    for config in configs:
        for key, (module, extra) in OPTIONAL.items() if first_host else ():
            if getattr(config.train, key) and importlib.util.find_spec(module) is None:
                raise UserError(f"train.{key}: needs {module}; pip install '{extra}'")
        _check_paths(config, made)
        made.add(at_home(config.output_dir).absolute())


def _check_paths(config: RunConfig, made: set[Path]) -> None:
    if config.model.shape is not None:
        load_shape(config.model.shape)
    init_from = None if config.lora is None else config.lora.init_from
    paths = {"model.path": config.model.path, "lora.init_from": init_from, "tokenizer.path": config.tokenizer.path}
    for key, name in paths.items():
        if name is None:
            continue
        path = at_home(name)
        if is_address(name):
            continue  # it has been downloaded by now
        if not path.exists() and path.absolute() not in made:
            raise UserError(f"{key}: {missing(name)}")
    for name in config.tokenizer.train_on:
        if not is_address(name) and not at_home(name).exists():
            raise UserError(f"tokenizer.train_on: {name}: no such file or folder")
    validation = () if isinstance(config.data.validation, (int, float)) else config.data.validation
    for source in validation:
        if re.fullmatch(r"[\w%,+-]*", source.path) and not Path(source.path).exists():
            raise UserError(f"data.validation: {source.path!r} is not a file or folder; {VALIDATION}")
    for source in (*config.data.train, *validation):
        check_source(source)
        _check_template(source)
        if config.data.records != "answers" and is_token_source(source):
            raise UserError(
                f"data: {source.path} holds tokens, and objective {config.objective} takes records of preferences; "
                "give the records (data.cache keeps their tokens)"
            )


def _check_template(source: SourceConfig) -> None:
    name = source.template
    known = at_home(name).is_file() if name.endswith(".json") else name in ("auto", *template_names())
    if not known:
        raise UserError(
            f"data: template {name!r} is unknown; choose {', '.join(template_names())}, or give a file NAME.json"
        )
