"""Forward and backward of the feed-forward layer: E experts of which a token uses k, beside the dense layer.

Same D and F; the sparse form sorts tokens by expert and multiplies only what is used. Both are timed in turn in one
process, and the ratio of each pair is taken. Goal: with 16 experts and k = 4 at most 45 % of the dense time.

    python benchmarks/moe.py [--tokens 4096] [--hidden 768] [--neurons 3072] [--dtype float32] [--rounds 7] [--plot PNG]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.experts import ExpertsFeedForward
from jaxlm.nn.feed_forward import FeedForward
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder


def layer(config: DecoderSpec, dtype: Any, tokens: int, compute: str | None) -> tuple[Callable[[], Any], float]:
    """A function that runs forward and backward once, compiled, and gives the gradients; and the seconds that took."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, tokens, config.hidden_size)), dtype)
    modality = jnp.zeros((1, tokens), jnp.int32)
    common = (config.hidden_size, config.initializer_range, {}, dtype, dtype, config.feed_forward)
    module: nn.Module = FeedForward(*common) if compute is None else ExpertsFeedForward(*common, compute=compute)
    rest = (jnp.int32(0), True) if compute is None else (jnp.int32(0), True, modality)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, *rest)["params"])

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(module.apply({"params": params}, x, *rest).astype(jnp.float32)))

    started = time.perf_counter()
    run = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return lambda: jax.block_until_ready(run(params, x)), time.perf_counter() - started


def check(config: DecoderSpec, dtype: Any, compute: str) -> float:
    """Gradients of 1,024 tokens beside those of the plain twin: norm of the difference, of the norm."""
    found, expected = (layer(config, dtype, 1024, name)[0]() for name in (compute, "dense"))

    def far(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    return max(jax.tree.leaves(jax.tree.map(far, found, expected)))


def ratios(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, list[float]]:
    """(median seconds of `one`, seconds of `one` / `other` in each round)."""
    one(), other()
    times = []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        for run in (one, other):
            run()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return statistics.median(a for a, _ in times), [a / b for a, b in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compute", default={"cpu": "loop"}.get(jax.default_backend(), f"pallas_{jax.default_backend()}")
    )
    parser.add_argument("--plot", help="PNG of the ratio over k")
    parser.add_argument("--cases", default="16:1,16:2,16:4,16:8,16:16,4:1,8:2,32:8,64:16", help="experts:k")
    parser.add_argument("--check", action="store_true", help="first compare gradients with the plain twin's")
    parser.add_argument("--short", action="store_true", help="only these cases, no growth with E nor with tokens")
    arguments = parser.parse_args()
    cases = [tuple(map(int, case.split(":"))) for case in arguments.cases.split(",")]
    dtype = jnp.dtype(arguments.dtype)
    dense_config = uniform_decoder(
        "llama",
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.neurons,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
    )

    def sparse(experts: int, k: int, router: str = "learned") -> DecoderSpec:
        return dense_config.with_experts(ExpertsSpec(experts, router, top_k=(k,)))

    dense, _ = layer(dense_config, dtype, arguments.tokens, None)
    print(f"{jax.devices()[0].device_kind}, D {arguments.hidden}, F {arguments.neurons}, {arguments.dtype}")
    points = []
    if arguments.check:
        worst = check(sparse(*cases[0]), dtype, arguments.compute)
        print(f"{arguments.compute}: gradients differ from the plain twin's by {worst:.1e}", flush=True)
    for experts, k in cases:
        run, seconds = layer(sparse(experts, k), dtype, arguments.tokens, arguments.compute)
        own, found = ratios(run, dense, arguments.rounds)
        ratio = statistics.median(found)
        points.append((experts, k, ratio))
        print(
            f"{experts:3} experts, k {k:2} ({k / experts:6.1%} of the neurons): {ratio:.2f} of the dense time "
            f"({min(found):.2f} to {max(found):.2f}), {1e3 * own:.0f} ms, compiled in {seconds:.1f} s",
            flush=True,
        )
    if arguments.short:
        return
    for experts in (8, 16, 32, 64):  # more experts of the same size, of which a token uses as many: more to choose from
        wide = sparse(experts, 4).with_feed_forward(size=arguments.neurons // 16 * experts)
        run, _ = layer(wide, dtype, arguments.tokens, arguments.compute)
        own, _ = ratios(run, lambda: None, arguments.rounds)
        print(f"{experts:3} experts of {arguments.neurons // 16} neurons, k 4: {1e3 * own:.0f} ms", flush=True)
    for k in (2, 4):
        run, _ = layer(sparse(16, k, "activation"), dtype, arguments.tokens, arguments.compute)
        _, found = ratios(run, dense, arguments.rounds)
        print(f"16 experts, k {k}, router activation, only down_proj skips: {statistics.median(found):.2f}", flush=True)
    for tokens in (arguments.tokens // 4, arguments.tokens // 2, arguments.tokens, arguments.tokens * 2):
        run, _ = layer(sparse(16, 4), dtype, tokens, arguments.compute)
        own, _ = ratios(run, lambda: None, arguments.rounds)
        print(f"16 experts, k 4, {tokens:6} tokens: {1e6 * own / tokens:.1f} us a token", flush=True)
    if arguments.plot:
        plot([(k / 16, ratio) for experts, k, ratio in points if experts == 16], arguments.plot)


def plot(points: list[tuple[float, float]], target: str) -> None:
    """The ratio over the share of neurons used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), dpi=120)
    axes.plot(*zip(*points, strict=True), marker="o", label="measured")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="share of the neurons")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xlabel="k / 16, share of the neurons used", ylabel="time / dense time", xlim=(0, 1.02), ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main()
