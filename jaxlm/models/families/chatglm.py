"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B's first release (arXiv:2406.12793): what GLM computes, in names of their own.

ChatGLM-6B, the first one, shares the name of the architecture and is a family of its own (`chatglm_6b`).
"""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.chatglm_6b import is_first
from jaxlm.models.families.common import is_number, read_decoder, read_flag
from jaxlm.models.families.rows import make_fused, make_rows
from jaxlm.spec import DEFAULT_THETA, DecoderSpec, RopeSpec, uniform_decoder

_LAYER = "transformer.encoder.layers.{}"
# What the code of the release takes, with values that compute something else; null says nothing.
_FIXED: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "pre_seq_len": None,
    "quantization_bit": 0,
}


def _read(config: dict[str, Any]) -> DecoderSpec:
    for key, only in _FIXED.items():
        value = config.get(key)
        if value is not None and value != only:
            raise UserError(
                f"config.json: {key} is {value!r}, which changes what the model computes; only {only} is read"
            )
    ratio = config.get("rope_ratio", 1.0)
    if not is_number(ratio) or ratio <= 0:
        raise UserError(f"config.json: rope_ratio is {ratio!r}; expected a positive number")
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    shared = read_flag(config, "multi_query_attention")
    attention = dict(
        num_kv_heads=config["num_key_value_heads"] if shared else num_heads,
        qkv_bias=read_flag(config, "add_qkv_bias"),
        rope=RopeSpec(rope_theta=DEFAULT_THETA * ratio),
        rotary_dim=head_dim // 2,
        rotary_interleaved=True,
    )
    return read_decoder("chatglm", config, attention=attention)


def _write(spec: DecoderSpec) -> dict[str, Any]:
    fixed = {key: value for key, value in _FIXED.items() if value is not None}
    return fixed | {
        "multi_query_attention": True,
        "add_qkv_bias": spec.attention.qkv_bias,
        "rope_ratio": spec.attention.rotary.rope_theta / DEFAULT_THETA,
        "original_rope": True,
        "hidden_dropout": 0.0,
    }


def _shape(**more: Any) -> DecoderSpec:
    return uniform_decoder(
        "chatglm",
        vocab_size=65024,
        hidden_size=4096,
        intermediate_size=13696,
        num_layers=28,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        qkv_bias=True,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    ).with_attention(rotary_dim=64, rotary_interleaved=True)


FAMILY = Family(
    name="chatglm",
    architecture="ChatGLMModel",
    defaults=dict(num_key_value_heads=1, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-5),
    is_config=lambda config: not is_first(config),
    read=_read,
    write=_write,
    rows=make_rows(
        {
            "embed_tokens": "transformer.embedding.word_embeddings",
            "input_layernorm": f"{_LAYER}.input_layernorm",
            "self_attn/q_proj": f"{_LAYER}.self_attention.q_proj",
            "self_attn/k_proj": f"{_LAYER}.self_attention.k_proj",
            "self_attn/v_proj": f"{_LAYER}.self_attention.v_proj",
            "self_attn/o_proj": f"{_LAYER}.self_attention.dense",
            "post_attention_layernorm": f"{_LAYER}.post_attention_layernorm",
            "mlp/gate_proj": f"{_LAYER}.mlp.gate_proj",
            "mlp/up_proj": f"{_LAYER}.mlp.up_proj",
            "mlp/down_proj": f"{_LAYER}.mlp.dense_4h_to_h",
            "mlp/router": f"{_LAYER}.mlp.router.weight",
            "norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
        }
    ),
    fused=(
        *make_fused(
            f"{_LAYER}.self_attention.query_key_value",
            "H h + K h + K h",
            ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
        ),
        *make_fused(f"{_LAYER}.mlp.dense_h_to_4h", "F + F", ("mlp/gate_proj", "mlp/up_proj")),
    ),
    aliases=("ChatGLMForConditionalGeneration",),
    keys={
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        # Which it has no keys for.
        "hidden_act": "",
        "rope_parameters": "",
        "rope_theta": "",
        "rope_scaling": "",
    },
    in_transformers=False,
    # Zhipu's model cards.
    shapes={
        "chatglm2-6b": _shape(max_position_embeddings=32768),
        "chatglm3-6b": _shape(max_position_embeddings=8192),
    },
)
