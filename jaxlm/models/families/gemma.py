"""The first Gemma (arXiv:2403.08295): LLaMA with scales around 0, a scaled embedding, and heads that do not fill D."""

from __future__ import annotations

import math
from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias = read_flag(config, "attention_bias")
    # The first release says gelu and means its approximation by tanh, as transformers has it.
    config = config | {"hidden_act": "gelu_pytorch_tanh"} if config["hidden_act"] == "gelu" else config
    return read_decoder(
        "gemma",
        config,
        attention=dict(qkv_bias=bias, o_bias=bias),
        norm=NormSpec(config.get("rms_norm_eps", 1e-6), offset=1.0),
        embedding_scale=math.sqrt(config["hidden_size"]),
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.attention.o_bias}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int) -> DecoderSpec:
    layer = LayerSpec(AttentionSpec(heads, kv_heads, 256), FeedForwardSpec(f, "gelu_tanh"))
    return DecoderSpec(
        "gemma",
        vocab_size=256000,
        hidden_size=d,
        num_layers=layers,
        period=(layer,),
        norm=NormSpec(1e-6, offset=1.0),
        tied_head=True,
        embedding_scale=math.sqrt(d),
        max_position_embeddings=8192,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    defaults=dict(
        num_key_value_heads=16,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    # Google's model cards.
    shapes={
        "gemma-2b": _shape(18, 2048, 16384, 8, 1),
        "gemma-7b": _shape(28, 3072, 24576, 16, 16),
    },
)
