"""Transposes by words of several elements: numpy's transposes, bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxlm.weights import transpose
from jaxlm.weights.transpose import transpose_into, transposed

DTYPES = [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("strip", [1, 5, 16, 64])
def test_is_numpys(dtype: type, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a larger matrix, at places that are no multiple of a word, and of views."""
    monkeypatch.setattr(transpose, "STRIP_ROWS", strip)
    random = np.random.default_rng(0)
    for rows, columns in [(0, 3), (3, 0), (1, 1), (7, 3), (16, 9), (67, 33), (128, 64)]:
        bits = random.integers(0, 256, (rows, columns, np.dtype(dtype).itemsize), np.uint8)
        matrix = bits.view(dtype)[..., 0]
        assert transposed(matrix).tobytes() == matrix.T.tobytes()
        assert transposed(matrix[::2, 1:]).tobytes() == matrix[::2, 1:].T.tobytes()
        whole = np.zeros((columns + 2, rows + 5), dtype)
        want = whole.copy()
        transpose_into(whole[1:-1, 3:-2], matrix)
        want[1:-1, 3:-2] = matrix.T
        assert whole.tobytes() == want.tobytes()
        turned = np.zeros((rows, columns), dtype).T
        transpose_into(turned, matrix)
        assert turned.tobytes() == matrix.T.tobytes()
