"""The train step on whole TPU slices, by their compiler: memory, cycles, collectives; beside goals and MaxText.

    python benchmarks/tpu_step.py [--only v5e:4x4] [--json FILE]

Needs libtpu (`pip install libtpu`) on x86-64 Linux and no TPU. Sequence 2048, packed rows, float32 parameters and
AdamW, bfloat16 products, FSDP over all chips. Cycles are the compiler's own estimates outside of Pallas kernels, for
which it gives none: a yardstick for programs on one topology, not a time. MaxText's figures (August 2026, same reading
of its program, splash attention) stand in brackets; its LoRA cannot be compiled ahead of time. A compile takes a minute
or two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from jaxlm.config.files import load_run_yaml
from jaxlm.devices.chips import parse_topology
from jaxlm.models.families import load_shape
from jaxlm.planning.compiled import compile_step


@dataclasses.dataclass(frozen=True)
class Case:
    """A step and what is asked of it.

    Attributes:
        rows: of 2048 tokens, per chip.
        goal, maxtext: (GiB per chip, Gcycles), or None.
        more: sections of the run's configuration beyond those that all share.
    """

    shape: str
    topology: str
    rows: int
    remat: str = "full"
    goal: tuple[float, float] | None = None
    maxtext: tuple[float, float] | None = None
    more: str = ""
    param_dtype: str = "float32"


LORA = "lora: {rank: 8, alpha: 16, dropout: 0.0, targets: [q_proj, k_proj, v_proj]}"
CASES = (
    Case("llama-2-7b", "v5e:4x4", 2, goal=(9.2, 2.1), maxtext=(9.23, 2.24)),
    Case("llama-2-7b", "v5e:4x4", 4, goal=(10.9, 4.3), maxtext=(11.30, 5.95)),
    Case("llama-2-7b", "v5e:4x4", 4, goal=(5.0, 3.0), more=LORA, param_dtype="bfloat16"),
    Case("llama-2-7b", "v5e:16x16", 4, maxtext=(4.13, 4.73)),
    Case("llama-2-7b", "v5e:16x16", 4, "qkv", goal=(10.0, 3.8), maxtext=(10.03, 4.17)),
    Case("llama-2-7b", "v5p:4x4x2", 4, goal=(7.2, 2.0), maxtext=(7.23, 2.20)),
    Case("llama-2-7b", "v6e:16x16", 4, goal=(4.5, 1.45), maxtext=(4.55, 1.61)),
    Case("llama-2-13b", "v5e:16x16", 2, goal=(4.0, 4.6), maxtext=(4.04, 5.06)),
    Case("llama-2-70b", "v5p:4x4x8", 1),
    Case("llama-2-70b", "v6e:16x16", 1),
)
RUN = """
model: {{shape: {shape}, dtype: bfloat16, param_dtype: {param_dtype}, remat: {remat}, attention: pallas_tpu}}
data: {{train: [{{path: text.jsonl, template: text}}], sequence_length: 2048}}
train: {{global_batch_size: {rows}, micro_batch_size: {rows}, epochs: 1}}
mesh: {{data: 1, fsdp: -1}}
output_dir: out
{more}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", help="a file for all figures")
    arguments = parser.parse_args()
    print("| step | GiB per chip, goal [MaxText] | Gcycles, goal [MaxText] | GB waited for / beside | compiled in |")
    print("|---|---|---|---|---|", flush=True)
    all_found = []
    for case in CASES:
        name = f"{case.shape} {case.topology}, {case.rows} rows, {case.remat}{', LoRA' if case.more else ''}"
        if arguments.only not in name:
            continue
        where = parse_topology(case.topology)
        rows = case.rows * where.count
        text = RUN.format(**{**dataclasses.asdict(case), "rows": rows})
        started = time.perf_counter()
        found = compile_step(load_run_yaml(text, "tpu_step.py"), load_shape(case.shape), where)
        seconds = time.perf_counter() - started
        all_found.append(dataclasses.asdict(case) | dataclasses.asdict(found))
        if found.program is None:
            print(f"| {name} | does not fit: {found.refused} | | | {seconds:.0f} s |", flush=True)
            continue
        assert found.program.cycles is not None

        def beside(at: int, case: Case = case) -> str:
            goal = f", {case.goal[at]}" if case.goal else ""
            return goal + (f" [{case.maxtext[at]}]" if case.maxtext else "")

        waited, overlapped = (found.program.collective_bytes(overlaps) / 1e9 for overlaps in (False, True))
        print(
            f"| {name} | {found.peak / 2**30:.2f}{beside(0)} | {found.program.cycles / 1e9:.3f}{beside(1)} "
            f"| {waited:.1f} / {overlapped:.1f} | {seconds:.0f} s |"
            + (f" involuntary full rematerialization: {found.involuntary}" if found.involuntary else ""),
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(all_found, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
