"""All GPU benchmarks in one call, within a number of seconds; one table at the end, and JSON and logs below --output.

Each part is a process of its own with a limit; what fails or runs too long is said, and the others run. The parts:
check (attention's kernels beside their plain form), nf4 (those for weights in four bits, and times), attention, lora
and full (7B training steps), decode, tune, experts, serve.

    python benchmarks/gpu.py [--seconds 560] [--parts check,attention,…] [--output DIR]
    python benchmarks/gpu.py --miniature        # the same scripts on a CPU at toy size: that they still run
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Part:
    """A process: words behind `python`, seconds it may take, and the words on a CPU (None: it needs a GPU)."""

    words: tuple[str, ...]
    limit: int
    miniature: tuple[str, ...] | None


def script(name: str, words: str) -> tuple[str, ...]:
    return (str(HERE / name), *words.split())


SMALL = str(HERE.parent / "configs/models/quickstart.json")
TRAIN_SMALL = f"--shape {SMALL} --length 64 --documents 2 --steps 2 --rows 2"
TUNE = "--heads 32 --head_dim 128 --dtype bfloat16 --lengths 4096 --packed --rows 2 --rounds 4"
PARTS = {
    "check": Part(script("attention_gpu.py", "--check"), 260, None),
    "nf4": Part(
        script("nf4_gpu.py", "--sizes 4096x11008 --rows 1,128,512,2048 --rounds 3"),
        90,
        script("nf4_gpu.py", "--sizes 128x200 --rows 24"),
    ),
    "attention": Part(
        script("attention_gpu.py", "--lengths 1024,2048,4096,8192,16384 --rounds 3 --json {out}/attention.json"),
        140,
        None,
    ),
    "lora": Part(
        script("train_gpu.py", "--mode lora --rows 2 --remat none --by_op"),
        100,
        script("train_gpu.py", f"--mode lora --remat dots {TRAIN_SMALL}"),
    ),
    "full": Part(
        script("train_gpu.py", "--mode full --rows 2 --remat dots --by_op"),
        100,
        script("train_gpu.py", f"--mode full --remat qkv_out {TRAIN_SMALL}"),
    ),
    "decode": Part(
        script("decode_gpu.py", "--batches 1,8 --int8 --rounds 2"),
        130,
        script("decode_gpu.py", f"--shape {SMALL} --batches 1 --rounds 1 --new 8"),
    ),
    "tune": Part(("-m", "jaxlm.tune", *TUNE.split()), 90, None),
    "experts": Part(
        script(
            "moe.py",
            "--hidden 4096 --neurons 11008 --tokens 16384 --dtype bfloat16 --rounds 3 --check --short --cases 16:4,8:2",
        ),
        70,
        script("moe.py", "--hidden 32 --neurons 64 --tokens 64 --rounds 1 --check --short --cases 4:2"),
    ),
    "serve": Part(
        script("serve_gpu.py", "--seconds 230"),
        250,
        script(
            "serve_gpu.py",
            f"--shape {SMALL} --clients 1 3 --rows 4 --each 1 --longest 8 --context 256 --cache {{out}}/cache",
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-benchmarks")))
    parser.add_argument("--miniature", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {sorted(unknown)} are none of {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "JAXLM_TUNED": str(arguments.output / "tuned.json"),
    }
    rows, failed = [], False
    for name in arguments.parts.split(","):
        part = PARTS[name]
        words = part.miniature if arguments.miniature else part.words
        if words is None:
            continue
        limit = min(part.limit, end - time.monotonic())
        if limit < 10:
            rows.append((name, "not run: no time was left", 0.0))
            continue
        print(f"== {name} (at most {limit:.0f} s)", flush=True)
        # PyTorch, which measures beside us, needs room of its own.
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.6" if name == "attention" else "0.92"
        started, log = time.monotonic(), arguments.output / f"{name}.log"
        ran = [sys.executable, *(word.replace("{out}", str(arguments.output)) for word in words)]
        with log.open("w") as out:
            try:
                status = str(
                    subprocess.run(ran, stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=limit).returncode
                )
            except subprocess.TimeoutExpired:
                status = "too long"
        text = log.read_text()
        print(text[-3500:] if status == "0" else text[-1800:], flush=True)
        rows.append((name, "done" if status == "0" else f"failed: {status}", time.monotonic() - started))
        failed |= status != "0"
    for name, status, taken in rows:
        print(f"{name:10} {status:30} {taken:6.1f} s")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
