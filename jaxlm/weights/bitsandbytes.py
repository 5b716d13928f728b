"""Hugging Face directories whose linear layers bitsandbytes has rounded to 4 or 8 bits.

Beside the packed matrix X.weight lie, in 4 bits, X.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4 (JSON)
and, doubly quantised, .nested_absmax and .nested_quant_map; in 8 bits X.SCB (transformers' `quantizer_bnb_4bit.py`,
bitsandbytes' `QuantState.as_dict`, `Linear8bitLt`). Their numbers are read as what they stand for, in float32; those of
nf4 with blocks of 64, doubly quantised, and of int8 can be kept as they are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.nn.rounding import BLOCK, NESTED_BLOCK, NF4, Kind, dynamic_map, parts_of
from jaxlm.weights.hf import HfSource
from jaxlm.weights.leaves import Index
from jaxlm.weights.names import Shape, tensor_name
from jaxlm.weights.quantized import kernels_of, layers_of, rounding_of_original
from jaxlm.weights.tensors import Tensor
from jaxlm.weights.transpose import transposed

METHOD = "bitsandbytes"
_FLOAT32 = np.dtype(np.float32)
# The values of 8 bits come from torch.linspace, whose last bit is another on some processors.
_LAST_BITS = 4e-7


@dataclass(frozen=True)
class Rounded4(Tensor):
    """A matrix in four bits, read as float32.

    Args:
        packed: two codes a byte, the first in the upper half.
        absmax: of each block: float32, or uint8 where it is rounded too.
        values: of the codes [16].
        block: numbers in a block.
        nested: (largest of each `nested_block` magnitudes, values of their codes [256], offset); None: float32.
    """

    name: str
    shape: Shape
    packed: Tensor
    absmax: Tensor
    values: np.ndarray
    block: int
    nested: tuple[Tensor, np.ndarray, np.float32] | None = None
    nested_block: int = NESTED_BLOCK

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.packed.file

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return _FLOAT32

    def rows(self, start: int, stop: int) -> np.ndarray:
        width = self.shape[1]
        first, last = start * width, stop * width
        codes = self.codes(first, last)
        blocks = slice(first // self.block, -(-last // self.block))
        scales = np.repeat(self.magnitudes(blocks.start, blocks.stop), self.block)
        scales = scales[first - blocks.start * self.block :][: last - first]
        return (self.values[codes] * scales).reshape(stop - start, width)

    def codes(self, first: int, last: int) -> np.ndarray:
        """The codes of the numbers first to last (not included), counted through the rows."""
        low, high = first // 2, -(-last // 2)
        packed = self.packed.rows(low, high).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        return codes[first - 2 * low :][: last - first]

    def magnitudes(self, first: int, last: int) -> np.ndarray:
        """Those of blocks, float32."""
        absmax = self.absmax.rows(first, last).reshape(-1)
        if self.nested is None:
            return absmax.astype(np.float32)
        largest, values, offset = self.nested
        low = first // self.nested_block
        each = np.repeat(largest.rows(low, -(-last // self.nested_block)).reshape(-1), self.nested_block)
        return values[absmax] * each[first - low * self.nested_block :][: last - first] + offset

    def problem(self) -> str | None:
        """Why its codes cannot be kept as they are; None: they can."""
        if not np.array_equal(self.values, NF4) or self.block != BLOCK:
            return f"has blocks of {self.block} and other values than nf4 with blocks of {BLOCK}"
        if self.shape[1] % BLOCK:
            return f"has {self.shape[1]} inputs, so that blocks of {BLOCK} go on from one output to the next"
        if self.nested is None or self.nested_block != NESTED_BLOCK:
            return f"is not doubly quantised in blocks of {NESTED_BLOCK}"
        if not np.allclose(self.nested[1], dynamic_map(), rtol=_LAST_BITS, atol=0):
            return "has other values of the magnitudes' codes"
        return None

    def part(self, name: str) -> np.ndarray:
        """One of the arrays of `rounding.parts_of` for its transpose [inputs, outputs]."""
        assert self.nested is not None
        outputs, inputs = self.shape
        if name == "codes":
            codes = transposed(self.codes(0, outputs * inputs).reshape(outputs, inputs))
            blocks = codes.reshape(-1, BLOCK, outputs)
            return blocks[:, : BLOCK // 2] << 4 | blocks[:, BLOCK // 2 :]
        if name == "absmax":
            return transposed(self.absmax.read().reshape(outputs, -1))
        return self.nested[0].read() if name == "nested_absmax" else np.array(self.nested[2])


@dataclass(frozen=True)
class Rounded8(Tensor):
    """A matrix in 8 bits with the largest magnitude of each row, read as float32."""

    name: str
    values: Tensor
    largest: Tensor

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.values.shape

    @property
    def file(self) -> Path:  # type: ignore[override]
        return self.values.file

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return _FLOAT32

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values.rows(start, stop).astype(np.float32) * self._factors(start, stop)[:, None]

    def _factors(self, start: int, stop: int) -> np.ndarray:
        return self.largest.rows(start, stop).reshape(-1).astype(np.float32) / np.float32(127)

    def problem(self) -> str | None:
        """As `Rounded4.problem`."""
        return None

    def part(self, name: str) -> np.ndarray:
        """As `Rounded4.part`."""
        return transposed(self.values.read()) if name == "values" else self._factors(0, self.shape[0])


class BitsAndBytesSource(HfSource):
    """A Hugging Face directory with matrices that bitsandbytes rounded (see `weights.quantized.QuantizedSource`).

    Raises:
        UserError: when an array that belongs to a matrix is missing or does not fit, or as `HfSource`.
    """

    stays_quantized = False
    kind: Kind

    def prepare_files(self, weights: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.kind = "int8" if content["quantization_config"].get("load_in_8bit") else "nf4"
        (_join_8bit if self.kind == "int8" else _join_4bit)(weights, tensors)

    def kept_config(self, content: dict[str, Any]) -> dict[str, Any] | None:
        return super().kept_config({key: value for key, value in content.items() if key != "quantization_config"})

    @functools.cached_property
    def rounding(self) -> str:
        """Of the weights that these are the rounding of nothing more is known than what they stand for."""
        return rounding_of_original(self, self.kind)

    def check_kept(self) -> None:
        """Refuses matrices whose bits have no place in jaxlm's form.

        Raises:
            UserError: naming the first of them.
        """
        wanted = Rounded8 if self.kind == "int8" else Rounded4
        for path in kernels_of(self.config):
            for layer, (tensor, _) in self._tensors[path].items():
                name = tensor_name(self.config, path, layer)
                problem = (
                    tensor.problem()
                    if isinstance(tensor, wanted)
                    else "is a part of a tensor that was rounded as one, or was not rounded"
                )
                if problem is not None:
                    raise UserError(
                        f"model.quantize: {self.kind}: {tensor.file}: {name} {problem}; leave quantize out to use what "
                        "it stands for, or begin with the original model"
                    )

    def read_part(self, path: str, index: Index) -> np.ndarray:
        kernel, _, name = path.rpartition("/")
        info, in_dims = self.leaves[kernel], kernels_of(self.config)[kernel]
        part = parts_of(self.kind, info.shape[1:], in_dims)[name]

        def layer_part(layer: int) -> np.ndarray:
            tensor, _ = self._tensors[kernel][layer]
            assert isinstance(tensor, (Rounded4, Rounded8))
            return tensor.part(name).reshape(part.shape)

        return layers_of(layer_part, (info.shape[0], *part.shape), part.dtype, index)


def uses_bitsandbytes(content: Mapping[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes rounded the model."""
    quantization = content.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def _take(weights: Path, tensors: dict[str, Tensor], name: str, dtypes: tuple[str, ...]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise UserError(f"{weights}: tensor {name!r} is missing, without which its matrix cannot be read")
    if tensor.dtype.name not in dtypes:
        raise UserError(f"{tensor.file}: {name!r} has dtype {tensor.dtype.name}, expected {' or '.join(dtypes)}")
    return tensor


def _join_4bit(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Puts a matrix in the place of each packed one and of what lies beside it."""
    states = {}
    for name in list(tensors):
        if found := re.fullmatch(r"(.*\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)", name):
            states[found[1]] = tensors.pop(name)
    for name, stored in states.items():
        packed = _take(weights, tensors, name, ("uint8",))
        absmax = _take(weights, tensors, f"{name}.absmax", ("uint8", "float32"))
        values = _take(weights, tensors, f"{name}.quant_map", ("float32",)).read().reshape(-1)
        try:
            state = json.loads(stored.read().tobytes())
            outputs, inputs = (int(size) for size in state["shape"])
            block, nested = int(state["blocksize"]), None
            if "nested_offset" in state:
                offset, nested_block = np.float32(state["nested_offset"]), int(state["nested_blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{stored.file}: {stored.name!r}: not the description of a matrix ({error})") from None
        count = outputs * inputs
        blocks = -(-count // max(1, block))
        if "nested_offset" in state:
            largest = _take(weights, tensors, f"{name}.nested_absmax", ("float32",))
            of_codes = _take(weights, tensors, f"{name}.nested_quant_map", ("float32",)).read().reshape(-1)
            nested = largest, of_codes, offset
            fits = largest.shape == (-(-blocks // max(1, nested_block)),) and of_codes.shape == (256,)
        else:
            fits, nested_block = absmax.dtype == _FLOAT32, NESTED_BLOCK
        if min(block, count) < 1 or packed.nbytes != -(-count // 2) or absmax.shape != (blocks,) or not fits:
            raise UserError(f"{packed.file}: {name!r}: its arrays do not fit a matrix {[outputs, inputs]}")
        if values.shape != (16,):
            raise UserError(f"{packed.file}: '{name}.quant_map' has {values.size} values, expected 16")
        tensors[name] = Rounded4(name, (outputs, inputs), packed, absmax, values, block, nested, nested_block)


def _join_8bit(weights: Path, tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".SCB")]:
        largest, matrix = _take(weights, tensors, name, ("float32",)), f"{name.removesuffix('SCB')}weight"
        tensors.pop(f"{matrix}_format", None)  # rows as they are; others were in memory only
        values = _take(weights, tensors, matrix, ("int8",))
        if len(values.shape) != 2 or largest.shape != values.shape[:1]:
            raise UserError(
                f"{largest.file}: {name!r} has shape {list(largest.shape)}, its matrix {list(values.shape)}"
            )
        tensors[matrix] = Rounded8(matrix, values, largest)
