"""The model families: one file each, registered here.

No JAX is imported, so that commands which only look at a model start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.families import (
    baichuan,
    bloom,
    chatglm,
    chatglm_6b,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    granite,
    internlm2,
    internlm3,
    llama,
    ministral,
    mistral,
    mt5,
    olmo2,
    olmo3,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    t5,
)
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import check_values, write_decoder
from jaxlm.spec import DecoderSpec, differences

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "ministral": ministral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "opt": opt.FAMILY,
    "bloom": bloom.FAMILY,
    "falcon": falcon.FAMILY,
    "phi3": phi3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "glm": glm.FAMILY,
    "glm4": glm4.FAMILY,
    "chatglm": chatglm.FAMILY,
    "chatglm_6b": chatglm_6b.FAMILY,
    "internlm2": internlm2.FAMILY,
    "internlm3": internlm3.FAMILY,
    "baichuan": baichuan.FAMILY,
    "t5": t5.FAMILY,
    "mt5": mt5.FAMILY,
}

# Published shapes by name.
SHAPES: dict[str, DecoderSpec] = {name: spec for family in FAMILIES.values() for name, spec in family.shapes.items()}


def family_of(spec: DecoderSpec) -> Family:
    """The family that a decoder belongs to."""
    if spec.family not in FAMILIES:
        raise UserError(f"config: family is {spec.family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[spec.family]


def architectures() -> list[str]:
    """The architectures of `config.json` that are supported, other names of them last."""
    named = [family.architecture for family in FAMILIES.values()]
    aliases = [alias for family in FAMILIES.values() for alias in family.aliases if alias.endswith("ForCausalLM")]
    return list(dict.fromkeys([*named, *aliases, "MixtralForCausalLM"]))


def _named_family(config: dict[str, Any]) -> Family:
    """The family that a `config.json` names, by its architecture or, without one, its model_type."""
    listed = config.get("architectures") or [None]
    if not isinstance(listed, list) or not isinstance(listed[0], str | None):
        raise UserError(f"config.json: architectures is {listed!r}; expected a list of one name")
    name = listed[0]
    kind = str(config.get("model_type")).lower() if name is None else name
    for family in FAMILIES.values():
        names = family.model_type or family.name if name is None else family.architecture
        if (kind == names or kind in family.aliases) and family.is_config(config):
            return family
        if kind in family.refused:
            raise UserError(f"config.json: architecture {kind!r} is not supported: {family.refused[kind]}")
    raise UserError(
        f"config.json: architecture {name or config.get('model_type')!r} is not supported; "
        f"supported: {', '.join(architectures())}"
    )


def read_config(config: dict[str, Any]) -> DecoderSpec:
    """The decoder that a HF `config.json` (old or new spelling) describes.

    Raises:
        UserError: for an architecture or a key that is not supported, and for values that no model can have.
    """
    family = _named_family(config)
    usual = {**{theirs: ours for ours, theirs in family.keys.items() if theirs}, **family.old_keys}
    given: dict[str, Any] = {}
    for theirs, value in config.items():
        key = usual.get(theirs, theirs)
        # A null says as little as a missing key where these are sizes, or where another spelling says more.
        if value is None and (key in _SIZES_WITH_DEFAULTS or key in given):
            continue
        if given.get(key) is not None and given[key] != value:
            other = next(name for name in config if usual.get(name, name) == key)
            raise UserError(f"config.json: {other} is {given[key]!r} and {theirs} is {value!r}; they mean the same")
        given[key] = value
    config = {**family.defaults, **given}
    check_values(config, family)
    return family.read(config)


_SIZES_WITH_DEFAULTS = ("max_position_embeddings",)


def write_config(spec: DecoderSpec, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model, for old and new transformers.

    For a model of experts it is that of the dense form, unless the family's files hold experts.

    Args:
        dtype: what the weights are stored in, e.g. 'bfloat16'.

    Raises:
        UserError: when the architecture has no key for something that the model has.
    """
    family = family_of(spec)
    usual = write_decoder(spec, family.architecture, dtype) | family.write(spec)
    named = {family.keys.get(key, key): value for key, value in usual.items()}
    config = {key: value for key, value in named.items() if key}
    described = spec.with_experts(None) if family.experts is None else spec
    for name, value, other in differences(described, read_config(config)):
        raise UserError(
            f"config.json: {family.architecture} has no place for {name} {value!r}: whoever reads it would take "
            f"{other!r}"
        )
    return config


def usual_names(config: dict[str, Any]) -> dict[str, Any]:
    """A readable `config.json` with the architecture under its usual name: what is written of a model that had another.

    The code that came with it (`auto_map`) is not what is written.
    """
    family = _named_family(config)
    usual = {"architectures": [family.architecture], "model_type": family.model_type or family.name}
    if all(not config.get(key) or config[key] == value for key, value in usual.items()):
        return config
    return {key: value for key, value in config.items() if key != "auto_map"} | usual


def load_shape(name: str) -> DecoderSpec:
    """A published shape by name (`llama-2-7b`), or the HF-style `config.json` at a path."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        return read_config(read_object(path))
    raise UserError(
        f"model.shape: {name!r} is neither a known shape ({', '.join(SHAPES)}) nor a JSON file like HF's config.json"
    )
