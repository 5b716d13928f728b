"""Mixtral's layout: a model of experts that transformers and others compute sparsely.

It has one k for all tokens and a linear router whose softmax over the chosen experts sums to 1. jaxlm's learned router
gives k times that, so k is multiplied into w2 on the way out and divided out on the way in: exact when k is a power of
two, else rounded once in the dtype of the weights each way. With k = 1 Mixtral's weight is 1 and jaxlm's is the softmax
over all experts, which no matrix can make up for: refused, both ways.

    model.layers.{i}.block_sparse_moe.gate.weight           [E, D], the router
    model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight [f, D], gate_proj of the expert's f = F / E neurons
    ...                                           .w3.weight [f, D], up_proj
    ...                                           .w2.weight [D, f], k times down_proj

Everything else is as in Mistral. Source: transformers, models/mixtral and conversion_mapping.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.transforms.experts import ROUTER
from jaxlm.errors import UserError
from jaxlm.models.families import write_config
from jaxlm.models.families.common import check_theta_is_kept
from jaxlm.spec import DecoderSpec, ExpertsSpec
from jaxlm.weights.experts import expert_tensors, experts_entries, join_experts
from jaxlm.weights.hf import HfSource, copy_files, parse_hf_config
from jaxlm.weights.leaves import ParamSource, main_dtype, stored_blocks
from jaxlm.weights.names import hf_entries
from jaxlm.weights.output import Advance
from jaxlm.weights.safetensors import write_safetensors
from jaxlm.weights.tensors import Tensor, TensorSpec, WrappedTensor

ARCHITECTURE, KIND = "MixtralForCausalLM", "mixtral"
# What a key that is not in a config.json means; source: transformers' MixtralConfig.
_DEFAULTS: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
_MOE = "model.layers.{}.block_sparse_moe"
_EXPERT = re.compile(r"model\.layers\.(\d{1,9})\.block_sparse_moe\.experts\.(\d{1,9})\.w[123]\.weight")
_PARTS = {"mlp/gate_proj": "w1", "mlp/up_proj": "w3", "mlp/down_proj": "w2"}
_EXPERTS = {path: f"{_MOE}.experts.{{}}.{part}.weight" for path, part in _PARTS.items()}


def is_mixtral(config: dict[str, Any]) -> bool:
    """Whether a config.json is Mixtral's."""
    return config.get("architectures") == [ARCHITECTURE] or config.get("model_type") == KIND


# --- reading ----------------------------------------------------------------------------------------------------------


def mixtral_spec(where: Path, content: dict[str, Any]) -> DecoderSpec:
    """The shape that Mixtral's `config.json` describes.

    Raises:
        UserError: a value is not served; `where` is named.
    """
    sizes = {}
    # transformers takes num_experts for the same key.
    try:
        check_theta_is_kept(content, _DEFAULTS["rope_theta"])
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config.json: ')}") from None
    content = _DEFAULTS | {"num_local_experts": content.get("num_experts", 8)} | content
    for key in ("num_local_experts", "num_experts_per_tok", "intermediate_size"):
        value = content[key]
        if type(value) is not int or not 0 < value < 1 << 20:
            raise UserError(f"{where}: {key} is {value!r}; expected a positive whole number")
        sizes[key] = value
    experts = sizes["num_local_experts"]
    if sizes["num_experts_per_tok"] == 1 < experts:
        raise UserError(
            f"{where}: num_experts_per_tok is 1: Mixtral then weighs its one expert by 1, jaxlm's learned router "
            "by the expert's share of the softmax over all, so it would be another model; to train it on with two "
            "experts for a token, write 2 there"
        )
    dense = {key: value for key, value in content.items() if key not in ("num_local_experts", "num_experts")}
    like_mistral = dense | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "intermediate_size": sizes["intermediate_size"] * experts,
    }
    config = parse_hf_config(where, like_mistral)
    try:
        moe = ExpertsSpec(experts, "learned", top_k=(sizes["num_experts_per_tok"],), layout="mixtral")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config.with_experts(moe)


