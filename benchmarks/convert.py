"""Speed and memory of `convert` beside `cp` of the same bytes and beside PyTorch scripts that load everything.

    python benchmarks/convert.py --gb 1,2,4 --dir /some/disk

Makes a synthetic checkpoint of 7B layers (as many as fit the size, shards of 1 GB), runs every conversion as its own
process with the inputs out of the page cache, and copies the model's bytes before and after each: the ratio is the
conversion's speed over the median copy's. Everything is synced to the disk, by cp too, and deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# This file's folder comes first on the path, where its own name would hide the package.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]

from jaxlm.config import LoraConfig  # noqa: E402
from jaxlm.models.adapters import resolve_lora  # noqa: E402
from jaxlm.models.families import load_shape, write_config  # noqa: E402
from jaxlm.spec import DecoderSpec  # noqa: E402
from jaxlm.weights.dtypes import WEIGHT_DTYPES  # noqa: E402
from jaxlm.weights.names import hf_entries, num_params, peft_entries  # noqa: E402
from jaxlm.weights.safetensors import write_safetensors, write_safetensors_file  # noqa: E402
from jaxlm.weights.tensors import TensorSpec  # noqa: E402

SHARD = 10**9

# What the published scripts do, without their checks: load both, add, save.
TORCH_DELTA = """
import sys, torch
from transformers import AutoModelForCausalLM
base, delta, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
other = AutoModelForCausalLM.from_pretrained(delta, dtype="auto").state_dict()
with torch.no_grad():
    for name, tensor in model.state_dict().items():
        tensor += other[name]
