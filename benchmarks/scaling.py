"""How cost grows with devices: TPU slices by their compiler, processes of this machine by the clock.

    python benchmarks/scaling.py [--only slices | local | v5e:8x8 ...] [--rows 4] [--json FILE]

**Slices** (weak scaling, ahead of time): the train step of LLaMA-2-7B (sequence 2048, float32 parameters and AdamW,
full remat, FSDP over all chips), as many rows on each chip of every slice. A step is reckoned to take the compiler's
cycles over the clock, and the bytes that are waited for at the links' full speed; transfers beside products cost
nothing. Efficiency is that time on the first slice over that on this one. Neither attention kernels (no estimate; the
same on every slice), nor the latency of longer rings, nor slow hosts are in it, so it is a bound. Needs libtpu and no
TPU; one to six minutes a slice.

**Local** (weak scaling, measured): `launch/local.py` trains the quickstart's model (4 M parameters) with 1, 2 and 4
processes of one CPU device, connected by Gloo, as many rows for each. All share this machine's cores, so nothing gets
faster by it: what is measured is what it costs to do a step in several processes, in processor seconds of all of them
(of Linux's /proc, so that other work on the machine matters little). Beside each stands one process with as many rows;
their ratio is 1 when the split is free.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config.files import load_run_yaml
from jaxlm.devices.chips import GIB, Topology, parse_topology
from jaxlm.errors import UserError
from jaxlm.models.families import load_shape
from jaxlm.planning.compiled import CompiledStep, compile_step

ROOT = Path(__file__).resolve().parents[1]
SLICES = ("v5e:4x4", "v5e:8x8", "v5e:16x16")
RUN = """
model: {{shape: llama-2-7b}}
data: {{train: [{{path: text.jsonl, template: text}}], sequence_length: 2048}}
train: {{global_batch_size: {rows}, micro_batch_size: {micro}}}
"""

PROCESSES = (1, 2, 4)
LOCAL_ROWS, LOCAL_LENGTH, STEPS, WARM = 4, 256, 14, 4
LOCAL = """
model: {{shape: {shape}, dtype: float32, remat: none}}
tokenizer: {{train_on: [{corpus}], vocab_size: 512}}
data: {{train: [{{path: {corpus}, template: text}}], sequence_length: {length}}}
optimizer: {{learning_rate: 1.0e-3, schedule: constant}}
train: {{steps: {steps}, global_batch_size: {rows}, micro_batch_size: {micro}, eval_every: 0, save_every: 0}}
output_dir: {out}
"""


def step_seconds(compiled: CompiledStep, topology: Topology) -> tuple[float, float]:
    """Seconds of a step: (products by the compiler's cycles, links while they are waited for)."""
    assert compiled.program is not None and compiled.program.cycles is not None
    chip = topology.chip
    return compiled.program.cycles / chip.clock, compiled.program.collective_bytes(False) / chip.link


def slices(names: Sequence[str], micro: int) -> list[dict[str, Any]]:
    """Compiles the step for each slice, and prints a row for it."""
    print(f"LLaMA-2-7B, {micro} rows of 2,048 a chip\n")
    print("| slice | GiB a chip | Gcycles | GB waited for / beside, a chip | step, s: cycles + waiting | efficiency |")
    print("|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        topology = parse_topology(name)
        config = load_run_yaml(RUN.format(rows=micro * topology.count, micro=micro), "scaling.py")
        found = compile_step(config, load_shape("llama-2-7b"), topology)
        if found.program is None:
            print(f"| {name} | does not fit: {found.refused} | | | | |", flush=True)
            continue
        compute, links = step_seconds(found, topology)
        rows.append({"slice": name, "compute": compute, "links": links} | dataclasses.asdict(found))
        efficiency = (rows[0]["compute"] + rows[0]["links"]) / (compute + links)
        waited, beside = (found.program.collective_bytes(overlaps) / 1e9 for overlaps in (False, True))
        print(
            f"| {name}, {topology.count} chips | {found.memory / GIB:.2f} | {compute * topology.chip.clock / 1e9:.2f} "
            f"| {waited:.1f} / {beside:.1f} | {compute:.2f} + {links:.2f} | {efficiency:.0%} |",
            flush=True,
        )
    return rows


def local_run(processes: int, rows: int, mesh: str) -> tuple[float, float]:
    """A training run of `processes` with `rows` a step: (tokens/s, processor seconds for 1,000 tokens).

    Raises:
        UserError: when the run fails; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        text = LOCAL.format(
            shape=ROOT / "configs/models/quickstart.json",
            corpus=ROOT / "configs/quickstart/corpus.txt",
            length=LOCAL_LENGTH,
            steps=STEPS,
            rows=rows,
            micro=rows // processes,
            out=here / "out",
        )
        (here / "run.yaml").write_text(text, encoding="utf-8")
        axes = ["--mesh.data", "-1", "--mesh.fsdp", "1"] if mesh == "data" else []
        launcher = [sys.executable, str(ROOT / "launch/local.py"), "--processes", str(processes), "--devices", "1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        words = ["--", "--config", str(here / "run.yaml"), *axes]
        seen: dict[int, tuple[float, float]] = {}  # step -> clock, processor seconds
        with (here / "said").open("w+", encoding="utf-8") as said:
            with subprocess.Popen([*launcher, *words], env=environment, stdout=said, stderr=said) as run:
                while run.poll() is None:
                    steps = _lines(here / "out/metrics.jsonl")
                    # The last step is followed by a checkpoint, which is not to count.
                    if WARM <= steps < STEPS and steps not in seen:
                        seen[steps] = time.perf_counter(), _processor_seconds(run.pid)
                    time.sleep(0.01)
            if run.returncode:
                said.seek(0)
                last = "\n".join(said.read().splitlines()[-15:])
                raise UserError(f"{processes} processes: the run ended with status {run.returncode}:\n{last}")
    first, last_step = min(seen), max(seen)
    tokens = (last_step - first) * rows * LOCAL_LENGTH
    clock, processor = (end - start for start, end in zip(seen[first], seen[last_step], strict=True))
    return tokens / clock, 1000 * processor / tokens


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _processor_seconds(parent: int) -> float:
    """Processor seconds of a process and all that it started, so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if int(fields[1]) == parent:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def local(rounds: int) -> list[dict[str, Any]]:
    """Trains with each number of processes, and prints a row for it."""
    print(f"{LOCAL_ROWS} rows of {LOCAL_LENGTH} a process, {os.cpu_count()} cores, {rounds} rounds\n")
    print("| processes | mesh | tokens/s | processor s for 1,000 tokens | of one process, as many rows | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    found: list[dict[str, Any]] = []
    for processes in PROCESSES:
        rows = LOCAL_ROWS * processes
        meshes = ("data", "fsdp") if processes > 1 else ()
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("alone", *meshes)}
        for _ in range(rounds):
            runs["alone"].append(local_run(1, rows, "fsdp"))
            for mesh in meshes:
                runs[mesh].append(local_run(processes, rows, mesh))
        for mesh in meshes or ("alone",):
            # Paired: the machine may be another one a minute later.
            ratios = [one[1] / base[1] for one, base in zip(runs[mesh], runs["alone"], strict=True)]
            ratio = statistics.median(ratios)
            speed, cost, alone = (
                statistics.median(one[at] for one in runs[name]) for name, at in ((mesh, 0), (mesh, 1), ("alone", 1))
            )
            found.append(
                {"processes": processes, "mesh": mesh, "tokens_per_second": speed, "cost": cost, "ratio": ratio}
            )
            name = "–" if mesh == "alone" else f"{mesh} {processes}"
            print(f"| {processes} | {name} | {speed:,.0f} | {cost:.2f} | {alone:.2f} | {ratio:.2f} |", flush=True)
    return found


def _check_slice(name: str) -> None:
    try:
        topology = parse_topology(name)
    except UserError as error:
        raise UserError(str(error).replace("--topology", "--only", 1) + "; or slices, or local") from None
    if topology.chip.platform != "tpu":
        raise UserError(f"--only: {name}: slices are TPUs', whose compiler estimates cycles; e.g. {SLICES[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake in the input or a run that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["slices", "local"], help="slices, local, or slices by name")
    parser.add_argument("--rows", type=int, default=4, help="of 2048 tokens a chip, on slices (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of the local runs (default 3)")
    parser.add_argument("--json", help="a file for all figures")
    given = parser.parse_args(argv)
    for name in ("rows", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}: {getattr(given, name)} must be at least 1")
    names = [name for one in given.only if one != "local" for name in (SLICES if one == "slices" else (one,))]
    try:
        for name in names:
            _check_slice(name)
        found: dict[str, Any] = {}
        if names:
            found["slices"] = slices(names, given.rows)
        if "local" in given.only:
            if names:
                print()
            found["local"] = local(given.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
