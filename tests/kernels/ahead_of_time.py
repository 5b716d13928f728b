"""Compiling kernels for TPUs and GPUs on a machine without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from jaxlm.cli.doctor import wanted_libtpu

START = """
from functools import partial
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlm.devices.compiler_options import least_effort

def compile(name, topology, run, *shapes, kernels=None):
    '''Shapes are (dtype, dims...); kernels: how many there are to be, None: some.'''
    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    arguments = [jax.ShapeDtypeStruct(dims, dtype, sharding=place) for dtype, *dims in shapes]
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",))
    # Kernels are compiled in full; what XLA does around them need not be the best, which saves more than half the time.
    compiled = lowered.compile(compiler_options=least_effort())
    found = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert found == kernels or (kernels is None and found), found
    print("compiled", name, topology, compiled.cost_analysis()["flops"], flush=True)
"""


def libtpu_goes_with_jax() -> None:
    """Skips the test where libtpu is missing, or of another version than this JAX names."""
    wanted = wanted_libtpu() or ""
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs libtpu (part of the extra `test` on x86-64 Linux), no TPU")
    if not found.startswith(wanted):
        pytest.skip(f"this JAX goes with libtpu {wanted}, installed is {found}")


def compile_for_tpus(program: str) -> list[list[str]]:
    """Runs START and a program in a process of its own, as libtpu reads its environment once.

    Returns:
        For each of the program's calls of `compile`: its name, topology, FLOPs.
    """
    libtpu_goes_with_jax()
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("compiled")]


# An H200 as NVIDIA describes it, in the words of XLA's GpuTargetConfigProto.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
# CUDA's compiler and the plug-in that drives it are wheels; no GPU is needed.
NO_CUDA_COMPILER = shutil.which("ptxas") is None or not any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
)


def run_for_h200(script: str) -> str:
    """What a script prints that takes a GPU's description as its argument, in a process without a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", script, H200],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
