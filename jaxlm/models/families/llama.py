"""LLaMA 1 to 3 (arXiv:2302.13971, 2307.09288, 2407.21783), and what has its architecture under other names."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias = read_flag(config, "attention_bias")
    return read_decoder(
        "llama",
        config,
        attention=dict(qkv_bias=bias, o_bias=bias),
        feed_forward=dict(bias=read_flag(config, "mlp_bias")),
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    layer = spec.uniform_layer
    return {"attention_bias": layer.attention.o_bias, "mlp_bias": layer.feed_forward.bias}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int | None = None, **more: Any) -> DecoderSpec:
    values: dict[str, Any] = dict(vocab_size=32000, bos_token_id=1, eos_token_id=2) | more
    return uniform_decoder(
        "llama",
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=d // heads,
        **values,
    )


def _rope(factor: float) -> RopeSpec:
    """LLaMA 3.1's scaling of 8192 positions."""
    return RopeSpec(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


_LLAMA2: dict[str, Any] = dict(max_position_embeddings=4096)
_TOKENS3: dict[str, Any] = dict(vocab_size=128256, bos_token_id=128000, eos_token_id=128001)
_LLAMA3 = _TOKENS3 | dict(max_position_embeddings=8192, rope=RopeSpec(rope_theta=500000.0))
_LLAMA31 = _TOKENS3 | dict(max_position_embeddings=131072, rope=_rope(8.0))
_SMOLLM2: dict[str, Any] = dict(vocab_size=49152, bos_token_id=0, eos_token_id=0, tied_head=True)
_SMOLLM2 |= dict(max_position_embeddings=8192)
_LLAMA32 = _TOKENS3 | dict(max_position_embeddings=131072, rope=_rope(32.0), tied_head=True)
_YI: dict[str, Any] = dict(
    vocab_size=64000, max_position_embeddings=4096, rope=RopeSpec(rope_theta=5e6), pad_token_id=0
)
_DEEPSEEK: dict[str, Any] = dict(
    vocab_size=102400, max_position_embeddings=4096, norm_eps=1e-6, bos_token_id=100000, eos_token_id=100001
)
_SMOL: dict[str, Any] = dict(vocab_size=49152, tied_head=True, bos_token_id=0, eos_token_id=0)

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    # The first ports of LLaMA, and Yi's first release, whose code is LLaMA's with other names for two norms.
    aliases=("LLaMAForCausalLM", "YiForCausalLM", "yi"),
    renamed={
        r"(model\.layers\.\d+)\.ln1\.weight": r"\1.input_layernorm.weight",
        r"(model\.layers\.\d+)\.ln2\.weight": r"\1.post_attention_layernorm.weight",
    },
    # Meta's, Hugging Face's and DeepSeek's model cards.
    shapes={
        "llama-7b": _shape(32, 4096, 11008, 32, norm_eps=1e-6),
        "llama-13b": _shape(40, 5120, 13824, 40, norm_eps=1e-6),
        "llama-33b": _shape(60, 6656, 17920, 52, norm_eps=1e-6),
        "llama-65b": _shape(80, 8192, 22016, 64),
        "llama-2-7b": _shape(32, 4096, 11008, 32, **_LLAMA2),
        "llama-2-13b": _shape(40, 5120, 13824, 40, **_LLAMA2),
        "llama-2-70b": _shape(80, 8192, 28672, 64, 8, **_LLAMA2),
        "llama-3-8b": _shape(32, 4096, 14336, 32, 8, **_LLAMA3),
        "llama-3-70b": _shape(80, 8192, 28672, 64, 8, **_LLAMA3),
        "llama-3.1-8b": _shape(32, 4096, 14336, 32, 8, **_LLAMA31),
        "llama-3.1-70b": _shape(80, 8192, 28672, 64, 8, **_LLAMA31),
        "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, **_LLAMA32),
        "llama-3.2-3b": _shape(28, 3072, 8192, 24, 8, **_LLAMA32),
        "smollm2-135m": _shape(30, 576, 1536, 9, 3, rope=RopeSpec(rope_theta=1e5), **_SMOLLM2),
        "smollm2-360m": _shape(32, 960, 2560, 15, 5, rope=RopeSpec(rope_theta=1e5), **_SMOLLM2),
        "smollm2-1.7b": _shape(24, 2048, 8192, 32, rope=RopeSpec(rope_theta=1.3e5), **_SMOLLM2),
        # Of others whose architecture it is, from theirs.
        "yi-6b": _shape(32, 4096, 11008, 32, 4, **_YI),
        "yi-34b": _shape(60, 7168, 20480, 56, 8, **_YI),
        "deepseek-llm-7b": _shape(30, 4096, 11008, 32, **_DEEPSEEK),
        "deepseek-llm-67b": _shape(95, 8192, 22016, 64, 8, **_DEEPSEEK),
        "smollm-135m": _shape(30, 576, 1536, 9, 3, **_SMOL),
        "smollm-360m": _shape(32, 960, 2560, 15, 5, **_SMOL),
        "smollm-1.7b": _shape(24, 2048, 8192, 32, **_SMOL),
    },
)
