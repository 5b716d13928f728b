"""`python -m tests.golden.compare --against COMMIT`: does this tree give the very numbers that another commit gives?

Both trees run the same commands on the same machine, from the same inputs, which the other commit makes. Bits differ
between processors, so nothing is checked in. What is compared:

- train: loss and gradient norm of 12 steps, bit by bit, of {full, LoRA, DoRA, experts, mean of means};
- resume: the other tree's run of 6 steps, continued by this one;
- generate: greedy, beams and sampled, of two models. Every character is a token, so equal texts are equal ids;
- convert: SHA-256 of every file of every direction. A native directory goes through `jax-to-hf` first, as OCDBT draws
  names of files;
- plan: the figures of three recipes.

Exit status: 0 all is equal, 1 something differs (each figure is printed, floats with their distance in ulp).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = "rock sand clay lava iron zinc salt acid base atom ion gas heat cold deep soft hard melt form flow".split(" ")  # noqa: SIM905  (a table of words reads better than a list)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 12
COMMON: dict[str, Any] = {
    "model": {"dtype": "float32", "remat": "none"},
    "data": {"validation": 8, "sequence_length": 128},
    "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
    "train": {
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "eval_every": 4,
        "save_every": 6,
        "compilation_cache": "none",
    },
}
# name -> what differs from COMMON.
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora, dropout, packing, accumulation": {
        "lora": {"rank": 4, "dropout": 0.1, "targets": ALL},
        "data": {"packing": True},
        "train": {"micro_batch_size": 2},
    },
    "dora": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"], "dora": True}},
    "experts, learned router": {
        "model": {"path": "{inputs}/moe"},
        "data": {"packing": False},
    },
    "mean of means": {"train": {"micro_batch_size": 2, "loss_normalisation": "mean_of_means"}},
}
DECODING = {
    "greedy": [],
    "beams": ["--num_beams", "3", "--samples", "2"],
    "sampled": ["--temperature", "0.8", "--top_p", "0.9", "--seed", "3", "--samples", "2"],
}
RECIPES = (
    ("pods/7b-v5e-4x4", "llama-2-7b", "v5e:4x4"),
    ("alpaca/lora", "llama-2-7b", "h100:1"),
    ("pods/70b-v5p-4x4x2", "llama-2-70b", "v5p:4x4x2"),
)


class Tree:
    """A checkout and where what it writes goes."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out
        out.mkdir(parents=True)

    def run(self, module: str, *words: object, may_end_with: tuple[int, ...] = (0,)) -> str:
        """A command of this tree; its standard output.

        Raises:
            SystemExit: it failed.
        """
        command = [sys.executable, "-m", module, *map(str, words)]
        environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        done = subprocess.run(command, cwd=self.out, env=environment, capture_output=True, text=True)
        if done.returncode not in may_end_with:
            raise SystemExit(f"{self.root}: {' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout


def make_inputs(tree: Tree, inputs: Path) -> None:
    """A tokenizer of characters, records, a model trained a little (as run and as HF), one of experts, adapters."""
    draw = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    records = [{"instruction": sentence(4), "input": "", "output": sentence(draw.randint(2, 12))} for _ in range(120)]
    (inputs / "records.json").write_text(json.dumps(records))
    (inputs / "questions.json").write_text(json.dumps([sentence(draw.randint(1, 6)) for _ in range(9)]))
    (inputs / "shape.json").write_text(json.dumps(SHAPE))
    (inputs / "tokenizer").mkdir()
    _characters(inputs / "tokenizer" / "tokenizer.model")
    base = {"model": {"shape": str(inputs / "shape.json")}, "tokenizer": {"path": str(inputs / "tokenizer")}}
    _train(tree, inputs, "base", _merged(base, {"train": {"steps": 30}}), inputs / "base")
    tree.run("convert", "jax-to-hf", inputs / "base", inputs / "hf")
    experts = ["--experts", "4", "--top-k", "text=2", "--router", "learned"]
    tree.run("convert", "moefy", inputs / "base", inputs / "moe", *experts)
    lora = {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}, "optimizer": {"learning_rate": 0.03}}
    _train(tree, inputs, "adapter", lora, inputs / "adapter")


def _characters(file: Path) -> None:
    """A SentencePiece model whose pieces are single characters, so that a text has one list of ids."""
    import sentencepiece

    text = [
        " ".join(WORDS),
        "Below is an instruction that describes a task. Write a response that completes it. ###:\n",
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_prefix=str(file.with_suffix("")),
        model_type="char",
        vocab_size=SHAPE["vocab_size"],
        hard_vocab_limit=False,
        minloglevel=2,
    )


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], value) for key, value in over.items() if isinstance(base.get(key), dict)}
    return base | over | both


def _train(tree: Tree, inputs: Path, name: str, changes: dict[str, Any], out: Path) -> Path:
    config = _merged(COMMON, {"data": {"train": [{"path": str(inputs / "records.json"), "template": "alpaca_short"}]}})
    if "shape" not in changes.get("model", {}):
        config = _merged(config, {"model": {"path": str(inputs / "hf")}})
    text = json.dumps(_merged(config, changes)).replace("{inputs}", str(inputs))
    file = tree.out / f"{name}.yaml"
    file.write_text(text)
    tree.run("jaxlm.train", "--config", file, "--output_dir", out)
    return out


