"""Plans every recipe of configs/pods/ and keeps the table in configs/pods/README.md; no devices, no data, no weights.

    python benchmarks/recipes.py              # check: exit 1 and a diff where the table is not what is reckoned now
    python benchmarks/recipes.py --write      # rewrite the table
    python benchmarks/recipes.py --compile    # compile every recipe for its devices too, one to eight minutes each
    python benchmarks/recipes.py --compile 7b-v5e-4x4 70b-v6e-16x16

Estimates are those of `python -m jaxlm.plan`. What compilers said stands in configs/pods/compiled.json, each beside a
hash of the recipe that it was said of: the check fails when the recipe is another one now. TPUs need libtpu
(`pip install 'jax[tpu]'`), GPUs JAX's CUDA plug-in (`'jax[cuda12]'`), both any x86-64 Linux machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jaxlm.cli.parser import parse_run
from jaxlm.config import RunConfig
from jaxlm.devices.chips import GIB, Topology, parse_topology
from jaxlm.errors import UserError
from jaxlm.planning.compiled import ENVIRONMENT, CompiledStep, compile_step

os.environ.update(ENVIRONMENT)  # before JAX starts: shapes are worked out on the CPU

from jaxlm.models.families import load_shape
from jaxlm.planning.cost import Time, estimate_cost, estimate_time
from jaxlm.planning.memory import Memory, estimate_memory
from jaxlm.training.setup import TrainSetup, set_up

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "configs/pods/README.md"
COMPILED = ROOT / "configs/pods/compiled.json"
BEGIN, END = "<!-- written by benchmarks/recipes.py -->", "<!-- end of what is written -->"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A configuration, the model it is for, and the devices it is for.

    Attributes:
        file: below configs/, without .yaml.
        shape: a name, or a config.json by its path in this repository.
        changes: words of the command line beyond the file.
        published: tokens/s a device that others report of the same setting, and where.
    """

    name: str
    file: str
    shape: str
    devices: str
    changes: tuple[str, ...] = ()
    published: str = ""

    @property
    def model(self) -> str:
        """A shape's name, or the path of a file of this repository."""
        return str(ROOT / self.shape) if self.shape.endswith(".json") else self.shape

    @cached_property
    def topology(self) -> Topology:
        return parse_topology(self.devices)

    @cached_property
    def config(self) -> RunConfig:
        words = ["--config", str(ROOT / f"configs/{self.file}.yaml"), "--model.shape", self.model, *self.changes]
        return parse_run(words, prog="recipes.py", description="").configs[0]

    def digest(self) -> str:
        """A hash of all that a recipe says; its comments, and keys that it leaves alone, do not count."""
        text = (ROOT / f"configs/{self.file}.yaml").read_text(encoding="utf-8")
        said = [yaml.safe_load(text), self.shape, self.devices, self.changes]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _pod(name: str) -> Recipe:
    """7b-v5e-4x4: LLaMA-2-7B on v5e:4x4."""
    size, *_, chip, shape = name.split("-")
    return Recipe(name, f"pods/{name}", f"llama-2-{size}", f"{chip}:{shape}")


