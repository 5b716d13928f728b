"""MindFormers models in MindSpore's formats: `.ckpt` or safetensors files, full models and LoRA adapters.

Names differ from HF's, layouts do not (MindFormers rotates halves, too). Three things to know:

- A checkpoint of a training run also holds optimizer moments, step counters and caches: those are skipped by name.
- `w_qkv` and `w_gate_hidden` hold wq, wk, wv and w1, w3 below each other, either whole (`groups` 1) or interleaved in
  as many groups as it was trained with tensor parallelism; the file does not say which.
- There is no configuration in it. It comes from `config.json` or MindFormers' YAML beside it, or from the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.transforms.experts import DenseSource, dense_first
from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.adapters import linears_of, resolve_lora
from jaxlm.models.families import SHAPES, family_of, write_config
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder
from jaxlm.tokenizer import find_tokenizer_files
from jaxlm.weights.ahead import read_ahead
from jaxlm.weights.hf import (
    StackedTensors,
    check_num_layers,
    copy_files,
    drop_tied_head,
    hf_config_for,
    match_tensors,
    parse_hf_config,
    split_fused,
)
from jaxlm.weights.leaves import ParamSource, stored_blocks
from jaxlm.weights.mindspore_ckpt import CkptWriter, is_ckpt, read_ckpt
from jaxlm.weights.names import (
    Entry,
    adapter_shapes,
    leaf_shapes,
    peft_entries,
    stored_entries,
)
from jaxlm.weights.output import Advance
from jaxlm.weights.partition import write_patterns
from jaxlm.weights.safetensors import read_safetensors
from jaxlm.weights.tensors import StoredTensor, Tensor

# Linear layers; MindFormers took Meta's names for them.
_LINEARS = {
    "self_attn/q_proj": "attention.wq",
    "self_attn/k_proj": "attention.wk",
    "self_attn/v_proj": "attention.wv",
    "self_attn/o_proj": "attention.wo",
    "mlp/gate_proj": "feed_forward.w1",
    "mlp/up_proj": "feed_forward.w3",
    "mlp/down_proj": "feed_forward.w2",
}
# `Row.path` -> the name.
NAMES: dict[str, str] = {
    "embed_tokens/embedding": "model.tok_embeddings.embedding_weight",
    "input_layernorm/scale": "model.layers.{}.attention_norm.weight",
    "post_attention_layernorm/scale": "model.layers.{}.ffn_norm.weight",
    "norm/scale": "model.norm_out.weight",
    "lm_head/kernel": "lm_head.weight",
    **{f"{path}/kernel": f"model.layers.{{}}.{name}.weight" for path, name in _LINEARS.items()},
    **{f"{path}/bias": f"model.layers.{{}}.{name}.bias" for path, name in _LINEARS.items()},
}
# Linear layers that hold several of ours below each other: name, parts, in this order.
JOINED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.layers.{}.attention.w_qkv", ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")),
    ("model.layers.{}.feed_forward.w_gate_hidden", ("mlp/gate_proj", "mlp/up_proj")),
)

FILE_NAME = "model.ckpt"
PATTERNS = "patterns"  # the folder of a model of experts
# What MindSpore and MindFormers save beside the parameters of the network.
_SKIPPED = re.compile(
    r"(adam_[mv]|adamw?_[mv]|moments?[12]?|moment[12]|accu_grads?|accum|master|main_params?|fp32_params?)\..*"
    r"|.*[._](key_past|value_past|key_cache|value_cache|batch_valid_length|freqs_cis|freqs_cos|freqs_sin)"
    r"|(epoch_num|step_num|cur_epoch_num|cur_step_num|current_iterator_step|last_overflow_iterator_step|loss_scale|"
    r"scale_sense|learning_rate|lr|weight_decay|global_step|global_batch_size|data_parallel|model_parallel|"
    r"beta[12]_power|random_op|append_info|network_config|has_trained_epoches|has_trained_steps)"
)
_LORA = re.compile(r"(?P<linear>.*)\.(?:tk|mindpet)_delta_lora_(?P<factor>[ab])", re.IGNORECASE)
# MindFormers' first converter forgot to rename the embedding.
_ALIASES = {"model.tok_embeddings.weight": "model.tok_embeddings.embedding_weight"}
# lora_alpha of MindFormers' published configurations; the files do not record it.
DEFAULT_ALPHA = 16.0
MAX_YAML_BYTES = 1 << 20
_RANK_FOLDER = re.compile(r"rank_\d+")
MERGE_RANKS = (
    "merge the parts first, in MindSpore: mindspore.transform_checkpoints(SOURCE_DIR, OUT_DIR, 'model_', "
    "src_strategy_file, None)"
)


def find_files(path: Path) -> list[Path]:
    """The MindSpore files that a path means: itself, or those in a directory; empty when there are none.

    Raises:
        UserError: for a directory with one folder per rank, or with several checkpoints.
    """
    if path.is_file():
        return [path] if path.suffix in (".ckpt", ".safetensors") else []
    ranks = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and _RANK_FOLDER.fullmatch(entry.name))
    if ranks:
        raise UserError(f"{path}: holds one part per rank ({ranks[0]}, …), not a whole model; {MERGE_RANKS}")
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and "strategy" not in entry.name)
    checkpoints = [file for file in files if file.suffix == ".ckpt" and is_ckpt(file)]
    if len(checkpoints) > 1:
        names = ", ".join(file.name for file in checkpoints[:4])
        raise UserError(f"{path}: holds {len(checkpoints)} MindSpore checkpoints ({names}, …); name one of them")
    return checkpoints or [file for file in files if file.suffix == ".safetensors"]


def read_files(files: list[Path], check: bool = True) -> dict[str, StoredTensor]:
    """The parameters in MindSpore files by name, without what belongs to the optimizer or the run.

    Args:
        check: see `read_ckpt`.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in (read_ckpt(file, check) if file.suffix == ".ckpt" else read_safetensors(file)).items():
            if _SKIPPED.fullmatch(name):
                continue
            name = _ALIASES.get(name, name)
            if name in tensors:
                raise UserError(
                    f"{file}: holds {name!r}, which {tensors[name].file.name} holds too; remove one of them"
                )
            tensors[name] = tensor
    return tensors


