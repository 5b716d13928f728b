"""SmolLM3: LLaMA whose every fourth layer has no rotary positions (arXiv:2501.18795), but a window if there is one."""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import check_theta_is_kept, read_decoder, read_flag, read_rope
from jaxlm.models.families.layer_types import read_windows, write_windows
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec

_THETA = 2e6  # without the key


def _read(config: dict[str, Any]) -> DecoderSpec:
    layers, every, given = config["num_hidden_layers"], config["no_rope_layer_interval"], config.get("no_rope_layers")
    if given is None:
        if type(every) is not int or every < 1:
            raise UserError(f"config.json: no_rope_layer_interval is {every!r}; expected a positive whole number")
        given = [int((layer + 1) % every > 0) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(value not in (0, 1) for value in given):
        raise UserError(
            f"config.json: no_rope_layers is {given!r}; expected 1 for each of the {layers} layers with rotary "
            "positions, 0 for each without"
        )
    turns = [bool(value) for value in given[:layers]]
    slides = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    windows = read_windows(config, [slides and not turn for turn in turns])
    if any(windows) and not slides:
        raise UserError("config.json: layer_types has sliding_attention, but use_sliding_window is false; say which")
    check_theta_is_kept(config, _THETA)
    bias, rope = read_flag(config, "attention_bias"), read_rope({"rope_theta": _THETA} | config)
    attention = [
        dict(qkv_bias=bias, o_bias=bias, window=window, rope=rope if turn else None)
        for turn, window in zip(turns, windows, strict=True)
    ]
    return read_decoder("smollm3", config, attention=attention, feed_forward=dict(bias=read_flag(config, "mlp_bias")))


def _write(spec: DecoderSpec) -> dict[str, Any]:
    layer, windows = spec.period[0], write_windows(spec)
    return {
        "attention_bias": layer.attention.o_bias,
        "mlp_bias": layer.feed_forward.bias,
        "no_rope_layers": [int(layer.attention.rope is not None) for layer in spec.layers()],
        "use_sliding_window": windows["sliding_window"] is not None,
        **windows,
    }


def _layer(rope: RopeSpec | None) -> LayerSpec:
    return LayerSpec(AttentionSpec(16, 4, 128, rope), FeedForwardSpec(11008))


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults=dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        no_rope_layer_interval=4,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
        pad_token_id=128004,
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    reads=frozenset({"no_rope_layers"}),
    # Hugging Face's model card.
    shapes={
        "smollm3-3b": DecoderSpec(
            "smollm3",
            vocab_size=128256,
            hidden_size=2048,
            num_layers=36,
            period=(*[_layer(RopeSpec(rope_theta=5e6))] * 3, _layer(None)),
            norm=NormSpec(1e-6),
            tied_head=True,
            max_position_embeddings=65536,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
        )
    },
)
