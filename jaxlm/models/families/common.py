"""What families share: readers and writers of config.json's keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.spec import (
    DEFAULT_THETA,
    ROPE_TYPES,
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)

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
    "apply_residual_connection_post_layernorm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "attention_chunk_size": (),
    "use_bidirectional_attention": (False,),
    "no_rope_layers": ([],),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0,),
}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    # Bounded, because an integer of JSON may be too large to become a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


# What Hugging Face calls the activations; the first word of each is what is written.
ACTIVATION_WORDS: dict[str, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "relu": ("relu",),
}


def check_values(config: dict[str, Any], family: Family) -> None:
    """Refuses, by name, keys that are missing, of another kind, or that ask for what is not computed.

    Args:
        config: by the usual keys, with the family's defaults.
    """
    named = {key: family.keys.get(key, key) for key in (*SIZES, *_OPTIONAL_SIZES, *_POSITIVE)}
    missing = [name for key, name in named.items() if key in SIZES and name and config.get(key) is None]
    if missing:
        raise UserError(f"config.json: missing: {', '.join(missing)}")
    for key in SIZES + _OPTIONAL_SIZES:
        read_size({named[key]: config.get(key)}, named[key])
    if (config.get("num_hidden_layers") or 0) > MAX_LAYERS:
        name, value = named["num_hidden_layers"], config["num_hidden_layers"]
        raise UserError(f"config.json: {name} is {value}; a model has at most {MAX_LAYERS:,} layers")
    for key in _POSITIVE:
        if key in config and not (is_number(config[key]) and config[key] > 0):
            raise UserError(f"config.json: {named[key]} is {config[key]!r}; expected a positive number")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(index is not None and type(index) is not int for index in ids):
            raise UserError(f"config.json: {key} is {value!r}; expected a token id")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        read_flag(config, key)
    for key, harmless in UNREAD.items():
        value = config.get(key)
        if key not in family.reads and value is not None and value not in harmless:
            only = " or ".join(json.dumps(choice) for choice in harmless) or "null"
            raise UserError(
                f"config.json: {key} is {value!r}, with which {family.architecture} is not supported: it changes what "
                f"the model computes; only {only} is read"
            )


# Layers are described one by one where they differ.
MAX_LAYERS = 1 << 16
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_POSITIVE = ("rms_norm_eps", "initializer_range")


def read_flag(config: dict[str, Any], key: str, default: bool = False) -> bool:
    """A key that is true, false, or not there.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"config.json: {key} is {value!r}; expected true or false")
    return default if value is None else value


def read_size(config: dict[str, Any], key: str) -> int | None:
    """A key that is a positive whole number, null, or not there.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
        raise UserError(f"config.json: {key} is {value!r}; expected a positive whole number")
    return value


def read_positive(config: dict[str, Any], key: str) -> float | None:
    """A key that is a positive number, null, or not there.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key)
    if value is not None and not (is_number(value) and value > 0):
        raise UserError(f"config.json: {key} is {value!r}; expected a positive number")
    return None if value is None else float(value)


def read_activation(config: dict[str, Any], key: str = "hidden_act", theirs: str = "") -> str:
    """The activation that a key names, in jaxlm's word; silu without the key.

    Args:
        theirs: what the family's files call the key, for errors.

    Raises:
        UserError: it is one that the decoder does not compute.
    """
    word = config.get(key, "silu")
    for activation, words in ACTIVATION_WORDS.items():
        if word in words:
            return activation
    known = ", ".join(word for words in ACTIVATION_WORDS.values() for word in words)
    raise UserError(f"config.json: {theirs or key} {word!r} is not supported; known: {known}")


def read_decoder(
    family: str,
    config: dict[str, Any],
    *,
    attention: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    feed_forward: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    layer: dict[str, Any] | None = None,
    **more: Any,
) -> DecoderSpec:
    """A decoder from the keys that LLaMA and its relatives share; its layers are alike, or differ in a period.

    Args:
        config: checked, by the usual keys, with the family's defaults.
        attention, feed_forward, layer: fields of `AttentionSpec`, `FeedForwardSpec` and `LayerSpec` beside, or instead
            of, those that the usual keys say; or those of each layer. A `qk_norm` of True is one with the eps of the
            others.
        more: fields of `DecoderSpec`, likewise.

    Raises:
        UserError: no model can be like that, or the layers differ without a short period.
    """
    num_heads, eos = config["num_attention_heads"], config.get("eos_token_id")
    eps = config.get("rms_norm_eps", 1e-6)
    heads = dict(
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
    )

    def described(attention: dict[str, Any], feed_forward: dict[str, Any]) -> LayerSpec:
        attention, feed_forward = heads | attention, dict(feed_forward)
        if attention.get("qk_norm") is True:
            attention["qk_norm"] = NormSpec(eps)
        if "rope" not in attention:
            attention["rope"] = read_rope(config)
        if "activation" not in feed_forward:
            feed_forward["activation"] = read_activation(config)
        feed_forward.setdefault("size", config.get("intermediate_size"))
        return LayerSpec(AttentionSpec(**attention), FeedForwardSpec(**feed_forward), **(layer or {}))

    lengths = {len(part) for part in (attention, feed_forward) if part is not None and not isinstance(part, dict)}
    num_described = max(lengths, default=1)  # one description will do where no list has one for each layer
    per_layer = zip(*(_of_layers(part, num_described) for part in (attention, feed_forward)), strict=True)
    period = shortest_period([described(*parts) for parts in per_layer])
    if len(period) > MAX_PERIOD:
        raise UserError(
            f"config.json: its layers differ from each other, and not in a pattern that repeats every {MAX_PERIOD} "
            f"layers or less (it takes {len(period)}), which is not supported"
        )
    fields: dict[str, Any] = dict(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        period=period,
        norm=NormSpec(eps),
        max_position_embeddings=config["max_position_embeddings"],
        tied_head=bool(config.get("tie_word_embeddings", False)),
        initializer_range=config.get("initializer_range", 0.02),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id"),
    )
    return DecoderSpec(**(fields | more))


