"""Weights rounded to 8 or 4 bits, in host memory, and back. Needs no JAX.

int8: one factor for each output. nf4: QLoRA's four bits (arXiv:2305.14314), as bitsandbytes computes them
(`kQuantizeBlockwise`, `dQuantizeNF4`, `quantize_4bit` with `compress_statistics`): blocks of 64 inputs of one output,
whose largest magnitudes are themselves rounded to 8 bits in blocks of 256, after their mean was taken away.

Codes and magnitudes have bitsandbytes' bits, with two exceptions: a block of zeros has the code of zero (there it has
the code of -1, which the rounded magnitude makes something else than zero), and where the number of inputs is not a
multiple of 64, blocks end with the inputs of an output instead of going on with the next one's. The place of a code in
memory is another: the first half of a block is in the upper bits, the second in the lower ones, so that a block is
unpacked without moving numbers, and blocks are a dim of their own, along which devices share a weight.

Shapes: I inputs, O outputs, N = ceil(I / 64) blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")
# Raised when the same weights would get other bits: part of what tells one rounding from another.
VERSIONS: Mapping[Kind, int] = {"int8": 1, "nf4": 1}

BLOCK, NESTED_BLOCK = 64, 256
# The values of the codes, and what lies between them (bitsandbytes, `get_4bit_type` and `dQuantizeNF4`).
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BETWEEN = np.array(
    [
        -0.8480964004993439,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967943489551544,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.1202552504837513,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634166240692,
        0.6427869200706482,
        0.8614784181118011,
    ],
    np.float32,
)
ZERO = 7  # the code of 0.0
SLAB = 1 << 20  # weights that are worked on at a time: they stay in the cache


class Part(NamedTuple):
    """One array of a rounded weight of one layer."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def parts_of(kind: Kind, shape: tuple[int, ...], in_dims: int) -> dict[str, Part]:
    """The arrays that a weight [*in, *out] of one layer becomes, by name, in the order in which they are stored."""
    inputs, outputs = math.prod(shape[:in_dims]), math.prod(shape[in_dims:])
    if kind == "int8":
        return {
            "values": Part(shape, np.dtype(np.int8)),
            "factors": Part(shape[in_dims:], np.dtype(np.float32)),
        }
    blocks = -(-inputs // BLOCK)
    return {
        "codes": Part((blocks, BLOCK // 2, outputs), np.dtype(np.uint8)),
        "absmax": Part((blocks, outputs), np.dtype(np.uint8)),
        "nested_absmax": Part((-(-blocks * outputs // NESTED_BLOCK),), np.dtype(np.float32)),
        "nested_offset": Part((1,), np.dtype(np.float32)),
    }


def quantize(kind: Kind, kernel: np.ndarray, in_dims: int) -> dict[str, np.ndarray]:
    """The arrays of `parts_of` for a weight [*in, *out] in any float dtype."""
    if kind == "int8":
        kernel = kernel.astype(np.float32)
        largest = np.abs(kernel).max(axis=tuple(range(in_dims)))
        factors = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
        return {"values": np.rint(kernel / factors).astype(np.int8), "factors": factors}
    matrix = kernel.reshape(math.prod(kernel.shape[:in_dims]), -1)
    codes, absmax = _nf4_blocks(matrix)
    rounded, nested, offset = nest(absmax)
    return {"codes": codes, "absmax": rounded, "nested_absmax": nested, "nested_offset": offset}


def dequantize(kind: Kind, parts: Mapping[str, np.ndarray], shape: tuple[int, ...], in_dims: int) -> np.ndarray:
    """The weight [*in, *out] in float32 that the arrays of one layer stand for."""
    if kind == "int8":
        return parts["values"].astype(np.float32) * parts["factors"]
    inputs, outputs = math.prod(shape[:in_dims]), math.prod(shape[in_dims:])
    absmax = unnest(parts["absmax"], parts["nested_absmax"], parts["nested_offset"])
    codes = parts["codes"]
    values = np.empty((codes.shape[0], BLOCK, outputs), np.float32)
    np.take(NF4, codes >> 4, out=values[:, : BLOCK // 2], mode="clip")
    np.take(NF4, codes & 15, out=values[:, BLOCK // 2 :], mode="clip")
    values *= absmax[:, None]
    return values.reshape(-1, outputs)[:inputs].reshape(shape)


def _nf4_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, 32, O] and magnitudes [N, O] float32 of a matrix [I, O]."""
    inputs, outputs = matrix.shape
    count = -(-inputs // BLOCK)
    codes = np.empty((count, BLOCK // 2, outputs), np.uint8)
    absmax = np.empty((count, outputs), np.float32)
    step = max(1, SLAB // (BLOCK * outputs))
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = matrix[start * BLOCK : stop * BLOCK].astype(np.float32)
        missing = (stop - start) * BLOCK - len(part)
        if missing:
            part = np.concatenate([part, np.zeros((missing, outputs), np.float32)])
        blocks = part.reshape(-1, BLOCK, outputs)
        largest = absmax[start:stop]
        np.abs(blocks).max(axis=1, out=largest)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / largest
        blocks = blocks * np.where(largest > 0, inverse, np.float32(0))[:, None]
        each = np.zeros(blocks.shape, np.uint8)
        for value in _BETWEEN:
            each += blocks > value
        codes[start:stop] = each[:, : BLOCK // 2] << 4 | each[:, BLOCK // 2 :]
    return codes, absmax


# --- magnitudes of blocks, themselves in 8 bits -----------------------------------------------------------------------


@cache
def dynamic_map() -> np.ndarray:
    """The 256 values of 8 bits whose exponent has as many bits as it needs, rising, float32.

    Source: bitsandbytes, `create_dynamic_map` (arXiv:2110.02861): below each power of ten half as many fractions.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        # As torch.linspace(0.1, 1, count + 1) in float32: from both ends, multiplied and added in one (on processors
        # with AVX2, where published models were made; elsewhere some values differ in their last bit).
        start, step = np.float32(0.1).astype(np.float64), (np.float32(1) - np.float32(0.1)) / np.float32(count)
        numbers = np.arange(count + 1)
        from_start, from_end = (
            start + step.astype(np.float64) * numbers,
            1 - step.astype(np.float64) * (count - numbers),
        )
        bounds = np.where(numbers < (count + 1) // 2, from_start, from_end).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*map(float, scaled), *map(float, -scaled)]
    return np.sort(np.array(values, np.float32))


def nest(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Magnitudes [N, O] float32 as 8 bits [N, O], the largest of each 256 of them, and their mean.

    They are counted output by output, as bitsandbytes has them. The mean is formed in float64 and rounded.
    """
    flat = np.ascontiguousarray(absmax.T).reshape(-1)
    offset = np.float32(flat.mean(dtype=np.float64))
    blocks = -(-flat.size // NESTED_BLOCK)
    padded = np.zeros(blocks * NESTED_BLOCK, np.float32)
    padded[: flat.size] = flat - offset
    centred = padded.reshape(blocks, NESTED_BLOCK)
    largest = np.abs(centred).max(axis=1)
    inverse = np.divide(np.float32(1), largest, out=np.zeros_like(largest), where=largest > 0)
    values = dynamic_map()
    between = (values[:-1] + values[1:]) * np.float32(0.5)
    codes = np.searchsorted(between, centred * inverse[:, None], side="left").astype(np.uint8)
    rounded = codes.reshape(-1)[: flat.size].reshape(absmax.shape[1], absmax.shape[0]).T
    return np.ascontiguousarray(rounded), largest, np.array([offset])


def unnest(rounded: np.ndarray, nested: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The magnitudes [N, O] float32 that `nest` rounded."""
    count, outputs = rounded.shape
    values = dynamic_map()[rounded.T.reshape(-1)]
    values *= np.repeat(nested, NESTED_BLOCK)[: values.size]
    values += offset
    return values.reshape(outputs, count).T
