"""Whether a long run stays as fast and as small as it begins: 2,000 steps of a 1 M model by `jaxlm train`.

    python benchmarks/long_run.py [--steps 2000]

A line is fitted to the time of a step and to the memory of the process (resident, read every quarter of a second) over
the steps; each is flat when its slope is within two standard errors of 0. The points that a line is fitted to are
medians of a fiftieth of the run, because neighbouring steps are slow together where other work comes and goes. The
first tenth is left out: caches fill. The run evaluates and saves every 200 steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxlm.runs.metrics import METRICS, Follower, series

POINTS, WARM_UP = 50, 0.1
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
RUN = """
model: {{shape: {folder}/shape.json, dtype: float32, remat: none}}
tokenizer: {{train_on: [{corpus}], vocab_size: 512}}
data: {{train: [{{path: {corpus}, template: text}}], validation: 40, sequence_length: 128}}
optimizer: {{learning_rate: 1.0e-3}}
train: {{steps: {steps}, global_batch_size: 4, micro_batch_size: 4, eval_every: 200, save_every: 200, keep: 2}}
output_dir: {folder}/run
"""


def resident(process: int) -> int | None:
    """Bytes of memory that a process has now; None once it has ended."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as file:  # noqa: PTH123
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS")), None)
    except OSError:
        return None


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """(mean, slope per 1,000 steps, its standard error) of a line through medians of neighbouring values."""
    kept = steps > steps.max() * WARM_UP
    parts = np.array_split(np.flatnonzero(kept), POINTS)
    x = np.array([steps[part].mean() for part in parts if len(part)])
    y = np.array([np.median(values[part]) for part in parts if len(part)])
    centred = x - x.mean()
    tilt = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - tilt * centred
    error = float(np.sqrt(residual @ residual / (len(x) - 2) / (centred @ centred)))
    return float(y.mean()), 1000 * tilt, 1000 * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(SHAPE))
        corpus = CONFIGS / "quickstart" / "corpus.txt"
        (folder / "run.yaml").write_text(RUN.format(folder=folder, corpus=corpus, steps=arguments.steps))
        command = [sys.executable, "-m", "jaxlm.train", "--config", str(folder / "run.yaml")]
        lines, memory = Follower(folder / "run" / METRICS), []
        with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            while process.poll() is None:
                time.sleep(0.25)
                done, size = lines.read(), resident(process.pid)
                if done and size is not None and 0 < done[-1]["step"] < arguments.steps:
                    memory.append((done[-1]["step"], size))
        if process.returncode:
            raise SystemExit((folder / "log").read_text())
        steps, seconds = np.array(series(lines.read(), "step_seconds")).T
        paused = lines.read()[-2].get("tokens_per_second_with_pauses")
        speed = np.median([value for _, value in series(lines.read(), "tokens_per_second")])
    print(f"{arguments.steps} steps, {speed:,.0f} tokens/s, {paused or 0:,.0f} with pauses")
    print("| | mean | slope in 1,000 steps | standard error | |")
    print("|---|---|---|---|---|")
    for what, unit, scale, x, y in (
        ("time of a step", "ms", 1e-3, steps, seconds),
        ("resident memory", "MiB", 2**20, *np.array(memory, float).T),
    ):
        mean, tilt, error = (value / scale for value in slope(x, y))
        flat = "flat" if abs(tilt) <= 2 * error else f"{tilt / mean:+.2%} in 1,000 steps"
        print(f"| {what} | {mean:.2f} {unit} | {tilt:+.3f} {unit} | {error:.3f} {unit} | {flat} |")


if __name__ == "__main__":
    main()
