"""`python -m jaxlm.doctor`: does this machine have what a run needs, and if not, what to do.

Started on all hosts of a cluster as training would be, it speaks of all of them, and compares their clocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from jaxlm.processes.distributed import Hosts

# Packages of jaxlm's core, by distribution name.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "transformers", "sentencepiece")
# JAX's own parts for accelerators: each must be of the very release of JAX.
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
DISK_BYTES = 64 << 20
# Below these a run is possible, but slow or soon out of room.
LEAST_DISK = 20 << 30
LEAST_SPEED = 100e6
# Clocks further apart make logs and the ages of files misleading, and certificates and tokens fail.
MOST_CLOCK_SECONDS = 1.0
# What all hosts must have in common.
COMMON = ("python", *PACKAGES, "jax, jaxlib", "packages", *PLUGINS, "libtpu", "jaxlm's code")
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


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.doctor") -> int:
    """Exit status: 0 all is well, 1 something to mend."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--dir", default=".", help="where a run would write (default: here)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    cluster = parser.add_argument_group(
        "several hosts", "found from the environment where it tells (see multi_host.md)"
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    cluster.add_argument("--num_processes", type=int, metavar="N")
    cluster.add_argument("--process_id", type=int, metavar="I")
    cluster.add_argument("--timeout", type=int, default=60, metavar="SECONDS", help="for the others (default 60)")
    options = parser.parse_args(argv)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    directory = Path(options.dir)
    if not directory.is_dir():
        raise UserError(f"--dir {directory}: is not a directory")
    from jaxlm.config import DistributedConfig
    from jaxlm.processes.distributed import start

    place = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id", "timeout")}
    with start(DistributedConfig(**place), lambda text: print(text, file=sys.stderr)) as hosts:
        own = list(examine(directory, hosts))
        findings = list(together(*_from_all(hosts, own))) if hosts.processes > 1 else own
        if hosts.process == 0 and options.json:
            print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
        elif hosts.process == 0:
            _print(findings)
    return int(any(finding.serious for finding in findings))


def _from_all(hosts: Hosts, own: Sequence[Finding]) -> tuple[list[list[Finding]], list[str]]:
    mine = json.dumps({"name": platform.node(), "findings": [asdict(finding) for finding in own]})
    texts = [json.loads(text) for text in hosts.exchange("findings", mine)]
    names = [text["name"] for text in texts]
    if len(set(names)) < len(names):
        names = [f"{name} (process {number})" for number, name in enumerate(names)]
    return [[Finding(**finding) for finding in text["findings"]] for text in texts], names


def together(by_host: Sequence[Sequence[Finding]], names: Sequence[str]) -> Iterator[Finding]:
    """The findings of several hosts as one report; what they must have in common and have not is serious.

    Args:
        by_host: the findings of each host.
        names: of the hosts.
    """
    for what in dict.fromkeys(finding.what for findings in by_host for finding in findings):
        groups: dict[Finding | None, list[str]] = {}
        for name, findings in zip(names, by_host, strict=True):
            groups.setdefault(next((finding for finding in findings if finding.what == what), None), []).append(name)
        known = {finding: where for finding, where in groups.items() if finding is not None}
        if len(groups) == 1:
            yield from known
        elif what in COMMON:
            value = "; ".join(
                f"{finding.value if finding else 'none'} on {', '.join(where)}" for finding, where in groups.items()
            )
            yield Finding(what, value, "must be the same on all hosts", serious=True)
        else:
            well = [(finding, where) for finding, where in known.items() if not finding.advice]
            for finding, where in well[:1]:
                others = sum(len(where) for _, where in well) - 1
                yield dataclasses.replace(finding, value=f"{finding.value} on {where[0]}; all well on {others} others")
            for finding, where in known.items():
                if finding.advice:
                    yield dataclasses.replace(finding, value=f"{finding.value} on {', '.join(where)}")


def examine(directory: Path, hosts: Hosts) -> Iterator[Finding]:
    """All checks, quick ones first."""
    from jaxlm.processes.distributed import versions as that_must_agree

    versions = {name: _version(name) for name in (*PACKAGES, *PLUGINS, "libtpu")}
    yield from check_versions(versions, sys.version_info[:2])
    yield Finding("jaxlm's code", that_must_agree()["jaxlm's code"])
    yield check_disk(directory)
    yield check_memory()
    yield check_clocks(hosts)
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
    libtpu = versions.get("libtpu")
    if libtpu is not None:
        wanted = wanted_libtpu()
        wrong = wanted is not None and not libtpu.startswith(wanted)
        advice = f"this JAX names libtpu {wanted}: pip install 'jax[tpu]=={core[0]}'" if wrong else ""
        yield Finding("libtpu", libtpu, advice)