T = TypeVar("T")
# Layers of a period: each is a part of the compiled step by itself.
MAX_PERIOD = 16


def shortest_period(layers: Sequence[T]) -> tuple[T, ...]:
    """The fewest descriptions that, repeated, are those of all layers; the last repetition may be cut off."""
    sizes = range(1, len(layers))
    size = next((n for n in sizes if all(a == b for a, b in zip(layers, layers[n:], strict=False))), len(layers))
    return tuple(layers[:size])


def _of_layers(fields: dict[str, Any] | Sequence[dict[str, Any]] | None, num_layers: int) -> Sequence[dict[str, Any]]:
    return [fields or {}] * num_layers if fields is None or isinstance(fields, dict) else fields


def write_decoder(spec: DecoderSpec, architecture: str, dtype: str) -> dict[str, Any]:
    """The keys that LLaMA and its relatives share, for old and new transformers.

    Where layers differ, they say the first one, and the first one's rotary positions that has any; the family's `write`
    says the rest.
    """
    layer = spec.period[0]
    rope = next((each.attention.rope for each in spec.period if each.attention.rope is not None), None)
    config = {
        "architectures": [architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.feed_forward.size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_kv_heads,
        "head_dim": layer.attention.head_dim,
        "hidden_act": ACTIVATION_WORDS[layer.feed_forward.activation][0],
        "max_position_embeddings": spec.max_position_embeddings,
        "initializer_range": spec.initializer_range,
        "rms_norm_eps": spec.norm.eps,
        "use_cache": True,
        "tie_word_embeddings": spec.tied_head,
    }
    if rope is not None:
        written = write_rope(rope)
        scaling = {key: value for key, value in written.items() if key != "rope_theta"}
        config |= {
            "rope_parameters": written,
            # The two old keys, for transformers 4 and everything built on it.
            "rope_theta": rope.rope_theta,
            "rope_scaling": None if rope.rope_type == "default" else scaling,
        }
    return config | {
        "attention_dropout": 0.0,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_id) if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# ---- positions


def read_rope(config: dict[str, Any], partial: bool = False) -> RopeSpec:
    """Reads both the new (`rope_parameters`) and the old (`rope_theta`, `rope_scaling`) form.

    Where both are there, a `rope_scaling` that says something replaces `rope_parameters` as a whole, as in
    transformers: that is how model cards have YaRN switched on.

    Args:
        partial: a part of each head may turn, see `read_partial_rope`.
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
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1.0) and not partial:
        raise UserError("config.json: partial_rotary_factor other than 1.0 is not supported")
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(RopeSpec)})
    if unknown:
        raise UserError(f"config.json: unknown rope parameters {', '.join(unknown)}")
    for name, value in given.items():
        if name in ("short_factor", "long_factor") and value is not None:
            if not isinstance(value, list) or not all(map(is_number, value)):
                raise UserError(f"config.json: rope parameter {name} is {value!r}; expected a list of numbers")
            given[name] = tuple(map(float, value))
        elif name not in ("rope_type", "truncate") and value is not None and not is_number(value):
            raise UserError(f"config.json: rope parameter {name} is {value!r}; expected a number")
    if not given["rope_theta"]:
        raise UserError(f"config.json: rope_theta is {given['rope_theta']!r}; expected a positive number")
    given["rope_theta"] = float(given["rope_theta"])
    original = "original_max_position_embeddings"
    if given["rope_type"] == "longrope" and config.get(original) is not None:
        given[original] = config[original]  # as in transformers, which lets it win over that of the parameters
    if given["rope_type"] in ("llama3", "longrope") and given.get(original) is None:
        given[original] = config.get("max_position_embeddings")
    try:
        return RopeSpec(**given)
    except UserError as error:
        raise UserError(f"config.json: {str(error).removeprefix('rope: ')}") from None


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    values = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read_partial_rope(config: dict[str, Any], default: float = 1.0) -> dict[str, Any]:
    """`rope` and `rotary_dim` of `AttentionSpec`, for a family that may turn a part of each head only.

    Args:
        default: the part where config.json says none.
    """
    rope = read_rope(config, partial=True)
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parts = (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), default)
    part = next(part for part in parts if part is not None)
    if not is_number(part) or not 0 < part <= 1:
        raise UserError(f"config.json: partial_rotary_factor is {part!r}; expected a number above 0 and up to 1")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary_dim = int(head_dim * part)
    return dict(rope=rope, rotary_dim=None if rotary_dim == head_dim else rotary_dim)


def write_partial_rope(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read_partial_rope` reads, where they are more than `write_decoder` writes."""
    attention = spec.attention
    part = 1.0 if attention.rotary_dim is None else attention.rotary_dim / attention.head_dim
    rope = write_rope(attention.rotary)
    return {"partial_rotary_factor": part, "rope_parameters": rope | {"partial_rotary_factor": part}}


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
