"""GLM-4-9B (arXiv:2406.12793): LLaMA whose heads turn their first half, in pairs of neighbours; gate and up as one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag, read_partial_rope, write_partial_rope
from jaxlm.models.families.rows import LLAMA_ROWS, make_fused
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder

DEFAULTS: dict[str, Any] = dict(
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-7,
    attention_bias=True,
    eos_token_id=[151329, 151336, 151338],
    pad_token_id=151329,
)
FUSED = make_fused("model.layers.{}.mlp.gate_up_proj", "F + F", ("mlp/gate_proj", "mlp/up_proj"))


def read(family: str, config: dict[str, Any], norms: str = "pre") -> DecoderSpec:
    """A decoder of GLM's family or one that computes what it does, with norms there (see `LayerSpec`)."""
    if config.get("eos_token_id") is None:
        config = config | {"eos_token_id": DEFAULTS["eos_token_id"]}  # null means the default, too
    attention = dict(
        qkv_bias=read_flag(config, "attention_bias"), rotary_interleaved=True, **read_partial_rope(config, default=0.5)
    )
    return read_decoder(family, config, attention=attention, layer=dict(norms=norms))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read` reads beside the usual ones."""
    return {"attention_bias": spec.attention.qkv_bias, **write_partial_rope(spec)}


def shape(family: str, layers: int, d: int, f: int, heads: int, norms: str = "pre", **more: Any) -> DecoderSpec:
    """A published shape, with the half of each head turning."""
    values: dict[str, Any] = (
        dict(
            vocab_size=151552,
            num_kv_heads=2,
            head_dim=128,
            qkv_bias=True,
            eos_token_id=(151329, 151336, 151338),
            pad_token_id=151329,
        )
        | more
    )
    spec = uniform_decoder(
        family, hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads, **values
    ).with_attention(rotary_dim=64, rotary_interleaved=True)
    return spec.with_layers(lambda layer: dataclasses.replace(layer, norms=norms))


FAMILY = Family(
    name="glm",
    architecture="GlmForCausalLM",
    defaults=DEFAULTS,
    read=lambda config: read("glm", config),
    write=write,
    rows=LLAMA_ROWS,
    fused=FUSED,
    reads=frozenset({"partial_rotary_factor"}),
    # Zhipu's model cards.
    shapes={
        "glm-4-9b-chat": shape(
            "glm",
            40,
            4096,
            13696,
            32,
            norm_eps=1.5625e-7,
            max_position_embeddings=131072,
            rope=RopeSpec(rope_theta=5e6),
        ),
    },
)
