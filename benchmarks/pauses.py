"""What a run waits for beside its steps, at 110 M on a CPU: saves, evaluation, and its start.

    python benchmarks/pauses.py save [--saves 3]      # seconds that a save takes from the steps around it, in steps
    python benchmarks/pauses.py evaluate              # sums read after each batch, and once at the end, in turn
    python benchmarks/pauses.py start [--rounds 3]    # from the start of the process to the first step, cold and warm

The model is that of train_cpu.py, its step 4 x 512 tokens in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_cpu import BATCH, LENGTH, SHAPE

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def save(options: argparse.Namespace) -> None:
    from train_cpu import jax_step

    from jaxlm.training.checkpoint import Checkpoints

    step = jax_step("full", "float32")
    for _ in range(2):
        step.run()

    def seconds() -> float:
        started = time.perf_counter()
        step.run()
        return time.perf_counter() - started

    usual = [seconds() for _ in range(2)]
    print("| save | returns after | until written | steps meanwhile | stall, steps |\n|---|---|---|---|---|")
    stalls = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        for number in range(options.saves):
            begun = time.perf_counter()
            path = checkpoints.path(checkpoints.save(step.state(), {}, {}, None))
            returned = time.perf_counter() - begun
            meanwhile: list[float] = []
            while not meanwhile or not path.is_dir():
                meanwhile.append(seconds())
            checkpoints.wait()
            written = time.perf_counter() - begun
            usual += [seconds() for _ in range(2)]
            one = statistics.median(usual)
            stalls.append((returned + sum(meanwhile) - len(meanwhile) * one) / one)
            print(
                f"| {number + 1} | {returned:.2f} s | {written:.2f} s | {len(meanwhile)} | {stalls[-1]:.2f} |",
                flush=True,
            )
        checkpoints.close()
    print(f"a step takes {statistics.median(usual):.2f} s; a save takes {statistics.median(stalls):.2f} of it")


# The phases of `jaxlm train`, with the clock's time at the end of each.
PHASES = """
import sys, time
begun = float(sys.argv.pop(1))
def mark(name):
    print("mark", name, time.time() - begun, flush=True)
mark("python")
import jaxlm.cli.train as command
import jaxlm.cli.start as start
def after(owner, name, what):
    before = getattr(owner, name)
    def wrapped(*args, **more):
        result = before(*args, **more)
        mark(what)
        return result
    setattr(owner, name, wrapped)
quiet_logs = start.quiet_logs
def imported():
    mark("import")
    from jaxlm.training import loop, prepare, setup
    after(prepare, "prepare", "data")
    after(loop, "place_state", "state")
    after(setup.TrainSetup, "lower_train_step", "trace")
    after(loop, "compile_steps", "compile")
    after(loop.TrainingRun, "_take_step", "dispatch")
    after(loop.TrainingRun, "_read_metrics", "step")
    quiet_logs()
start.quiet_logs = imported
sys.exit(command.main(sys.argv[1:]))
"""
RUN = """
model: {{shape: {folder}/shape.json, dtype: float32, remat: qkv_out}}
tokenizer: {{path: {folder}/tokenizer}}
data: {{train: [{{path: {corpus}, template: text}}], validation: 0, sequence_length: {length}}}
train:
  {{steps: 2, global_batch_size: {rows}, micro_batch_size: {rows}, eval_every: 0, save_every: 0,
    compilation_cache: {cache}}}
output_dir: {folder}/run-{number}
"""


def start(options: argparse.Namespace) -> None:
    from jaxlm.tokenizer import train_sentencepiece

    corpus = CONFIGS / "quickstart" / "corpus.txt"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SHAPE}))
        train_sentencepiece([corpus], 512, folder / "tokenizer")
        tables: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for number in range(2 * options.rounds):
            kind = "warm" if number % 2 else "cold"
            text = RUN.format(
                folder=folder,
                corpus=corpus,
                length=LENGTH,
                rows=BATCH,
                number=number,
                cache=folder / f"cache-{number // 2}",
            )
            (folder / "run.yaml").write_text(text)
            command = [sys.executable, "-c", PHASES, str(time.time()), "--config", str(folder / "run.yaml")]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            marks: dict[str, float] = {}
            for line in done.stdout.splitlines():
                if line.startswith("mark "):
                    _, what, at = line.split()
                    marks.setdefault(what, float(at))
            marks["step"] = next(
                float(line.split()[2])
                for line in done.stdout.partition("mark dispatch")[2].splitlines()
                if line.startswith("mark step")
            )
            tables[kind].append(marks)
    phases = ["python", "import", "data", "trace", "state", "compile", "dispatch", "step"]
    print(f"| seconds | {' | '.join(phases)} | first step begins after |")
    print(f"|---|{'---|' * (len(phases) + 1)}")
    for kind, rounds in tables.items():
        ends = {what: statistics.median(each[what] for each in rounds) for what in phases}
        spent = [ends[what] - (ends[phases[at - 1]] if at else 0.0) for at, what in enumerate(phases)]
        print(f"| {kind} | {' | '.join(f'{each:.2f}' for each in spent)} | {ends['compile']:.2f} |")


def evaluate(options: argparse.Namespace) -> None:
    import jax
    from train_cpu import jax_step

    step = jax_step("full", "float32")
    run: Any = step.evaluation()
    batches = 6

    def read_each() -> float:
        begun, total = time.perf_counter(), 0.0
        for _ in range(batches):
            total += float(jax.device_get(run())["loss"])
        return time.perf_counter() - begun

    def read_once() -> float:
        begun = time.perf_counter()
        results = [run() for _ in range(batches)]
        sum(float(each["loss"]) for each in jax.device_get(results))
        return time.perf_counter() - begun

    read_each()
    pairs = [(read_each(), read_once()) for _ in range(options.rounds)]
    print(
        f"{batches} batches: read after each {statistics.median(a for a, _ in pairs):.2f} s, "
        f"once {statistics.median(b for _, b in pairs):.2f} s, ratio {statistics.median(a / b for a, b in pairs):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["save", "evaluate", "start"])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    {"save": save, "evaluate": evaluate, "start": start}[options.what](options)


if __name__ == "__main__":
    main()
