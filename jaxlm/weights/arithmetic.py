"""Sums, differences and casts of blocks of weights.

numpy calculates float16 in software, several times slower than a disk writes it. XLA uses the processor's instructions
for it: the same numbers, checked by a test. It is used where it cannot be in the way, in a process of `convert`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.errors import UserError

FLOAT16 = np.dtype(np.float16)
# Infinity of the 16-bit floats as an integer; NaNs are above it, and the negative ones 0x8000 higher.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
# Elements given to XLA at a time, and the least for which that is worth a call.
_CHUNK = 1 << 18
_SMALL = 1 << 12


def combine(first: np.ndarray, second: np.ndarray, subtract: bool, name: str) -> np.ndarray:
    """first + second or first - second, rounded once to their common dtype, as torch does on a CPU.

    Args:
        name: the tensor's, for the error.

    Raises:
        UserError: when a number of the result is not finite.
    """
    assert first.dtype == second.dtype and first.shape == second.shape, name
    if first.dtype == FLOAT16 and first.size >= _SMALL and use_xla():
        result = by_xla("subtract" if subtract else "add", FLOAT16, first, second)
    else:
        result = combine_plain(first, second, subtract)
    if not all_finite(result):
        what = "difference" if subtract else "sum"
        raise UserError(
            f"{name}: the {what} is not finite in {result.dtype.name}: either a model holds infinities or NaNs, or the "
            "two do not belong together; where the numbers are only too large, use --dtype float32"
        )
    return result


def combine_plain(first: np.ndarray, second: np.ndarray, subtract: bool) -> np.ndarray:
    """The same by numpy."""
    calculate = np.subtract if subtract else np.add
    with np.errstate(over="ignore", invalid="ignore"):
        if first.dtype.name != "bfloat16":
            result: np.ndarray = calculate(first, second)
            return result
        # Rounded once all the same: float32 holds the sum of two of them to more than twice their digits.
        wide = first.astype(np.float32)
        return calculate(wide, second, out=wide).astype(first.dtype)


def convert_dtype(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`array` rounded to `dtype`, to infinity where it is too large."""
    if array.dtype == dtype:
        return array
    if FLOAT16 in (array.dtype, dtype) and array.size >= _SMALL and use_xla():
        return by_xla(dtype.name, dtype, array)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


@functools.cache
def use_xla() -> bool:
    """Whether XLA may calculate here: not in a process that uses JAX for something else, maybe on other devices."""
    if "jax" in sys.modules:
        return False
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator is not needed for this, so none is taken
    return True


def by_xla(operation: str, dtype: np.dtype[Any], *arrays: np.ndarray) -> np.ndarray:
    """'add', 'subtract' or the name of a dtype to cast to, element by element, on the CPU."""
    function = _jitted(operation)
    flat = [array.reshape(-1) for array in arrays]
    out = np.empty(flat[0].size, dtype)
    for start in range(0, out.size, _CHUNK):
        out[start : start + _CHUNK] = function(*(array[start : start + _CHUNK] for array in flat))
    return out.reshape(arrays[0].shape)


@functools.cache
def _jitted(operation: str) -> Callable[..., Any]:
    import jax

    functions: dict[str, Callable[..., Any]] = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b}
    return jax.jit(functions.get(operation, lambda a: a.astype(operation)))


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN."""
    infinity = _INFINITY.get(array.dtype.name)
    if infinity is None:
        return bool(np.isfinite(array).all())
    if array.size == 0:
        return True
    return int(array.view(np.int16).max()) < infinity and int(array.view(np.uint16).max()) < 0x8000 + infinity
