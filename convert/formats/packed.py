"""Hugging Face directories with linear layers packed by GPTQ, AWQ or compressed-tensors, read as what they stand for.

A matrix [outputs, inputs] is whole numbers, several in an int32, from the lowest bits up, with scales and zeros for
groups of inputs:  weight = scale * (number - zero), in float32.

    GPTQ   qweight [in / n, out], qzeros [groups, out / n], scales [groups, out], g_idx [in]: the group of each input.
           Zeros are stored less 1, but in checkpoint_format gptq_v2.
    AWQ    qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; the eight outputs of an int32 stand in
           the order 0 2 4 6 1 3 5 7 (version gemm).
    pack-quantized (compressed-tensors)   weight_packed [out, in / n], weight_scale [out, groups], weight_shape [2],
           weight_zero_point [out / n, groups], weight_g_idx [in]; numbers and zeros are stored plus half of the range.

Sources: AutoGPTQ and GPTQModel `qlinear_torch.py`, AutoAWQ `packing_utils.py`, compressed-tensors `pack_quantized`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.weights.hf import HfSource
from jaxlm.weights.names import Shape, fused_entries, hf_entries
from jaxlm.weights.tensors import Tensor

METHODS = ("gptq", "awq", "compressed-tensors")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("float16", "bfloat16", "float32")


def packing_method(content: Mapping[str, Any]) -> str | None:
    """The method of METHODS that a config.json names; None for another, or none."""
    quantised = content.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return method if method in METHODS else None


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of int32 words along the last dim, from the lowest bits up: uint8 [..., words * 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)


@functools.lru_cache(maxsize=4)
def _whole(tensor: Tensor) -> np.ndarray:
    """A packed matrix: of inputs by outputs, while rows are outputs, so that each block of rows needs all of it."""
    return tensor.read()


@dataclass(frozen=True)
class PackedMatrix(Tensor):
    """A matrix [outputs, inputs] by GPTQ or AWQ, read as float32.

    Args:
        qweight, qzeros, scales: see this module.
        groups: of each input; None: of `group_size` one after the other.
        group_size: number of inputs.
        bits: of a number.
        zero_offset: what is added to the zeros.
        along_outputs: an int32 holds numbers of several outputs, in AWQ's order; else of several inputs.
    """

    name: str
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    groups: Tensor | None
    group_size: int
    bits: int
    zero_offset: int
    along_outputs: bool
    dtype = np.dtype(np.float32)

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.qweight.file

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        per_word = 32 // self.bits
        first, second = self.qweight.shape
        return (second * per_word, first) if self.along_outputs else (second, first * per_word)

    def rows(self, start: int, stop: int) -> np.ndarray:
        inputs = self.shape[1]
        words = _whole(self.qweight)
        if self.along_outputs:
            numbers = self._outputs(words, start, stop)
        else:
            numbers = unpack(np.ascontiguousarray(words[:, start:stop].T), self.bits).T
        zeros = self._outputs(_whole(self.qzeros), start, stop).astype(np.float32) + np.float32(self.zero_offset)
        scales = _whole(self.scales)[:, start:stop].astype(np.float32)
        group = np.arange(inputs) // self.group_size if self.groups is None else _whole(self.groups)
        return np.ascontiguousarray((scales[group] * (numbers.astype(np.float32) - zeros[group])).T)

    def _outputs(self, words: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Columns start to stop of what is packed along the outputs."""
        per_word = 32 // self.bits
        first, last = start // per_word, math.ceil(stop / per_word)
        numbers = unpack(np.ascontiguousarray(words[:, first:last]), self.bits)
        if self.along_outputs:
            place = np.argsort(_AWQ_ORDER)
            numbers = numbers.reshape(numbers.shape[0], -1, per_word)[..., place].reshape(numbers.shape)
        return numbers[:, start - first * per_word : stop - first * per_word]


