"""What families share: readers and writers of config.json's keys, and the rows of LLaMA's name table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Row
from jaxlm.spec import DEFAULT_THETA, ROPE_TYPES, DecoderSpec, LayerSpec, NormSpec, RopeSpec, uniform_decoder

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys by which relatives of these architectures compute other numbers, with the values that change nothing.
UNREAD: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "clip_qkv": (),
    "alibi": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0,),
}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    # Bounded, because an integer of JSON may be too large to become a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def check_values(config: dict[str, Any], architecture: str) -> None:
    """Refuses, by name, keys that are missing, of another kind, or that ask for what is not computed."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; only 'silu' is")
    missing = [key for key in SIZES if config.get(key) is None]
    if missing:
        raise UserError(f"config.json: missing: {', '.join(missing)}")
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
    for key in SIZES + optional:
        value = config.get(key)
        if (value is not None or key in SIZES) and (type(value) is not int or not 0 < value < 1 << 31):
            raise UserError(f"config.json: {key} is {value!r}; expected a positive whole number")
    for key in ("rms_norm_eps", "initializer_range"):
        if key in config and not (is_number(config[key]) and config[key] > 0):
            raise UserError(f"config.json: {key} is {config[key]!r}; expected a positive number")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(index is not None and type(index) is not int for index in ids):
            raise UserError(f"config.json: {key} is {value!r}; expected a token id")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key) is not None and type(config[key]) is not bool:
            raise UserError(f"config.json: {key} is {config[key]!r}; expected true or false")
    for key, harmless in UNREAD.items():
        value = config.get(key)
        if value is not None and value not in harmless:
            only = " or ".join(json.dumps(choice) for choice in harmless) or "null"
            raise UserError(
                f"config.json: {key} is {value!r}, with which {architecture} is not supported: it changes what the "
                f"model computes; only {only} is read"
            )


def read_decoder(
    family: str,
    config: dict[str, Any],
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    window: int | None = None,
    qk_norm: bool = False,
) -> DecoderSpec:
    """A decoder of layers that are all alike, from the keys that LLaMA and its relatives share.

    Args:
        config: checked, with the family's defaults.
        qk_norm: whether q and k have a norm, with the eps of the others.
    """
    num_heads, eos, eps = config["num_attention_heads"], config.get("eos_token_id"), config.get("rms_norm_eps", 1e-6)
    return uniform_decoder(
        family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        max_position_embeddings=config["max_position_embeddings"],
        norm_eps=eps,
        rope=read_rope(config),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        window=window,
        qk_norm=NormSpec(eps) if qk_norm else None,
        initializer_range=config.get("initializer_range", 0.02),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id"),
    )