PODS = tuple(
    _pod(name)
    for name in (
        "7b-v5e-4x4", "7b-v5e-8x8", "13b-v5e-8x8", "13b-v5e-16x16", "70b-v5e-16x16", "70b-v5p-4x4x2", "70b-v6e-16x16",
        "7b-h100-8", "7b-h200-8", "13b-h100-8", "13b-h200-8", "70b-lora-h100-8", "70b-lora-h200-8", "70b-h200-4x8",
    )
)  # fmt: skip
# What `convert moefy` writes into the model; by --model.shape there is no such model.
_EXPERTS = ("--moe.experts", "16", "--moe.ranges", "{molecule: [32000, 32098]}")
_SCIMIND = "configs/scimind/llama-2-7b.json"
_LLAMA = ("--config", "llm4academic/llama-7b")
PUBLISHED = (
    Recipe("QLoRA, one TPU chip", "qlora/7b", "llama-2-7b", "v5e:1x1", published="none"),
    Recipe("QLoRA, one GPU of 24 GB", "qlora/7b", "llama-2-7b", "rtx4090:1", published="none, one GPU"),
    Recipe("SciMind fine-tuning", "scimind/finetune", _SCIMIND, "h100:8", _EXPERTS, "none, 8 Ascend 910A"),
    Recipe("SciMind fine-tuning, v5e-16", "scimind/finetune", _SCIMIND, "v5e:4x4", _EXPERTS, "none"),
    Recipe("SciMind pretraining", "scimind/pretrain", _SCIMIND, "h100:8", _EXPERTS, "none, 8 Ascend 910A"),
    Recipe("SciMind pretraining, v5e-32", "scimind/pretrain", _SCIMIND, "v5e:4x8", _EXPERTS, "none"),
    Recipe("LLM4Academic, LLaMA-7B", "llm4academic/mix", "llama-7b", "h100:4", _LLAMA, "none, 4 A100-80G"),
    Recipe("LLM4Academic, LLaMA-7B, 8 GPUs", "llm4academic/mix", "llama-7b", "h100:8", _LLAMA, "none"),
    Recipe(
        "LLM4Academic, LLaMA-7B, v5e-16",
        "llm4academic/mix",
        "llama-7b",
        "v5e:4x4",
        (*_LLAMA, "--train.micro_batch_size", "8"),
        "none",
    ),
    Recipe("KnowLM pretraining", "knowlm/pretrain", "llama-13b", "h100:3x8", published="236, on 24 V100-32G"),
    Recipe(
        "KnowLM pretraining, one machine",
        "knowlm/pretrain",
        "llama-13b",
        "h100:8",
        ("--mesh.data", "1"),
        "none",
    ),
    Recipe("KnowLM instructions, LoRA", "knowlm/lora", "llama-13b", "h100:8", published="none, 8 V100-32G"),
    Recipe("K2 pretraining", "k2/pretrain", "llama-7b", "h100:4", published="none, 4 GPUs"),
    Recipe("K2 pretraining, 8 GPUs", "k2/pretrain", "llama-7b", "h100:8", published="none"),
    Recipe("K2 pretraining, v5e-16", "k2/pretrain", "llama-7b", "v5e:4x4", published="none"),
    Recipe("Alpaca 7B", "alpaca/full", "llama-7b", "h100:8", published="at most 922, on 8 A100-80G"),
    Recipe("Alpaca 13B", "alpaca/full-13b", "llama-13b", "h100:8", published="none"),
    Recipe("Darwin", "darwin/sft", "llama-7b", "h100:8", published="none, 4 or 8 A100-80G"),
)


def _rows(rows: int, micro: int) -> tuple[str, ...]:
    return ("--train.global_batch_size", str(rows), "--train.micro_batch_size", str(micro))


# With as little as a step can have: one row a device.
WISHES = (
    Recipe("13B, v5e-16", "pods/13b-v5e-8x8", "llama-2-13b", "v5e:4x4", _rows(16, 1)),
    Recipe("70B, v5e-64", "pods/70b-v6e-16x16", "llama-2-70b", "v5e:8x8", _rows(64, 1)),
    Recipe("70B, 8 H100", "pods/70b-h200-4x8", "llama-2-70b", "h100:8", _rows(8, 1)),
    Recipe("70B, 8 H200", "pods/70b-h200-4x8", "llama-2-70b", "h200:8", _rows(8, 1)),
    Recipe("70B, 2 x 8 H200", "pods/70b-h200-4x8", "llama-2-70b", "h200:2x8", _rows(16, 1)),
)
ALL = PODS + PUBLISHED + WISHES


@dataclasses.dataclass(frozen=True)
class Estimate:
    setup: TrainSetup
    memory: Memory
    time: Time


