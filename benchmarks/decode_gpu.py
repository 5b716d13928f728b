"""Greedy decoding at LLaMA-7B shape on one GPU, beside the limit that its memory bandwidth sets.

A token needs every weight once, and the keys and values so far: at best batch * bandwidth / (weights + batch * cache)
tokens a second. Weights are random; prompts of 128 tokens, 256 new ones. One call, a few minutes:

    python benchmarks/decode_gpu.py [--shape llama-2-7b] [--batches 1,8] [--bandwidth 4.8e12] [--int8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights, weight_bytes
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.families import load_shape
from jaxlm.models.unrolled import cache_bytes
from jaxlm.nn.weight_types import Int8Weight

PROMPT = 128


class RandomModel:
    """Leaves of random numbers; all layers share theirs, so that making them takes seconds."""

    leaves: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        tree = nn.unbox(abstract_variables(Decoder(config))["params"])
        self.shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        self.made: dict[str, np.ndarray] = {}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        layered = path.startswith("layers/")
        if path not in self.made:
            shape = self.shapes[path][1:] if layered else self.shapes[path]
            made = np.random.default_rng(len(path)).standard_normal(shape, np.float32) * 0.02
            self.made[path] = made.astype(jnp.bfloat16)  # the model's: it is not cast again for every layer
        return self.made[path][None] if layered else self.made[path][index]


def measure(generator: Generator, batch: int, new: int, rounds: int) -> tuple[float, float]:
    """(seconds to the first token, seconds per step after it), medians."""
    prompts = np.random.default_rng(0).integers(3, 250, (batch, PROMPT)).tolist()
    firsts, steps = [], []
    for turn in range(rounds + 1):
        marks = [time.perf_counter()]
        for _ in generator.start(prompts, Decoding(max_new_tokens=new), flush=new).steps():
            marks.append(time.perf_counter())
        if turn:  # the first one compiles
            firsts.append(marks[1] - marks[0])
            steps.append((marks[-1] - marks[1]) / (new - 1))
    return statistics.median(firsts), statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; default: H200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--int8", action="store_true", help="also measure int8 weights")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    arguments = parser.parse_args()
    new = arguments.new
    config = load_shape(arguments.shape)
    print(f"{jax.devices()[0].device_kind}, {arguments.shape}, bfloat16, prompt {PROMPT}, {new} new tokens")
    for int8 in (False, True) if arguments.int8 else (False,):
        decoder = Decoder(config, dtype="bfloat16", param_dtype="bfloat16")
        mesh, weight_type = make_mesh(MeshConfig(), jax.devices()[:1]), Int8Weight if int8 else None
        generator = Generator(decoder, load_weights(decoder, mesh, RandomModel(config), None, weight_type), mesh, [])
        embedding = generator.weights["params"]["embed_tokens"]["embedding"].nbytes
        # The table is looked up, not read, unless it is the output matrix too.
        needed = weight_bytes(generator.weights) - (0 if config.tied_head else embedding)
        for batch in map(int, arguments.batches.split(",")):
            first, step = measure(generator, batch, new, arguments.rounds)
            least = (needed + cache_bytes(config, batch, PROMPT + new // 2, "bfloat16")) / arguments.bandwidth
            print(
                f"{'int8' if int8 else 'bf16'} batch {batch}: first token {1e3 * first:.0f} ms, "
                f"{batch / step:.1f} tokens/s, {100 * least / step:.0f} % of the memory's limit",
                flush=True,
            )


if __name__ == "__main__":
    main()