class MixtralSource(HfSource):
    """A model in Mixtral's layout, read as a learned router's experts over one feed-forward layer."""

    def parse_config(self, where: Path, content: dict[str, Any]) -> DecoderSpec:
        return mixtral_spec(where, content)

    def kept_config(self, content: dict[str, Any]) -> dict[str, Any] | None:
        return None  # a dense model made of this one needs another

    def prepare(self, weights: Path, tensors: dict[str, Tensor]) -> None:
        """Replaces the experts' matrices by those of the whole layer, under HF's names for a dense one."""
        super().prepare(weights, tensors)
        moe = self.config.experts
        assert moe is not None
        for router in hf_entries(self.config):
            if router.path == ROUTER and (gate := f"{_MOE.format(router.layer)}.gate.weight") in tensors:
                tensors[router.name] = tensors.pop(gate)
        for entry in experts_entries(self.config, _EXPERTS):
            whole = join_experts(weights, tensors, entry)
            tensors[entry.whole.name] = Divided(whole, moe.top_k[0]) if entry.side_by_side else whole
        left = next((name for name in tensors if _EXPERT.fullmatch(name)), None)
        if left is not None:
            raise UserError(
                f"{weights}: tensor {left!r} has no place: config.json says {moe.num_experts} experts in "
                f"{self.config.num_layers} layers"
            )


@dataclass(frozen=True)
class Divided(WrappedTensor):
    """A tensor over a whole number, in its own dtype."""

    divisor: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        block = self.tensor.rows(start, stop)
        return (block.astype(np.float32) / np.float32(self.divisor)).astype(block.dtype)


# --- writing ----------------------------------------------------------------------------------------------------------


def check_mixtral(source: ParamSource) -> None:
    """Refuses a model that Mixtral's layout has no place for, with what else there is."""
    config = source.config
    moe = config.experts
    out = "leave --layout out" if moe is None or moe.layout == "dense" else "convert jax-to-hf --layout dense writes it"
    instead = f"{out}: a dense model, with the experts in files beside it that jaxlm reads"
    if moe is None:
        raise UserError(f"--layout mixtral: {source.path} is a dense model; leave --layout out")
    if moe.router != "learned":
        raise UserError(
            f"--layout mixtral: Mixtral's router is a trained matrix, that of {source.path} is {moe.router}; make one "
            f"(convert distil-router), or {instead}"
        )
    if moe.weights != "k_times":
        raise UserError(
            f"--layout mixtral: the weights of a token's experts in {source.path} are {moe.weights}; what is written "
            "in it has k_times the softmax over them, as `convert moefy` makes it"
        )
    if len(set(moe.top_k)) > 1:
        used = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
        raise UserError(
            f"--layout mixtral: Mixtral has one k for all tokens, {source.path} has {used}; train it with one k "
            f"(moe.top_k), or {instead}"
        )
    if moe.max_top_k == 1 < moe.num_experts:
        raise UserError(
            f"--layout mixtral: tokens of {source.path} use one expert (moe.top_k), weighted by its share of the "
            f"softmax over all; Mixtral would weigh it by 1: another model. Train it with a k of 2 or "
            f"more, or {instead}"
        )
    if config.feed_forward.bias or config.attention.qkv_bias or config.attention.o_bias:
        raise UserError(f"--layout mixtral: Mixtral's layers have no biases, those of {source.path} do; {instead}")


def mixtral_config(source: ParamSource) -> dict[str, Any]:
    """The config.json."""
    config, moe = source.config, source.config.experts
    assert moe is not None
    values = write_config(dataclasses.replace(config, family="mistral"), main_dtype(source.leaves))
    return values | {
        "architectures": [ARCHITECTURE],
        "model_type": KIND,
        "intermediate_size": config.feed_forward.size // moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k[0],
        "sliding_window": config.attention.window,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def mixtral_tensors(source: ParamSource) -> list[TensorSpec]:
    """The tensors in Mixtral's layout, to be read once, in this order."""
    moe = source.config.experts
    assert moe is not None
    experts = {entry.whole.name: entry for entry in experts_entries(source.config, _EXPERTS)}
    specs: list[TensorSpec] = []
    for entry in hf_entries(source.config):
        divided = experts.get(entry.name)
        if divided is not None:
            specs += expert_tensors(source, divided, moe.top_k[0] if divided.side_by_side else 1)
            continue
        name = f"{_MOE.format(entry.layer)}.gate.weight" if entry.path == ROUTER else entry.name
        dtype = source.leaves[entry.path].dtype
        specs.append(TensorSpec(name, entry.layout.stored, dtype, stored_blocks(source, entry)))
    return specs


def write_mixtral(source: ParamSource, directory: Path, shard_size: int, advance: Advance) -> None:
    """Writes a model of experts in Mixtral's layout. One matrix of one layer is in memory at a time.

    Args:
        directory: an existing, empty directory.
        shard_size: bytes of tensors in a file.
        advance: called with the bytes written.

    Raises:
        UserError: when the layout has no place for it.
    """
    check_mixtral(source)
    write_safetensors(directory, "model", mixtral_tensors(source), shard_size, advance)
    text = json.dumps(mixtral_config(source), indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    copy_files(source.tokenizer_files, directory)
