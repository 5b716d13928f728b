"""Grouped products for Hopper GPUs: played out on a CPU, compiled for an H200 without one, run where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from jaxlm.kernels.grouped_matmul import reference_grouped_matmul
from jaxlm.kernels.grouped_matmul_gpu import TILE, gpu_grouped_matmul, width
from jaxlm.kernels.groups import make_groups
from tests.kernels.ahead_of_time import NO_CUDA_COMPILER, run_for_h200


def compare(counts: Sequence[int], inner: int, columns: int, interpret: Any) -> None:
    """Values and gradients beside the plain twin's, of groups with these numbers of rows."""
    groups, starts, rows = make_groups(jnp.array(counts), sum(counts), TILE)
    rng, live = np.random.default_rng(0), np.zeros(rows, bool)
    for start, count in zip(np.asarray(starts), counts, strict=True):
        live[start : start + count] = True
    x = jnp.asarray(rng.normal(size=(rows, inner)) * live[:, None], jnp.bfloat16)
    grad = jnp.asarray(rng.normal(size=(rows, columns)) * live[:, None], jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(len(counts), inner, columns)), jnp.bfloat16)

    def run(multiply: Any) -> Any:
        out, back = jax.vjp(multiply, x, w)
        return out, *back(grad)

    found = run(lambda x, w: gpu_grouped_matmul(x, w, groups, interpret))
    expected = run(lambda x, w: reference_grouped_matmul(x, w, groups))
    for name, a, b, rows_ in zip(("out", "dx", "dw"), found, expected, (live, live, slice(None)), strict=True):
        a, b = np.asarray(a, np.float32)[rows_], np.asarray(b, np.float32)[rows_]
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b), name  # both round float32 sums to bfloat16


@pytest.mark.slow
def test_values_and_gradients() -> None:
    """A group of two tiles, one without rows, one of less than a tile; sizes that steps and tiles do not divide."""
    compare((130, 0, 70), 100, 140, InterpretGPUParams(detect_races=True))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU (JAXLM_TEST_PLATFORMS=cuda,cpu)")
def test_on_a_gpu() -> None:
    compare((300, 0, 1000, 77), 688, 1376, None)


def test_tiles_leave_little_empty() -> None:
    assert [width(columns) for columns in (4096, 1376, 688, 28672, 100)] == [256, 128, 256, 256, 128]


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlm.kernels.grouped_matmul_gpu import gpu_grouped_matmul
from jaxlm.kernels.groups import make_groups

jax.devices("cpu")
h200 = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=sys.argv[1], topology="1x1x1")
place = SingleDeviceSharding(h200.devices[0])

def shape(dtype, *dims):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

def both(x, w, counts):
    groups, _, rows = make_groups(counts, len(x), 256)
    out, back = jax.vjp(lambda x, w: gpu_grouped_matmul(x, w, groups), jnp.pad(x, ((0, rows - len(x)), (0, 0))), w)
    return out, back(out)

for inner, columns in [(4096, 1376), (688, 4096)]:
    arguments = shape(jnp.bfloat16, 8192, inner), shape(jnp.bfloat16, 16, inner, columns), shape(jnp.int32, 16)
    binary = jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().runtime_executable()
    assert binary.serialize().count(b"ELF"), "no machine code"
    print("compiled", inner, columns, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    NO_CUDA_COMPILER,
    reason="needs JAX's CUDA plug-in and ptxas (nvidia-cuda-nvcc), no GPU",
)
def test_compiles_for_an_h200() -> None:
    assert run_for_h200(COMPILE).count("compiled") == 2
