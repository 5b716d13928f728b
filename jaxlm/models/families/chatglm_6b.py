"""ChatGLM-6B (arXiv:2103.10360, arXiv:2210.02414): a prompt whose tokens see each other, positions in two dimensions.

Its residual is the norm of the hidden states, times sqrt(2 L). The frequencies of its positions are rounded to float16,
as its code stores them; angles are not, which that code rounds too when it runs in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import QKV, make_fused, make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, PrefixSpec, RopeSpec

_TOKENS = {"bos_token_id": 130004, "gmask_token_id": 130001, "mask_token_id": 130000}  # <sop>, [gMASK], [MASK]


def is_first(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of ChatGLM is that of the first model, whose feed-forward layer's size has this name."""
    return bool(config.get("position_encoding_2d") or config.get("inner_hidden_size"))


def _read(config: dict[str, Any]) -> DecoderSpec:
    if not read_flag(config, "position_encoding_2d", True):
        raise UserError("config.json: position_encoding_2d is false; only true is read")
    for key in ("pre_seq_len", "quantization_bit"):
        if config.get(key):
            raise UserError(f"config.json: {key} is {config[key]!r}; only null or 0 is read")
    tokens = [config.get(key, token) for key, token in _TOKENS.items()]
    if not all(type(token) is int for token in tokens):
        raise UserError(f"config.json: {', '.join(_TOKENS)} are {tokens}; expected token ids")
    return read_decoder(
        "chatglm_6b",
        config,
        attention=dict(
            rope=RopeSpec(frequency_dtype="float16"),
            prefix=PrefixSpec(tokens[0], tuple(tokens[1:])),
            qkv_bias=True,
            o_bias=True,
        ),
        feed_forward=dict(activation="gelu_tanh", bias=True, gated=False),
        layer=dict(normed_residual=math.sqrt(2 * config["num_hidden_layers"])),
        norm=NormSpec(config["rms_norm_eps"], "layer", bias=True),
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    assert spec.prefix is not None
    masks = dict(zip(("gmask_token_id", "mask_token_id"), spec.prefix.mask_ids, strict=True))
    return {"model_type": "chatglm", "bos_token_id": spec.prefix.start_id, "position_encoding_2d": True, **masks}


FAMILY = Family(
    name="chatglm_6b",
    architecture="ChatGLMModel",
    model_type="chatglm",
    is_config=is_first,
    aliases=("ChatGLMForConditionalGeneration",),
    defaults=dict(
        rms_norm_eps=1e-5, max_position_embeddings=2048, bos_token_id=130004, eos_token_id=130005, pad_token_id=3
    ),
    read=_read,
    write=_write,
    rows=make_rows(
        {
            "lm_head": "lm_head",
            "embed_tokens": "transformer.word_embeddings",
            "input_layernorm": "transformer.layers.{}.input_layernorm",
            # The parts of query_key_value, which no file has by themselves.
            "self_attn/q_proj": "transformer.layers.{}.attention.q_proj",
            "self_attn/k_proj": "transformer.layers.{}.attention.k_proj",
            "self_attn/v_proj": "transformer.layers.{}.attention.v_proj",
            "self_attn/o_proj": "transformer.layers.{}.attention.dense",
            "post_attention_layernorm": "transformer.layers.{}.post_attention_layernorm",
            "mlp/up_proj": "transformer.layers.{}.mlp.dense_h_to_4h",
            "mlp/down_proj": "transformer.layers.{}.mlp.dense_4h_to_h",
            "norm": "transformer.final_layernorm",
        }
    ),
    fused=make_fused("transformer.layers.{}.attention.query_key_value", "H (1 + 1 + 1) h", QKV),
    keys={
        "intermediate_size": "inner_hidden_size",
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "max_sequence_length",
        # Which it has no keys for.
        "num_key_value_heads": "",
        "head_dim": "",
        "hidden_act": "",
        "rope_parameters": "",
        "rope_theta": "",
        "rope_scaling": "",
    },
    # The config.json of THUDM/chatglm-6b.
    shapes={
        "chatglm-6b": DecoderSpec(
            "chatglm_6b",
            vocab_size=130528,
            hidden_size=4096,
            num_layers=28,
            period=(
                LayerSpec(
                    AttentionSpec(
                        32,
                        32,
                        128,
                        RopeSpec(frequency_dtype="float16"),
                        qkv_bias=True,
                        o_bias=True,
                        prefix=PrefixSpec(130004, (130001, 130000)),
                    ),
                    FeedForwardSpec(16384, "gelu_tanh", bias=True, gated=False),
                    normed_residual=math.sqrt(56),
                ),
            ),
            norm=NormSpec(1e-5, "layer", bias=True),
            bos_token_id=130004,
            eos_token_id=130005,
            pad_token_id=3,
        )
    },
)
