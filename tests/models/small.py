"""A small config of every family in transformers' own words, and its PyTorch model's tensors as jaxlm's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from jaxlm.models.families import FAMILIES, read_config
from jaxlm.spec import DecoderSpec
from jaxlm.weights.names import fused_entries, hf_entries, leaf_shapes

SIZES: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
_BIASES = dict(attention_bias=True, mlp_bias=True)
_TIED = dict(tie_word_embeddings=True)
_OPT = dict(
    vocab_size=37,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=24,
    word_embed_proj_dim=16,
    dropout=0.0,
    pad_token_id=None,  # its embedding would have no gradient
)

_BLOOM = dict(vocab_size=37, hidden_size=16, n_layer=3, n_head=4)
_FALCON = dict(vocab_size=37, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
_GEMMA = dict(sliding_window=4, query_pre_attn_scalar=3)
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
_MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=5)
_EVERY_THIRD = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
# Phi-3's configuration class takes the head dim to be D / H, and its embedding learns nothing of padding.
_PHI3 = SIZES | dict(hidden_size=24, bos_token_id=1, eos_token_id=2, pad_token_id=None)
_PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=2 / 3)
_GLM = SIZES | dict(head_dim=8, eos_token_id=2, pad_token_id=None)
_LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2], long_factor=[1.5, 3.0, 6.0])
_ENCODER: dict[str, Any] = dict(
    vocab_size=37,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)

# Family -> variant -> what its configuration class in transformers is given. The first variant is the plain one.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"plain": SIZES, "biases": SIZES | _BIASES, "tied": SIZES | _TIED},
    "mistral": {"plain": SIZES, "tied": SIZES | _TIED, "window": SIZES | dict(sliding_window=5)},
    "qwen2": {"plain": SIZES, "tied": SIZES | _TIED},
    "phi3": {
        "plain": _PHI3,
        "window": _PHI3 | dict(sliding_window=5),
        "partial": _PHI3 | _TIED | dict(rope_parameters=_PARTIAL),
        "longrope": _PHI3 | dict(rope_parameters=_LONGROPE, original_max_position_embeddings=8),
    },
    **{
        name: {
            "plain": _GLM,
            "whole heads": _GLM | _TIED | dict(attention_bias=False, partial_rotary_factor=1.0, rms_norm_eps=1e-5),
        }
        for name in ("glm", "glm4")
    },
    "qwen3": {"plain": SIZES, "biases": SIZES | dict(attention_bias=True), "tied": SIZES | _TIED},
    "gemma": {"plain": SIZES, "biases": SIZES | dict(attention_bias=True, tie_word_embeddings=False)},
    "gemma2": {
        "plain": SIZES | _GEMMA | dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
        "uncapped": SIZES
        | _GEMMA
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=["full_attention"] * 3,
            hidden_activation="gelu",
        ),
    },
    "gemma3_text": {
        "plain": SIZES | _GEMMA | dict(num_hidden_layers=5, rope_parameters=_TWO_ROPES, layer_types=_EVERY_THIRD),
        "local": SIZES | _GEMMA | dict(final_logit_softcapping=3.0, attention_bias=True, tie_word_embeddings=False),
    },
    "qwen3_moe": {
        "plain": SIZES | _MOE | dict(norm_topk_prob=True),
        "shares": SIZES | _MOE | dict(num_experts_per_tok=3, attention_bias=True, tie_word_embeddings=True),
        "dense_layers": SIZES
        | _MOE
        | dict(
            norm_topk_prob=True, num_hidden_layers=5, decoder_sparse_step=2, use_sliding_window=True, sliding_window=4
        ),
    },
    "ministral": {
        "plain": SIZES | dict(sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "everywhere": SIZES | _TIED | dict(sliding_window=4),
    },
    "smollm3": {
        "plain": SIZES | dict(num_hidden_layers=5, no_rope_layer_interval=2, rope_theta=500.0, pad_token_id=None),
        "windows": SIZES
        | _BIASES
        | dict(no_rope_layers=[1, 0, 0], use_sliding_window=True, sliding_window=4)
        | dict(tie_word_embeddings=False, pad_token_id=None),
    },
    "granite": {
        "plain": SIZES
        | dict(embedding_multiplier=1.5, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=0.7),
        "biases": SIZES | _BIASES | _TIED,
    },
    "opt": {
        "plain": _OPT,
        "no_biases": _OPT | dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
        "350m": _OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=10),
        "untied": _OPT | dict(_remove_final_layer_norm=True, word_embed_proj_dim=10, tie_word_embeddings=False),
    },
    "bloom": {
        "plain": _BLOOM,
        "six_heads": _BLOOM | dict(hidden_size=24, n_head=6, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    },
    "falcon": {
        "7b": _FALCON,
        "40b": _FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2),
        "11b": _FALCON
        | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True)
        | dict(tie_word_embeddings=False, ffn_hidden_size=24),
        "by_head": _FALCON | dict(multi_query=False, parallel_attn=False, bias=True),
    },
    "olmo2": {"plain": SIZES, "biases": SIZES | _TIED | dict(attention_bias=True)},
    "olmo3": {
        "plain": SIZES
        | dict(
            num_hidden_layers=5,
            sliding_window=4,
            rope_parameters={
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "attention_factor": 1.3,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
        "biases": SIZES | _TIED | dict(attention_bias=True),
    },
    "t5": {
        "plain": _ENCODER | dict(feed_forward_proj="relu"),
        "gated": _ENCODER | dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False),
    },
    "mt5": {"plain": _ENCODER},
}
_PLAIN = {key: value for key, value in SIZES.items() if key != "head_dim"}
_INTERNLM2 = _PLAIN | dict(architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=False)
_INTERNLM3 = SIZES | dict(architectures=["InternLM3ForCausalLM"], model_type="internlm3")
_BAICHUAN = dict(architectures=["BaichuanForCausalLM"], model_type="baichuan", rms_norm_eps=1e-6)
_BAICHUAN |= {key: _PLAIN[key] for key in _PLAIN.keys() - {"num_key_value_heads", "max_position_embeddings"}}

# Families that transformers has no module of -> variant -> config.json. The first variant is the plain one.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "chatglm_6b": {
        "plain": dict(
            architectures=["ChatGLMModel"],
            model_type="chatglm",
            position_encoding_2d=True,
            vocab_size=37,
            hidden_size=16,
            inner_hidden_size=24,
            num_layers=3,
            num_attention_heads=2,
            max_sequence_length=64,
            bos_token_id=30,
            gmask_token_id=31,
            mask_token_id=32,
            eos_token_id=33,
            pad_token_id=3,
        )
    },
    "chatglm": {
        "plain": dict(
            architectures=["ChatGLMModel"],
            model_type="chatglm",
            padded_vocab_size=37,
            hidden_size=16,
            ffn_hidden_size=24,
            num_layers=3,
            num_attention_heads=4,
            multi_query_attention=True,
            multi_query_group_num=2,
            kv_channels=8,
            seq_length=64,
            layernorm_epsilon=1e-5,
            add_qkv_bias=True,
            rope_ratio=50,
            eos_token_id=2,
        ),
    },
    "internlm2": {"plain": _INTERNLM2, "biases": _INTERNLM2 | dict(bias=True)},
    "internlm3": {"plain": _INTERNLM3, "biases": _INTERNLM3 | dict(bias=True, qkv_bias=True)},
    "baichuan": {
        "plain": _BAICHUAN | dict(max_position_embeddings=64),
        "13b": _BAICHUAN | dict(model_max_length=64),
        "2-7b": _BAICHUAN | dict(max_position_embeddings=64, model_max_length=64, z_loss_weight=0),
        "2-13b": _BAICHUAN | dict(model_max_length=64, z_loss_weight=0),
    },
}
# Families whose models have an encoder.
WITH_ENCODER = ("t5", "mt5")
VARIANTS = [(family, variant) for family, variants in SMALL.items() for variant in variants]


def small_spec(family: str, variant: str = "", **more: Any) -> DecoderSpec:
    """The spec of a small model, read from the config.json that transformers writes, or from one of OWN."""
    if family in OWN:
        named = {FAMILIES[family].keys.get(key, key): value for key, value in more.items()}
        return read_config(own_values(family, variant) | named)
    return read_config(
        hf_config(family, variant, **more).to_dict() | {"architectures": [FAMILIES[family].architecture]}
    )


def own_values(family: str, variant: str = "") -> dict[str, Any]:
    """config.json of a small model of OWN; the first variant by default."""
    return OWN[family][variant] if variant else next(iter(OWN[family].values()))


def hf_class(family: str) -> Any:
    """The PyTorch module of a family: transformers', or ours for a family of OWN."""
    if family in OWN:
        from tests.models.own_modules import own_class  # which needs PyTorch

        return own_class(family, FAMILIES[family].architecture)
    return getattr(pytest.importorskip("transformers"), FAMILIES[family].architecture)


