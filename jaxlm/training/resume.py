"""Whether a run may go on from a checkpoint: the settings that decide its numbers must not have changed.

Settings are compared key by key through today's dataclasses, with defaults where a checkpoint was written before a key
existed. Where a checkpoint has hashes of the inputs themselves (tokens, base weights), these decide, and not the name
of a file with the same content. Hashes have a version; those of older versions are computed as they were then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jaxlm.config import RunConfig, to_dict
from jaxlm.data.loader import Data
from jaxlm.data.order import Order
from jaxlm.errors import UserError
from jaxlm.hub import is_address
from jaxlm.locate import at_home
from jaxlm.models.version1 import read_model, recorded
from jaxlm.spec import DecoderSpec, differences
from jaxlm.weights.fingerprint import base_fingerprint
from jaxlm.weights.leaves import LeafReader
from jaxlm.weights.native.layout import FINGERPRINTS, MODEL_JSON, RUN_YAML

VERSION = 2  # of fingerprints.json; 1 had no `version`

# Keys that may differ: they decide where and how long a run computes and what it reports, not what it computes.
FREE = (
    "mesh",
    "model.attention",
    "model.offload",
    "model.remat",
    "lora.init_from",
    "data.workers",
    "data.cache",
    "data.allow_no_end",
    "train.epochs",
    "train.steps",
    "train.micro_batch_size",
    "train.eval_every",
    "train.tasks",
    "train.best",
    "train.save_every",
    "train.local_checkpoints",
    "train.local_every",
    "train.keep",
    "train.log_every",
    "train.on_nonfinite",
    "train.resume",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.tensorboard",
    "train.wandb",
    "train.profile",
    "train.compilation_cache",
    "train.compiler_options",
    "distributed",
    "output_dir",
    "stages",
)
# Keys whose whole effect is on the tokens and the targets among them, which are compared themselves.
IN_TOKENS = (
    "data.train",
    "data.validation",
    "data.train_on_inputs",
    "data.add_bos",
    "data.add_eos",
    "data.drop_unknown",
    "data.too_long",
    "data.date",
)
PATHS = ("path", "shape", "train_on", "tokens_file")  # keys, by their last word


def _base_fingerprint_1(stored_shape: Mapping[str, Any], source: LeafReader) -> str:
    """As version 1: the whole shape, as it was recorded then, and the norms."""
    digest = hashlib.sha256(json.dumps(stored_shape, sort_keys=True).encode())
    for leaf in ("norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"):
        digest.update(source.read(leaf, ()).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Inputs:
    """What a run computes from.

    Args:
        config: its settings.
        data: its rows.
        model: its decoder.
        base: reader of the frozen base; None for a run that trains all parameters.
        rounding: which rounding of which weights the base is kept in (see `weights.quantized.rounding_of`); None: none.
    """

    config: RunConfig
    data: Data
    model: DecoderSpec
    base: LeafReader | None
    rounding: str | None = None

    @cached_property
    def base_fingerprint(self) -> str | None:
        return None if self.base is None else base_fingerprint(self.model, self.base)

    def to_json(self) -> bytes:
        """fingerprints.json of a checkpoint of this run."""
        prints: dict[str, Any] = {"version": VERSION, "data": self.data.fingerprint}
        if self.base is not None:
            prints["base"] = self.base_fingerprint
        if self.rounding is not None:
            prints["rounding"] = self.rounding
        # The keys that a version without them must not ignore.
        prints["given"] = [key for key, _, default in _walk(to_dict(self.config), RunConfig, "") if not default]
        return json.dumps(prints).encode()


def check_settings(files: Mapping[str, bytes], config: RunConfig, checkpoint: Path) -> None:
    """Compares the settings of a run with those of the run that wrote a checkpoint; needs neither data nor model.

    Args:
        files: small files of the checkpoint, at least run.yaml and fingerprints.json.
        config: the run that wants to go on.
        checkpoint: its path, for the message.

    Raises:
        UserError: naming each changed key with both values.
    """
    # Under mean_of_means the micro batch is part of the loss.
    fixed = {"train.micro_batch_size"} if config.train.loss_normalisation == "mean_of_means" else set()
    later = [*IN_TOKENS, *(["model.path", "model.quantize"] if config.lora is not None else [])]
    free = [key for key in (*FREE, *later) if key not in fixed]
    changed = [
        text
        for key, text in _changes(files, config)
        if _is_below(key, ["data.train.weights"]) or not any(_is_below(key, [name]) for name in free)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} was written with other settings ({'; '.join(changed)}); "
            f"set them back, or choose another output_dir"
        )


def check_inputs(files: Mapping[str, bytes], inputs: Inputs, checkpoint: Path) -> None:
    """Compares the data, and the base of an adapter, with those of the run that wrote a checkpoint.

    Args:
        files: as in `check_settings`; model.json for a checkpoint of version 1.
        inputs: of the run that wants to go on.
        checkpoint: its path, for the message.

    Raises:
        UserError: they differ; it names the settings that may be the reason.
    """
    prints = json.loads(files[FINGERPRINTS])
    stored = yaml.safe_load(files[RUN_YAML])
    version = prints.get("version", 1)
    if version > VERSION:
        raise UserError(f"{checkpoint}: was written by a newer jaxlm; update this one, or choose another output_dir")
    if version == 1:
        same_data = prints["data"] == inputs.data.fingerprint_1(stored["data"], stored["train"]["seed"])
    else:
        same_data = prints["data"] == inputs.data.fingerprint
    changes = list(_changes(files, inputs.config))
    if not same_data:
        raise _other("the training data are", [text for key, text in changes if _is_below(key, IN_TOKENS)], checkpoint)
    if inputs.base is None:
        return
    reasons = [text for key, text in changes if key in ("model.path", "model.quantize")]
    rounding = prints.get("rounding")
    if rounding is not None and rounding == inputs.rounding:
        return  # of the same weights, wherever and in whichever form they lie
    if rounding != inputs.rounding:
        before, now = ("not quantised" if each is None else each.split()[0] for each in (rounding, inputs.rounding))
        reasons.append(f"its rounding: was {before}, is {now}{', of other weights' if before == now else ''}")
    if version == 1:
        shape = json.loads(files[MODEL_JSON])["model"] if MODEL_JSON in files else recorded(inputs.model)
        before = read_model(shape, "model.json: model")
        reasons += [f"its {name}: was {old!r}, is {new!r}" for name, old, new in differences(before, inputs.model)]
        same_base = before == inputs.model and prints.get("base") == _base_fingerprint_1(shape, inputs.base)
    else:
        same_base = prints.get("base") == inputs.base_fingerprint
    if not same_base or rounding != inputs.rounding:
        raise _other("the base model at model.path is", reasons, checkpoint)


def length_before(files: Mapping[str, bytes], order: Order) -> int:
    """Steps of the run that wrote a checkpoint, as it was configured then.

    Args:
        order: rows of the run that goes on, as many a step.
    """
    config = yaml.safe_load(files[RUN_YAML])["train"]
    if config.get("steps") is not None:
        return int(config["steps"])
    return order.steps_of(float(config.get("epochs", 1.0)), json.loads(files.get("data.json", b"{}")))


def _other(what: str, reasons: list[str], checkpoint: Path) -> UserError:
    why = "; ".join(reasons) if reasons else "same settings, other content"
    return UserError(
        f"{checkpoint}: {what} not what this run began with ({why}); bring the files back, or choose another output_dir"
    )


def _is_below(key: str, names: typing.Iterable[str]) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def _changes(files: Mapping[str, bytes], config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, what it was and is) of every setting that differs."""
    before = _settings(yaml.safe_load(files[RUN_YAML]), RunConfig)
    now = _settings(to_dict(config), RunConfig)
    given = json.loads(files[FINGERPRINTS]).get("given")
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key not in now and "[" not in key and now.keys().isdisjoint(_parents(key)):
            # This version has no such key: it computes what a version before the key did where it was not set.
            if key in given if given is not None else old not in (None, False, 0, "", [], {}):
                yield key, f"{key}: was {old!r}, which this version does not know"
        elif old != new and not (key.rpartition(".")[2] in PATHS and _same_place(old, new)):
            yield key, f"{key}: was {old!r}, is {new!r}"


