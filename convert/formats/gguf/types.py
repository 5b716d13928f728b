"""GGUF's types of numbers: what they are called, how rows are packed, and tensors of them in a file.

A packed row is blocks of 32 numbers, each with a scale of its own: `gguf.quants` packs and unpacks them as llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from convert.formats.gguf.library import load_gguf
from jaxlm.errors import UserError
from jaxlm.weights.leaves import cast
from jaxlm.weights.names import Shape
from jaxlm.weights.tensors import StoredTensor, Tensor, WrappedTensor

TypeName = Literal["keep", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# What is written for a dtype that is kept.
KEPT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PLAIN: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
# general.file_type, which tools show: `LlamaFileType`.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
BLOCK = 32  # numbers of a block, in all types that are written
# Packed in fewer than eight bits, the output matrix loses most; llama.cpp's own quantiser keeps it in more bits too.
_HEAD_TYPE = "q8_0"


def file_type(name: str) -> int:
    """`general.file_type` of a file whose matrices are of a type."""
    return _FILE_TYPES[name]


def matrix_type(name: str, columns: int, is_head: bool) -> str:
    """The type of a matrix in a file of a type.

    Args:
        columns: numbers in a row, which blocks must fill: else float16.
        is_head: whether it is the output matrix, or the embedding that is also that.
    """
    if name in _PLAIN:
        return name
    if columns % BLOCK:
        return "f16"
    return _HEAD_TYPE if is_head else name


def raw_type(name: str) -> Any:
    """The number that stands for a type in a file, as `gguf` has it."""
    return load_gguf().GGMLQuantizationType[name.upper()]


def packed_bytes(name: str, shape: Shape) -> int:
    """Bytes of a tensor of a type."""
    block, size = load_gguf().GGML_QUANT_SIZES[raw_type(name)]
    return math.prod(shape) // block * size


def pack(rows: np.ndarray, name: str, tensor: str) -> np.ndarray:
    """Rows in a type, as bytes.

    Args:
        tensor: for errors.

    Raises:
        UserError: a number does not fit, or is not finite where rows are packed.
    """
    if name in _PLAIN:
        try:
            return np.ascontiguousarray(cast(rows, _PLAIN[name], tensor)).view(np.uint8)
        except UserError as error:
            text = str(error).replace("--dtype float16", "--type f16").replace("use bfloat16", "use --type bf16")
            raise UserError(text) from None
    numbers = rows.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise UserError(f"--type {name}: {tensor} holds numbers that are not finite, which cannot be packed")
    packed: np.ndarray = load_gguf().quants.quantize(numbers, raw_type(name))
    return packed


def open_tensor(name: str, file: Path, offset: int, shape: Shape, kind: Any) -> Tensor:
    """A tensor in a file: as it is stored, or unpacked to float32.

    Args:
        offset: where it begins, in bytes.
        kind: its type, as `gguf` has it.

    Raises:
        UserError: a type that is not unpacked.
    """
    plain = _PLAIN.get(kind.name.lower())
    if plain is not None:
        return StoredTensor(name, file, offset, shape, plain)
    library = load_gguf()
    block, size = library.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise UserError(
            f"{file}: tensor {name!r} of shape {list(shape)} is {kind.name}, whose blocks have {block} numbers"
        )
    try:
        library.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise UserError(f"{file}: tensor {name!r} is {kind.name}, which is not read") from None
    return PackedTensor(name, file, offset, shape, kind)


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A matrix in blocks, unpacked to float32 when it is read.

    Args:
        offset: where it begins, in bytes.
        kind: its type, as `gguf` has it.
    """

    name: str
    file: Path
    offset: int
    shape: Shape
    kind: Any
    dtype = np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *self.shape[1:])
        if 0 in shape:
            return np.empty(shape, np.float32)
        block, size = load_gguf().GGML_QUANT_SIZES[self.kind]
        row_bytes = math.prod(self.shape[1:]) // block * size
        stored = StoredTensor(self.name, self.file, self.offset, (self.shape[0], row_bytes), np.dtype(np.uint8))
        numbers: np.ndarray = load_gguf().quants.dequantize(stored.rows(start, stop), self.kind)
        return numbers.reshape(shape)


@dataclass(frozen=True)
class UnpackedRows(WrappedTensor):
    """A tensor as float32, where others of the same leaf are packed."""

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.tensor.rows(start, stop).astype(np.float32)


def in_one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that are stacked or joined, which need one dtype: as they are where they share it, else float32."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return list(tensors)
    return [UnpackedRows(tensor) for tensor in tensors]
