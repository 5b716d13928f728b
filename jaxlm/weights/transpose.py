"""Transposes of matrices of weights in memory, fast enough for a converter. Needs nothing but numpy."""

from __future__ import annotations

import numpy as np

# Rows turned at a time: they stay in the cache.
STRIP_ROWS = 64
_WORD_BYTES = 8


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose of a matrix, contiguous."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    transpose_into(out, matrix)
    return out


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """Fills `out` with the transpose of a matrix.

    numpy copies one element after the other where rows become columns. So several rows are laid into one of 64-bit
    words first, element beside element, and words are what is turned: a quarter of the steps for 16-bit numbers.

    Args:
        out: [M, N], the elements of a row beside each other.
        matrix: [N, M] of the same dtype.
    """
    assert out.dtype == matrix.dtype and out.shape == matrix.shape[::-1], (out.dtype, out.shape, matrix.shape)
    size = out.dtype.itemsize
    if out.size == 0 or size > _WORD_BYTES or _WORD_BYTES % size or out.strides[1] != size:
        out[...] = matrix.T
        return
    # As integers, whose copies numpy makes without asking the dtype for each element, and without Python's lock.
    numbers = f"u{size}"
    out, matrix = out.view(numbers), matrix.view(numbers)
    together = _WORD_BYTES // size
    words = np.empty((max(1, STRIP_ROWS // together), matrix.shape[1], together), numbers)
    step = len(words) * together
    for start in range(0, len(matrix), step):
        strip = matrix[start : start + step]
        count = len(strip) // together
        end = count * together
        if count:
            for part in range(together):
                words[:count, :, part] = strip[part:end:together]
            out[:, start : start + end].view(np.uint64)[...] = words.view(np.uint64)[:count, :, 0].T
        if end < len(strip):
            out[:, start + end : start + len(strip)] = strip[end:].T