def estimate(recipe: Recipe) -> Estimate:
    """What `jaxlm.plan` reckons, less its suggestions, which take longer.

    Raises:
        UserError: the recipe does not go with the model or the devices.
    """
    setup = set_up(recipe.config, load_shape(recipe.model), recipe.topology)
    initializer = setup.initializer(setup.schedule(1000))
    memory = estimate_memory(setup, initializer)
    time = estimate_time(estimate_cost(setup, initializer, memory), recipe.topology.chip, recipe.topology.count)
    assert time is not None  # no recipe is for devices of unknown speed
    return Estimate(setup, memory, time)


def _compiled_figures(found: CompiledStep) -> dict[str, Any]:
    figures: dict[str, Any] = {"seconds": round(found.seconds), "by": _by(), "refused": found.refused}
    if found.program is None:
        return figures
    cycles = found.program.cycles
    return figures | {
        "bytes": found.memory,
        "gcycles": None if cycles is None else round(cycles / 1e9, 3),
        "waited_gb": round(found.program.collective_bytes(False) / 1e9, 1),
        "beside_gb": round(found.program.collective_bytes(True) / 1e9, 1),
        "involuntary": found.involuntary,
    }


def _by() -> dict[str, str]:
    """Who said it: versions of the compilers, and the commit of this repository where it is one."""
    found = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(FileNotFoundError):  # no git
        said = subprocess.run(git, capture_output=True, text=True)
        if said.returncode == 0:
            found["commit"] = said.stdout.strip()
    return found


def read_compiled() -> dict[str, Any]:
    """By the recipe's name: its hash, and what the compiler said."""
    found: dict[str, Any] = json.loads(COMPILED.read_text(encoding="utf-8")) if COMPILED.is_file() else {}
    return found


def stale(recipes: Sequence[Recipe] = ALL) -> list[str]:
    """The recipes that no longer are what was compiled."""
    compiled = read_compiled()
    return [one.name for one in recipes if one.name in compiled and compiled[one.name]["recipe"] != one.digest()]


def _range(least: float, most: float, form: str) -> str:
    return f"{least:{form}} to {most:{form}}"


def row(recipe: Recipe, compiled: dict[str, Any]) -> str:
    """A line of its table."""
    found, topology, config = estimate(recipe), recipe.topology, recipe.config
    said = compiled.get(recipe.name, {})
    chip = topology.chip
    room, needed = chip.memory, said.get("bytes", found.memory.peak)
    memory = f"{found.memory.peak / GIB:.1f} of {room / GIB:.1f}"
    told, cycles, moved = "refused" if said else "–", "–", "–"
    if "bytes" in said:
        told = f"{said['bytes'] / GIB:.1f}"
        waited = said["waited_gb"]
        moved = f"{waited:,} ({waited * 1e9 / chip.link:.1f}) / {said['beside_gb']:,}"
        if said["gcycles"] is not None:
            cycles = f"{said['gcycles']:.2f} ({said['gcycles'] * 1e9 / chip.clock:.1f})"
    if needed > room:
        fits = f"no, by {(needed - room) / GIB:.1f}"
    else:
        fits = "no" if said.get("refused") else "yes"
    if recipe in WISHES:
        return _cells(recipe.name, memory, told, fits)
    time = found.time
    step = _range(time.shortest, time.longest, ".3g")
    most, least = (tokens / topology.count for tokens in time.tokens_per_second)
    speed = _range(least, most, ",.0f")
    if recipe in PUBLISHED:
        link = f"[{recipe.name}](../{recipe.file}.yaml)"
        return _cells(link, topology, memory, told, step, speed, recipe.published)
    tokens = config.train.global_batch_size * config.data.sequence_length
    return _cells(
        f"[{recipe.name}]({recipe.name}.yaml)",
        topology.count,
        f"{tokens / 2**20:.3g} M, {found.setup.micro_batch} x {found.setup.accumulation}",
        f"{memory}, {fits}",
        step,
        _range(time.mfu[1], time.mfu[0], ".0%"),
        speed,
        told,
        cycles,
        moved,
    )


