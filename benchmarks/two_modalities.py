"""Does a learned router tell two modalities apart, and is it worth its neurons? A small experiment, whatever it shows.

Two languages with tokens of their own (64 each): the next token follows from the last two by a random table, with one
in ten drawn at random. So there is more to remember than a small feed-forward layer holds. Three models, alike but for
that layer, see the same rows: dense with the neurons that a token of the experts' model uses, that model (E experts, k
used, router learned), and dense with all of its neurons.

    python benchmarks/two_modalities.py [--seeds 3] [--steps 800] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.config import MoeRunConfig
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder
from jaxlm.training.objectives.cross_entropy import router_figures

TOKENS, LENGTH, ROWS, NOISE = 64, 64, 64, 0.1
EXPERTS, USED, NEURONS = 8, 2, 512
SHAPE = uniform_decoder(
    "llama",
    vocab_size=2 * TOKENS,
    hidden_size=64,
    intermediate_size=NEURONS,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
)
MOE = ExpertsSpec(EXPERTS, "learned", ("text", "other"), ((TOKENS, 2 * TOKENS),), (USED, USED))
MODELS = {
    "dense, active size": SHAPE.with_feed_forward(size=NEURONS * USED // EXPERTS),
    "experts": SHAPE.with_experts(MOE),
    "dense, full size": SHAPE,
}
LOSSES = MoeRunConfig()  # the weights of balance and z loss that training has by default


def rows(tables: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, LENGTH] int32: every row in one of the two languages."""
    language = rng.integers(0, 2, count)
    out = np.empty((count, LENGTH), np.int32)
    out[:, :2] = rng.integers(0, TOKENS, (count, 2))
    for at in range(2, LENGTH):
        follows = tables[language, out[:, at - 2], out[:, at - 1]]
        out[:, at] = np.where(rng.random(count) < NOISE, rng.integers(0, TOKENS, count), follows)
    return out + (TOKENS * language)[:, None].astype(np.int32)


def train(config: DecoderSpec, seed: int, steps: int) -> dict[str, Any]:
    """Held-out loss, and for experts the share of each modality's tokens that used each."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, TOKENS, (2, TOKENS, TOKENS))
    model = Decoder(config, experts="loop", remat="none")
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, steps), weight_decay=0.01)
    weights = jnp.ones((ROWS, LENGTH)).at[:, :2].set(0.0)  # what nothing says

    def loss(params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        found, notes = model.apply({"params": params}, ids, weights / weights.sum(), method="loss", mutable=["moe"])
        penalty, figures = router_figures(notes, config, LOSSES, 1)
        return found.loss + penalty, (found.loss, figures)

    @jax.jit
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss, has_aux=True)(params, ids)[0]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    held_out = [rows(tables, np.random.default_rng([seed, 1, number]), ROWS) for number in range(8)]
    params = nn.unbox(model.init(jax.random.key(seed), jnp.asarray(held_out[0])))["params"]
    state = optimizer.init(params)
    started = time.perf_counter()
    for _ in range(steps):
        params, state = step(params, state, jnp.asarray(rows(tables, rng, ROWS)))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    test = jax.jit(loss)
    found = [jax.device_get(test(params, jnp.asarray(ids))[1]) for ids in held_out]
    result: dict[str, Any] = {"loss": float(np.mean([value for value, _ in found])), "seconds": seconds}
    if config.experts is not None:
        used = sum(figures["expert_use"] for _, figures in found)  # [L, modalities, E]
        share = used / used.sum(axis=-1, keepdims=True)
        # 1: no expert is used by both; 0: both use all alike.
        result["separation"] = [float(0.5 * np.abs(layer[0] - layer[1]).sum()) for layer in share]
        result["share"] = np.round(share * USED, 3).tolist()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json")
    options = parser.parse_args()
    floor = -((1 - NOISE + NOISE / TOKENS) * np.log(1 - NOISE + NOISE / TOKENS))
    floor -= (TOKENS - 1) * NOISE / TOKENS * np.log(NOISE / TOKENS)
    print(
        f"{options.steps} steps of {ROWS} rows of {LENGTH}; least loss possible {floor:.3f}, knowing nothing "
        f"{np.log(TOKENS):.3f}"
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        for name, config in MODELS.items():
            found = train(config, seed, options.steps)
            results[name].append(found)
            print(f"seed {seed}, {name:18}: loss {found['loss']:.4f}, {found['seconds']:.0f} s", flush=True)
            if "separation" in found:
                apart = ", ".join(f"{value:.2f}" for value in found["separation"])
                print(f"{'':8}separation of the two by layer (1: no expert has both): {apart}", flush=True)
    for name, found in results.items():
        losses = [each["loss"] for each in found]
        print(f"{name:18}: mean {statistics.mean(losses):.4f}, {min(losses):.4f} to {max(losses):.4f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"steps": options.steps, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
