"""GLM-4-0414 (9B and 32B): GLM with a norm behind attention and feed-forward, too."""

from __future__ import annotations

from jaxlm.models.families.base import Family
from jaxlm.models.families.glm import DEFAULTS, FUSED, read, shape, write
from jaxlm.models.families.rows import LLAMA_ROWS, make_rows

FAMILY = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    defaults=DEFAULTS,
    read=lambda config: read("glm4", config, norms="both"),
    write=write,
    rows=LLAMA_ROWS
    + make_rows(
        {
            "attention_output_norm": "model.layers.{}.post_self_attn_layernorm",
            "feed_forward_output_norm": "model.layers.{}.post_mlp_layernorm",
        }
    ),
    fused=FUSED,
    reads=frozenset({"partial_rotary_factor"}),
    # Zhipu's model cards.
    shapes={
        "glm-4-9b-0414": shape("glm4", 40, 4096, 13696, 32, norms="both", max_position_embeddings=32768),
        "glm-4-32b-0414": shape(
            "glm4", 61, 6144, 23040, 48, norms="both", max_position_embeddings=32768, qkv_bias=False
        ),
    },
)
