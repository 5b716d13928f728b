"""IBM's dense Granite 3 and 4.1 (arXiv:2408.03541, appendix): LLaMA with four multipliers (muP, arXiv:2203.03466)."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag, read_positive
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias = read_flag(config, "attention_bias")
    divisor = _multiplier(config, "logits_scaling")
    return read_decoder(
        "granite",
        config,
        attention=dict(qkv_bias=bias, o_bias=bias, scale=read_positive(config, "attention_multiplier")),
        feed_forward=dict(bias=read_flag(config, "mlp_bias")),
        layer=dict(residual_scale=_multiplier(config, "residual_multiplier")),
        embedding_scale=_multiplier(config, "embedding_multiplier"),
        logits_scale=None if divisor is None else 1.0 / divisor,
    )


def _multiplier(config: dict[str, Any], key: str) -> float | None:
    """None where it is 1, which changes nothing."""
    value = read_positive(config, key)
    return None if value == 1 else value


def _write(spec: DecoderSpec) -> dict[str, Any]:
    layer = spec.uniform_layer
    attention = layer.attention
    return {
        "attention_bias": attention.o_bias,
        "mlp_bias": layer.feed_forward.bias,
        "attention_multiplier": attention.head_dim**-0.5 if attention.scale is None else attention.scale,
        "residual_multiplier": layer.residual_scale or 1.0,
        "embedding_multiplier": spec.embedding_scale or 1.0,
        "logits_scaling": 1.0 / (spec.logits_scale or 1.0),
    }


def _shape(d: int, f: int, theta: float, divisor: float) -> DecoderSpec:
    h = d // 32
    return DecoderSpec(
        "granite",
        vocab_size=49152,
        hidden_size=d,
        num_layers=40,
        period=(
            LayerSpec(
                AttentionSpec(32, 8, h, RopeSpec(rope_theta=theta), scale=1 / h),
                FeedForwardSpec(f),
                residual_scale=0.22,
            ),
        ),
        norm=NormSpec(1e-5),
        tied_head=True,
        embedding_scale=12.0,
        logits_scale=1 / divisor,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    defaults=dict(
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        attention_multiplier=1.0,
        residual_multiplier=1.0,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    reads=frozenset({"attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"}),
    # IBM's model cards.
    shapes={
        "granite-3.1-2b": _shape(2048, 8192, 5e6, 8.0),
        "granite-3.1-8b": _shape(4096, 12800, 1e7, 16.0),
    },
)