def hf_config(family: str, variant: str = "", **more: Any) -> Any:
    """transformers' configuration of a small model, or one of its kind for a family of OWN.

    Args:
        variant: a key of SMALL[family]; the first one by default.
    """
    transformers = pytest.importorskip("transformers")
    if family in OWN:
        from tests.models.own_modules import own_config  # which needs PyTorch

        return own_config(family, own_values(family, variant) | more)
    values = SMALL[family][variant] if variant else next(iter(SMALL[family].values()))
    return transformers.AutoConfig.for_model(family, **(values | more))


def hf_model(family: str, variant: str = "", dtype: str = "float32", seed: int = 0, **more: Any) -> Any:
    """A small transformers model in which every parameter is random, biases and norms too."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    config = hf_config(family, variant, **more)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # PyTorch's grouped product takes no experts as narrow as these
    model = hf_class(family)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(getattr(torch, dtype)).eval()


def whole_experts(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stacked matrices of experts that transformers 5 has as those of the layers that they are parts of."""
    result = {}
    for name, array in arrays.items():
        layer, _, stacked = name.rpartition(".experts.")
        if stacked == "gate_up_proj":  # [E, 2 f, D]
            halves = np.split(array, 2, axis=1)
            for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
                result[f"{layer}.{part}.weight"] = half.reshape(-1, half.shape[2])
        elif stacked == "down_proj":  # [E, D, f]
            result[f"{layer}.down_proj.weight"] = array.transpose(1, 0, 2).reshape(array.shape[1], -1)
        else:
            result[name] = array
    return result


def tree_of(tensors: Mapping[str, Any], spec: DecoderSpec) -> dict[str, Any]:
    """PyTorch tensors (weights or gradients) by HF's names as the tree of the collection `params`, by the name table.

    Raises:
        AssertionError: a tensor is left over.
    """
    arrays = whole_experts({name: tensor.detach().float().numpy() for name, tensor in tensors.items()})
    for fused in fused_entries(spec):
        if fused.name in arrays:
            whole = arrays.pop(fused.name)
            groups = whole.reshape(fused.repeats, sum(fused.rows), *whole.shape[1:])
            parts = np.split(groups, np.cumsum(fused.rows)[:-1], axis=1)
            for entry, part in zip(fused.parts, parts, strict=True):
                arrays[entry.name] = part.reshape(-1, *whole.shape[1:])
    leaves = {path: np.empty(shape, np.float32) for path, shape in leaf_shapes(spec).items()}
    for entry in hf_entries(spec):
        value = arrays.pop(entry.name).reshape(entry.layout.view).transpose(entry.layout.perm)
        leaves[entry.path][... if entry.layer is None else entry.layer] = value
    assert not arrays, f"left over: {', '.join(arrays)}"
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = leaf
    return tree
