"""One training step of a 110 M LLaMA, jaxlm beside transformers + PyTorch (+ PEFT), on this machine.

Both sides are processes of their own that make a step when told to; they step in turn, so that a busy machine
slows both, and the ratio of each pair is taken. Reports medians of paired ratios, peak memory and compile time.

    python benchmarks/train_cpu.py [--steps 10] [--cases full-float32,lora-float32,full-bfloat16,lora-bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_step import TimedStep

BATCH, LENGTH, RANK, TARGETS = 4, 512, 8, ("q_proj", "k_proj", "v_proj")
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def jax_step(mode: str, dtype: str) -> TimedStep:
    from train_step import build_step

    from jaxlm.config import LoraConfig
    from jaxlm.models.families import read_config

    return build_step(
        read_config({"architectures": ["LlamaForCausalLM"], **SHAPE}),
        lora=LoraConfig(rank=RANK, targets=TARGETS) if mode == "lora" else None,
        compute=dtype,
        params=dtype if mode == "lora" else "float32",  # a frozen base is kept in the compute dtype
        rows=BATCH,
        length=LENGTH,
        documents=1,
        remat=os.environ.get("JAXLM_BENCH_REMAT") or {"full": "qkv_out", "lora": "dots"}[mode],
    )


def jax_side(mode: str, dtype: str) -> tuple[Callable[[], float], dict[str, Any]]:
    step = jax_step(mode, dtype)
    return step.run, step.facts


def torch_side(mode: str, dtype: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa", use_cache=False))
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        if dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS)))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def one() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return one, {}


Make = Callable[[str, str], tuple[Callable[[], float], dict[str, Any]]]


def serve(make: Make, mode: str, dtype: str) -> None:
    """Makes a step for each line on stdin; answers each with a line of JSON."""
    step, facts = make(mode, dtype)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak_memory()}), flush=True)


class Side:
    def __init__(self, script: str, side: str, mode: str, dtype: str) -> None:
        command = [sys.executable, script, "--serve", side, mode, dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side of the benchmark ended; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(script: str, mode: str, dtype: str, steps: int) -> dict[str, Any]:
    ours, theirs = Side(script, "jax", mode, dtype), Side(script, "torch", mode, dtype)
    for _ in range(2):  # warm-up
        ours.step(), theirs.step()
    pairs = [(ours.step(), theirs.step()) for _ in range(steps)]
    ours.close(), theirs.close()
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    tokens = BATCH * LENGTH
    return {
        "case": f"{mode} {dtype}",
        "jaxlm tok/s": tokens / statistics.median(a["seconds"] for a, _ in pairs),
        "torch tok/s": tokens / statistics.median(b["seconds"] for _, b in pairs),
        "speed ratio": statistics.median(ratios),
        "ratio min": min(ratios),
        "ratio max": max(ratios),
        "jaxlm peak GiB": max(a["peak"] for a, _ in pairs) / 2**30,
        "torch peak GiB": max(b["peak"] for _, b in pairs) / 2**30,
        "memory ratio": max(a["peak"] for a, _ in pairs) / max(b["peak"] for _, b in pairs),
        "losses": [round(x["loss"], 4) for x in pairs[0]],
        **ours.facts,
    }


def main(script: str, text: str | None, cases: str, sides: dict[str, Make]) -> None:
    """Compares two sides case by case, or is one of them."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cases", default=cases)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        side, mode, dtype = arguments.serve
        serve(sides[side], mode, dtype)
        return
    for case in arguments.cases.split(","):
        mode, dtype = case.split("-")
        row = compare(script, mode, dtype, arguments.steps)
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)


if __name__ == "__main__":
    ALL = "full-float32,lora-float32,full-bfloat16,lora-bfloat16"
    main(__file__, __doc__, ALL, {"jax": jax_side, "torch": torch_side})
