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
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.transforms.experts import ROUTER
from jaxlm.errors import UserError
from jaxlm.models.families import write_config
from jaxlm.models.families.common import check_theta_is_kept
from jaxlm.spec import DecoderSpec, ExpertsSpec
from jaxlm.weights.hf import HfSource, copy_files
from jaxlm.weights.leaves import ParamSource, cast, main_dtype, stored_blocks
from jaxlm.weights.names import Entry, Shape, hf_entries, transposed
from jaxlm.weights.output import Advance
from jaxlm.weights.safetensors import write_safetensors
from jaxlm.weights.tensors import JoinedColumns, JoinedRows, Tensor, TensorSpec, WrappedTensor

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
_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def is_mixtral(config: dict[str, Any]) -> bool:
    """Whether a config.json is Mixtral's."""
    return config.get("architectures") == [ARCHITECTURE] or config.get("model_type") == KIND


# --- reading ----------------------------------------------------------------------------------------------------------


class MixtralSource(HfSource):
    """A model in Mixtral's layout, read as a learned router's experts over one feed-forward layer."""

    def parse_config(self, where: Path, content: dict[str, Any]) -> DecoderSpec:
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
        config = super().parse_config(where, like_mistral)
        try:
            moe = ExpertsSpec(experts, "learned", top_k=(sizes["num_experts_per_tok"],), layout="mixtral")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return config.with_experts(moe)

    def kept_config(self, content: dict[str, Any]) -> dict[str, Any] | None:
        return None  # a dense model made of this one needs another

    def prepare(self, weights: Path, tensors: dict[str, Tensor]) -> None:
        """Replaces the experts' matrices by those of the whole layer, under HF's names for a dense one."""
        super().prepare(weights, tensors)
        moe = self.config.experts
        assert moe is not None
        size = self.config.feed_forward.size // moe.num_experts
        shapes = {"w1": (size, self.config.hidden_size), "w2": (self.config.hidden_size, size)}
        shapes["w3"] = shapes["w1"]
        for entry in hf_entries(self.config):
            if entry.layer is None:
                continue
            stem, linear = _MOE.format(entry.layer), entry.path.split("/")[2]
            if entry.path == ROUTER and f"{stem}.gate.weight" in tensors:
                tensors[entry.name] = tensors.pop(f"{stem}.gate.weight")
            elif linear in _PARTS:
                part = _PARTS[linear]
                names = [f"{stem}.experts.{expert}.{part}.weight" for expert in range(moe.num_experts)]
                tensors[entry.name] = self._joined(weights, entry.name, names, tensors, shapes[part], moe.top_k[0])
        left = next((name for name in tensors if _EXPERT.fullmatch(name)), None)
        if left is not None:
            raise UserError(
                f"{weights}: tensor {left!r} has no place: config.json says {moe.num_experts} experts in "
                f"{self.config.num_layers} layers"
            )

    def _joined(
        self, weights: Path, name: str, names: list[str], tensors: dict[str, Tensor], shape: Shape, k: int
    ) -> Tensor:
        parts: list[Tensor] = []
        for part in names:
            if part not in tensors:
                raise UserError(f"{weights}: tensor {part!r} is missing; copy the model again")
            tensor = tensors.pop(part)
            if tensor.shape != shape:
                raise UserError(
                    f"{weights}: tensor {part!r} has shape {list(tensor.shape)}, config.json means {list(shape)}"
                )
            if parts and tensor.dtype != parts[0].dtype:
                raise UserError(
                    f"{weights}: {part!r} is {tensor.dtype.name} and {names[0]!r} is {parts[0].dtype.name}; experts "
                    "are joined, so they need one dtype: save the model in one dtype first"
                )
            parts.append(tensor)
        if ".down_proj." in name:
            return _Divided(JoinedColumns(name, tuple(parts)), k)
        return JoinedRows(name, tuple((tensor, 0, shape[0]) for tensor in parts))


@dataclass(frozen=True)
class _Divided(WrappedTensor):
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
    specs: list[TensorSpec] = []
    for entry in hf_entries(source.config):
        dtype, linear = source.leaves[entry.path].dtype, entry.path.split("/")[-2]
        if entry.path == ROUTER:
            name = f"{_MOE.format(entry.layer)}.gate.weight"
            specs.append(TensorSpec(name, entry.layout.stored, dtype, stored_blocks(source, entry)))
        elif linear in _PARTS:
            specs += _expert_tensors(source, entry, _PARTS[linear])
        else:
            specs.append(TensorSpec(entry.name, entry.layout.stored, dtype, stored_blocks(source, entry)))
    return specs


def _expert_tensors(source: ParamSource, entry: Entry, part: str) -> list[TensorSpec]:
    """One matrix of a layer as those of its experts, which are written one after the other."""
    moe = source.config.experts
    assert moe is not None
    size = source.config.feed_forward.size // moe.num_experts
    dtype, shape = source.leaves[entry.path].dtype, entry.layout.stored
    shape = (shape[0], size) if part == "w2" else (size, shape[1])
    pieces = _pieces(source, entry, part == "w2", size, moe.top_k[0])
    names = [f"{_MOE.format(entry.layer)}.experts.{expert}.{part}.weight" for expert in range(moe.num_experts)]
    return [TensorSpec(name, shape, dtype, _Next(pieces, name == names[-1])) for name in names]


def _pieces(source: ParamSource, entry: Entry, down: bool, size: int, k: int) -> Generator[np.ndarray, None, None]:
    """The matrices of the experts of one layer; the layer's is in memory meanwhile."""
    assert entry.layer is not None
    leaf = source.read(entry.path, (slice(entry.layer, entry.layer + 1),))[0]  # down [F, D], the others [D, F]
    for start in range(0, source.config.feed_forward.size, size):
        neurons = slice(start, start + size)
        matrix = transposed(leaf[neurons] if down else leaf[:, neurons])
        yield cast(matrix.astype(np.float32) * np.float32(k), matrix.dtype, entry.name) if down else matrix


class _Next:
    """The next piece of a stream. The last one closes it: what it holds would stay until all layers are written."""

    def __init__(self, stream: Generator[np.ndarray, None, None], last: bool) -> None:
        self._stream = stream
        self._last = last

    def __iter__(self) -> Iterator[np.ndarray]:
        yield next(self._stream)
        if self._last:
            self._stream.close()


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