model.save_pretrained(out)
"""
TORCH_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
# The same command without its sums, to see what they cost.
NO_SUMS = """
import sys
from convert.commands import main as cli
from jaxlm.weights import manifest
manifest._piece_digest = lambda *piece: ""
sys.exit(cli.main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: wall and processor seconds, and its largest resident memory in MiB."""

    seconds: float
    cpu: float
    mib: float


def shape_of(gigabytes: float, dtype: str) -> DecoderSpec:
    """LLaMA-7B with as many layers as make up the size."""
    whole = load_shape("llama-7b")
    one, two = (num_params(dataclasses.replace(whole, num_layers=n)) for n in (1, 2))
    layers = 1 + (gigabytes * 1e9 / WEIGHT_DTYPES[dtype].itemsize - one) / (two - one)
    return dataclasses.replace(whole, num_layers=max(1, round(layers)))


def numbers(count: int, dtype: str, random: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` weights in blocks; from a pool, for drawing them all would take longer than converting them."""
    pool = (random.standard_normal(1 << 22) * 0.02).astype(np.float32).astype(WEIGHT_DTYPES[dtype])
    while count:
        size = min(count, 1 << 20)
        start = int(random.integers(0, len(pool) - size + 1))
        yield pool[start : start + size]
        count -= size


def specs(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> list[TensorSpec]:
    random = np.random.default_rng(seed)
    return [
        TensorSpec(name, shape, WEIGHT_DTYPES[dtype], numbers(int(np.prod(shape)), dtype, random))
        for name, shape in shapes.items()
    ]


def make_model(directory: Path, config: DecoderSpec, dtype: str, seed: int) -> None:
    directory.mkdir()
    shapes = {entry.name: entry.layout.stored for entry in hf_entries(config)}
    write_safetensors(directory, "model", specs(shapes, dtype, seed), SHARD, lambda nbytes: None)
    (directory / "config.json").write_text(json.dumps(write_config(config, dtype)))


def make_adapter(directory: Path, config: DecoderSpec, rank: int = 8) -> None:
    directory.mkdir()
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    entries = peft_entries(config, resolve_lora(config, LoraConfig(rank=rank, alpha=16.0, targets=targets)))
    shapes = {entry.name: entry.layout.stored for entry in entries}
    path = directory / "adapter_model.safetensors"
    write_safetensors_file(path, specs(shapes, "float32", 7), lambda nbytes: None)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": [*targets]}
    (directory / "adapter_config.json").write_text(json.dumps(values))


def settle(*directories: Path) -> None:
    """Syncs, and drops the files of the directories from the page cache."""
    os.sync()
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


# A small process between this one and the measured one: a new process starts with its parent's largest memory.
WAIT = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
"""


def run(command: list[str], sync: Path | None = None) -> Run:
    """Runs a command; with `sync`, then syncs the files of that directory, within the time."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", WAIT, *command], capture_output=True, text=True)
    status, cpu, mib = done.stdout.split()
    if int(status):
        sys.exit(f"{' '.join(command)}: status {status}\n{done.stderr[-2000:]}")
    if sync is not None:
        for path in sync.rglob("*"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return Run(time.perf_counter() - started, float(cpu), float(mib))


def cases(folder: Path, torch: bool) -> Iterator[tuple[str, list[Path], list[str], list[str] | None]]:
    """Name, inputs, arguments of `convert` without the output, and the PyTorch script that does the same."""
    base, delta, adapter = folder / "base", folder / "delta", folder / "adapter"

    def words(*items: object) -> list[str]:
        return [str(item) for item in items]

    python = [sys.executable, "-c"]
    delta_script = [*python, TORCH_DELTA, *words(base, delta)] if torch else None
    merge_script = [*python, TORCH_MERGE, *words(base, adapter)] if torch else None
    yield "apply-delta", [base, delta], words("apply-delta", base, delta), delta_script
    yield "make-delta", [base, delta], words("make-delta", base, delta), None
    yield "merge (LoRA, rank 8, all linear layers)", [base, adapter], words("merge", base, adapter), merge_script
    yield "hf-to-meta", [base], words("hf-to-meta", base), None
    yield "meta-to-hf", [folder / "hf-to-meta"], words("meta-to-hf", folder / "hf-to-meta"), None
    yield "hf-to-mindspore", [base], words("hf-to-mindspore", base), None
    yield "mindspore-to-hf", [folder / "hf-to-mindspore"], words("mindspore-to-hf", folder / "hf-to-mindspore"), None
    yield "hf-to-jax", [base], words("hf-to-jax", base), None
    yield "jax-to-hf", [folder / "hf-to-jax"], words("jax-to-hf", folder / "hf-to-jax"), None


def measure(folder: Path, gigabytes: float, dtype: str, wanted: str, torch: bool) -> None:
    config = shape_of(gigabytes, dtype)
    make_model(folder / "base", config, dtype, 0)
    make_model(folder / "delta", config, dtype, 1)
    make_adapter(folder / "adapter", config)
    nbytes = sum(path.stat().st_size for path in (folder / "base").iterdir())
    copies: list[float] = []

    def copy() -> None:
        settle(folder / "base")
        copies.append(run(["cp", "-r", str(folder / "base"), str(folder / "copy")], folder / "copy").seconds)
        shutil.rmtree(folder / "copy")

    results: list[tuple[str, Run, Run, Run | None]] = []
    for name, inputs, arguments, script in cases(folder, torch):
        if wanted not in name:
            continue
        out = folder / name.split()[0]
        copy()
        settle(*inputs)
        without = run([sys.executable, "-c", NO_SUMS, *arguments, str(out)])
        shutil.rmtree(out)
        settle(*inputs)
        found = run([sys.executable, "-m", "convert", *arguments, str(out)])
        peer = None
        if script is not None:
            settle(*inputs)
            peer = run([*script, str(folder / "peer")], folder / "peer")
            shutil.rmtree(folder / "peer")
        copy()
        results.append((name, found, without, peer))
        if name not in ("hf-to-meta", "hf-to-mindspore", "hf-to-jax"):
            shutil.rmtree(out)
    speed = nbytes / statistics.median(copies) / 1e6
    print(f"\n{nbytes / 1e9:.2f} GB in {dtype}, {config.num_layers} layers of 7B; cp {speed:.0f} MB/s")
    print("| conversion | MB/s | of cp | of cp, without sums | processor s/GB | peak MiB | PyTorch MB/s, peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, found, without, peer in results:
        rates = [nbytes / item.seconds / 1e6 for item in (found, without)]
        other = "" if peer is None else f"{nbytes / peer.seconds / 1e6:.0f}, {peer.mib:,.0f}"
        per_gb = " / ".join(f"{item.cpu / (nbytes / 1e9):.1f}" for item in (found, without))
        print(
            f"| {name} | {rates[0]:.0f} | **{rates[0] / speed:.2f}** | {rates[1] / speed:.2f} | {per_gb} "
            f"| {found.mib:,.0f} | {other} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", default="1,2,4", help="sizes, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=WEIGHT_DTYPES)
    parser.add_argument("--dir", default=None, help="where to write; needs 5 times the largest size")
    parser.add_argument("--only", default="", help="only conversions with this in their name")
    parser.add_argument("--no-torch", action="store_true", help="without the PyTorch scripts")
    options = parser.parse_args()
    for gigabytes in (float(item) for item in options.gb.split(",")):
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            measure(Path(folder), gigabytes, options.dtype, options.only, not options.no_torch)


if __name__ == "__main__":
    main()
