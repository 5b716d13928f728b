"""The train step on whole TPU slices, by their compiler: memory, cycles, collectives; beside goals and MaxText.

    python benchmarks/tpu_step.py [NAME ...]      # compile these (all), keep what is found, rewrite the table
    python benchmarks/tpu_step.py --check [NAME]  # compile; exit 1 where the figures kept differ by more than 2 %
    python benchmarks/tpu_step.py --table         # the table alone

Needs libtpu (`pip install libtpu`) on x86-64 Linux and no TPU. Sequence 2048 unless said, packed rows, float32
parameters and AdamW, bfloat16 products, FSDP over all chips. Cycles are the compiler's own estimates outside of Pallas
kernels, for which it gives none: a yardstick for programs on one topology, not a time. Those of the experts' kernels
are counted from their code (`experts_aot.py --cycles`) and added; attention's are in no row. MaxText's figures (August
2026, same reading of its program, splash attention) stand last; its LoRA cannot be compiled ahead of time. A compile
takes a minute or two. Figures are kept in benchmarks/tpu_step.json, the table between markers of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm.config.files import load_run_yaml
from jaxlm.devices.chips import parse_topology
from jaxlm.models.families import load_shape
from jaxlm.models.resolve import resolve_experts
from jaxlm.planning.compiled import ENVIRONMENT, compile_step
from jaxlm.spec import DecoderSpec
from jaxlm.training.report import flops_per_token

HERE = Path(__file__).parent
FIGURES, README = HERE / "tpu_step.json", HERE / "README.md"
BEGIN, END = "<!-- written by benchmarks/tpu_step.py -->", "<!-- end of what is written -->"
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Case:
    """A step and what is asked of it.

    Attributes:
        name: as the table has it.
        rows: of `length` tokens, per chip; a fraction where several chips share a row.
        goal, maxtext: (GiB per chip, Gcycles); None where there is none.
        more: sections of the run's configuration beyond those that all share.
    """

    name: str
    topology: str
    rows: float
    shape: str = "llama-2-7b"
    remat: str = "full"
    length: int = 2048
    goal: tuple[float | None, float | None] = (None, None)
    maxtext: tuple[float | None, float | None] = (None, None)
    more: str = ""
    mesh: str = "{data: 1, fsdp: -1}"
    param_dtype: str = "float32"


LORA = "lora: {rank: 8, alpha: 16, dropout: 0.0, targets: [q_proj, k_proj, v_proj]}"
# What `auto` takes with so many of 16: all is computed, and what is not used masked.
SCIMIND = "moe: {experts: 16, router: activation, top_k: {text: 14}, compute: dense}"
# `ragged` is XLA's own product, whose cycles the compiler estimates; of a kernel it estimates none.
LEARNED = "moe: {experts: 8, router: learned, top_k: {text: 2}, compute: ragged}"
KERNEL = LEARNED.replace("ragged", "pallas_tpu")  # what `auto` takes
CASES = (
    Case("v5e:4x4, 2 rows a chip", "v5e:4x4", 2, goal=(9.0, 1.85), maxtext=(9.23, 2.24)),
    Case("v5e:4x4, 4 rows", "v5e:4x4", 4, goal=(10.9, 4.3), maxtext=(11.30, 5.95)),
    Case(
        "v5e:4x4, 4 rows, LoRA rank 8 on q, k, v, bfloat16 base", "v5e:4x4", 4, goal=(5.0, 2.64), more=LORA,
        param_dtype="bfloat16",
    ),
    Case("v5e:16x16, 4 rows", "v5e:16x16", 4, maxtext=(4.13, 4.73)),
    Case("v5e:16x16, 4 rows, remat `qkv`", "v5e:16x16", 4, remat="qkv", goal=(10.0, 3.8), maxtext=(10.03, 4.17)),
    Case("v5p:4x4x2, 4 rows", "v5p:4x4x2", 4, goal=(7.2, 2.0), maxtext=(7.23, 2.20)),
    Case("v6e:16x16, 4 rows", "v6e:16x16", 4, goal=(4.5, 1.45), maxtext=(4.55, 1.61)),
    Case("13B, v5e:16x16, 2 rows", "v5e:16x16", 2, "llama-2-13b", goal=(4.0, 4.6), maxtext=(4.04, 5.06)),
    Case("70B, v5p:4x4x8, 1 row", "v5p:4x4x8", 1, "llama-2-70b"),
    Case("v5e:8x8, 2 rows", "v5e:8x8", 2),
    Case("v5e:8x8, 2 rows, SciMind's 16 experts, 14 for text", "v5e:8x8", 2, more=SCIMIND),
    Case("v5e:8x8, 2 rows, 8 experts, 2 by a learned router, XLA's product", "v5e:8x8", 2, more=LEARNED),
    Case("v5e:8x8, 2 rows, 8 experts, 2 by a learned router, own kernel", "v5e:8x8", 2, more=KERNEL),
    Case("v6e:16x16, 2 rows", "v6e:16x16", 2),
    Case("v6e:16x16, 2 rows, SciMind's 16 experts, 14 for text", "v6e:16x16", 2, more=SCIMIND),
    Case("v6e:16x16, 2 rows, 8 experts, 2 by a learned router, XLA's product", "v6e:16x16", 2, more=LEARNED),
    Case("v6e:16x16, 2 rows, 8 experts, 2 by a learned router, own kernel", "v6e:16x16", 2, more=KERNEL),
    Case(
        "LLaMA-3.1-8B, v5e:4x4, 1/8 row of 32,768, sequence 8", "v5e:4x4", 1 / 8, "llama-3.1-8b", length=32768,
        mesh="{data: 1, fsdp: -1, sequence: 8}",
    ),
)  # fmt: skip
RUN = """
model: {{shape: {shape}, dtype: bfloat16, param_dtype: {param_dtype}, remat: {remat}, attention: pallas_tpu}}
data: {{train: [{{path: text.jsonl, template: text}}], sequence_length: {length}}}
train: {{global_batch_size: {rows}, micro_batch_size: {rows}, epochs: 1}}
mesh: {mesh}
output_dir: out
{more}
"""


def compiled(case: Case) -> dict[str, Any]:
    """What the compiler says of a step: GiB, Gcycles, GB of collectives, and FLOPs of the model on a chip."""
    where = parse_topology(case.topology)
    text = RUN.format(**{**dataclasses.asdict(case), "rows": int(case.rows * where.count)})
    config = load_run_yaml(text, "tpu_step.py")
    shape = resolve_experts(load_shape(case.shape), config.moe, fresh=True)
    started = time.perf_counter()
    found = compile_step(config, shape, where)
    figures: dict[str, Any] = {
        "seconds": round(time.perf_counter() - started),
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
    }
    if found.program is None:
        return figures | {"refused": found.refused}
    assert found.program.cycles is not None
    waited, beside = (found.program.collective_bytes(overlaps) / 1e9 for overlaps in (False, True))
    full = "lora" not in case.more
    kernels = expert_cycles(case, shape, found.program.kernels)
    return figures | {
        "gib": round(found.peak / 2**30, 3),
        "gcycles": round((found.program.cycles + kernels) / 1e9, 4),
        "kernels": round(kernels / 1e9, 4),
        "waited": round(waited, 2),
        "beside": round(beside, 2),
        "tflops": round(flops_per_token(shape, case.length, full) * case.rows * case.length / 1e12, 3),
        "involuntary": found.involuntary,
    }


def expert_cycles(case: Case, shape: DecoderSpec, calls: dict[str, int]) -> float:
    """Cycles of the kernels that multiply with experts, in a step; 0 without any.

    Args:
        calls: number of runs by the kernel's name.
    """
    if "grouped_matmul" not in calls:
        return 0.0
    assert shape.experts is not None
    moe, layers = shape.experts, shape.total_layers
    call = [sys.executable, str(HERE / "experts_aot.py"), "--cycles", parse_topology(case.topology).chip.name]
    sizes = {
        "tokens": int(case.rows * case.length),
        "hidden": shape.hidden_size,
        "neurons": shape.period[0].feed_forward.size,
        "experts": moe.num_experts,
        "k": max(moe.top_k),
    }
    call += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    runs: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    total = 0.0
    for name, (gate_up, down) in runs.items():
        # Gate and up, one product, come first: a layer's last product need not be done again for its gradient.
        first = -(-calls[name] // layers // 2)
        assert calls[name] % layers == 0, calls
        total += layers * (first * gate_up + (calls[name] // layers - first) * down)
    return total


def _beside(value: float, goal: float | None, theirs: float | None) -> str:
    met = goal is not None and value <= goal + 0.005
    shown = f"**{value:.2f}**" if met else f"{value:.2f}"
    others = ["–" if other is None else f"{other}" for other in (goal, theirs)]
    return shown if goal is theirs is None else ", ".join([shown, *others])


def table() -> str:
    """The table as the figures kept say it."""
    known = read_figures()
    heads = "step", "GiB a chip, goal, MaxText", "Gcycles, goal, MaxText", "GB waited for / beside", "TFLOP a Gcycle"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in CASES:
        figures = known.get(case.name)
        if figures is None:
            continue
        if "refused" in figures:
            lines.append(f"| {case.name} | does not fit | | | |")
            continue
        gib = _beside(figures["gib"], case.goal[0], case.maxtext[0])
        cycles = _beside(figures["gcycles"], case.goal[1], case.maxtext[1])
        moved = f"{figures['waited']:.1f} / {figures['beside']:.1f}"
        lines.append(f"| {case.name} | {gib} | {cycles} | {moved} | {figures['tflops'] / figures['gcycles']:.1f} |")
    versions = sorted({(figures["jax"], figures["libtpu"]) for figures in known.values()})
    said = "; ".join(f"JAX {jax}, libtpu {libtpu}" for jax, libtpu in versions)
    return "\n".join([*lines, "", f"Compiled by {said}."])


def read_figures() -> dict[str, dict[str, Any]]:
    """The figures kept, by the case's name."""
    if not FIGURES.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def with_table(text: str) -> str:
    """The page with the table as it is now.

    Raises:
        SystemExit: the markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: there is no {BEGIN} … {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def differences(kept: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Which figures differ by more than `TOLERANCE`, in words."""
    return [
        f"{key} is {found.get(key)}, {kept.get(key)} is kept"
        for key in ("gib", "gcycles")
        if key not in found or key not in kept or abs(found[key] - kept[key]) > TOLERANCE * kept[key]
    ]


def main() -> int:
    """Exit status: 0; 1 where --check finds other figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases whose name begins with this (default: all)")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.names or any(case.name.startswith(each) for each in given.names)]
    if not chosen:
        parser.error(f"{given.names} begin none of: {'; '.join(case.name for case in CASES)}")
    status = 0
    for case in [] if given.table else chosen:
        found = compiled(case)
        print(f"{case.name}: {json.dumps(found)}", flush=True)
        known = read_figures()
        if given.check:
            for line in differences(known.get(case.name, {}), found):
                print(f"{case.name}: {line}", flush=True)
                status = 1
            continue
        known[case.name] = found
        ordered = {each.name: known[each.name] for each in CASES if each.name in known}
        FIGURES.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    if not given.check:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
