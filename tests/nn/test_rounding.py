"""Weights in few bits against bitsandbytes' definitions, written in PyTorch, and against what they must hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxlm.nn.rounding import BLOCK, NF4, ZERO, dequantize, dynamic_map, nest, parts_of, quantize

# bitsandbytes 0.50.2, `functional.get_4bit_type("nf4")`; thresholds of `dQuantizeNF4` in csrc/kernels.cu.
TREE = (
    "-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984 "
    "-0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668 "
    "0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"
)


def oracle(weight: np.ndarray) -> dict[str, Any]:
    """`quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")` of a matrix [outputs, inputs].

    The default backend's `quantize_4bit` and `quantize_blockwise` with `create_dynamic_map`, in float32; the codes by
    the CUDA kernel's thresholds.
    """
    torch = pytest.importorskip("torch")
    blocks = torch.tensor(weight).float().reshape(-1, 64)
    absmax = blocks.abs().max(dim=-1)[0]
    scaled = blocks * (1 / absmax)[:, None]
    codes = torch.bucketize(scaled, torch.tensor([float(x) for x in TREE.split()]), right=False)
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    code = torch.tensor(sorted(values), dtype=torch.float32)
    offset = absmax.double().mean().float()
    nested = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    nested_absmax = nested.abs().max(dim=-1)[0]
    diff = ((nested * (1 / nested_absmax)[:, None]).reshape(-1, 1) - code).abs()
    rounded = diff.argmin(dim=-1)[: len(absmax)]
    return {
        "codes": codes.numpy(),
        "absmax": rounded.numpy(),
        "nested_absmax": nested_absmax.numpy(),
        "nested_offset": offset.numpy(),
        "map": code.numpy(),
    }


def codes_of(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Codes [outputs, inputs] of a matrix's parts."""
    return np.concatenate([parts["codes"] >> 4, parts["codes"] & 15], axis=1).reshape(-1, parts["codes"].shape[-1]).T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tails", [False, True])
def test_nf4_has_the_bits_of_bitsandbytes(dtype: str, tails: bool) -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    shape = 192, 100
    kernel = (rng.standard_t(5, shape) if tails else rng.normal(size=shape)) * 0.02
    kernel = kernel.astype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    parts, expected = quantize("nf4", kernel, 1), oracle(kernel.T.astype(np.float32))
    np.testing.assert_array_equal(codes_of(parts).reshape(-1, 64), expected["codes"])
    np.testing.assert_array_equal(parts["absmax"].T.reshape(-1), expected["absmax"])
    np.testing.assert_array_equal(parts["nested_absmax"], expected["nested_absmax"])
    np.testing.assert_array_equal(parts["nested_offset"], [expected["nested_offset"]])
    np.testing.assert_allclose(dynamic_map(), expected["map"], rtol=2e-7)
    magnitude = expected["map"][expected["absmax"]] * np.repeat(expected["nested_absmax"], 256)[: 3 * 100]
    dense = (NF4[expected["codes"]] * (magnitude + expected["nested_offset"])[:, None]).reshape(100, 192).T
    np.testing.assert_allclose(dequantize("nf4", parts, kernel.shape, 1), dense, rtol=1e-6)


def test_values_between_two_codes_go_where_bitsandbytes_sends_them() -> None:
    """Each threshold itself, and the numbers next to it, in a block whose largest magnitude is 1."""
    edges = np.array([float(x) for x in TREE.split()], np.float32)
    near = np.concatenate([np.nextafter(edges, np.float32(-2)), edges, np.nextafter(edges, np.float32(2)), [1.0]])
    kernel = np.resize(near.astype(np.float32), (BLOCK, 1))
    codes = codes_of(quantize("nf4", kernel, 1))[0, : 3 * len(edges)].reshape(3, -1)
    numbers = np.arange(15)
    np.testing.assert_array_equal(codes, [numbers, numbers, numbers + 1])


def test_the_error_is_that_of_the_published_table() -> None:
    """Relative rms of nf4 in blocks of 64: 0.092 for Gauss, 0.105 for Student's t (5 degrees); int8 0.008 and 0.018."""
    rng = np.random.default_rng(0)
    wanted = {"nf4": (0.092, 0.105), "int8": (0.008, 0.018)}
    for number, kernel in enumerate((rng.normal(size=(2048, 256)), rng.standard_t(5, (2048, 256)))):
        kernel = kernel.astype(np.float32)
        for kind in ("nf4", "int8"):
            found = dequantize(kind, quantize(kind, kernel, 1), kernel.shape, 1)
            error = np.sqrt(np.mean((found - kernel) ** 2) / np.mean(kernel**2))
            assert error == pytest.approx(wanted[kind][number], abs=1.2e-3), (kind, number)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zeros_and_odd_sizes_are_kept(kind: Any) -> None:
    """A pruned output, and inputs [5, 9] that are not a multiple of 64."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(5, 9, 6)).astype(np.float32)
    kernel[..., 2] = 0
    parts = quantize(kind, kernel, 2)
    shapes = {name: (part.shape, part.dtype) for name, part in parts_of(kind, kernel.shape, 2).items()}
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == shapes
    found = dequantize(kind, parts, kernel.shape, 2)
    np.testing.assert_array_equal(found[..., 2], 0)
    assert np.abs(found - kernel).max() < (0.35 if kind == "nf4" else 0.02) * np.abs(kernel).max()
    if kind == "nf4":
        assert (codes_of(parts)[2] == ZERO).all()


def test_magnitudes_that_are_all_equal_are_kept() -> None:
    rounded, largest, offset = nest(np.full((3, 4), 0.5, np.float32))
    np.testing.assert_array_equal(offset, [0.5])
    assert rounded.shape == (3, 4) and not largest.any()
