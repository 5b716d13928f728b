"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a window on three layers of four, whose rotary positions are not scaled."""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families import olmo2
from jaxlm.models.families.base import Family
from jaxlm.models.families.layer_types import SLIDING, read_ropes, read_windows, write_ropes, write_windows
from jaxlm.spec import DecoderSpec, NormSpec, RopeSpec

_THETA = 5e5


def _read(config: dict[str, Any]) -> DecoderSpec:
    windows = read_windows(config, [(layer + 1) % 4 > 0 for layer in range(config["num_hidden_layers"])])
    ropes = read_ropes(config, config["rope_theta"], _THETA)
    own = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    if config["rope_theta"] != _THETA and any(windows) and "rope_theta" not in own:
        # transformers' configuration class takes the key away before it comes to these layers.
        raise UserError(
            f"config.json: rope_theta is {config['rope_theta']!r}, but transformers would go on with {_THETA:g} in "
            f"layers with a window. Say which is meant: put a rope_theta into rope_parameters.{SLIDING}"
        )
    return olmo2.read_layers("olmo3", config, [dict(window=window, rope=ropes[window]) for window in windows])


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attention_bias": spec.period[0].attention.o_bias, **write_windows(spec), **write_ropes(spec)}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int) -> DecoderSpec:
    far = RopeSpec(
        "yarn",
        _THETA,
        factor=8.0,
        original_max_position_embeddings=8192,
        attention_factor=1.2079441541679836,
        beta_fast=32.0,
        beta_slow=1.0,
    )
    near = RopeSpec(rope_theta=_THETA)
    return DecoderSpec(
        "olmo3",
        vocab_size=100278,
        hidden_size=d,
        num_layers=layers,
        period=(
            *[olmo2.describe(d, f, heads, kv_heads, near, window=4096)] * 3,
            olmo2.describe(d, f, heads, kv_heads, far),
        ),
        norm=NormSpec(1e-6),
        max_position_embeddings=65536,
        eos_token_id=100257,
        pad_token_id=100277,
    )


FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults=olmo2.DEFAULTS | dict(sliding_window=4096, rope_theta=_THETA),
    read=_read,
    write=_write,
    rows=olmo2.ROWS,
    # The Allen Institute's model cards.
    shapes={"olmo-3-7b": _shape(32, 4096, 11008, 32, 32), "olmo-3-32b": _shape(64, 5120, 27648, 40, 8)},
)
