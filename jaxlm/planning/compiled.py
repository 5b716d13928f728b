"""The train step of a run, compiled for devices that this machine need not have, in a process of its own.

A process of its own, because the compiler of another kind of device needs another environment, and may end the process.
This module is also that process (`python -m jaxlm.planning.compiled`): it reads a job as JSON and writes its figures as
JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import RunConfig
from jaxlm.config.files import dump_yaml, load_run_yaml
from jaxlm.devices.chips import SHARE, Topology, parse_topology
from jaxlm.devices.compiler_options import least_effort
from jaxlm.devices.program import Program, read_program
from jaxlm.errors import UserError
from jaxlm.machine import QUIET
from jaxlm.spec import DecoderSpec
from jaxlm.training.setup import set_up

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # compilers for other devices are loaded by name
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_INVOLUNTARY = "nvoluntary full rematerialization"
_NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory")

# A Hopper GPU as XLA describes it to itself (`xla/tools/hlo_opt/gpu_specs`); memory by chip.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler reports about a train step; bytes are per device.

    Attributes:
        arguments: bytes of state, frozen base and batch; the new state takes their place.
        temporaries: bytes beside them.
        peak: largest number of bytes in use at once, arguments included.
        host: bytes of frozen layers in the host's memory; in none of the figures above.
        seconds: time that compiling took.
        options: options that were given to the compiler (see `devices.compiler_options`).
        involuntary: number of times that the partitioner reports to gather a whole tensor because it has no better way.
        program: products, collectives and cycles of a step.
        refused: the compiler's message when the step does not fit; the figures above are then 0, and program is None.
    """

    arguments: int
    temporaries: int
    peak: int
    host: int
    seconds: float
    options: dict[str, Any]
    involuntary: int
    program: Program | None
    refused: str | None = None

    @property
    def memory(self) -> int:
        """Bytes that the step needs on a device."""
        return max(self.peak, self.arguments)


def can_compile(topology: Topology, offload: bool = False) -> str | None:
    """Says what is missing to compile for these devices; None if nothing is.

    Args:
        offload: whether frozen layers lie in the hosts' memory.
    """
    chip = topology.chip
    if chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed; on x86-64 Linux: pip install 'jax[tpu]' (it needs no TPU)"
    if chip.name == "v4":
        return "libtpu describes a v4 chip as two devices, a real v4 is one; jaxlm can compile for v5e, v5p and v6e"
    if chip.platform == "gpu":
        if offload:
            # They have no `default_memory`, without which JAX leaves out where an array lies, and says nothing.
            return (
                "JAX knows no hosts' memory beside GPUs that are not here, so that the compiler would count what "
                "model.offload keeps there as the GPU's"
            )
        if chip.name not in ("h100", "h200"):
            return f"jaxlm has no description of {chip.name} for XLA; it can compile for h100 and h200"
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            return "JAX's CUDA plug-in is not installed: pip install 'jax[cuda12]' (it needs no GPU)"
    return None