def _metrics(run: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for key in ("loss", "grad_norm", "learning_rate", "validation_loss", "balance_loss", "z_loss"):
            if key in values:
                figures[f"step {values['step']} {key}"] = values[key]
    return figures


def train(tree: Tree, inputs: Path) -> dict[str, Any]:
    """Figures of every run in RUNS."""
    figures: dict[str, Any] = {}
    for name, changes in RUNS.items():
        run = _train(tree, inputs, name.split(",")[0], changes, tree.out / "runs" / name.split(",")[0])
        figures |= {f"{name}: {key}": value for key, value in _metrics(run).items()}
    return figures


def resume(tree: Tree, inputs: Path) -> dict[str, Any]:
    """A run of 30 steps that the other tree made, made ten steps longer."""
    run = tree.out / "resumed"
    subprocess.run(["cp", "-a", str(inputs / "base"), str(run)], check=True)
    tree.run("jaxlm.train", "--config", run / "config.yaml", "--output_dir", run, "--train.steps", 40)
    return _metrics(run)


def generate(tree: Tree, inputs: Path) -> dict[str, Any]:
    """Answers of a dense model with an adapter and of one of experts."""
    figures: dict[str, Any] = {}
    for model in ("adapter", "moe"):
        for name, words in DECODING.items():
            file = tree.out / f"{model}-{name}.jsonl"
            words = [*words, "--max_new_tokens", "40", "--batch_size", "4", "--compilation_cache", "none"]
            words += ["--predict_data", str(inputs / "questions.json"), "--save_file", str(file)]
            tree.run("jaxlm.generate", "--model", inputs / model, "--template", "alpaca_short", *words)
            lines = file.read_text().splitlines()
            figures |= {f"{model}, {name}: question {number}": line for number, line in enumerate(lines)}
    return figures


def convert(tree: Tree, inputs: Path) -> dict[str, Any]:
    """SHA-256 of every file of every direction."""
    out = tree.out / "converted"
    out.mkdir()

    def run(verb: str, *words: object) -> None:
        tree.run("convert", verb, *words)

    hf = inputs / "hf"
    run("hf-to-jax", hf, out / "jax")
    run("jax-to-hf", out / "jax", out / "hf-again")
    for form in ("meta", "mindspore"):
        run(f"hf-to-{form}", hf, out / form)
        run(f"jax-to-{form}", inputs / "base", out / f"{form}-of-run")
        run(f"{form}-to-hf", out / form, out / f"hf-of-{form}")
        run(f"{form}-to-jax", out / form, out / f"jax-of-{form}")
    run("jax-to-peft", inputs / "adapter", out / "peft")
    run("peft-to-jax", out / "peft", out / "adapter", "--base", hf)
    run("jax-to-peft", out / "adapter", out / "peft-again")
    run("merge", hf, inputs / "adapter", out / "merged")
    run("make-delta", hf, out / "merged", out / "delta")
    run("apply-delta", hf, out / "delta", out / "tuned")
    run("extend-vocab", hf, out / "extended", "--token", "<new>")
    run("moefy", hf, out / "experts", "--experts", "4", "--top-k", "text=2", "--router", "activation")
    run("demoefy", out / "experts", out / "dense")
    run("jax-to-hf", inputs / "moe", out / "moe-hf")
    figures: dict[str, Any] = {}
    for directory in sorted(out.iterdir()):
        description = directory / "jaxlm" / "model.json"
        if description.is_file() and json.loads(description.read_text()).get("lora") is None:
            run("jax-to-hf", directory, out / f"{directory.name}-as-hf")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        native = any((parent / "jaxlm" / "model.json").is_file() for parent in file.parents if parent != out)
        if not native:
            figures[name] = hashlib.sha256(_without_paths(file, tree)).hexdigest()
    return figures


def _without_paths(file: Path, tree: Tree) -> bytes:
    """The content; of a small text, without the folder that this tree writes to."""
    content = file.read_bytes()
    return content.replace(str(tree.out).encode(), b"OUT") if file.suffix in (".json", ".md", ".txt") else content


def plan(tree: Tree, inputs: Path) -> dict[str, Any]:
    """The figures of RECIPES."""
    figures: dict[str, Any] = {}
    for name, shape, topology in RECIPES:
        file = tree.root / "configs" / f"{name}.yaml"
        words = ["--config", file, "--model.shape", shape, "--topology", topology, "--json"]
        done = tree.run("jaxlm.plan", *words, may_end_with=(0, 1))  # 1: it does not fit
        figures |= {f"{name}: {key}": value for key, value in _flat(json.loads(done)).items()}
    return figures


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    if isinstance(values, list):
        return {k: v for i, inner in enumerate(values) for k, v in _flat(inner, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): values}


PARTS: dict[str, Callable[[Tree, Path], dict[str, Any]]] = {
    "train": train,
    "resume": resume,
    "generate": generate,
    "convert": convert,
    "plan": plan,
}


def ulps(a: float, b: float) -> int:
    """How many float32 lie between two of them."""

    def place(value: float) -> int:
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        return bits if bits >= 0 else -(bits & 0x7FFFFFFF)

    return abs(place(a) - place(b))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each figure that is not the same."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            both = isinstance(old, float) and isinstance(new, float)
            distance = f"  ({ulps(old, new)} ulp)" if both else ""  # type: ignore[arg-type]
            lines.append(f"  {key}: {old} before, {new} now{distance}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the commit that says what is right")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be given again)")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkout = place / "before"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(checkout), options.against], cwd=ROOT, check=True
        )
        try:
            trees = Tree(checkout, place / "out-before"), Tree(ROOT, place / "out-now")
            inputs = place / "inputs"
            inputs.mkdir()
            make_inputs(trees[0], inputs)
            for name in options.only or PARTS:
                figures = [PARTS[name](tree, inputs) for tree in trees]
                lines = differences(*figures)
                failed |= bool(lines) or not figures[0]
                print(f"{name}: {len(figures[0])} figures, {len(lines)} differ", flush=True)
                print("\n".join(lines[:50]), end="\n" if lines else "", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=False)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
