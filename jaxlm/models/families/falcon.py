"""Falcon (arXiv:2311.16867): LayerNorm, no biases of linear layers, attention and feed-forward beside each other.

7B has one key and value head, and one norm for both parts; 40B and 180B have groups of heads and a norm for each part;
11B has groups and one norm. q, k and v are stored as one, group by group. The models with ALiBi (falcon-rw-…) are not
read: transformers rounds their slopes and what it adds to scores to bfloat16, where distances no longer tell it.
"""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_activation, read_decoder, read_flag, read_size
from jaxlm.models.families.rows import QKV, make_fused, make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec


def _read(config: dict[str, Any]) -> DecoderSpec:
    # Files from before Falcon was in transformers tell 40B from 7B by the model_type alone.
    grouped = read_flag(config, "new_decoder_architecture", config.get("model_type") == "RefinedWeb")
    beside, one_head = read_flag(config, "parallel_attn", True), read_flag(config, "multi_query", True)
    heads, bias, norms = config["num_attention_heads"], read_flag(config, "bias"), _read_norms(config, grouped, beside)
    kv_heads = config.get("num_key_value_heads") or heads
    if not grouped:
        if not one_head and kv_heads != heads:
            raise UserError(f"config.json: num_kv_heads is {kv_heads}; without multi_query it is {heads}, one per head")
        kv_heads = 1 if one_head else heads
    return read_decoder(
        "falcon",
        config,
        attention=dict(num_kv_heads=kv_heads, qkv_bias=bias, o_bias=bias),
        feed_forward=dict(
            size=read_size(config, "ffn_hidden_size") or 4 * config["hidden_size"],
            activation=read_activation(config, theirs="activation"),
            bias=bias,
            gated=False,
        ),
        layer=dict(parallel={0: None, 1: "shared_norm", 2: "own_norm"}[norms]),
        norm=NormSpec(config["rms_norm_eps"], "layer", bias=True),
    )


def _read_norms(config: dict[str, Any], grouped: bool, beside: bool) -> int:
    """The number of norms in front of attention and feed-forward that lie beside each other; 0 where they do not."""
    if grouped and not beside:
        raise UserError("config.json: parallel_attn is false; with new_decoder_architecture only true is read")
    norms = read_size(config, "num_ln_in_parallel_attn") or (2 if grouped else 1)
    if norms > (2 if grouped else 1):
        more = " without new_decoder_architecture" if norms == 2 else ""
        raise UserError(f"config.json: num_ln_in_parallel_attn is {norms}{more}; only null, 1 or, with it, 2 is read")
    return norms if beside else 0


def _write(spec: DecoderSpec) -> dict[str, Any]:
    layer, attention = spec.uniform_layer, spec.attention
    grouped = layer.parallel == "own_norm" or attention.num_kv_heads not in (1, attention.num_heads)
    return {
        "new_decoder_architecture": grouped,
        "multi_query": grouped or attention.num_kv_heads == 1,
        "num_key_value_heads": attention.num_kv_heads if grouped else attention.num_heads,
        "parallel_attn": layer.parallel is not None,
        "num_ln_in_parallel_attn": {"own_norm": 2, "shared_norm": 1 if grouped else None, None: None}[layer.parallel],
        "ffn_hidden_size": layer.feed_forward.size,
        "bias": attention.o_bias,
        "alibi": False,
    }


def _shape(
    layers: int, d: int, heads: int, kv_heads: int, parallel: str, theta: float = 1e4, **more: Any
) -> DecoderSpec:
    attention = AttentionSpec(heads, kv_heads, d // heads, RopeSpec(rope_theta=theta))
    fields: dict[str, Any] = dict(vocab_size=65024, tied_head=True, bos_token_id=11, eos_token_id=11)
    return DecoderSpec(
        "falcon",
        hidden_size=d,
        num_layers=layers,
        period=(LayerSpec(attention, FeedForwardSpec(4 * d, "gelu", gated=False), parallel=parallel),),
        norm=NormSpec(1e-5, "layer", bias=True),
        **(fields | more),
    )


def _has_own_norms(_: DecoderSpec, layer: LayerSpec) -> bool:
    return layer.parallel == "own_norm"


_LAYER = "transformer.h.{}"
FAMILY = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    aliases=("RWForCausalLM", "refinedwebmodel", "refinedweb"),
    defaults=dict(
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        hidden_act="gelu",
        tie_word_embeddings=True,
        bos_token_id=11,
        eos_token_id=11,
    ),
    read=_read,
    write=_write,
    rows=(
        *make_rows(
            {"input_layernorm": f"{_LAYER}.ln_attn", "post_attention_layernorm": f"{_LAYER}.ln_mlp"}, _has_own_norms
        ),
        *make_rows(
            {name: f"{_LAYER}.{name}" for name in ("input_layernorm", "post_attention_layernorm")},
            lambda spec, layer: not _has_own_norms(spec, layer),
        ),
        *make_rows(
            {
                "embed_tokens": "transformer.word_embeddings",
                # The parts of query_key_value, which no file has by themselves.
                "self_attn/q_proj": f"{_LAYER}.self_attention.q_proj",
                "self_attn/k_proj": f"{_LAYER}.self_attention.k_proj",
                "self_attn/v_proj": f"{_LAYER}.self_attention.v_proj",
                "self_attn/o_proj": f"{_LAYER}.self_attention.dense",
                "mlp/up_proj": f"{_LAYER}.mlp.dense_h_to_4h",
                "mlp/down_proj": f"{_LAYER}.mlp.dense_4h_to_h",
                "norm": "transformer.ln_f",
                "lm_head": "lm_head",
            }
        ),
    ),
    # For one kv head these are all of q, k, v; for as many as there are query heads, those of each head.
    fused=make_fused(f"{_LAYER}.self_attention.query_key_value", "K (G + 1 + 1) h", QKV),
    keys={
        "num_key_value_heads": "num_kv_heads",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_epsilon",
        "intermediate_size": "",
        "head_dim": "",
    },
    old_keys={
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
    },
    reads=frozenset({"parallel_attn"}),
    # The config.json of tiiuae/falcon-….
    shapes={
        "falcon-7b": _shape(32, 4544, 71, 1, "shared_norm"),
        "falcon-11b": _shape(60, 4096, 32, 8, "shared_norm", 500042.0, tied_head=False, max_position_embeddings=8192),
        "falcon-40b": _shape(60, 8192, 128, 8, "own_norm"),
        "falcon-180b": _shape(80, 14848, 232, 8, "own_norm"),
    },
)
