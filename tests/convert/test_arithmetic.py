"""The fast float16 sums against numpy's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from convert.arithmetic import all_finite, combine, combine_plain
from jaxlm.errors import UserError


@pytest.mark.parametrize("subtract", [False, True])
def test_float16_is_numpys(subtract: bool) -> None:
    """Every number, subnormal ones too, with many others; sums that are not finite are refused, not returned."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    for shift in (1, 2, 1024, 5000, 31743, 40000, 60001):
        first, second = numbers, np.roll(numbers, shift)
        want = combine_plain(first, second, subtract)
        keep = np.isfinite(want)
        found = combine(first[keep], second[keep], subtract, "x")
        assert found.dtype == np.float16 and found.tobytes() == want[keep].tobytes()
        if not keep.all():
            with pytest.raises(UserError, match="not finite in float16"):
                combine(first, second, subtract, "x")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype: type) -> None:
    block = np.array([0, -1, 1e4, -1e-5], dtype)
    assert all_finite(block) and all_finite(block[:0])
    for bad in (np.inf, -np.inf, np.nan):
        assert not all_finite(np.array([0, bad, 1], dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_overflow_is_refused(dtype: type) -> None:
    big = np.array([3e38], dtype)
    with pytest.raises(UserError, match="w: the sum is not finite"):
        combine(big, big, False, "w")
    assert combine(big, big, True, "w") == 0


@pytest.mark.parametrize("subtract", [False, True])
def test_bfloat16_is_rounded_once(subtract: bool) -> None:
    random = np.random.default_rng(0)
    first, second = (random.standard_normal(100_000).astype(ml_dtypes.bfloat16) for _ in range(2))
    second *= np.array(2.0 ** random.integers(-20, 20, 100_000), ml_dtypes.bfloat16)
    exact = first.astype(np.float64) - second if subtract else first.astype(np.float64) + second
    found = combine(first, second, subtract, "x")
    assert found.tobytes() == (first - second if subtract else first + second).tobytes()
    assert (np.abs(found - exact) <= np.abs(exact) * 2**-8).all()