@dataclass(frozen=True)
class PackedRows(Tensor):
    """A matrix [outputs, inputs] by compressed-tensors, read as float32.

    Args:
        packed, scales, zeros, groups: see this module.
        shape: of the matrix.
        bits: of a number.
        group_size: number of inputs; all for a scale of each output.
    """

    name: str
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None
    shape: Shape
    bits: int
    group_size: int
    dtype = np.dtype(np.float32)

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.packed.file

    def rows(self, start: int, stop: int) -> np.ndarray:
        inputs = self.shape[1]
        half = np.float32(1 << (self.bits - 1))
        numbers = unpack(self.packed.rows(start, stop), self.bits)[:, :inputs].astype(np.float32)
        scales = self.scales.rows(start, stop).astype(np.float32)
        group = np.arange(inputs) // self.group_size if self.groups is None else _whole(self.groups)
        if self.zeros is None:
            return (numbers - half) * scales[:, group]
        per_word = 32 // self.bits
        first, last = start // per_word, math.ceil(stop / per_word)
        zeros = unpack(np.ascontiguousarray(self.zeros.rows(first, last).T), self.bits).T
        zeros = zeros[start - first * per_word : stop - first * per_word].astype(np.float32)
        return (numbers - zeros[:, group]) * scales[:, group]


