"""InternLM2 and 2.5 (arXiv:2403.17297): LLaMA with names of its own, and each kv head stored with its query heads."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import make_fused, make_rows
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias = read_flag(config, "attention_bias")
    return read_decoder("internlm2", config, attention=dict(qkv_bias=bias, o_bias=bias))


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.attention.o_bias}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int) -> DecoderSpec:
    return uniform_decoder(
        "internlm2",
        vocab_size=92544,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rope=RopeSpec(rope_theta=1e6),
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


_LAYER = "model.layers.{}"
FAMILY = Family(
    name="internlm2",
    architecture="InternLM2ForCausalLM",
    defaults=dict(
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    read=_read,
    write=_write,
    rows=make_rows(
        {
            "embed_tokens": "model.tok_embeddings",
            # The parts of wqkv, which no file has by themselves.
            "self_attn/q_proj": f"{_LAYER}.attention.wq",
            "self_attn/k_proj": f"{_LAYER}.attention.wk",
            "self_attn/v_proj": f"{_LAYER}.attention.wv",
            "self_attn/o_proj": f"{_LAYER}.attention.wo",
            "mlp/gate_proj": f"{_LAYER}.feed_forward.w1",
            "mlp/up_proj": f"{_LAYER}.feed_forward.w3",
            "mlp/down_proj": f"{_LAYER}.feed_forward.w2",
            "mlp/router": f"{_LAYER}.feed_forward.router.weight",
            "input_layernorm": f"{_LAYER}.attention_norm",
            "post_attention_layernorm": f"{_LAYER}.ffn_norm",
            "norm": "model.norm",
            "lm_head": "output",
        }
    ),
    fused=make_fused(
        f"{_LAYER}.attention.wqkv",
        "K (G + 1 + 1) h",
        ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ),
    keys={"attention_bias": "bias"},
    in_transformers=False,
    # Shanghai AI Laboratory's model cards.
    shapes={
        "internlm2-1.8b": _shape(24, 2048, 8192, 16, 8),
        "internlm2-7b": _shape(32, 4096, 14336, 32, 8),
        "internlm2-20b": _shape(48, 6144, 16384, 48, 8),
    },
)
