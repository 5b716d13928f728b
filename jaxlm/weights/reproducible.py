"""Products and sums that have the same bits however the work is cut, on any number of threads and on every processor.

A matrix product of a BLAS library has not: it adds in an order that depends on the shapes, the threads and the
instructions that it finds, with or without fused multiply-add. Here is nothing but numpy's element-wise operations,
each rounded once as IEEE 754 says, in an order that does not depend on the cut; or sums of whole numbers below 2^53,
which float64 adds without rounding, so that no order matters (Demmel and Nguyen, "Fast reproducible floating-point
summation", 2013).
"""

from __future__ import annotations

import math
import threading

import numpy as np

# Elements of a product that are added up at a time: they stay in the processor's cache.
STRIP_ELEMENTS = 64 << 10
# Whole numbers up to this are added exactly in float64, in any order.
EXACT_BITS = 53
# `ExactSum`: its grid, the digits that are added up on their own, numbers at a time, and the largest of them: the sums
# of that number stay below 2^53.
_SUM_BITS, _LOW_BITS, _SUM_ELEMENTS, _LARGEST = 44, 24, 256 << 10, 32768.0


def low_rank_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right in float32, added up rank by rank.

    Args:
        left: [N, R] float32, R at least 1.
        right: [R, M] float32.

    Returns:
        [N, M] float32. Every element is ((l0 r0 + l1 r1) + l2 r2) + …, each product and sum rounded once.
    """
    assert left.dtype == right.dtype == np.float32 and left.shape[1] == right.shape[0] > 0, (left.shape, right.shape)
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    step = max(1, STRIP_ELEMENTS // max(1, out.shape[1]))
    product = np.empty((min(step, out.shape[0]), out.shape[1]), np.float32)
    for start in range(0, out.shape[0], step):
        total, factor = out[start : start + step], left[start : start + step]
        np.multiply(factor[:, :1], right[0], out=total)
        for rank in range(1, right.shape[0]):
            np.multiply(factor[:, rank : rank + 1], right[rank], out=product[: len(total)])
            total += product[: len(total)]
    return out


def norms(matrix: np.ndarray, axis: int) -> np.ndarray:
    """Euclidean norms along an axis of a matrix, in float32. Their numbers may stand in any order.

    The squares are rounded to whole multiples of a power of two that the largest number and the count decide, so that
    their sum is exact; what is lost is far below float32's own digits unless one number is nearly all of the norm, and
    then still less than half a unit in its last place.

    Args:
        matrix: [N, M] float32 with finite numbers.
        axis: 0 or 1.
    """
    assert matrix.dtype == np.float32 and matrix.ndim == 2, (matrix.dtype, matrix.shape)
    largest = np.maximum(matrix.max(axis=axis, keepdims=True), -matrix.min(axis=axis, keepdims=True))
    exponent = np.frexp(largest)[1].astype(np.int64)
    # n numbers of at most 2^(2 exponent) each.
    shift = EXACT_BITS - (matrix.shape[axis] - 1).bit_length() - 2 * exponent
    squares = np.square(matrix, dtype=np.float64)  # exact: 48 bits
    squares *= np.ldexp(1.0, shift)  # exact: 2^349 at the most
    np.rint(squares, out=squares)
    total = np.ldexp(squares.sum(axis=axis), -np.squeeze(shift, axis))
    return np.sqrt(total).astype(np.float32)


class ExactSum:
    """A sum of weights that come in blocks, from any threads, in any order and any cut.

    Numbers are rounded to multiples of 2^-44 and added up as whole numbers. Numbers beyond 2^15 are none of a weight;
    they are added up in the ordinary way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._whole = 0
        self._other = 0.0

    def add(self, block: np.ndarray) -> None:
        """Adds all numbers of a block of any float dtype."""
        flat, whole, other = block.reshape(-1), 0, 0.0
        for start in range(0, flat.size, _SUM_ELEMENTS):
            part = flat[start : start + _SUM_ELEMENTS].astype(np.float64)
            large = ~(np.abs(part) <= _LARGEST)
            if large.any():
                other += float(part[large].sum())
                part[large] = 0.0
            part *= 2.0 ** (_SUM_BITS - _LOW_BITS)
            high = np.rint(part)
            part -= high
            part *= 2.0**_LOW_BITS
            whole += (int(high.sum()) << _LOW_BITS) + int(np.rint(part, out=part).sum())
        with self._lock:
            self._whole += whole
            self._other += other

    @property
    def total(self) -> float:
        """The sum so far, rounded to float64."""
        return math.ldexp(self._whole, -_SUM_BITS) + self._other