def wanted_libtpu() -> str | None:
    """The version of libtpu that the installed JAX asks for, to its last dot: "0.0.42."."""
    # "libtpu==0.0.42.*; extra == 'tpu'"
    names = (re.match(r"libtpu==([\d.]+)", line) for line in importlib.metadata.requires("jax") or [])
    return next((name[1] for name in names if name), None)


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


def check_clocks(hosts: Hosts) -> Finding:
    """The number of hosts, and how far apart their clocks are."""
    if hosts.processes == 1:
        return Finding("hosts", "1")
    hosts.barrier("clocks")  # all leave it within milliseconds
    times = [float(text) for text in hosts.exchange("clocks", repr(time.time()))]
    apart = max(times) - min(times)
    advice = ""
    if apart > MOST_CLOCK_SECONDS:
        late, early = times.index(min(times)), times.index(max(times))
        advice = f"process {late} is behind process {early}: have them keep time (chrony, systemd-timesyncd)"
    return Finding("hosts", f"{hosts.processes}, clocks within {apart + 0.005:.2f} s", advice)


def check_devices() -> Iterator[Finding]:
    """What JAX runs on, whether it computes, and which attention it would take."""
    import jax

    started = time.perf_counter()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding("devices", "JAX finds none", " ".join(str(error).split()), serious=True)
        return
    kind, count, mine = devices[0].device_kind, len(devices), jax.local_devices()[0]
    stats = mine.memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB each" if "bytes_limit" in stats else ""
    yield missing_accelerator(
        devices[0].platform, lambda path: Path(path).exists(), f"{count} x {kind} ({devices[0].platform}){memory}"
    )
    yield _compute(mine, started)
    yield from _attention()
    yield _serving(mine.platform)


def missing_accelerator(platform_name: str, exists: Callable[[str], bool], shown: str) -> Finding:
    """The devices, with what to do when the machine has an accelerator that JAX does not see."""
    for files, name, extra in ((GPU_FILES, "an NVIDIA GPU", "gpu"), (TPU_FILES, "a TPU", "tpu")):
        if platform_name == "cpu" and any(exists(path) for path in files):
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
    from jaxlm.kernels.backend import attention_details, choose_attention, shape_key
    from jaxlm.models.families import SHAPES

    shape, before = SHAPES["llama-2-7b"], ""
    for rows, packed in (("packed rows", True), ("single documents", False)):
        case = shape_key(shape.attention, "bfloat16", shape.max_length, packed)
        try:
            chosen, why = choose_attention("auto", case)
        except UserError as error:
            yield Finding(f"attention, {rows}", "the table of tuned kernels cannot be read", str(error), serious=True)
            continue
        details = f"{why} ({attention_details(chosen, case)})"
        shown = "as for packed rows" if details == before else details
        before = details
        yield Finding(f"attention, {rows}", f"{shown}; {_try_attention(chosen, packed)}")


def _try_attention(chosen: Any, packed: bool) -> str:
    """Runs it, forward and backward, on a small problem: a kernel that does not compile here should show here."""
    import jax
    import jax.numpy as jnp

    from jaxlm.nn.attention import MaskSpec, attention

    started = time.perf_counter()
    q, segments = jnp.ones((1, 256, 4, 128), jnp.bfloat16), jnp.repeat(jnp.arange(2), 128)[None]
    mask = MaskSpec(segment_ids=segments if packed else None, window=None)

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, q, q, mask, chosen).astype(jnp.float32))

    jax.block_until_ready(jax.jit(jax.grad(total))(q))
    return f"runs, first result after {time.perf_counter() - started:.1f} s"


def _serving(platform: str) -> Finding:
    """What `jaxlm serve` compiles at its start, for a model like LLaMA-2-7B."""
    from jaxlm.config import ServeConfig
    from jaxlm.inference.paged.programs import usual_programs
    from jaxlm.models.families import SHAPES

    rows = ServeConfig().rows
    programs = usual_programs(SHAPES["llama-2-7b"], rows, platform)
    return Finding("programs of serve", f"with {rows} answers at a time {programs}; kept in the compilation cache")


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jaxlm.screen import print_table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = "bold red" if finding.serious else "yellow"
        table.add_row(Text(finding.what), Text(finding.value))
        if finding.advice:
            table.add_row("", Text(f"-> {finding.advice}", style=style))
    print_table(table)
    serious = sum(finding.serious for finding in findings)
    console.print(f"{serious} to mend" if serious else "nothing to mend", style="bold")


if __name__ == "__main__":
    sys.exit(main())