def write_decoder(spec: DecoderSpec, architecture: str, dtype: str) -> dict[str, Any]:
    """The keys that LLaMA and its relatives share, for old and new transformers."""
    layer, rope = spec.uniform_layer, write_rope(spec.attention.rotary)
    return {
        "architectures": [architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.feed_forward.size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_kv_heads,
        "head_dim": layer.attention.head_dim,
        "hidden_act": layer.feed_forward.activation,
        "max_position_embeddings": spec.max_position_embeddings,
        "initializer_range": spec.initializer_range,
        "rms_norm_eps": spec.norm.eps,
        "use_cache": True,
        "tie_word_embeddings": spec.tied_head,
        "rope_parameters": rope,
        # The two old keys, for transformers 4 and everything built on it.
        "rope_theta": layer.attention.rotary.rope_theta,
        "rope_scaling": None
        if layer.attention.rotary.rope_type == "default"
        else {key: value for key, value in rope.items() if key != "rope_theta"},
        "attention_dropout": 0.0,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_id) if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# ---- positions


def read_rope(config: dict[str, Any]) -> RopeSpec:
    """Reads both the new (`rope_parameters`) and the old (`rope_theta`, `rope_scaling`) form.

    Where both are there, a `rope_scaling` that says something replaces `rope_parameters` as a whole, as in
    transformers: that is how model cards have YaRN switched on.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) and not isinstance(config[key], dict):
            raise UserError(f"config.json: {key} is {config[key]!r}; expected a JSON object")
    check_theta_is_kept(config, DEFAULT_THETA)
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_THETA)
    legacy_type = given.pop("type", None)
    given.setdefault("rope_type", legacy_type or "default")
    if given["rope_type"] not in list(ROPE_TYPES):  # a list: the value may be anything, also what has no hash
        raise UserError(
            f"config.json: rope_type {given['rope_type']!r} is not supported; known: {', '.join(ROPE_TYPES)}"
        )
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError("config.json: partial_rotary_factor other than 1.0 is not supported")
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(RopeSpec)})
    if unknown:
        raise UserError(f"config.json: unknown rope parameters {', '.join(unknown)}")
    for name, value in given.items():
        if name not in ("rope_type", "truncate") and value is not None and not is_number(value):
            raise UserError(f"config.json: rope parameter {name} is {value!r}; expected a number")
    if not given["rope_theta"]:
        raise UserError(f"config.json: rope_theta is {given['rope_theta']!r}; expected a positive number")
    given["rope_theta"] = float(given["rope_theta"])
    if given["rope_type"] == "llama3" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = config.get("max_position_embeddings")
    try:
        return RopeSpec(**given)
    except UserError as error:
        raise UserError(f"config.json: {str(error).removeprefix('rope: ')}") from None


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    return {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}


def check_theta_is_kept(config: dict[str, Any], default: float) -> None:
    """Refuses a `rope_scaling` that replaces the `rope_parameters` which alone say a `rope_theta` other than `default`.

    Args:
        default: what transformers' configuration class of the architecture takes without one.
    """
    added, new = config.get("rope_scaling"), config.get("rope_parameters")
    if not (isinstance(added, dict) and added and isinstance(new, dict)) or config.get("rope_theta"):
        return
    theta = new.get("rope_theta", default)
    if added.get("rope_theta") is None and theta != default:
        raise UserError(
            f"config.json: rope_scaling replaces rope_parameters, which alone has the rope_theta {theta!r}; "
            f"transformers would go on with {default:g}. Say which is meant: put "
            f'"rope_theta": {json.dumps(theta)} into rope_scaling'
        )


def read_switched_window(config: dict[str, Any]) -> int | None:
    """Qwen's sliding window: every config names one, another key switches it on, for the layers from some layer on."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", False) or window is None:
        return None
    layers, first, types = config["num_hidden_layers"], config.get("max_window_layers"), config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise UserError(f"config.json: layer_types is {types!r}; expected a list of names, one of each layer")
        slide = {kind == "sliding_attention" for kind in types}
        what = "layer_types"
    else:
        if type(first) is not int:
            raise UserError(f"config.json: max_window_layers is {first!r}; expected a whole number")
        slide = {layer >= first for layer in range(layers)}
        what = f"max_window_layers {first} of {layers}"
    if len(slide) > 1:
        raise UserError(
            f"config.json: a sliding window on a part of the layers ({what}) is not supported; where rows are shorter "
            f"than the window, {window}, it changes nothing: set use_sliding_window to false"
        )
    return window if slide == {True} else None


def write_switched_window(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read_switched_window` reads."""
    window = spec.attention.window
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window is not None else spec.num_layers,
    }


# ---- names


def _linear(path: str, dims: str, hf_dims: str, bias: Callable[[LayerSpec], bool]) -> list[Row]:
    """Kernel and bias of a linear layer."""
    hf, outputs = f"model.layers.{{}}.{path.replace('/', '.')}", re.findall(r"\([^)]*\)|\S+", hf_dims)[0]
    kernel = Row(f"{path}/kernel", f"{hf}.weight", dims, hf_dims)
    return [kernel, Row(f"{path}/bias", f"{hf}.bias", outputs.strip("()"), outputs, bias)]


def _norm(name: str) -> Row:
    return Row(f"{name}/scale", f"model.layers.{{}}.{name}.weight", "D", "D")


def _head_norm(name: str) -> Row:
    names = f"self_attn/{name}/scale", f"model.layers.{{}}.self_attn.{name}.weight"
    return Row(*names, "h", "h", lambda layer: layer.attention.qk_norm is not None)


def _qkv_bias(layer: LayerSpec) -> bool:
    return layer.attention.qkv_bias


def _o_bias(layer: LayerSpec) -> bool:
    return layer.attention.o_bias


def _mlp_bias(layer: LayerSpec) -> bool:
    return layer.feed_forward.bias


def _learned_router(layer: LayerSpec) -> bool:
    experts = layer.feed_forward.experts
    return experts is not None and experts.router == "learned"


ROWS: tuple[Row, ...] = (
    Row("embed_tokens/embedding", "model.embed_tokens.weight", "V D", "V D"),
    _norm("input_layernorm"),
    *_linear("self_attn/q_proj", "D H h", "(H h) D", _qkv_bias),
    *_linear("self_attn/k_proj", "D K h", "(K h) D", _qkv_bias),
    *_linear("self_attn/v_proj", "D K h", "(K h) D", _qkv_bias),
    *_linear("self_attn/o_proj", "H h D", "D (H h)", _o_bias),
    _head_norm("q_norm"),
    _head_norm("k_norm"),
    _norm("post_attention_layernorm"),
    *_linear("mlp/gate_proj", "D F", "F D", _mlp_bias),
    *_linear("mlp/up_proj", "D F", "F D", _mlp_bias),
    *_linear("mlp/down_proj", "F D", "D F", _mlp_bias),
    # The linear router of a layer divided into experts; the name outside jaxlm is our own.
    Row("mlp/router", "model.layers.{}.mlp.router.weight", "D E", "E D", _learned_router),
    Row("norm/scale", "model.norm.weight", "D", "D"),
    Row("lm_head/kernel", "lm_head.weight", "V D", "V D", lambda spec: not spec.tied_head),
)
