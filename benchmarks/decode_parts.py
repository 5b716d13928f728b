"""Beams and top-p on this machine, each beside the plain way of doing it, in turn in one process.

    python benchmarks/decode_parts.py [--rounds 7] [--parts top_p beams]

Beams: the 110 M LLaMA in float32, 4 beams, caches of 512 slots, steps of the search's loop, beside the same loop with
all caches reordered at every token. Top-p: a token for each row, top_p 0.9 and no top-k, from logits whose nucleus has
some tens of tokens (and from flat ones, whose nucleus has nearly all), beside sorting the vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_gpu import RandomModel
from train_cpu import SHAPE

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.inference import sampling
from jaxlm.inference.model import load_weights
from jaxlm.inference.sampling import Method, Settings, choose, row_keys
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import read_config
from jaxlm.models.unrolled import gathered, next_logits
from jaxlm.nn.beam_attention import Lineage

BEAMS, SLOTS, STEPS = 4, 512, 32


def ratios(rounds: int, ours: Callable[[], Any], plain: Callable[[], Any]) -> str:
    """Seconds of both, and how many times as fast ours is, medians of rounds in which both run."""
    seconds: list[tuple[float, float]] = []
    for call in (ours, plain):
        jax.block_until_ready(call())
    for _ in range(rounds):
        took = []
        for call in (ours, plain):
            started = time.perf_counter()
            jax.block_until_ready(call())
            took.append(time.perf_counter() - started)
        seconds.append((took[0], took[1]))
    medians = (1e3 * statistics.median(each) for each in zip(*seconds, strict=True))
    first, second = medians
    each = [plain / ours for ours, plain in seconds]
    return (
        f"{first:.2f} ms, plain {second:.2f} ms: {statistics.median(each):.2f} times as fast "
        f"({min(each):.2f} to {max(each):.2f})"
    )


def beams(rounds: int) -> None:
    config = read_config({"architectures": ["LlamaForCausalLM"], **SHAPE})
    decoder, mesh = Decoder(config), make_mesh(MeshConfig())
    weights = load_weights(decoder, mesh, RandomModel(config))
    dims = BEAMS, config.period[0].attention.num_kv_heads, SLOTS, config.period[0].attention.head_dim
    caches = [(jnp.ones(dims), jnp.ones(dims)) for _ in range(config.num_layers)]
    origins = jnp.asarray(np.random.default_rng(0).integers(0, BEAMS, (STEPS, BEAMS)))
    start = SLOTS - STEPS

    def steps(shares: bool) -> Callable[[], Any]:
        def run(weights: Any, caches: Any) -> Any:
            def one_more(step: jax.Array, carry: Any) -> Any:
                caches, lineage, token = carry
                places = jnp.full(BEAMS, start) + step
                lineage = lineage.written(places) if shares else None
                logits, caches = next_logits(decoder, weights, caches, token, places, lineage)
                origin = origins[step]
                token = jnp.argmax(logits, axis=1).astype(jnp.int32)[origin]
                if shares:
                    return caches, lineage.continued(origin), token
                return [(k[origin], v[origin]) for k, v in caches], carry[1], token

            carry = caches, Lineage.new(BEAMS, SLOTS, BEAMS), jnp.arange(BEAMS, dtype=jnp.int32)
            caches, lineage, token = jax.lax.fori_loop(0, STEPS, one_more, carry)
            return token, gathered(decoder, caches, lineage) if shares else caches

        program = jax.jit(run)
        return lambda: program(weights, caches)

    with use_mesh(mesh):
        print(f"{STEPS} tokens, {BEAMS} beams, {SLOTS} slots: {ratios(rounds, steps(True), steps(False))}", flush=True)


def top_p(rounds: int) -> None:
    rng, leading = np.random.default_rng(0), sampling.LEADING
    for size, rows, kind in ((32000, 1, ""), (32000, 8, ""), (128000, 1, ""), (128000, 8, ""), (32000, 8, ", flat")):
        falling = np.cumsum(-rng.exponential(0.0 if kind else 0.05, (rows, size)), axis=1)
        logits = jnp.asarray(rng.permuted(falling, axis=1), jnp.float32)
        decoding = Decoding(temperature=1.0, top_p=0.9)
        settings, keys = Settings.of(decoding, rows, size), row_keys(0, range(rows), 1)
        arguments = logits, keys, np.zeros(rows, np.int32), settings
        programs = []
        for count in (leading, size):
            sampling.LEADING = count  # read when a program is traced: all tokens are sorted at once
            # A function of its own: JAX would take what it traced before.
            programs.append(jax.jit(partial(choose, method=Method.of(decoding, size))).lower(*arguments).compile())
        first, second = (partial(program, *arguments) for program in programs)
        np.testing.assert_array_equal(first(), second())
        print(f"top_p 0.9, {size} tokens, {rows} rows{kind}: {ratios(rounds, first, second)}", flush=True)
    sampling.LEADING = leading


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=["top_p", "beams"], default=["top_p", "beams"])
    arguments = parser.parse_args()
    for part in arguments.parts:
        {"top_p": top_p, "beams": beams}[part](arguments.rounds)
