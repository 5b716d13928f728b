"""Qwen3's dense models (arXiv:2505.09388): LLaMA with a norm of q and k before the positions; heads need not fill D."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_flag
from jaxlm.models.families.layer_types import read_switched_windows, write_switched_windows
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import DecoderSpec, NormSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    bias = read_flag(config, "attention_bias")
    shared = dict(qkv_bias=bias, o_bias=bias, qk_norm=True)
    return read_decoder(
        "qwen3", config, attention=[shared | dict(window=window) for window in read_switched_windows(config)]
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.period[0].attention.o_bias, **write_switched_windows(spec)}


def _shape(layers: int, d: int, f: int, heads: int, tied: bool) -> DecoderSpec:
    return uniform_decoder(
        "qwen3",
        vocab_size=151936,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=NormSpec(1e-6),
        norm_eps=1e-6,
        rope=RopeSpec(rope_theta=1e6),
        max_position_embeddings=40960,
        tied_head=tied,
        bos_token_id=151643,
        eos_token_id=151645,
    )


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=dict(
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    # Qwen's model cards.
    shapes={
        "qwen3-0.6b": _shape(28, 1024, 3072, 16, True),
        "qwen3-1.7b": _shape(28, 2048, 6144, 16, True),
        "qwen3-4b": _shape(36, 2560, 9728, 32, True),
        "qwen3-8b": _shape(36, 4096, 12288, 32, False),
        "qwen3-14b": _shape(40, 5120, 17408, 40, False),
        "qwen3-32b": _shape(64, 5120, 25600, 64, False),
    },
)
