"""Qwen2 and Qwen2.5 (arXiv:2407.10671): LLaMA with a bias on q, k and v, and a sliding window that is mostly off."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder
from jaxlm.models.families.layer_types import read_switched_windows, write_switched_windows
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    attention = [dict(qkv_bias=True, window=window) for window in read_switched_windows(config)]
    return read_decoder("qwen2", config, attention=attention)


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int, **more: Any) -> DecoderSpec:
    return uniform_decoder(
        "qwen2",
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d // heads,
        qkv_bias=True,
        max_position_embeddings=131072,
        norm_eps=1e-6,
        rope=RopeSpec(rope_theta=1e6),
        bos_token_id=151643,
        eos_token_id=151643,
        **more,
    )


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28),
    read=_read,
    write=write_switched_windows,
    rows=LLAMA_ROWS,
    # Qwen's model cards.
    shapes={
        "qwen2-0.5b": _shape(24, 896, 4864, 14, 2, vocab_size=151936, tied_head=True),
        "qwen2-7b": _shape(28, 3584, 18944, 28, 4, vocab_size=152064),
    },
)
