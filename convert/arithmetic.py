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

# Bits of a 16-bit float's exponent: all of them are set in infinities and NaNs.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80}


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
    with np.errstate(over="ignore", invalid="ignore"):
        result: np.ndarray = first - second if subtract else first + second
    return result


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
    mask = _EXPONENTS.get(array.dtype)
    if mask is None:
        return bool(np.isfinite(array).all())
    bits = array.view(np.uint16) & np.uint16(0x7FFF)
    return bits.size == 0 or int(bits.max()) < mask
