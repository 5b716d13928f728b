"""Training speed at LLaMA-7B shape on one GPU: bf16, rows packed to 4,096 tokens; full and LoRA.

    python benchmarks/train_gpu.py        # both, some 5 minutes; a line each, and JSON below $OUT if set
    python benchmarks/train_gpu.py --mode lora --rows 2 --remat qkv_out

Goals on an H200: 45 % MFU full, 16,000 tokens/s LoRA (rank 8 on q, k, v). MFU is
`jaxlm.training.report.flops_per_token` over the device's dense bf16 peak. Full fine-tuning keeps parameters and moments
in bfloat16 by default, since float32 states of 7B (108 GB) leave a 141 GB card no room for a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
from train_step import build_step

from jaxlm.config import LoraConfig
from jaxlm.devices.chips import peak_flops
from jaxlm.devices.trace import measure as measure_operations
from jaxlm.models.families import load_shape
from jaxlm.training.report import flops_per_token


def measure(
    name: str, mode: str, rows: int, length: int, documents: int, remat: str, steps: int, params: str, ops: bool
) -> dict[str, object]:
    shape = load_shape(name)
    lora = LoraConfig(rank=8, targets=("q_proj", "k_proj", "v_proj")) if mode == "lora" else None
    step = build_step(
        shape,
        lora=lora,
        compute="bfloat16",
        params=params,
        rows=rows,
        length=length,
        documents=documents,
        remat=remat,
    )
    for _ in range(3):
        step.run()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - started)
    speed = rows * length / statistics.median(seconds)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind) if device.platform == "gpu" else None
    if ops:
        print("\n".join(measure_operations(step.run, step.text()).lines(14)), flush=True)
    flops = flops_per_token(shape, length, full=lora is None)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "mode": mode,
        "device": device.device_kind,
        "rows": rows,
        "length": length,
        "documents": documents,
        "remat": remat,
        "tokens_per_s": speed,
        "mfu": None if peak is None else speed * flops / peak,
        "step_s": [min(seconds), statistics.median(seconds), max(seconds)],
        "peak_gib": memory / 2**30,
        **step.facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["full", "lora", "both"], default="both")
    parser.add_argument("--rows", type=int, default=None, help="rows a step (full 1, LoRA 2)")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8, help="documents packed into a row")
    parser.add_argument("--remat", default=None, choices=["none", "dots", "qkv_out", "qkv", "full"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--by_op", action="store_true", help="also print the costliest operations of a step")
    parser.add_argument("--params", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    results = []
    for mode in ["lora", "full"] if arguments.mode == "both" else [arguments.mode]:
        rows = arguments.rows or {"full": 1, "lora": 2}[mode]
        remat = arguments.remat or {"full": "full", "lora": "qkv_out"}[mode]
        results.append(
            measure(
                arguments.shape,
                mode,
                rows,
                arguments.length,
                arguments.documents,
                remat,
                arguments.steps,
                arguments.params,
                arguments.by_op,
            )
        )
        print(json.dumps(results[-1]), flush=True)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "train_gpu.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