class PackedSource(HfSource):
    """A Hugging Face model whose linear layers are packed.

    Raises:
        UserError: as `HfSource`, and for numbers of bits, orders and schemes that are not read.
    """

    def prepare_files(self, weights: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        settings, where = content["quantization_config"], self.path / "config.json"
        method = settings["quant_method"]
        if method == "compressed-tensors":
            _unpack_rows(where, weights, settings, tensors)
        else:
            _unpack_matrices(where, weights, settings, tensors, method == "awq")
        self._drop_zero_biases(tensors)

    def kept_config(self, content: dict[str, Any]) -> dict[str, Any] | None:
        return super().kept_config({key: value for key, value in content.items() if key != "quantization_config"})

    def _drop_zero_biases(self, tensors: dict[str, Tensor]) -> None:
        """Takes out biases that the architecture does not have: AutoGPTQ writes zeros for all linear layers."""
        expected = {entry.name for entry in hf_entries(self.config)}
        expected |= {whole.name for whole in fused_entries(self.config)}
        for name in [name for name in tensors if name.endswith(".bias") and name not in expected]:
            if not tensors[name].read().any():
                del tensors[name]


def _take(weights: Path, tensors: dict[str, Tensor], name: str, dtypes: tuple[str, ...], num_dims: int) -> Tensor:
    """A tensor, taken out; UserError where it is missing or of another kind."""
    if name not in tensors:
        raise UserError(f"{weights}: tensor {name!r} is missing; copy the model again")
    tensor = tensors.pop(name)
    if tensor.dtype.name not in dtypes or len(tensor.shape) != num_dims:
        raise UserError(
            f"{weights}: tensor {name!r} is {tensor.dtype.name} of shape {list(tensor.shape)}; expected "
            f"{' or '.join(dtypes)} in {num_dims} dims"
        )
    return tensor


def _number(where: Path, settings: Mapping[str, Any], *names: str) -> int:
    value = next((settings[name] for name in names if name in settings), None)
    if type(value) is not int:
        raise UserError(f"{where}: quantization_config.{names[0]} is {value!r}; expected a whole number")
    return value


def _unpack_matrices(
    where: Path, weights: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor], awq: bool
) -> None:
    """Puts matrices in the place of the tensors of GPTQ or AWQ."""
    bits, size = _number(where, settings, "bits", "w_bit"), _number(where, settings, "group_size", "q_group_size")
    version = str(settings.get("version", "gemm")).lower()
    if bits not in ((4,) if awq else (4, 8)) or (awq and version != "gemm"):
        raise UserError(
            f"{where}: quantization_config has {bits} bits{f', version {version!r}' if awq else ''}; read are "
            f"{'4 bits, version gemm' if awq else '4 and 8 bits'}"
        )
    form = str(settings.get("checkpoint_format", "gptq"))
    if not awq and form not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: quantization_config.checkpoint_format is {form!r}; read are gptq and gptq_v2")
    per_word = 32 // bits
    for packed in [name for name in tensors if name.endswith(".qweight")]:
        layer = packed.removesuffix(".qweight")
        qweight = _take(weights, tensors, packed, ("int32",), 2)
        qzeros = _take(weights, tensors, f"{layer}.qzeros", ("int32",), 2)
        scales = _take(weights, tensors, f"{layer}.scales", _FLOATS, 2)
        groups = _take(weights, tensors, f"{layer}.g_idx", ("int32",), 1) if f"{layer}.g_idx" in tensors else None
        inputs = qweight.shape[0] * (1 if awq else per_word)
        matrix = PackedMatrix(
            f"{layer}.weight",
            qweight,
            qzeros,
            scales,
            groups,
            inputs if size == -1 else size,
            bits,
            0 if awq or form == "gptq_v2" else 1,
            awq,
        )
        outputs, count = matrix.shape[0], math.ceil(inputs / matrix.group_size) if matrix.group_size > 0 else 0
        if scales.shape != (count, outputs) or qzeros.shape != (count, outputs // per_word):
            raise UserError(
                f"{weights}: {layer} has qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales "
                f"{list(scales.shape)}, which do not go together with groups of {size}"
            )
        if groups is not None and (groups.shape != (inputs,) or not _are_below(groups, count)):
            raise UserError(f"{weights}: {layer}.g_idx names groups that are not there; copy the model again")
        tensors[matrix.name] = matrix


def _are_below(groups: Tensor, count: int) -> bool:
    numbers = groups.read()
    return bool(((numbers >= 0) & (numbers < count)).all())


def _unpack_rows(where: Path, weights: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts matrices in the place of the tensors of compressed-tensors."""
    schemes = settings.get("config_groups")
    schemes = list(schemes.values()) if isinstance(schemes, dict) else []
    described = [scheme.get("weights") for scheme in schemes if isinstance(scheme, dict)]
    form, scheme = settings.get("format"), described[0] if described else None
    if form != "pack-quantized" or len(described) != 1 or not isinstance(scheme, dict):
        raise UserError(
            f"{where}: quantization_config has the format {form!r} and {len(described)} groups; one group of "
            "pack-quantized weights is read"
        )
    bits, strategy = _number(where, scheme, "num_bits"), scheme.get("strategy")
    if bits not in (4, 8) or strategy not in ("group", "channel") or scheme.get("type") != "int":
        raise UserError(
            f"{where}: quantization_config has weights of {bits} bits, type {scheme.get('type')!r}, strategy "
            f"{strategy!r}; read are int of 4 and 8 bits by group or channel"
        )
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        layer = name.removesuffix("_packed")
        packed = _take(weights, tensors, name, ("int32",), 2)
        scales = _take(weights, tensors, f"{layer}_scale", _FLOATS, 2)
        rows, columns = (int(size) for size in _take(weights, tensors, f"{layer}_shape", ("int64", "int32"), 1).read())
        zeros = None
        if not scheme.get("symmetric", True):
            zeros = _take(weights, tensors, f"{layer}_zero_point", ("int32",), 2)
        groups = _take(weights, tensors, f"{layer}_g_idx", ("int32",), 1) if f"{layer}_g_idx" in tensors else None
        size = columns if strategy == "channel" else _number(where, scheme, "group_size")
        if packed.shape != (rows, math.ceil(columns * bits / 32)) or scales.shape != (rows, math.ceil(columns / size)):
            raise UserError(
                f"{weights}: {layer} has shape {[rows, columns]}, packed {list(packed.shape)} and scales "
                f"{list(scales.shape)}, which do not go together with groups of {size}"
            )
        tensors[layer] = PackedRows(layer, packed, scales, zeros, groups, (rows, columns), bits, size)
