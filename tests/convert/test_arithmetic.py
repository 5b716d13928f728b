"""The fast float16 sums against numpy's."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.weights.arithmetic import all_finite, by_xla, combine, combine_plain, use_xla


@pytest.mark.parametrize("subtract", [False, True])
def test_float16_sums_are_numpys(subtract: bool) -> None:
    """Every number, subnormal ones too, with many others."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)].reshape(2, -1)
    for shift in (1, 2, 1024, 5000, 31743, 40000, 60001):
        second = np.roll(numbers, shift)
        want = combine_plain(numbers, second, subtract)
        found = by_xla("subtract" if subtract else "add", np.dtype(np.float16), numbers, second)
        assert found.dtype == np.float16 and found.shape == want.shape
        assert found.tobytes() == want.tobytes()


def test_float16_casts_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm.weights.arithmetic._CHUNK", 10_000)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    wide = by_xla("float32", np.dtype(np.float32), half)
    assert wide.tobytes() == half.astype(np.float32).tobytes()
    # The numbers halfway between two of them, and their neighbours: all of rounding.
    middle = np.convolve(np.sort(wide), [0.5, 0.5], "valid").astype(np.float32)
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    random *= np.exp2(np.random.default_rng(1).integers(-40, 18, 100_000)).astype(np.float32)
    for numbers in (
        middle,
        np.nextafter(middle, np.float32(np.inf)),
        np.nextafter(middle, np.float32(-np.inf)),
        random,
    ):
        with np.errstate(over="ignore"):
            want = numbers.astype(np.float16)
        assert by_xla("float16", np.dtype(np.float16), numbers).tobytes() == want.tobytes()


def test_xla_is_left_to_whoever_imported_jax() -> None:
    """Not in this process; in one of its own the results are the same, and no accelerator is looked for."""
    import jax

    assert jax and not use_xla()
    code = (
        "import os, sys, numpy as np\n"
        "from jaxlm.weights.arithmetic import combine, convert_dtype, use_xla\n"
        "a, b = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)\n"
        "a, b = (convert_dtype(x, np.dtype(np.float16)) for x in (a, b))\n"
        "print(use_xla(), 'jax' in sys.modules, os.environ['JAX_PLATFORMS'], combine(a, b, True, 'x').tobytes().hex())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    a, b = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32).astype(np.float16)
    assert printed == ["True", "True", "cpu", (a - b).tobytes().hex()]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_sums_that_are_not_finite_are_refused(dtype: type) -> None:
    big = np.array([ml_dtypes.finfo(dtype).max], dtype)
    with pytest.raises(UserError, match="w: the sum is not finite"):
        combine(big, big, False, "w")
    assert combine(big, big, True, "w") == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype: type) -> None:
    block = np.array([0, -1, 1e4, -1e-5], dtype)
    assert all_finite(block) and all_finite(block[:0])
    for bad in (np.inf, -np.inf, np.nan):
        assert not all_finite(np.array([0, bad, 1], dtype))


@pytest.mark.parametrize("subtract", [False, True])
def test_bfloat16_is_rounded_once(subtract: bool) -> None:
    random = np.random.default_rng(0)
    first, second = (random.standard_normal(100_000).astype(ml_dtypes.bfloat16) for _ in range(2))
    second *= np.array(2.0 ** random.integers(-20, 20, 100_000), ml_dtypes.bfloat16)
    exact = first.astype(np.float64) - second if subtract else first.astype(np.float64) + second
    found = combine(first, second, subtract, "x")
    assert found.tobytes() == (first - second if subtract else first + second).tobytes()
    assert (np.abs(found - exact) <= np.abs(exact) * 2**-8).all()
