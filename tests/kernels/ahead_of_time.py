"""Compiling kernels for TPUs on a machine without one."""

from __future__ import annotations

import importlib.metadata
import os
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
