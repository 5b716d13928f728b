"""Gemma 2 (arXiv:2408.00118): norms around a layer's parts, caps on scores and logits, windows in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import ACTIVATION_WORDS, read_activation, read_decoder, read_flag, read_positive
from jaxlm.models.families.layer_types import read_windows, write_windows
from jaxlm.models.families.rows import LLAMA_NAMES, make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

# Gemma 3 shares what follows.
ROWS = make_rows(
    LLAMA_NAMES
    | {
        "attention_output_norm": "model.layers.{}.post_attention_layernorm",
        "post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
        "feed_forward_output_norm": "model.layers.{}.post_feedforward_layernorm",
    }
)
READS = frozenset({"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"})
KEYS = {"hidden_act": ""}  # theirs is hidden_activation, and files have both
DEFAULTS: dict[str, Any] = dict(
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
)


def read_layers(
    family: str, config: dict[str, Any], layers: list[dict[str, Any]], shared: Mapping[str, Any]
) -> DecoderSpec:
    """A model of the family.

    Args:
        layers: what attention has that differs between layers.
        shared: what else it has.
    """
    bias, scalar = read_flag(config, "attention_bias"), read_positive(config, "query_pre_attn_scalar")
    scale = None if scalar is None else scalar**-0.5
    return read_decoder(
        family,
        config,
        attention=[dict(qkv_bias=bias, o_bias=bias, scale=scale, **shared, **own) for own in layers],
        feed_forward=dict(activation=read_activation(config, "hidden_activation")),
        layer=dict(norms="both"),
        norm=NormSpec(config.get("rms_norm_eps", 1e-6), offset=1.0),
        embedding_scale=math.sqrt(config["hidden_size"]),
        logits_soft_cap=read_positive(config, "final_logit_softcapping"),
    )


def write_layers(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read_layers` reads, and the windows."""
    layer = spec.period[0]
    scalar = layer.attention.head_dim if layer.attention.scale is None else layer.attention.scale**-2
    return {
        "hidden_activation": ACTIVATION_WORDS[layer.feed_forward.activation][0],
        "attention_bias": layer.attention.o_bias,
        # A whole number, as transformers wants it, where it is one but for rounding.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar,
        "final_logit_softcapping": spec.logits_soft_cap,
        **write_windows(spec),
    }


def _read(config: dict[str, Any]) -> DecoderSpec:
    windows = read_windows(config, [layer % 2 == 0 for layer in range(config["num_hidden_layers"])])
    shared = dict(soft_cap=read_positive(config, "attn_logit_softcapping"))
    return read_layers("gemma2", config, [dict(window=window) for window in windows], shared)


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_layers(spec) | {"attn_logit_softcapping": spec.period[0].attention.soft_cap}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int, head_dim: int, scalar: int = 256) -> DecoderSpec:
    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(heads, kv_heads, head_dim, window=window, scale=scalar**-0.5, soft_cap=50.0)
        return LayerSpec(attention, FeedForwardSpec(f, "gelu_tanh"), norms="both")

    return DecoderSpec(
        "gemma2",
        vocab_size=256000,
        hidden_size=d,
        num_layers=layers,
        period=(layer(4096), layer(None)),
        norm=NormSpec(1e-6, offset=1.0),
        tied_head=True,
        embedding_scale=math.sqrt(d),
        logits_soft_cap=30.0,
        max_position_embeddings=8192,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults=DEFAULTS | dict(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    read=_read,
    write=_write,
    rows=ROWS,
    keys=KEYS,
    reads=READS,
    # Google's model cards.
    shapes={
        "gemma-2-2b": _shape(26, 2304, 9216, 8, 4, 256),
        "gemma-2-9b": _shape(42, 3584, 14336, 16, 8, 256),
        "gemma-2-27b": _shape(46, 4608, 36864, 32, 16, 128, scalar=144),
    },
)
