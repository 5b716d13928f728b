"""Ministral: Mistral with a sliding window on the layers that `layer_types` names."""

from __future__ import annotations

from typing import Any

from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder
from jaxlm.models.families.layer_types import read_windows, write_windows
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, RopeSpec


def _read(config: dict[str, Any]) -> DecoderSpec:
    slides = config["sliding_window"] is not None
    windows = read_windows(config, [slides] * config["num_hidden_layers"])
    return read_decoder("ministral", config, attention=[dict(window=window) for window in windows])


def _shape() -> DecoderSpec:
    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(AttentionSpec(32, 8, 128, RopeSpec(rope_theta=1e8), window=window), FeedForwardSpec(12288))

    return DecoderSpec(
        "ministral",
        vocab_size=131072,
        hidden_size=4096,
        num_layers=36,
        period=(layer(None), *[layer(32768)] * 3),
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=2,
    )


FAMILY = Family(
    name="ministral",
    architecture="MinistralForCausalLM",
    defaults=dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096, bos_token_id=1, eos_token_id=2
    ),
    read=_read,
    write=write_windows,
    rows=LLAMA_ROWS,
    # Mistral's model card: one layer without a window, then three with one.
    shapes={"ministral-8b": _shape()},
)
