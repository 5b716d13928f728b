"""BLOOM and BLOOMZ (arXiv:2211.05100): ALiBi, LayerNorm, a norm behind the embedding, q, k and v of each head as one.

transformers adds slope * place of the key to a score, jaxlm -slope * its distance. All scores of a query differ by one
number, which softmax does not see. (In 16 bits transformers rounds what it adds, jaxlm does not.)
"""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import QKV, make_fused, make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

TRAINED_LENGTH = 2048


def _read(config: dict[str, Any]) -> DecoderSpec:
    read_flag(config, "slow_but_exact")  # which sums the same products in another order
    size = 4 * config["hidden_size"]
    if config.get("n_inner") not in (None, size):
        raise UserError(f"config.json: n_inner is {config['n_inner']!r}; only null or {size} (4 * hidden_size) is read")
    return read_decoder(
        "bloom",
        config,
        attention=dict(rope=None, alibi=True, qkv_bias=True, o_bias=True),
        feed_forward=dict(activation="gelu_tanh", size=size, bias=True, gated=False),
        norm=NormSpec(config["rms_norm_eps"], "layer", bias=True),
        embedding_norm=True,
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    length = spec.max_position_embeddings
    return {
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        **({} if length == TRAINED_LENGTH else {"seq_length": length}),
    }


def _shape(layers: int, d: int, heads: int) -> DecoderSpec:
    attention = AttentionSpec(heads, heads, d // heads, rope=None, qkv_bias=True, o_bias=True, alibi=True)
    return DecoderSpec(
        "bloom",
        vocab_size=250880,
        hidden_size=d,
        num_layers=layers,
        period=(LayerSpec(attention, FeedForwardSpec(4 * d, "gelu_tanh", bias=True, gated=False)),),
        norm=NormSpec(1e-5, "layer", bias=True),
        embedding_norm=True,
        tied_head=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


# The config.json of bigscience/bloom-…; BLOOMZ has those of the models that it was tuned from.
_SIZES = {
    "560m": _shape(24, 1024, 16),
    "1b1": _shape(24, 1536, 16),
    "1b7": _shape(24, 2048, 16),
    "3b": _shape(30, 2560, 32),
    "7b1": _shape(30, 4096, 32),
    "176b": _shape(70, 14336, 112),
}
_LAYER = "transformer.h.{}"
FAMILY = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    defaults=dict(
        rms_norm_eps=1e-5,
        max_position_embeddings=TRAINED_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    read=_read,
    write=_write,
    rows=make_rows(
        {
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "input_layernorm": f"{_LAYER}.input_layernorm",
            # The parts of query_key_value, which no file has by themselves.
            "self_attn/q_proj": f"{_LAYER}.self_attention.q_proj",
            "self_attn/k_proj": f"{_LAYER}.self_attention.k_proj",
            "self_attn/v_proj": f"{_LAYER}.self_attention.v_proj",
            "self_attn/o_proj": f"{_LAYER}.self_attention.dense",
            "post_attention_layernorm": f"{_LAYER}.post_attention_layernorm",
            "mlp/up_proj": f"{_LAYER}.mlp.dense_h_to_4h",
            "mlp/down_proj": f"{_LAYER}.mlp.dense_4h_to_h",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        }
    ),
    fused=make_fused(f"{_LAYER}.self_attention.query_key_value", "H (1 + 1 + 1) h", QKV),
    keys={
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "rms_norm_eps": "layer_norm_epsilon",
        "intermediate_size": "",
        "num_key_value_heads": "",
        "head_dim": "",
        "hidden_act": "",
        "max_position_embeddings": "",
    },
    old_keys={"n_embed": "hidden_size", "seq_length": "max_position_embeddings"},
    # BigScience's own files are those of the model without a head.
    renamed={r"((word_embeddings(_layernorm)?|h\.\d+|ln_f)\..*)": r"transformer.\1"},
    shapes={f"{name}-{size}": spec for name in ("bloom", "bloomz") for size, spec in _SIZES.items()},
)
