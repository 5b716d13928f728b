"""A Hugging Face directory in the form of compressed-tensors: what vLLM and SGLang load with weights of 4 or 8 bits.

Each matrix of a linear layer is rounded by itself, without data: a group's numbers are divided by its scale, the
largest of them by size over half of the range, and rounded (to even). Embedding, head, norms, biases and routers stay
as they are. Scheme w8a16 has a scale for each output, w4a16 one for each group of inputs of an output.

Source: compressed-tensors `quantization/utils`, `lifecycle/forward.py`, `compressors/pack_quantized`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.families import family_of
from jaxlm.weights.experts import own_experts
from jaxlm.weights.hf import copy_files, hf_config_for, hf_tensors
from jaxlm.weights.leaves import ParamSource, all_finite, total_bytes
from jaxlm.weights.names import fused_entries, hf_entries
from jaxlm.weights.output import Advance, tell_final
from jaxlm.weights.safetensors import write_safetensors
from jaxlm.weights.tensors import TensorSpec

Scheme = Literal["w8a16", "w4a16"]
SCHEMES: dict[Scheme, int] = {"w8a16": 8, "w4a16": 4}  # bits of a weight
GROUP_SIZE = 128
_INT32 = np.dtype(np.int32)


def scales_of(rows: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """The scale of each group: float32 [rows, groups]; that of a group of zeros is 1, as nothing is divided by 0."""
    groups = np.abs(rows.astype(np.float32)).reshape(rows.shape[0], -1, group_size).max(-1)
    scales = groups / np.float32(((1 << bits) - 1) / 2)
    return np.where(scales > 0, scales, np.float32(1))


def pack(rows: np.ndarray, scales: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Rows as int32 words [rows, columns * bits / 32].

    Args:
        scales: as they are stored, [rows, groups].
    """
    half = 1 << (bits - 1)
    groups = rows.astype(np.float32).reshape(rows.shape[0], -1, group_size)
    numbers = np.round(groups / scales.astype(np.float32)[..., None]).clip(-half, half - 1).astype(np.int64) + half
    words = numbers.reshape(rows.shape[0], -1, 32 // bits).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(words << shifts, axis=-1).view(np.int32)


def check_compressed(source: ParamSource, scheme: Scheme, group_size: int) -> None:
    """Refuses a model whose rows do not come out in whole groups.

    Raises:
        UserError: they do not, or the group size is not one that words come out in.
    """
    if group_size < 8 or group_size % 8:
        raise UserError(f"--group-size {group_size}: expected a multiple of 8, e.g. 128, 64 or 32")
    if source.config.experts is not None and family_of(source.config).experts is None:
        raise UserError(
            f"{source.path}: was divided into experts by jaxlm, which this form has no place for; convert demoefy "
            "writes the dense model"
        )
    bits = SCHEMES[scheme]
    packed = _linear_names(source)
    for tensor in hf_tensors(source):
        size = group_size if bits == 4 else 32 // bits
        if tensor.name in packed and tensor.shape[1] % size:
            raise UserError(
                f"--scheme {scheme}: {tensor.name} has rows of {tensor.shape[1]} numbers, which groups of {size} do "
                "not divide; choose a --group-size that does"
            )


def _linear_names(source: ParamSource) -> set[str]:
    """The names of the matrices of linear layers in the files: also of those that hold several, and experts'."""
    spec = source.config
    linear = {row.path for row in family_of(spec).rows if row.in_layer and row.linear}
    single = {entry.name for entry in hf_entries(spec) if any(entry.path.endswith(f"/{path}") for path in linear)}
    fused = {whole.name for whole in fused_entries(spec) if len(whole.stored) == 2}
    experts = {name for entry in own_experts(spec) for name in entry.names}
    return single | fused | experts


def compressed_tensors(source: ParamSource, scheme: Scheme, group_size: int) -> list[TensorSpec]:
    """The tensors in the form of compressed-tensors, to be read once, in this order."""
    bits, packed = SCHEMES[scheme], _linear_names(source)
    specs: list[TensorSpec] = []
    # Rows are read twice: for the scales, and to be divided by them.
    for first, second in zip(hf_tensors(source), hf_tensors(source), strict=True):
        if first.name not in packed:
            specs.append(first)
            continue
        rows, columns = first.shape
        size = group_size if bits == 4 else columns
        groups = columns // size
        specs += [
            TensorSpec(f"{first.name}_scale", (rows, groups), first.dtype, _scales(first, bits, size)),
            TensorSpec(f"{first.name}_packed", (rows, columns * bits // 32), _INT32, _packed(second, bits, size)),
            TensorSpec(f"{first.name}_shape", (2,), np.dtype(np.int64), [np.array([rows, columns], np.int64)]),
        ]
    return specs


def _scales(tensor: TensorSpec, bits: int, group_size: int) -> Iterator[np.ndarray]:
    for rows in tensor.blocks:
        if not all_finite(rows):
            raise UserError(f"{tensor.name} holds numbers that are not finite, which cannot be rounded")
        yield _stored(scales_of(rows, bits, group_size), tensor)


def _stored(scales: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    """Scales in the dtype of the files; one that would be 0 there is the smallest number instead."""
    smallest = np.finfo(np.float16).smallest_subnormal if tensor.dtype == np.float16 else np.float32(1e-38)
    return np.maximum(scales, np.float32(smallest)).astype(tensor.dtype)


def _packed(tensor: TensorSpec, bits: int, group_size: int) -> Iterator[np.ndarray]:
    for rows in tensor.blocks:
        yield pack(rows, _stored(scales_of(rows, bits, group_size), tensor), bits, group_size)


def quantization_config(source: ParamSource, scheme: Scheme, group_size: int) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    bits = SCHEMES[scheme]
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if bits == 4 else "channel",
        "group_size": group_size if bits == 4 else None,
        "dynamic": False,
        "observer": "minmax",
        "actorder": None,
        "block_structure": None,
    }
    routers = [row.hf for row in family_of(source.config).rows if row.path == "mlp/router"]
    has_router = source.config.experts is not None
    router = [f"re:.*{name.removesuffix('.weight').rpartition('.')[2]}$" for name in routers] if has_router else []
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *router],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


class _Scaled:
    """An `advance` that tells of the source's bytes, of which fewer are written.

    Args:
        ratio: bytes of the source for each that is written.
    """

    def __init__(self, advance: Advance, ratio: float) -> None:
        self._advance, self._ratio = advance, ratio
        self._written = 0

    def __call__(self, nbytes: int) -> None:
        before = round(self._written * self._ratio)
        self._written += nbytes
        self._advance(round(self._written * self._ratio) - before)

    def final(self, path: Path, end: int | None) -> None:
        """See `jaxlm.weights.output.Watcher`."""
        tell_final(self._advance, path, end)


def write_compressed(
    source: ParamSource, directory: Path, scheme: Scheme, group_size: int, shard_size: int, advance: Advance
) -> None:
    """Writes a model, one block of rows at a time.

    Args:
        directory: an existing, empty directory.
        group_size: number of inputs that share a scale, in w4a16.
        shard_size: bytes of tensors in a file.
        advance: called with the bytes written.

    Raises:
        UserError: see `check_compressed`, and for numbers that are not finite.
    """
    check_compressed(source, scheme, group_size)
    specs = compressed_tensors(source, scheme, group_size)
    written = sum(spec.nbytes for spec in specs)
    write_safetensors(directory, "model", specs, shard_size, _Scaled(advance, total_bytes(source.leaves) / written))
    config = json.loads(hf_config_for(source))
    config["quantization_config"] = quantization_config(source, scheme, group_size)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    copy_files(source.tokenizer_files, directory)
