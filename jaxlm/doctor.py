"""`python -m jaxlm.doctor`: does this machine have what a run needs, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Packages of jaxlm's core, by distribution name.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "transformers", "sentencepiece")
# JAX's own parts for accelerators: each must be of the very release of JAX.
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
DISK_BYTES = 64 << 20
# Below these a run is possible, but hardly what one wants.
LEAST_DISK = 20 << 30
LEAST_SPEED = 100e6
# Where Linux shows accelerators, whether a driver works or not.
GPU_FILES, TPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl"), ("/dev/accel0", "/dev/vfio/0")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        what: e.g. 'devices'.
        value: what was found.
        advice: what to do about it; empty when all is well.
        serious: a run would fail or be far slower than it need be; the exit status says so.
    """

    what: str
    value: str
    advice: str = ""
    serious: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is well, 1 something to mend."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.doctor", description=__doc__)
    parser.add_argument("--dir", default=".", help="where a run would write (default: here)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    options = parser.parse_args(argv)
    directory = Path(options.dir)
    if not directory.is_dir():
        print(f"error: --dir {directory}: is no directory", file=sys.stderr)
        return 2
    findings = list(examine(directory))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return int(any(finding.serious for finding in findings))


def examine(directory: Path) -> Iterator[Finding]:
    """All checks, quick ones first."""
    versions = {name: _version(name) for name in (*PACKAGES, *PLUGINS, "libtpu")}
    yield from check_versions(versions, sys.version_info[:2])
    yield check_disk(directory)
    yield check_memory()
    yield from check_devices()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(versions: Mapping[str, str | None], python: tuple[int, ...]) -> Iterator[Finding]:
    """Whether the packages are there and go together.

    Args:
        versions: by distribution name; None where it is not installed.
        python: e.g. (3, 12).
    """
    shown = f"{platform.python_implementation()} {'.'.join(map(str, python))}"
    advice = "JAX 0.10.2 is the last for it; newer ones need Python 3.12" if python < (3, 12) else ""
    yield Finding("python", shown, advice)
    for name in PACKAGES:
        if versions.get(name) is None:
            yield Finding(name, "not installed", f"pip install {name}", serious=True)
    core = versions.get("jax"), versions.get("jaxlib")
    if None not in core:
        same = core[0] == core[1]
        advice = "" if same else f"both must be of one release: pip install jaxlib=={core[0]}"
        yield Finding("jax, jaxlib", " and ".join(map(str, core)), advice, not same)
    others = [f"{name} {versions[name]}" for name in PACKAGES[2:] if versions.get(name) is not None]
    yield Finding("packages", ", ".join(others))
    for name in PLUGINS:
        version = versions.get(name)
        if version is not None:
            advice = "" if version == core[0] else f"must be of JAX's release: pip install {name}=={core[0]}"
            yield Finding(name, version, advice, bool(advice))
    if versions.get("libtpu") is not None:
        yield Finding("libtpu", str(versions["libtpu"]))


def check_disk(directory: Path) -> Finding:
    """Room, and the speed of writing, where a run would write."""
    free = shutil.disk_usage(directory).free
    file = directory / f".jaxlm-doctor-{os.getpid()}"
    piece = os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(DISK_BYTES // len(piece)):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        speed = DISK_BYTES / (time.perf_counter() - started)
    except OSError as error:
        advice = f"{error.strerror}: choose another output_dir, or mend its rights"
        return Finding("disk", f"{directory.resolve()} cannot be written", advice, serious=True)
    finally:
        file.unlink(missing_ok=True)
    advice = ""
    if free < LEAST_DISK:
        advice = "a checkpoint of a 7B model and its optimizer has some 80 GB; LoRA's have some MB"
    elif speed < LEAST_SPEED:
        advice = "slow: checkpoints are written while training goes on, but the last one is waited for"
    return Finding("disk", f"{free / 1e9:,.0f} GB free, writes {speed / 1e6:,.0f} MB/s", advice)


def check_memory() -> Finding:
    """Main memory and cores."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _available_memory()
    shown = f"{total / 2**30:.0f} GiB" + (f", {available / 2**30:.0f} free" if available else "")
    return Finding("memory", f"{shown}; {os.cpu_count()} cores")


def _available_memory() -> int | None:
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def check_devices() -> Iterator[Finding]:
    """What JAX runs on, whether it computes, and which attention it would take."""
    import jax

    started = time.perf_counter()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding("devices", "JAX finds none", " ".join(str(error).split()), serious=True)
        return
    kind, count = devices[0].device_kind, len(devices)
    stats = devices[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB each" if "bytes_limit" in stats else ""
    yield missing_accelerator(
        devices[0].platform, lambda path: Path(path).exists(), f"{count} x {kind} ({devices[0].platform}){memory}"
    )
    yield Finding("hosts", str(jax.process_count()))
    yield _compute(devices[0], started)
    yield from _attention()


def missing_accelerator(found: str, exists: Callable[[str], bool], shown: str) -> Finding:
    """The devices, with what to do when the machine has an accelerator that JAX does not see."""
    for files, name, extra in ((GPU_FILES, "an NVIDIA GPU", "gpu"), (TPU_FILES, "a TPU", "tpu")):
        if found == "cpu" and any(exists(path) for path in files):
            advice = f"the machine has {name}, which JAX does not use: pip install 'jaxlm[{extra}]'"
            return Finding("devices", shown, f"{advice}, and look whether JAX_PLATFORMS is set", serious=True)
    return Finding("devices", shown)


def _compute(device: Any, started: float) -> Finding:
    """A product of matrices, in the accelerator's usual precision."""
    import jax
    import jax.numpy as jnp

    small = device.platform == "cpu"
    size, dtype = (1024, jnp.float32) if small else (8192, jnp.bfloat16)
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    ready = time.perf_counter() - started
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    speed = 2 * size**3 / best / 1e12
    return Finding("computes", f"{speed:.2f} TFLOP/s in {jnp.dtype(dtype).name}; first result after {ready:.1f} s")


def _attention() -> Iterator[Finding]:
    """What `attention: auto` takes, for a model like LLaMA-2-7B."""
    from jaxlm.errors import UserError
    from jaxlm.kernels.choice import choose_attention, here
    from jaxlm.models.shapes import SHAPES

    shape = SHAPES["llama-2-7b"]
    for rows, packed in (("packed rows", True), ("single documents", False)):
        case = here(shape, "bfloat16", shape.max_length, packed)
        try:
            yield Finding(f"attention, {rows}", choose_attention("auto", case)[1])
        except UserError as error:
            yield Finding(f"attention, {rows}", "the table of tuned kernels cannot be read", str(error), serious=True)


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "found", "to do", show_lines=False)
    for finding in findings:
        style = "bold red" if finding.serious else "yellow" if finding.advice else ""
        table.add_row(Text(finding.what), Text(finding.value), Text(finding.advice, style=style))
    console.print(table)
    serious = sum(finding.serious for finding in findings)
    console.print(f"{serious} to mend" if serious else "nothing to mend", style="bold")


if __name__ == "__main__":
    sys.exit(main())
