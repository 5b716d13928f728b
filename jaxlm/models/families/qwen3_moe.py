"""Qwen3's models of experts (arXiv:2505.09388): Qwen3 with a linear router, and k experts for each token."""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family, PerExpert
from jaxlm.models.families.common import read_activation, read_decoder, read_flag
from jaxlm.models.families.rows import LLAMA_NAMES, make_rows
from jaxlm.spec import DecoderSpec, ExpertsSpec, NormSpec, RopeSpec, uniform_decoder

_EXPERT = "model.layers.{}.mlp.experts.{}."
_STACKED = "model.layers.{}.mlp.experts."


def _read(config: dict[str, Any]) -> DecoderSpec:
    num_experts = config.get("num_experts")
    local = config.get("num_local_experts", num_experts)  # transformers 5's word for it
    if None not in (num_experts, local) and num_experts != local:
        raise UserError(f"config.json: num_experts is {num_experts!r} and num_local_experts {local!r}; leave one out")
    num_experts = _count({"num_experts": 128 if local is None else local}, "num_experts", least=0)
    step, dense = _count(config, "decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise UserError(f"config.json: mlp_only_layers is {dense!r}; expected a list of numbers of layers")
    divided: dict[str, Any] = {}
    if num_experts:
        weights = "normalised" if read_flag(config, "norm_topk_prob") else "shares"
        experts = ExpertsSpec(num_experts, "learned", top_k=(_count(config, "num_experts_per_tok"),), weights=weights)
        divided = dict(size=num_experts * _count(config, "moe_intermediate_size"), experts=experts)
        if read_activation(config) != "silu":
            raise UserError(
                f"config.json: hidden_act is {config['hidden_act']!r}; experts are computed with 'silu' alone"
            )
    bias = read_flag(config, "attention_bias")
    window = config["sliding_window"] if read_flag(config, "use_sliding_window") else None
    return read_decoder(
        "qwen3_moe",
        config,
        attention=dict(qkv_bias=bias, o_bias=bias, qk_norm=True, window=window),
        feed_forward=[
            {} if layer in dense or (layer + 1) % step else divided for layer in range(config["num_hidden_layers"])
        ],
    )


def _count(config: dict[str, Any], key: str, least: int = 1) -> int:
    value = config[key]
    if type(value) is not int or not least <= value < 1 << 20:
        raise UserError(f"config.json: {key} is {value!r}; expected a whole number from {least} on")
    return value


def _write(spec: DecoderSpec) -> dict[str, Any]:
    layers, moe = [layer.feed_forward for layer in spec.layers()], spec.experts
    attention = spec.period[0].attention
    dense = [number for number, layer in enumerate(layers) if layer.experts is None]
    keys: dict[str, Any] = {
        "attention_bias": attention.o_bias,
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense if moe is not None else [],
        "num_experts": 0,
    }
    if moe is None:
        return keys
    f = next(layer.size for layer in layers if layer.experts is not None) // moe.num_experts
    return keys | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k[0],
        "moe_intermediate_size": f,
        # Of the other layers; where there are none it says nothing, and is as in the published models.
        "intermediate_size": layers[dense[0]].size if dense else f * moe.top_k[0],
        "norm_topk_prob": moe.weights == "normalised",
    }


def _shape(layers: int, d: int, heads: int, f: int) -> DecoderSpec:
    return uniform_decoder(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=d,
        intermediate_size=128 * f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        qk_norm=NormSpec(1e-6),
        norm_eps=1e-6,
        rope=RopeSpec(rope_theta=1e6),
        experts=ExpertsSpec(128, "learned", top_k=(8,), weights="normalised"),
        max_position_embeddings=40960,
        bos_token_id=151643,
        eos_token_id=151645,
    )


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults=dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        sliding_window=4096,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        decoder_sparse_step=1,
    ),
    read=_read,
    write=_write,
    rows=make_rows(LLAMA_NAMES | {"mlp/router": "model.layers.{}.mlp.gate.weight"}),
    experts=PerExpert(
        {f"mlp/{name}": f"{_EXPERT}{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
        stacked={
            f"{_STACKED}gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
            f"{_STACKED}down_proj": ("mlp/down_proj",),
        },
    ),
    reads=frozenset({"num_experts", "num_local_experts"}),
    # Qwen's model cards.
    shapes={
        "qwen3-30b-a3b": _shape(48, 2048, 32, 768),
        "qwen3-235b-a22b": _shape(94, 4096, 64, 1536),
    },
)
