"""Phi-3, 3.5 and 4 (arXiv:2404.14219, 2412.08905): LLaMA with q, k and v stored as one and gate and up as one.

Phi-4-mini turns three quarters of each head. Models for 128k tokens have longrope.
"""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder, read_partial_rope, write_partial_rope
from jaxlm.models.families.rows import LLAMA_ROWS, make_fused
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    rope = read_partial_rope(_usual_rope(config))
    kind = rope["rope"].rope_type
    if kind not in ("default", "longrope"):
        raise UserError(f"config.json: rope_type is {kind!r}; Phi-3 has 'default' and 'longrope'")
    return read_decoder("phi3", config, attention=dict(window=config.get("sliding_window"), **rope))


def _usual_rope(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with today's name of longrope: the first releases call it 'su', and some 'yarn'."""
    usual = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if isinstance(given, dict) and (given.get("rope_type") or given.get("type")) in ("su", "yarn"):
            usual[key] = {name: value for name, value in given.items() if name != "type"} | {"rope_type": "longrope"}
    return usual


def _write(spec: DecoderSpec) -> dict[str, Any]:
    original = spec.attention.rotary.original_max_position_embeddings
    longrope = {} if original is None else {"original_max_position_embeddings": original}
    return {"sliding_window": spec.attention.window, **longrope, **write_partial_rope(spec)}


def _shape(layers: int, d: int, f: int, heads: int, kv_heads: int, **more: Any) -> DecoderSpec:
    values: dict[str, Any] = dict(vocab_size=32064, bos_token_id=1, eos_token_id=32000, pad_token_id=32000) | more
    return uniform_decoder(
        "phi3",
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d // heads,
        **values,
    )


FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults=dict(
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    fused=(
        *make_fused(
            "model.layers.{}.self_attn.qkv_proj",
            "H h + K h + K h",
            ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
        ),
        *make_fused("model.layers.{}.mlp.gate_up_proj", "F + F", ("mlp/gate_proj", "mlp/up_proj")),
    ),
    reads=frozenset({"partial_rotary_factor"}),
    # Microsoft's model cards.
    shapes={
        "phi-3-mini-4k": _shape(32, 3072, 8192, 32, 32, max_position_embeddings=4096, window=2047),
        "phi-3-medium-4k": _shape(40, 5120, 17920, 40, 10, max_position_embeddings=4096, window=2047),
        "phi-4": _shape(
            40,
            5120,
            17920,
            40,
            10,
            vocab_size=100352,
            max_position_embeddings=16384,
            rope=RopeSpec(rope_theta=250000.0),
            bos_token_id=100257,
            eos_token_id=100265,
            pad_token_id=100349,
        ),
    },
)
