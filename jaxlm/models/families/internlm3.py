"""InternLM3: LLaMA with heads that need not fill D, and a bias on q, k and v, or on all linear layers, by two keys."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    others = read_flag(config, "mlp_bias")
    return read_decoder(
        "internlm3",
        config,
        attention=dict(qkv_bias=read_flag(config, "attention_bias"), o_bias=others),
        feed_forward=dict(bias=others),
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.attention.qkv_bias, "mlp_bias": spec.feed_forward.bias}


FAMILY = Family(
    name="internlm3",
    architecture="InternLM3ForCausalLM",
    defaults=dict(
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    # transformers writes the usual ones, the model's own code these.
    keys={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    # Shanghai AI Laboratory's model card.
    shapes={
        "internlm3-8b": uniform_decoder(
            "internlm3",
            vocab_size=128512,
            hidden_size=4096,
            intermediate_size=10240,
            num_layers=48,
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            rope=RopeSpec("dynamic", rope_theta=5e7, factor=6.0),
            max_position_embeddings=32768,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    },
)