def _parents(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _same_place(old: Any, new: Any) -> bool:
    """Whether two ways to write a path, or several, mean the same in this working directory."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same_place, old, new))
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    if is_address(old) or is_address(new):
        return old == new
    first, second = (os.path.abspath(at_home(text)) for text in (old, new))  # noqa: PTH100 (no links)
    return first == second


def _settings(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Plain values by key, those that are missing filled with the dataclass's defaults; lists of sections by number."""
    return {key: value for key, value, _ in _walk(values, cls, "")}


def _walk(values: Mapping[str, Any], cls: type, prefix: str) -> Iterator[tuple[str, Any, bool]]:
    """(key, value, whether that is its default); keys that the dataclass does not have come last."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, default = f"{prefix}{field.name}", _default(field)
        value = values.get(field.name, default)
        section = _section(hints[field.name])
        if section is not None and isinstance(value, Mapping):
            yield from _walk(value, section, f"{name}.")
        elif section is not None and isinstance(value, (list, tuple)):
            for number, entry in enumerate(value):
                yield from _walk(entry, section, f"{name}[{number}].")
            if "weight" in _names(section):
                # Weights decide how often a record is used, and not its tokens.
                weights = [entry.get("weight", 1.0) for entry in value]
                yield f"{name}.weights", weights, set(weights) <= {1.0}
        else:
            yield name, _plain(value), _plain(value) == _plain(default)
    for key in values.keys() - _names(cls):
        yield f"{prefix}{key}", values[key], False


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = None if field.default is dataclasses.MISSING else field.default
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _section(hint: Any) -> type | None:
    """The dataclass in `X`, `X | None`, `tuple[X, ...]` or `int | tuple[X, ...]`."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    sections = (_section(inner) for inner in typing.get_args(hint))
    return next((section for section in sections if section is not None), None)
