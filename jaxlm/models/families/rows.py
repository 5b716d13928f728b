"""The rows of a family's name table, from the names alone.

Which tensors a decoder has, their dims, and that a linear layer is stored as [outputs, inputs], follow from what it
computes, in every family: a family's file says what its modules are called.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxlm.models.families.base import Fused, Row, always
from jaxlm.spec import ENCODER, DecoderSpec, LayerSpec

Condition = Callable[[DecoderSpec, LayerSpec], bool]


def _has_cross(_: DecoderSpec, layer: LayerSpec) -> bool:
    return layer.cross_attention is not None


def _cross_bias(layer: LayerSpec, field: str) -> bool:
    return layer.cross_attention is not None and bool(getattr(layer.cross_attention, field))


# Linear layer -> (dims, dims in HF's files, whether there is one, whether it has a bias).
_LINEARS: dict[str, tuple[str, str, Condition, Condition]] = {
    "self_attn/q_proj": ("D H h", "(H h) D", always, lambda _, layer: layer.attention.qkv_bias),
    "self_attn/k_proj": ("D K h", "(K h) D", always, lambda _, layer: layer.attention.qkv_bias),
    "self_attn/v_proj": ("D K h", "(K h) D", always, lambda _, layer: layer.attention.qkv_bias),
    "self_attn/o_proj": ("H h D", "D (H h)", always, lambda _, layer: layer.attention.o_bias),
    "cross_attn/q_proj": ("D H h", "(H h) D", _has_cross, lambda _, layer: _cross_bias(layer, "qkv_bias")),
    "cross_attn/k_proj": ("D K h", "(K h) D", _has_cross, lambda _, layer: _cross_bias(layer, "qkv_bias")),
    "cross_attn/v_proj": ("D K h", "(K h) D", _has_cross, lambda _, layer: _cross_bias(layer, "qkv_bias")),
    "cross_attn/o_proj": ("H h D", "D (H h)", _has_cross, lambda _, layer: _cross_bias(layer, "o_bias")),
    "mlp/gate_proj": (
        "D F",
        "F D",
        lambda _, layer: layer.feed_forward.gated,
        lambda _, layer: layer.feed_forward.gated and layer.feed_forward.bias,
    ),
    "mlp/up_proj": ("D F", "F D", always, lambda _, layer: layer.feed_forward.bias),
    "mlp/down_proj": ("F D", "D F", always, lambda _, layer: layer.feed_forward.bias),
}
QKV = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")  # what is often stored as one
# Norm of the hidden states -> whether there is one.
_NORMS: dict[str, Condition] = {
    "embed_norm": lambda spec, _: spec.embedding_norm,
    "input_layernorm": lambda _, layer: layer.norm_before,
    "post_attention_layernorm": lambda _, layer: layer.norm_before and layer.parallel != "shared_norm",
    "cross_attention_layernorm": _has_cross,
    "attention_output_norm": lambda _, layer: layer.norm_after,
    "feed_forward_output_norm": lambda _, layer: layer.norm_after,
    "norm": lambda spec, _: spec.final_norm,
}
# Matrix outside of the layers -> (its parameter, dims, whether there is one).
_MATRICES: dict[str, tuple[str, str, Condition]] = {
    "embed_tokens": ("embedding", "V W", always),
    "embed_positions": ("embedding", "N D", lambda spec, _: spec.learned_positions is not None),
    "project_in": ("kernel", "D W", lambda spec, _: spec.embedding_size is not None),
    "project_out": ("kernel", "W D", lambda spec, _: spec.embedding_size is not None),
    "lm_head": ("kernel", "V W", lambda spec, _: not spec.tied_head),
    "relative_bias": ("embedding", "U H", lambda _, layer: layer.attention.relative_bias is not None),
}


def make_rows(names: Mapping[str, str], when: Condition = always) -> tuple[Row, ...]:
    """The rows of a family.

    Args:
        names: path of each module below its layer ('self_attn/q_proj') or outside of the layers ('embed_tokens') ->
            HF's name, with '{}' for the number of the layer; in the order of HF's files. 'mlp/router' is a tensor. An
            encoder's begin with 'encoder/'.
        when: a further condition: whether the modules have these names.
    """
    rows = [row for path, hf in names.items() for row in _rows_of(path, hf)]
    return tuple(rows) if when is always else tuple(replace(row, when=_both(row.when, when)) for row in rows)


def _both(first: Condition, second: Condition) -> Condition:
    return lambda spec, layer: first(spec, layer) and second(spec, layer)


def make_fused(hf: str, dims: str, parts: tuple[str, ...]) -> tuple[Fused, ...]:
    """A linear layer that is stored as one but is several here: its matrix and its bias.

    Args:
        hf: name of the module, e.g. 'model.layers.{}.self_attn.qkv_proj'.
        dims: of its outputs, e.g. 'H h + K h + K h' (see `Fused`).
        parts: the paths that `make_rows` was given.
    """
    kernels, biases = (tuple(f"{part}/{name}" for part in parts) for name in ("kernel", "bias"))
    return Fused(f"{hf}.weight", f"({dims}) D", kernels), Fused(f"{hf}.bias", f"({dims})", biases)


def _rows_of(path: str, hf: str) -> list[Row]:
    if path.startswith(ENCODER):
        rows = _rows_of(path.removeprefix(ENCODER), hf)
        return [dataclasses.replace(row, path=f"{ENCODER}{row.path}") for row in rows]
    if path in _LINEARS:
        dims, hf_dims, exists, biased = _LINEARS[path]
        outputs = re.findall(r"\([^)]*\)|\S+", hf_dims)[0]
        kernel = Row(f"{path}/kernel", f"{hf}.weight", dims, hf_dims, exists)
        return [kernel, Row(f"{path}/bias", f"{hf}.bias", outputs.strip("()"), outputs, biased)]
    if path in _NORMS:
        return _norm(path, hf, _NORMS[path])
    if path in _MATRICES:
        name, dims, exists = _MATRICES[path]
        return [Row(f"{path}/{name}", f"{hf}.weight", dims, dims, exists)]
    if path in ("self_attn/q_norm", "self_attn/k_norm"):
        all_heads = "Q" if path.endswith("q_norm") else "M"
        return [
            Row(f"{path}/scale", f"{hf}.weight", "h", "h", _has_qk_norm_over("head")),
            Row(f"{path}/scale", f"{hf}.weight", all_heads, all_heads, _has_qk_norm_over("all")),
        ]
    assert path == "mlp/router", path
    return [Row(path, hf, "D E", "E D", _has_learned_router)]


def _norm(path: str, hf: str, exists: Condition) -> list[Row]:
    return [
        Row(f"{path}/scale", f"{hf}.weight", "D", "D", lambda spec, layer: spec.norm.scale and exists(spec, layer)),
        Row(f"{path}/bias", f"{hf}.bias", "D", "D", lambda spec, layer: spec.norm.bias and exists(spec, layer)),
    ]


def _has_qk_norm_over(what: str) -> Condition:
    return lambda _, layer: layer.attention.qk_norm is not None and layer.attention.qk_norm_over == what


def _has_learned_router(_: DecoderSpec, layer: LayerSpec) -> bool:
    experts = layer.feed_forward.experts
    return experts is not None and experts.router == "learned"


LLAMA_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "input_layernorm": "model.layers.{}.input_layernorm",
    "self_attn/q_proj": "model.layers.{}.self_attn.q_proj",
    "self_attn/k_proj": "model.layers.{}.self_attn.k_proj",
    "self_attn/v_proj": "model.layers.{}.self_attn.v_proj",
    "self_attn/o_proj": "model.layers.{}.self_attn.o_proj",
    "self_attn/q_norm": "model.layers.{}.self_attn.q_norm",
    "self_attn/k_norm": "model.layers.{}.self_attn.k_norm",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "mlp/gate_proj": "model.layers.{}.mlp.gate_proj",
    "mlp/up_proj": "model.layers.{}.mlp.up_proj",
    "mlp/down_proj": "model.layers.{}.mlp.down_proj",
    # The linear router of a layer divided into experts; the name outside jaxlm is our own.
    "mlp/router": "model.layers.{}.mlp.router.weight",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
LLAMA_ROWS = make_rows(LLAMA_NAMES)
