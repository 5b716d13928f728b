"""OLMo 2 (arXiv:2501.00656): norms of what a layer's parts give, and of q and k over all heads together."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import LLAMA_NAMES, make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec

# OLMo 3 shares what follows.
ROWS = make_rows(
    {path: name for path, name in LLAMA_NAMES.items() if path not in ("input_layernorm", "post_attention_layernorm")}
    | {
        "attention_output_norm": "model.layers.{}.post_attention_layernorm",
        "feed_forward_output_norm": "model.layers.{}.post_feedforward_layernorm",
    }
)
DEFAULTS: dict[str, Any] = dict(max_position_embeddings=2048, rms_norm_eps=1e-5, eos_token_id=50279, pad_token_id=1)


def read_layers(family: str, config: dict[str, Any], layers: list[dict[str, Any]]) -> DecoderSpec:
    """A model of the family.

    Args:
        layers: what attention has that differs between layers.
    """
    bias = read_flag(config, "attention_bias")
    shared = dict(qkv_bias=bias, o_bias=bias, qk_norm=True, qk_norm_over="all")
    return read_decoder(family, config, attention=[shared | own for own in layers], layer=dict(norms="post"))


def describe(d: int, f: int, heads: int, kv_heads: int, rope: RopeSpec, window: int | None = None) -> LayerSpec:
    """A layer of a published model."""
    norm = NormSpec(1e-6)
    attention = AttentionSpec(heads, kv_heads, d // heads, rope, qk_norm=norm, qk_norm_over="all", window=window)
    return LayerSpec(attention, FeedForwardSpec(f), norms="post")


def _read(config: dict[str, Any]) -> DecoderSpec:
    return read_layers("olmo2", config, [{}] * config["num_hidden_layers"])


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.attention.o_bias}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int) -> DecoderSpec:
    return DecoderSpec(
        "olmo2",
        vocab_size=100352,
        hidden_size=d,
        num_layers=layers,
        period=(describe(d, f, heads, kv_heads, RopeSpec(rope_theta=5e5)),),
        norm=NormSpec(1e-6),
        max_position_embeddings=4096,
        eos_token_id=100257,
        pad_token_id=100277,
    )


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    rows=ROWS,
    # The Allen Institute's model cards.
    shapes={
        "olmo-2-1b": _shape(16, 2048, 8192, 16, 16),
        "olmo-2-7b": _shape(32, 4096, 11008, 32, 32),
        "olmo-2-13b": _shape(40, 5120, 13824, 40, 40),
        "olmo-2-32b": _shape(64, 5120, 27648, 40, 8),
    },
)
