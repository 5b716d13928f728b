"""The text models of Gemma 3 (arXiv:2503.19786): five layers with a window, then one without, and other positions."""

from __future__ import annotations

import math
from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families import gemma2
from jaxlm.models.families.base import Family
from jaxlm.models.families.layer_types import read_ropes, read_windows, write_ropes
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec

_PERIOD = 6  # the last layer of each sees everything


def _read(config: dict[str, Any]) -> DecoderSpec:
    pattern = config["sliding_window_pattern"]
    if type(pattern) is not int or pattern < 1:
        raise UserError(f"config.json: sliding_window_pattern is {pattern!r}; expected a positive whole number")
    windows = read_windows(config, [(layer + 1) % pattern > 0 for layer in range(config["num_hidden_layers"])])
    ropes = read_ropes(config, config["rope_theta"], config["rope_local_base_freq"])
    shared = dict(qk_norm=NormSpec(config.get("rms_norm_eps", 1e-6), offset=1.0))
    layers = [dict(window=window, rope=ropes[window]) for window in windows]
    return gemma2.read_layers("gemma3_text", config, layers, shared)


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return gemma2.write_layers(spec) | write_ropes(spec, "rope_local_base_freq")


def _shape(
    layers: int, d: int, f: int, heads: int, kv_heads: int, head_dim: int = 256, scalar: int = 256, large: bool = True
) -> DecoderSpec:
    norm = NormSpec(1e-6, offset=1.0)

    def layer(window: int | None) -> LayerSpec:
        far = RopeSpec("linear", 1e6, factor=8.0) if large else RopeSpec(rope_theta=1e6)
        rope = far if window is None else RopeSpec(rope_theta=1e4)
        attention = AttentionSpec(heads, kv_heads, head_dim, rope, qk_norm=norm, window=window, scale=scalar**-0.5)
        return LayerSpec(attention, FeedForwardSpec(f, "gelu_tanh"), norms="both")

    window = 1024 if large else 512
    return DecoderSpec(
        "gemma3_text",
        vocab_size=262208 if large else 262144,
        hidden_size=d,
        num_layers=layers,
        period=(*[layer(window)] * (_PERIOD - 1), layer(None)),
        norm=norm,
        tied_head=True,
        embedding_scale=math.sqrt(d),
        max_position_embeddings=131072 if large else 32768,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults=gemma2.DEFAULTS
    | dict(
        vocab_size=262208,
        max_position_embeddings=131072,
        sliding_window_pattern=_PERIOD,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
    ),
    read=_read,
    write=_write,
    rows=gemma2.ROWS,
    keys=gemma2.KEYS,
    # Its own attention has no cap.
    reads=gemma2.READS - {"attn_logit_softcapping"},
    refused={
        "Gemma3ForConditionalGeneration": "it sees images too; save its text model by itself, with transformers: "
        "m = Gemma3ForConditionalGeneration.from_pretrained(MODEL); t = Gemma3ForCausalLM(m.config.text_config); "
        "t.model = m.model.language_model; t.tie_weights(); t.save_pretrained(TEXT_MODEL)"
    },
    # Google's model cards; of 4b and larger the text models.
    shapes={
        "gemma-3-270m": _shape(18, 640, 2048, 4, 1, large=False),
        "gemma-3-1b": _shape(26, 1152, 6912, 4, 1, large=False),
        "gemma-3-4b": _shape(34, 2560, 10240, 8, 4),
        "gemma-3-12b": _shape(48, 3840, 15360, 16, 8),
        "gemma-3-27b": _shape(62, 5376, 21504, 32, 16, 128, scalar=168),
    },
)