def _cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _head(*names: str) -> list[str]:
    return [_cells(*names), f"|{'---|' * len(names)}"]


def compilers(compiled: dict[str, Any]) -> str:
    """Which versions compiled the rows, for the table: one sentence, TPUs' before GPUs'."""
    by_kind: dict[str, set[str]] = {"TPUs": set(), "GPUs": set()}
    for recipe in ALL:
        if recipe.name in compiled:
            said = compiled[recipe.name]["by"]
            if recipe.topology.chip.platform == "tpu":
                by_kind["TPUs"].add(f"JAX {said['jax']} with libtpu {said['libtpu']}")
            else:
                by_kind["GPUs"].add(f"JAX {said['jax']} and its CUDA plug-in")
    parts = [f"rows of {kind} by {' and by '.join(sorted(known))}" for kind, known in by_kind.items() if known]
    return f"Compiled: {'; '.join(parts)}." if parts else ""


def tables(recipes: Sequence[Recipe] = ALL) -> list[str]:
    """Lines of the three tables, with the rows of these recipes only."""
    compiled = read_compiled()

    def rows(of: Sequence[Recipe]) -> list[str]:
        return [row(one, compiled) for one in of if one in recipes]

    batch, speed = "tokens a step, rows a device x micro-steps", "tokens/s a device"
    compiler = "compiled: GiB", "Gcycles (s)", "GB waited for (s) / beside"
    return [
        *_head("recipe", "devices", batch, "GiB a device, fits", "step, s", "MFU", speed, *compiler),
        *rows(PODS),
        "",
        compilers(compiled),
        "",
        *_head("published setting", "devices", "GiB a device", "compiled", "step, s", speed, "published"),
        *rows(PUBLISHED),
        "",
        *_head("all parameters, one row of 4,096 a device", "GiB a device", "compiled", "fits"),
        *rows(WISHES),
    ]


def written() -> list[str]:
    """The lines that stand in the README now."""
    lines = README.read_text(encoding="utf-8").splitlines()
    if BEGIN not in lines or END not in lines:
        raise UserError(f"{README}: the lines {BEGIN!r} and {END!r} are missing; the table goes between them")
    return lines[lines.index(BEGIN) + 1 : lines.index(END)]


def write() -> None:
    old = written()
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace("\n".join([BEGIN, *old, END]), "\n".join([BEGIN, *tables(), END])), encoding="utf-8")


def compile_recipes(recipes: Sequence[Recipe]) -> None:
    """One after another; what each said is kept at once."""
    for recipe in recipes:
        print(f"{recipe.name}: compiling for {recipe.topology}", flush=True)
        found = compile_step(recipe.config, load_shape(recipe.model), recipe.topology)
        figures = {"recipe": recipe.digest()} | _compiled_figures(found)
        print(json.dumps(figures), flush=True)
        everything = read_compiled() | {recipe.name: figures}
        ordered = {one.name: everything[one.name] for one in ALL if one.name in everything}
        COMPILED.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 the table is right (or was written), 1 it is not, 2 a mistake in the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument(
        "--compile", nargs="*", metavar="NAME", help="these recipes (default: all), and rewrite the table"
    )
    given = parser.parse_args(argv)
    try:
        return _run(given.write, given.compile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(rewrite: bool, names: list[str] | None) -> int:
    known = {one.name: one for one in ALL}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(f"--compile: no recipe {unknown[0]!r}; there are {', '.join(known)}")
    if names is not None:
        compile_recipes([known[name] for name in names] or ALL)
    old = stale()
    if old:
        print(f"compiled as they were before: --compile {' '.join(map(repr, old))}")
    if rewrite or names is not None:
        write()
        return int(bool(old))
    differs = list(difflib.unified_diff(written(), tables(), "configs/pods/README.md", "now", lineterm="", n=0))
    print("\n".join(differs) or "the table is what is reckoned now")
    return int(bool(old or differs))


if __name__ == "__main__":
    sys.exit(main())
