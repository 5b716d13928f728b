"""`jaxlm/model.json`, the file that makes a directory a jaxlm model: its content, written and read here only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jaxlm.config import LoraConfig, to_dict
from jaxlm.errors import UserError
from jaxlm.jsonfields import build
from jaxlm.jsontext import read_object
from jaxlm.models.families import FAMILIES
from jaxlm.models.version1 import read_model
from jaxlm.nn.rounding import VERSIONS, Kind
from jaxlm.spec import DecoderSpec
from jaxlm.version import __version__
from jaxlm.weights.native.layout import MODEL_JSON, SMALL_FILES

FORMAT, VERSION = "jaxlm", 2  # 1 described the model in the flat fields of `models.version1`


@dataclass(frozen=True)
class ModelFile:
    """What model.json says.

    Args:
        config: the decoder; an adapter has its base's.
        dtype: that most bytes are stored in; None: not recorded.
        lora: an adapter's ranks, scales and targets; None: a full model.
        layers: the layers that carry an adapter; None: all.
        base: the base of an adapter, or what a trained model began with, as `jaxlm.locate.record_base` records it;
            empty: not recorded.
        rounding: an adapter's: which rounding of its base it was trained on (see `weights.quantized.rounding_of`).
            A model's: which one its kernels are stored in; `base` is where the original is. None: none.
    """

    config: DecoderSpec
    dtype: str | None
    lora: LoraConfig | None = None
    layers: tuple[int, ...] | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None

    @property
    def kind(self) -> Kind | None:
        """What the kernels are rounded to; None: nothing."""
        return None if self.rounding is None else cast(Kind, self.rounding.partition("-")[0])

    @property
    def base_path(self) -> str | None:
        """Where the base was when this was written, or its name."""
        return self.base.get("base")

    def to_bytes(self) -> bytes:
        """The file's content."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "written_by": f"jaxlm {__version__}"}
        content["model"] = self.config.to_dict()
        if self.lora is None:
            content |= {"lora": None, "base": None, **self.base}
        else:
            layers = None if self.layers is None else list(self.layers)
            content |= {"lora": to_dict(self.lora), "layers": layers, "base": None, **self.base}
        if self.rounding is not None:
            content["rounding"] = self.rounding
        return json_bytes(content | {"dtype": self.dtype})


def json_bytes(content: Any) -> bytes:
    """JSON as jaxlm writes it for people to read."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class _Fields:
    """The fields of the file and their types; `model` and `lora` are read by themselves."""

    format: str
    version: int
    model: dict[str, Any]
    written_by: str | None = None
    lora: dict[str, Any] | None = None
    base: str | None = None
    base_from_here: str | None = None
    layers: Any = None
    dtype: str | None = None
    rounding: str | None = None


def read_model_json(directory: Path) -> ModelFile:
    """`jaxlm/model.json` of a directory.

    Raises:
        UserError: another format, a newer version, an unknown field, or a value that does not fit.
    """
    where = directory / SMALL_FILES / MODEL_JSON
    content = read_object(where)
    version = content.get("version")
    if content.get("format") != FORMAT or version not in (1, VERSION):
        raise UserError(
            f"{where}: format {content.get('format')!r} version {version!r}, {_writer(content)}; this is jaxlm "
            f"{__version__}, which reads format {FORMAT!r} version 1 and {VERSION}"
        )
    try:
        fields = build(_Fields, content, f"{where}:")
        config = (read_model if version == 1 else DecoderSpec.from_dict)(fields.model, f"{where}: model")
        if config.family not in FAMILIES:
            raise UserError(f"{where}: model.family is {config.family!r}; known: {', '.join(FAMILIES)}")
    except UserError as error:
        raise UserError(f"{error}; {_writer(content)}, this is jaxlm {__version__}") from None
    recorded = {"base": fields.base, "base_from_here": fields.base_from_here}
    base = {key: value for key, value in recorded.items() if value is not None}
    if fields.lora is None:
        return ModelFile(config, fields.dtype, base=base, rounding=_rounding(fields.rounding, where))
    lora, layers = lora_from_dict(fields.lora, where), _layers(fields.layers, config, where)
    return ModelFile(config, fields.dtype, lora, layers, base, _rounding(fields.rounding, where))


def _rounding(value: str | None, where: Path) -> str | None:
    kinds = "|".join(f"{kind}-{version}" for kind, version in VERSIONS.items())
    if value is not None and not re.fullmatch(rf"({kinds}) [0-9a-f]{{64}}", value):
        raise UserError(f"{where}: rounding is {value!r}; this version knows {kinds.replace('|', ', ')}, and a hash")
    return value


def _writer(content: dict[str, Any]) -> str:
    return f"written by {content['written_by']}" if "written_by" in content else "it does not say what wrote it"


def lora_from_dict(values: Any, where: Path) -> LoraConfig:
    """A LoraConfig from the plain values in model.json."""
    lora = build(LoraConfig, values, f"{where}: lora")
    for name, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: lora.{name}: {pattern!r} is not a regular expression ({error})") from None
    return lora


def _layers(values: Any, config: DecoderSpec, where: Path) -> tuple[int, ...] | None:
    if values is None:
        return None
    numbers = values if isinstance(values, list) else [values]
    if not all(type(layer) is int and 0 <= layer < config.num_layers for layer in numbers) or sorted(
        set(numbers)
    ) != list(values if isinstance(values, list) else []):
        raise UserError(
            f"{where}: layers is {values!r}; expected null (all), or a list of some of the layers 0 to "
            f"{config.num_layers - 1}, in order"
        )
    return tuple(numbers)