def compile_step(
    config: RunConfig, shape: DecoderSpec, topology: Topology, *, quick: bool = False, text: str | None = None
) -> CompiledStep:
    """Compiles the train step of a run for a topology; takes seconds for small models, minutes for large ones.

    Args:
        config: the run. Only keys that shape the step matter; no file that it names is opened.
        shape: the model, experts resolved.
        quick: less effort of a TPU's compiler: memory stays nearly the same, cycles do not.
        text: a file to write the compiled program to.

    Raises:
        UserError: when no compiler is installed for it, settings do not fit the devices, or the compiler fails.
    """
    lack = can_compile(topology, config.model.offload is not None)
    if lack is not None:
        raise UserError(f"--compile: {topology}: {lack}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        job = {
            "config": dump_yaml(config),
            "shape": shape.to_dict(),
            "topology": str(topology),
            "quick": quick,
            "text": text,
            "out": str(out),
        }
        paths = os.pathsep.join(path for path in sys.path if path)
        # Without what keeps libtpu quiet: it is about no TPU, and this one is to compile for some.
        own = {name: value for name, value in os.environ.items() if QUIET.get(name) != value}
        environment = {**own, **ENVIRONMENT, "PYTHONPATH": paths}
        environment["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's complaints are warnings
        call = [sys.executable, "-m", "jaxlm.planning.compiled"]
        done = subprocess.run(call, input=json.dumps(job), env=environment, capture_output=True, text=True)
        if not out.is_file():
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise UserError(f"--compile: {topology}: the compiler ended with status {done.returncode}:\n{last}")
        figures = json.loads(out.read_text(encoding="utf-8"))
    if "user_error" in figures:
        raise UserError(figures["user_error"])
    program = figures.pop("program")
    return CompiledStep(
        **figures,
        involuntary=done.stderr.count(_INVOLUNTARY),
        program=None if program is None else Program.from_dict(program),
    )


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, in a process with `ENVIRONMENT` in which JAX has not started."""
    chip = topology.chip
    if chip.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.count)
        return jax.devices()
    from jax.experimental import topologies

    jax.devices()
    if chip.platform == "tpu":
        bounds: dict[str, Any] = {}
        if topology.count == 1:
            bounds["chips_per_host_bounds"] = (1, 1, 1)
        if topology.slices > 1:
            bounds["num_slices"] = topology.slices
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.slice, **bounds).devices)
    config = _GPU.format(bandwidth=chip.bandwidth, memory=chip.memory / SHARE, kind=chip.device_kind)
    hosts, gpus = topology.shape
    description = topologies.get_topology_desc(
        platform="cuda", topology_name=chip.name, target_config=config, topology=f"1x{hosts}x{gpus}"
    )
    return list(description.devices)


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    config = load_run_yaml(job["config"], "the job")
    shape = DecoderSpec.from_dict(job["shape"])
    topology = parse_topology(job["topology"])
    try:
        devices = topology_devices(topology)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology: {topology}: {str(error).splitlines()[0]}") from None
    setup = set_up(config, shape, devices)
    # The number of steps is a constant of the schedule: any other gives the same program.
    schedule = setup.schedule(config.train.steps or 1000)
    more = least_effort() if job["quick"] and topology.chip.platform == "tpu" else {}
    started = time.perf_counter()
    platform = {"gpu": "cuda"}.get(topology.chip.platform, topology.chip.platform)
    try:
        # Abstract variables are traced too: cuDNN is asked for at once.
        initializer = setup.initializer(schedule)
        lowered = setup.lower_train_step(
            initializer, schedule, initializer.abstract_state(), setup.abstract_frozen(initializer), platform
        )
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"--compile: model.attention is cudnn, and {error} Install nvidia-cudnn-cu12, or --model.attention xla"
        ) from None
    figures: dict[str, Any] = {"options": setup.compiler_options(), "refused": None, "program": None}
    try:
        compiled: Any = setup.compile(lowered, **more)
    except jax.errors.JaxRuntimeError as error:
        if not _NO_ROOM.search(str(error)):
            raise
        seconds = time.perf_counter() - started
        nothing = dict.fromkeys(("arguments", "temporaries", "peak", "host"), 0)
        return figures | nothing | {"seconds": seconds, "refused": _room(str(error))}
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if job["text"]:
        Path(job["text"]).write_text(text, encoding="utf-8")
    return figures | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # The compiler counts arguments in the host's memory among those that are in use.
        "peak": memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        "host": memory.host_argument_size_in_bytes,
        "seconds": time.perf_counter() - started,
        "program": read_program(text).to_dict(),
    }


def _room(message: str) -> str:
    """The first lines of a refusal, which have the bytes asked for and the bytes of the device."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])[:500]


def main() -> int:
    """Reads a job from stdin, and writes its figures to the file that it names."""
    job = json.load(sys.stdin)
    try:
        figures = _compile(job)
    except UserError as error:
        figures = {"user_error": str(error)}
    Path(job["out"]).write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
