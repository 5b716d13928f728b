"""A run directory written by hand, with all that a run may write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jaxlm.runs.events import EventLog


def write_run(out: Path, steps: int = 60, total: int = 100, end: dict[str, Any] | None = None) -> Path:
    """Two starts, of which the second has a warning; two sources, whose names are not plain; a task; experts."""
    out.mkdir(parents=True)
    events = EventLog(out)
    facts = {"model": "models/geo: 7,000 parameters, 2 layers", "trained": "70 (1.00%): LoRA rank 8 on q_proj"}
    versions = {"jax": "0.10.2"}
    events.write("start", step=0, total=total, facts=facts, versions=versions, processes=1, data=["train <i>a</i>"])
    events.write("end", step=20, complete=False, stopped_by="SIGTERM")
    events.write("start", step=20, total=total, facts=facts, versions=versions, processes=2, data=["train <i>a</i>"])
    events.write("warning", text="<script>alert(1)</script> [red]is no markup[/red]")
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step % 20 == 0:
            lines.append({"step": step, "validation_loss": 3.0 - step / 100, "validation_accuracy": 0.5})
            lines.append({"step": step, "mdp/accuracy": 0.25 + step / 200, "mdp/accuracy_stderr": 0.02})
        if step:
            lines.append(
                {
                    "step": step,
                    "loss": 2 + 2 * math.exp(-step / 20),
                    "tokens": 100,
                    "learning_rate": 1e-3,
                    "grad_norm": 0.5,
                    "skipped": 0,
                    "tokens_per_second": 1000.0,
                    "tokens_per_second_with_pauses": 910.0,
                    "step_seconds": 2.0,
                    "host_memory": 3 << 30,
                    "consumed_tokens": {"a&b.json": 80 * step, "[bold]c.json": 20 * step},
                    "passes": {"a&b.json": 0.5, "[bold]c.json": 0.1},
                    "expert_share": {"text": [0.9, 0.6, 0.3, 0.2]},
                    "router_entropy": {"text": 0.9},
                }
            )
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
    (out / "config.yaml").write_text("model: {path: my models/geo}\nlora: {rank: 8}\n")
    for step in (20, 40):
        (out / "checkpoints" / str(step)).mkdir(parents=True)
        (out / "checkpoints" / str(step) / "commit_success.txt").write_text("x")
    (out / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    if end is not None:
        events.write("end", **end)
    return out
