"""Greedy decoding of a 110 M LLaMA in float32, jaxlm beside transformers' `generate`, on this machine.

Every side is a process of its own that generates when told to; they do so in turn, so that a busy machine slows all,
and the ratio of each round is taken. First-token times are taken in fresh processes: from the call to the first token,
model loaded, with an empty compilation cache (cold) and with the one that the run before left (warm).

    python benchmarks/decode_cpu.py [--rounds 5] [--batches 1,8] [--dtype float32] [--int8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from train_cpu import SHAPE

PROMPT, NEW = 128, 128


def jax_side(batch: int, dtype: str, cache_directory: str) -> Callable[[int], float]:
    """Makes `new` tokens for the batch; returns the seconds until the first one."""
    import jax
    import numpy as np

    jax.config.update("jax_compilation_cache_dir", cache_directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    from decode_gpu import RandomModel

    from jaxlm.config import Decoding, MeshConfig
    from jaxlm.devices.mesh import make_mesh
    from jaxlm.inference.generator import Generator
    from jaxlm.inference.model import load_weights
    from jaxlm.models.decoder import Decoder
    from jaxlm.models.families import read_config
    from jaxlm.nn.weight_types import Int8Weight

    config = read_config({"architectures": ["LlamaForCausalLM"], **SHAPE})
    weight_type, dtype = Int8Weight if dtype.endswith("-int8") else None, dtype.removesuffix("-int8")
    decoder = Decoder(config, dtype=dtype, param_dtype=dtype)
    mesh = make_mesh(MeshConfig())
    generator = Generator(decoder, load_weights(decoder, mesh, RandomModel(config), None, weight_type), mesh, [])
    prompts = np.random.default_rng(0).integers(3, 32000, (batch, PROMPT)).tolist()

    def generate(new: int) -> float:
        started, first = time.perf_counter(), 0.0
        session = generator.start(prompts, Decoding(max_new_tokens=new))
        for _ in session.steps():
            first = first or time.perf_counter() - started
        assert all(len(answer.ids) == new for row in session.answers() for answer in row)
        return first

    return generate


def torch_side(batch: int, dtype: str, cache: str) -> Callable[[int], float]:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).to(getattr(torch, dtype)).eval()
    ids = torch.randint(3, 32000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))

    def generate(new: int) -> float:
        options = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation=cache
        )
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        assert out.shape[1] == PROMPT + new
        return time.perf_counter() - started

    return generate


def serve(side: str, batch: int, dtype: str, cache: str) -> None:
    """Generates as many tokens as each line on stdin says; answers each with a line of JSON."""
    generate = (jax_side if side == "jax" else torch_side)(batch, dtype, cache)
    print("{}", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        first = generate(int(line))
        print(json.dumps({"seconds": time.perf_counter() - started, "first": first}), flush=True)


class Side:
    def __init__(self, side: str, batch: int, dtype: str, cache: str) -> None:
        command = [sys.executable, __file__, "--serve", side, str(batch), dtype, cache]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side of the benchmark ended; its message stands above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def generate(self, new: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{new}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(batch: int, dtype: str, rounds: int, int8: bool) -> None:
    with tempfile.TemporaryDirectory() as cache:
        firsts = []
        for _ in range(2):
            side = Side("jax", batch, dtype, cache)
            firsts.append(side.generate(NEW)["first"])
            side.close()
        sides = {
            "jaxlm": Side("jax", batch, dtype, cache),
            "transformers, dynamic cache": Side("torch", batch, dtype, "dynamic"),
            "transformers, static cache": Side("torch", batch, dtype, "static"),
        }
        if int8:
            sides["jaxlm, int8"] = Side("jax", batch, f"{dtype}-int8", cache)
        for side in sides.values():
            side.generate(NEW)  # warm-up
        times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                times[name].append(side.generate(NEW))
        first_peer = []
        for _ in range(rounds):
            first_peer.append(sides["transformers, dynamic cache"].generate(1)["seconds"])
        for side in sides.values():
            side.close()
    print(f"batch {batch}, {dtype}: first token {firsts[0]:.2f} s with a cold cache, {firsts[1]:.2f} s with a warm one")
    steady = statistics.median(t["first"] for t in times["jaxlm"])
    print(
        f"  in a process that has generated before: {steady:.2f} s, transformers {statistics.median(first_peer):.2f} s"
    )
    for name, found in times.items():
        speed = batch * NEW / statistics.median(t["seconds"] for t in found)
        ratios = [other["seconds"] / mine["seconds"] for mine, other in zip(times["jaxlm"], found, strict=True)]
        print(
            f"  {name:28} {speed:7.1f} tokens/s   jaxlm / this: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--int8", action="store_true", help="also measure int8 weights")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        side, batch, dtype, cache = arguments.serve
        serve(side, int(batch), dtype, cache)
        return
    for batch in arguments.batches.split(","):
        compare(int(batch), arguments.dtype, arguments.rounds, arguments.int8)


if __name__ == "__main__":
    main()
