"""The pictures of docs/pictures, from real runs and plans.

python docs/site/pictures.py --quickstart out/quickstart --experts out/experts

`out/quickstart` is what `jaxlm train --config configs/quickstart.yaml` wrote. `out/experts` is a run with experts (see
EXPERTS). Memory bars come from `jaxlm plan --json`; the drawings of ways need no run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from jaxlm.planning.memory import Memory

FOLDER = Path(__file__).parent.parent / "pictures"
EXPERTS = (
    "jaxlm train --config configs/scimind/base.yaml --tokenizer.modalities '[{preset: smiles}]' --moe.experts 8 "
    "--moe.router learned --moe.top_k '{text: 4, smiles: 1}' --train.epochs 1 "
    "--data.train '[{path: configs/scimind/train.json, template: smiles2text}]' --output_dir out/experts"
)
TEAL, AMBER, GREY, BLUE, RED = "#00897b", "#f4a261", "#90a4ae", "#3d7ea6", "#c8553d"
PLANS = (
    ("LoRA, bfloat16 base\none H100", "configs/lora.yaml", "h100:1"),
    ("QLoRA, nf4 base\none RTX 4090", "configs/knowlm/qlora.yaml", "rtx4090:1"),
    ("all parameters\none of 8 H100", "configs/alpaca/full.yaml", "h100:8"),
    ("all parameters\none of 16 v5e", "configs/alpaca/full.yaml", "v5e:4x4"),
)
PARTS = {
    "parameters": TEAL,
    "optimizer": BLUE,
    "gradients": RED,
    "activations": AMBER,
    "layer": "#e9c46a",
    "gathered": GREY,
    "loss": "#b39ddb",
    "embedding": "#8d6e63",
}


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def save(name: str) -> None:
    """Writes the figure, without a date, so that the same figures give the same file."""
    plt.savefig(FOLDER / name, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close()


def draw_loss(run: Path) -> None:
    """Loss of both stages of the quickstart."""
    _, axes = plt.subplots(1, 2, figsize=(8.4, 2.8), sharey=True)
    for axis, stage, title in zip(
        axes, ("pretrain", "sft"), ("reads: all parameters", "learns to answer: LoRA"), strict=True
    ):
        rows = rows_of(run / stage)
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        check = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        axis.plot(*zip(*train, strict=True), color=TEAL, alpha=0.7, label="training")
        axis.plot(*zip(*check, strict=True), "o-", color=RED, markersize=4, label="validation")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    save("quickstart_loss.svg")


def plan_of(config: str, topology: str) -> dict[str, Any]:
    """What `jaxlm plan --json` says of LLaMA-2-7B."""
    from jaxlm.cli.main import main

    printed = io.StringIO()
    words = ["plan", "--config", config, "--model.shape", "llama-2-7b", "--topology", topology, "--json"]
    with contextlib.redirect_stdout(printed):
        status = main(words)
    if status:
        raise SystemExit(f"jaxlm {' '.join(words)} ended with {status}")
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def at_the_worst_moment(memory: dict[str, Any]) -> dict[str, int]:
    """The bytes of a plan that are in use at once when most are."""
    plan = Memory(**{field.name: memory[field.name] for field in dataclasses.fields(Memory)})
    return plan.phases()[plan.worst]


def draw_memory() -> None:
    """What each device holds at the worst moment of a step, for four runs of LLaMA-2-7B."""
    _, axis = plt.subplots(figsize=(8.4, 2.9))
    named: set[str] = set()
    for place, (_, config, topology) in enumerate(PLANS):
        memory, left = at_the_worst_moment(plan_of(config, topology)["memory"]), 0.0
        for part, size in memory.items():
            width = size / 2**30
            axis.barh(-place, width, left=left, color=PARTS[part], height=0.62, label=None if part in named else part)
            named.add(part)
            left += width
        axis.text(left + 0.3, -place, f"{left:.1f} GiB", va="center", fontsize=9)
    axis.set_yticks([-place for place in range(len(PLANS))], [name for name, _, _ in PLANS], fontsize=9)
    axis.set_xlabel("GiB of a device, LLaMA-2-7B, by jaxlm plan")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    save("memory.svg")


def draw_experts(run: Path) -> None:
    """The share of tokens of each modality that used each expert, mean over the layers, over the last ten steps."""
    rows = [row for row in rows_of(run) if "expert_share" in row][-10:]
    names = list(rows[0]["expert_share"])
    _, axes = plt.subplots(1, len(names), figsize=(8.4, 2.4), sharey=True)
    for axis, name, colour in zip(axes, names, (TEAL, AMBER), strict=True):
        layers = [layer for row in rows for layer in as_layers(row["expert_share"][name])]
        shares = [100 * sum(column) / len(layers) for column in zip(*layers, strict=True)]
        axis.bar(range(1, len(shares) + 1), shares, color=colour)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("expert")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("% of the tokens")
    save("experts.svg")


def as_layers(share: list[Any]) -> list[list[float]]:
    """Shares as [layers][experts], also where a run logged one list."""
    return share if isinstance(share[0], list) else [share]


def box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 1.55, height: float = 0.62) -> None:
    """A rounded box with a text around (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.1",
        facecolor=colour + "22", edgecolor=colour, linewidth=1.3,
    )  # fmt: skip
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=7.6, color="#1c2b2a")


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two boxes."""
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#546e7a", linewidth=1.2))


def canvas(width: float, height: float) -> Axes:
    """An empty drawing, one unit to the inch."""
    _, axis = plt.subplots(figsize=(width, height))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.axis("off")
    return axis


def draw_flow() -> None:
    """The main job: what comes in, what is made, where it goes."""
    axis = canvas(8.6, 2.9)
    box(axis, 1.0, 2.1, "weights\nHF, Meta, MindSpore,\nGGUF, deltas", BLUE, 1.8, 0.86)
    box(axis, 1.0, 0.8, "papers, records,\nmolecules", AMBER, 1.8, 0.86)
    box(axis, 3.2, 0.8, "jaxlm prepare\nclean, pack, store", AMBER, 1.6)
    box(axis, 4.3, 2.1, "jaxlm train\npretraining, LoRA, full,\npreferences, experts", TEAL, 2.0, 0.86)
    box(axis, 7.3, 2.55, "jaxlm evaluate", RED, 2.0, 0.46)
    box(axis, 7.3, 1.9, "jaxlm generate, serve", RED, 2.0, 0.46)
    box(axis, 7.3, 1.25, "convert: HF, PEFT, GGUF, …", BLUE, 2.0, 0.46)
    box(axis, 7.3, 0.6, "jaxlm push", BLUE, 2.0, 0.46)
    for start, end in (
        ((1.94, 2.1), (3.26, 2.1)), ((1.94, 0.8), (2.36, 0.8)), ((3.5, 1.14), (3.95, 1.64)),
        ((5.34, 2.2), (6.26, 2.53)), ((5.34, 2.08), (6.26, 1.92)), ((5.34, 1.9), (6.26, 1.3)),
        ((7.3, 1.0), (7.3, 0.86)),
    ):  # fmt: skip
        arrow(axis, start, end)
    save("flow.svg")


def draw_ways() -> None:
    """The ways of a record, a prompt and a tensor."""
    ways = {
        "a record": "read|template,\ntokens, marks|packed rows|order by seed|step|metrics,\ncheckpoint",
        "a prompt": "template|tokens|prefill|decode,\none by one|whole\ncharacters|answer",
        "a tensor": "name in\na file|row of\nthe table|slice for\na device|trained,\nsharded"
        "|the same\ntable back|name in\na file",
    }
    axis = canvas(8.9, 3.0)
    for number, ((name, steps), colour) in enumerate(zip(ways.items(), (AMBER, RED, BLUE), strict=True)):
        y = 2.5 - number
        axis.text(0.02, y, name, va="center", fontsize=9, color=colour, fontweight="bold")
        for place, step in enumerate(steps.split("|")):
            x = 1.5 + 1.34 * place
            box(axis, x, y, step, colour, 1.08)
            if place:
                arrow(axis, (x - 0.78, y), (x - 0.55, y))
    save("ways.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, metavar="DIR", required=True)
    parser.add_argument("--experts", type=Path, metavar="DIR", required=True)
    options = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "jaxlm"
    FOLDER.mkdir(exist_ok=True)
    draw_flow()
    draw_ways()
    draw_memory()
    draw_loss(options.quickstart)
    draw_experts(options.experts)
