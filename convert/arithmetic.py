"""Sums and differences of blocks of weights, in the weights' own dtype."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.tensors import BFLOAT16
from jaxlm.errors import UserError

# Infinity of the 16-bit floats as an integer; NaNs are above it, and the negative ones 0x8000 higher.
_INFINITY = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80}


def combine(first: np.ndarray, second: np.ndarray, subtract: bool, name: str) -> np.ndarray:
    """first + second or first - second, rounded once to their common dtype, as torch does on a CPU.

    Args:
        name: of the tensor, for the error.

    Raises:
        UserError: when a number of the result is not finite.
    """
    assert first.dtype == second.dtype and first.shape == second.shape, name
    if first.dtype == np.float16:
        result = np.asarray(_jitted(subtract)(first, second))
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
    """The same by numpy. Its float16 is calculated in software, at an eighth of the speed."""
    calculate = np.subtract if subtract else np.add
    with np.errstate(over="ignore", invalid="ignore"):
        if first.dtype != BFLOAT16:
            result: np.ndarray = calculate(first, second)
            return result
        # Rounded once all the same: float32 holds the sum of two of them to more than twice their digits.
        wide = first.astype(np.float32)
        return calculate(wide, second, out=wide).astype(BFLOAT16)


@functools.cache
def _jitted(subtract: bool) -> Callable[[np.ndarray, np.ndarray], Any]:
    if "jax" not in sys.modules:
        # Nobody here has asked for an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    def calculate(first: Any, second: Any) -> Any:
        return first - second if subtract else first + second

    return jax.jit(calculate)


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN."""
    infinity = _INFINITY.get(array.dtype)
    if infinity is None:
        return bool(np.isfinite(array).all())
    if array.size == 0:
        return True
    return int(array.view(np.int16).max()) < infinity and int(array.view(np.uint16).max()) < 0x8000 + infinity