def looks_like_mindspore(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are MindFormers', of a model or an adapter."""
    return has_embedding(tensors) or is_lora(tensors)


def has_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a whole model is there, and not only an adapter."""
    return NAMES["embed_tokens/embedding"] in tensors


def is_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any name is that of a LoRA factor."""
    return any(_LORA.fullmatch(name) for name in tensors)


class MindSporeSource(StackedTensors):
    """A model in MindSpore files, read without loading it.

    Args:
        path: the file or its directory.
        config: a known shape by name, a config.json, or MindFormers' YAML; None takes what lies beside the file.
        groups: how many times wq, wk, wv (and w1, w3) alternate in concatenated tensors.

    Raises:
        UserError: when there is no configuration, or a tensor is missing, unexpected or of another shape than it says.
    """

    def __init__(self, path: Path, config: str | Path | None = None, groups: int = 1) -> None:
        super().__init__()
        self.path = path
        files = find_files(path)
        if not files:
            raise UserError(f"{path}: holds no MindSpore checkpoint (.ckpt or .safetensors)")
        directory = path if path.is_dir() else path.parent
        self.tokenizer_dir = directory
        self.tokenizer_files = find_tokenizer_files(directory)
        tensors = read_files(files)
        if is_lora(tensors):
            raise UserError(
                f"{files[0]}: holds LoRA factors; take them out as an adapter (convert mindspore-to-hf "
                f"{shlex.quote(str(files[0]))} OUT --lora --base BASE) and open the base model itself"
            )
        self.config, self.hf_config = find_config(directory, config, tensors)
        check_num_layers(files[0], self.config.num_layers, len(tensors))
        split: dict[str, Tensor] = dict(tensors)
        #: Whether tensors were concatenated, so that `groups` mattered.
        self.joined = _split_joined(files[0], split, self.config, groups)
        #: What the format does not say and was taken for granted, in words.
        self.assumed: list[str] = []
        if self.joined:
            how = "whole, one below the other" if groups == 1 else f"interleaved in {groups} groups"
            self.assumed.append(f"wq, wk, wv in w_qkv lie {how} (the file does not say it; another: --groups N)")
        drop_tied_head(files[0], split, NAMES["lm_head/kernel"], NAMES["embed_tokens/embedding"], self.config)
        entries = _entries(self.config)
        try:
            match_tensors(files[0], split, entries)
        except UserError as error:
            rank = next((part for part in path.absolute().parts if _RANK_FOLDER.fullmatch(part)), None)
            if rank is None:
                raise
            raise UserError(f"{error}; {rank} holds the part of one rank: {MERGE_RANKS}") from None
        self.add(files[0], leaf_shapes(self.config), split, entries)


def _entries(config: DecoderSpec) -> list[Entry]:
    return stored_entries(config, NAMES, "MindSpore's")


def _joined_parts(config: DecoderSpec, groups: int) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """The name of each concatenated tensor that the model may have, and its parts: (name, rows of one group)."""
    rows = {entry.path.removeprefix("layers/"): entry.layout.stored[0] for entry in _entries(config)}
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
        for joined, linears in JOINED:
            paths = [f"{linear}/{leaf}" for linear in linears]
            if not all(path in rows for path in paths):
                continue
            for path in paths:
                if rows[path] % groups:
                    raise UserError(f"--groups {groups}: does not divide the {rows[path]} rows of {path}")
            for layer in range(config.num_layers):
                parts = [(NAMES[path].format(layer), rows[path] // groups) for path in paths]
                yield f"{joined.format(layer)}.{suffix}", tuple(parts)


def _split_joined(where: Path, tensors: dict[str, Tensor], config: DecoderSpec, groups: int) -> bool:
    """Replaces concatenated tensors by their parts; whether there were any."""
    joined = [split_fused(where, tensors, name, parts, groups) for name, parts in _joined_parts(config, groups)]
    return any(joined)


# ---- the configuration


def find_config(
    directory: Path, given: str | Path | None, tensors: Mapping[str, Tensor]
) -> tuple[DecoderSpec, dict[str, Any] | None]:
    """The model's shape and, when it comes from a config.json, that file's content.

    Args:
        given: a known shape by name, or a file; None looks for one in `directory`.
    """
    if given is not None and str(given) in SHAPES:
        return SHAPES[str(given)], None
    if given is not None:
        file = Path(given)
        if not file.is_file():
            raise UserError(
                f"--config {given}: is neither a file (config.json, MindFormers' YAML) nor a known shape: "
                f"{', '.join(SHAPES)}"
            )
    else:
        candidates = [directory / "config.json"] if (directory / "config.json").is_file() else []
        candidates = candidates or [
            path for path in sorted(directory.glob("*.y*ml")) if _model_section(path) is not None
        ]
        if len(candidates) != 1:
            there = "are several configurations" if candidates else "is no config.json or MindFormers YAML"
            raise UserError(
                f"{directory}: MindSpore's checkpoints do not say the model's shape, and there {there} beside it; put "
                f"one there, or give the verb --config FILE or a known shape: {', '.join(SHAPES)}"
            )
        (file,) = candidates
    if file.suffix == ".json":
        content = read_object(file)
        return parse_hf_config(file, content), content
    section = _model_section(file)
    if section is None:
        raise UserError(f"{file}: has no model.model_config, as MindFormers' YAML files have")
    try:
        return _from_mindformers(section, tensors), None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _model_section(file: Path) -> dict[str, Any] | None:
    """`model.model_config` of a YAML file; None when it is another kind of file."""
    if file.stat().st_size > MAX_YAML_BYTES:
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from None
    section = content
    for key in ("model", "model_config"):
        section = section.get(key) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _from_mindformers(section: dict[str, Any], tensors: Mapping[str, Tensor]) -> DecoderSpec:
    """MindFormers' LlamaConfig; its defaults where the file is silent, F from the tensors."""

    def number(key: str, default: Any, kind: type = int, values: dict[str, Any] = section) -> Any:
        value: Any = values.get(key)
        value = default if value is None else value
        if kind is float and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML takes 1e-5, without a dot, for text
        known = (int, float) if kind is float else (int,)
        if type(value) not in known or not 0 < value < 1e300:
            # Not the value itself: YAML's aliases can nest it so that printing never ends.
            shown = repr(value) if type(value) in (int, float, str, bool) else f"of type {type(value).__name__}"
            raise UserError(f"model.model_config.{key} is {shown}; expected a positive number")
        return kind(value)

    def token(key: str, default: int) -> Any:
        value = section.get(key, default)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(index is not None and type(index) is not int for index in ids):
            raise UserError(f"model.model_config.{key} is not a token id")
        return tuple(ids) if isinstance(value, list) else value

    hidden, heads = number("hidden_size", 4096), number("num_heads", 32)
    if section.get("intermediate_size") is not None:
        ffn = number("intermediate_size", None)
    else:
        name = NAMES["mlp/down_proj/kernel"].format(0)
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"says no intermediate_size, and there is no matrix {name!r} to take it from")
        ffn = tensors[name].shape[1]
    method, scaling = section.get("extend_method"), section.get("scaling_factor")
    method = method.upper() if isinstance(method, str) else "NONE" if method is None else "another kind"
    theta = number("theta", 10000.0, float)
    if method == "NONE":
        rope = RopeSpec(rope_theta=theta)
    elif method == "PI":
        rope = RopeSpec(rope_type="linear", rope_theta=theta, factor=number("scaling_factor", 1.0, float))
    elif method == "LLAMA3" and isinstance(scaling, dict):
        keys = "factor", "low_freq_factor", "high_freq_factor"
        factors = {key: number(key, None, float, scaling) for key in keys}
        original = number("original_max_position_embeddings", None, int, scaling)
        rope = RopeSpec("llama3", theta, original_max_position_embeddings=original, **factors)
    else:
        raise UserError(f"extend_method is {method!r}; None, PI and LLAMA3 (with its factors) are read")
    biased = section.get("qkv_has_bias") is True
    return uniform_decoder(
        "qwen2" if biased else "llama",
        vocab_size=number("vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=number("num_layers", 32),
        num_heads=heads,
        num_kv_heads=number("n_kv_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        max_position_embeddings=number("max_position_embedding", number("seq_length", 2048)),
        norm_eps=number("rms_norm_eps", 1e-5, float),
        rope=rope,
        tied_head=section.get("tie_word_embeddings") is True,
        qkv_bias=biased,
        bos_token_id=token("bos_token_id", 1),
        eos_token_id=token("eos_token_id", 2),
        pad_token_id=token("pad_token_id", 0),
    )


# ---- adapters


class MindSporeAdapter(StackedTensors):
    """A LoRA adapter that MindFormers trained (`…_delta_lora_a`, `…_delta_lora_b`), for a base of the shape `config`.

    Args:
        alpha: the scale, which the files do not record: lora_alpha of the run's pet_config.

    Raises:
        UserError: when a factor is missing, of another shape, or of a layer that is not known.
    """

    def __init__(self, path: Path, config: DecoderSpec, alpha: float = DEFAULT_ALPHA) -> None:
        super().__init__()
        self.path = path
        self.config = config
        self.base: str | None = None
        self.peft_config: dict[str, Any] | None = None
        files = find_files(path)
        if not files:
            raise UserError(f"{path}: holds no MindSpore checkpoint (.ckpt or .safetensors)")
        directory = path if path.is_dir() else path.parent
        self.tokenizer_files = find_tokenizer_files(directory)
        where = files[0]
        linears = {
            NAMES[row.path].format(layer).removesuffix(".weight"): (linear, layer)
            for linear, row in family_of(config).linears.items()
            if row.path in NAMES
            for layer in range(config.num_layers)
        }
        factors: dict[tuple[str, int, str], StoredTensor] = {}
        for name, tensor in read_files(files).items():
            match = _LORA.fullmatch(name)
            if match is None:
                continue  # the frozen base, which MindFormers saves too unless told not to
            if match["linear"] not in linears:
                raise UserError(
                    f"{where}: {name!r} belongs to no linear layer of the base model's {config.num_layers} layers"
                )
            key = (*linears[match["linear"]], match["factor"].upper())
            if key in factors:
                raise UserError(f"{where}: {name!r} and {factors[key].name!r} are the same factor twice")
            factors[key] = tensor
        if not factors:
            raise UserError(f"{where}: holds no LoRA factors (names that end in _delta_lora_a and _delta_lora_b)")
        self.lora, self.layers = _lora_of(where, factors, config, alpha)
        specs = resolve_lora(config, self.lora, self.layers)
        entries = peft_entries(config, specs)
        tensors = {
            entry.name: factors[key] for entry in entries if (key := _factor_key(entry)) in factors
        }  # by PEFT's names: one place knows the factors' shapes
        match_tensors(where, tensors, entries)
        self.add(where, adapter_shapes(config, specs), tensors, entries)


def _factor_key(entry: Entry) -> tuple[str, int, str]:
    linear, factor = entry.path.split("/")[-2:]
    assert entry.layer is not None
    return linear, entry.layer, factor.removeprefix("lora_")


def _lora_of(
    where: Path, factors: Mapping[tuple[str, int, str], StoredTensor], config: DecoderSpec, alpha: float
) -> tuple[LoraConfig, tuple[int, ...] | None]:
    adapted = {(linear, layer) for linear, layer, _ in factors}
    targets = tuple(linear for linear in linears_of(config) if any(name == linear for name, _ in adapted))
    layers = tuple(sorted({layer for _, layer in adapted}))
    for linear in targets:
        for layer in layers:
            for factor in "AB":
                if (linear, layer, factor) not in factors:
                    raise UserError(f"{where}: layer {layer} lacks lora_{factor.lower()} of {linear}")
    first = next(tensor for (_, _, factor), tensor in factors.items() if factor == "A")
    if len(first.shape) != 2 or not 0 < first.shape[0] <= 65536:
        raise UserError(f"{where}: {first.name!r} has shape {list(first.shape)}; expected [rank, inputs]")
    lora = LoraConfig(rank=first.shape[0], alpha=alpha, dropout=0.0, targets=targets)
    return lora, None if len(layers) == config.num_layers else layers


# ---- writing


# Families of which MindFormers' LLaMA computes every model: biases and a window are keys of its YAML.
_LIKE_LLAMA = ("llama", "mistral", "qwen2")


def check_model(source: ParamSource) -> None:
    """Refuses a model that MindFormers' LLaMA, or SciMind's code, would compute in another way, with the ways out."""
    _ = source.config.uniform_layer  # which refuses layers that differ
    refusals = []
    for family in _LIKE_LLAMA:
        try:
            write_config(dataclasses.replace(source.config, family=family), "float32")
        except UserError as error:
            refusals.append(str(error).removeprefix("config.json: "))
    if len(refusals) == len(_LIKE_LLAMA):
        raise UserError(
            f"{source.path}: {refusals[0]}. MindFormers' LLaMA would compute another model; take Hugging Face's format "
            "(convert jax-to-hf)"
        )
    moe = source.config.experts
    if moe is not None and not moe.router.startswith("activation"):
        raise UserError(
            f"{source.path}: its {moe.num_experts} experts have the router {moe.router}; beside a MindSpore checkpoint "
            "there is only a place for SciMind's patterns, whose experts are chosen by activation; "
            f"{dense_first(source)}, or take the Hugging Face format (convert jax-to-hf)"
        )


def write_mindspore(
    source: ParamSource, directory: Path, advance: Advance, joined: bool = False, crc: bool = False
) -> None:
    """Writes a model as `model.ckpt`, with `config.json` and tokenizer files beside it, in one pass.

    A model of experts becomes what SciMind takes: the dense one, neurons in their original order, and a folder with a
    `patterns_{layer}.npy` for each layer. k and the tokens of modalities have no place: SciMind's code has them.

    Args:
        directory: an existing, empty directory.
        advance: called with the bytes written.
        joined: concatenates wq, wk, wv into w_qkv, and w1, w3 into w_gate_hidden (MindFormers' qkv_concat).
        crc: ends the file with its CRC-32.

    Raises:
        UserError: for a model of experts whose router does not go by activation.
    """
    check_model(source)
    moe = source.config.experts
    if moe is not None:
        order = source.partition
        if order is None:
            order = np.tile(np.arange(source.config.feed_forward.size, dtype=np.int32), (source.config.num_layers, 1))
        write_patterns(directory / PATTERNS, order, moe.num_experts)
        source = DenseSource(source, strict=False)
    entries = {entry.name: entry for entry in _entries(source.config)}
    parts_of = {}
    if joined:
        for name, parts in _joined_parts(source.config, 1):
            for part, _ in parts:
                parts_of[part] = (name, [entries[other] for other, _ in parts])
    # By name in the file: the tensors that it is made of.
    groups: dict[str, list[Entry]] = {}
    for entry in entries.values():
        name, group = parts_of.get(entry.name, (entry.name, [entry]))
        groups.setdefault(name, group)
    with (
        CkptWriter(directory / FILE_NAME, crc) as writer,
        read_ahead((name, _chained(source, group)) for name, group in groups.items()) as tensors,
    ):
        for name, blocks in tensors:
            group = groups[name]
            shape = (sum(part.layout.stored[0] for part in group), *group[0].layout.stored[1:])
            dtypes = {source.leaves[part.path].dtype for part in group}
            if len(dtypes) > 1:
                raise UserError(f"{name!r}: its parts have different dtypes; add --dtype to give them one")
            writer.write(name, shape, dtypes.pop(), blocks, advance)
    (directory / "config.json").write_text(hf_config_for(source), encoding="utf-8")
    copy_files(source.tokenizer_files, directory)


def _chained(source: ParamSource, entries: list[Entry]) -> Iterator[np.ndarray]:
    for entry in entries:
        yield from stored_blocks(source, entry)
