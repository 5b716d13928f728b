"""OPT (arXiv:2205.01068) and Galactica (arXiv:2211.09085): learned positions from row 2 on, LayerNorm, no gate.

OPT-350m alone has its norms behind the sums, none behind the last layer, and embeddings of other dims than D.
"""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_activation, read_decoder, read_flag, read_size
from jaxlm.models.families.rows import make_rows
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, LearnedPositionsSpec, NormSpec

POSITION_OFFSET = 2  # rows below it are those of padding


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias, affine = read_flag(config, "enable_bias", True), read_flag(config, "layer_norm_elementwise_affine", True)
    before, removed = read_flag(config, "do_layer_norm_before", True), read_flag(config, "_remove_final_layer_norm")
    size = read_size(config, "word_embed_proj_dim")
    return read_decoder(
        "opt",
        config,
        attention=dict(rope=None, qkv_bias=bias, o_bias=bias),
        feed_forward=dict(bias=bias, gated=False, activation=read_activation(config, theirs="activation_function")),
        layer=dict(norms="pre" if before else "sum"),
        norm=NormSpec(1e-5, "layer", bias=affine, scale=affine),
        final_norm=before and not removed,
        embedding_size=None if size == config["hidden_size"] else size,
        learned_positions=LearnedPositionsSpec(config["max_position_embeddings"] + POSITION_OFFSET, POSITION_OFFSET),
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    before = spec.uniform_layer.norms != "sum"
    return {
        "enable_bias": spec.attention.o_bias,
        "layer_norm_elementwise_affine": spec.norm.scale,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not spec.final_norm,
        "word_embed_proj_dim": spec.embedding_dims,
    }


def _shape(layers: int, d: int, heads: int, **more: Any) -> DecoderSpec:
    galactica = dict(vocab_size=50000, bos_token_id=0) if more.pop("activation", "relu") == "gelu" else {}
    norms = more.pop("norms", "pre")
    feed_forward = FeedForwardSpec(4 * d, "gelu" if galactica else "relu", bias=True, gated=False)
    attention = AttentionSpec(heads, heads, d // heads, rope=None, qkv_bias=True, o_bias=True)
    fields: dict[str, Any] = dict(vocab_size=50272, bos_token_id=2, eos_token_id=2, pad_token_id=1, tied_head=True)
    return DecoderSpec(
        "opt",
        hidden_size=d,
        num_layers=layers,
        period=(LayerSpec(attention, feed_forward, norms),),
        norm=NormSpec(1e-5, "layer", bias=True),
        learned_positions=LearnedPositionsSpec(2048 + POSITION_OFFSET, POSITION_OFFSET),
        **(fields | galactica | more),
    )


_LAYER = "model.decoder.layers.{}"
FAMILY = Family(
    name="opt",
    architecture="OPTForCausalLM",
    defaults=dict(
        hidden_act="relu",
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ),
    read=_read,
    write=_write,
    rows=make_rows(
        {
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            "project_out": "model.decoder.project_out",
            "project_in": "model.decoder.project_in",
            "norm": "model.decoder.final_layer_norm",
            "self_attn/k_proj": f"{_LAYER}.self_attn.k_proj",
            "self_attn/v_proj": f"{_LAYER}.self_attn.v_proj",
            "self_attn/q_proj": f"{_LAYER}.self_attn.q_proj",
            "self_attn/o_proj": f"{_LAYER}.self_attn.out_proj",
            # Before attention or behind the sum with it: a layer has one of the two.
            "input_layernorm": f"{_LAYER}.self_attn_layer_norm",
            "attention_output_norm": f"{_LAYER}.self_attn_layer_norm",
            "mlp/up_proj": f"{_LAYER}.fc1",
            "mlp/down_proj": f"{_LAYER}.fc2",
            "post_attention_layernorm": f"{_LAYER}.final_layer_norm",
            "feed_forward_output_norm": f"{_LAYER}.final_layer_norm",
            "lm_head": "lm_head",
        }
    ),
    keys={
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "initializer_range": "init_std",
        "num_key_value_heads": "",
        "head_dim": "",
        "rms_norm_eps": "",
    },
    # The files of Meta's first uploads are those of the model without a head.
    renamed={r"(decoder\..*)": r"model.\1"},
    # The model cards and config.json of facebook/opt-… and facebook/galactica-….
    shapes={
        "opt-125m": _shape(12, 768, 12),
        "opt-350m": _shape(24, 1024, 16, norms="sum", embedding_size=512, final_norm=False),
        "opt-1.3b": _shape(24, 2048, 32),
        "opt-2.7b": _shape(32, 2560, 32),
        "opt-6.7b": _shape(32, 4096, 32),
        "opt-13b": _shape(40, 5120, 40),
        "opt-30b": _shape(48, 7168, 56),
        "opt-66b": _shape(64, 9216, 72),
        "galactica-125m": _shape(12, 768, 12, activation="gelu"),
        "galactica-1.3b": _shape(24, 2048, 32, activation="gelu"),
        "galactica-6.7b": _shape(32, 4096, 32, activation="gelu"),
        "galactica-30b": _shape(48, 7168, 56, activation="gelu"),
        "galactica-120b": _shape(96, 10240, 80, activation="gelu"),
    },
)
