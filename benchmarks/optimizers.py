"""What optimizers keep, what eight bits cost in accuracy, and what the host's memory frees on a TPU.

    python benchmarks/optimizers.py                   # bytes by optimizer, errors of moments in eight bits
    python benchmarks/optimizers.py --train           # losses of a small model on text of random words, beside adamw
    python benchmarks/optimizers.py --compile adamw   # by libtpu: a step with its state on the chip, and on the host

Errors are those of updates: Adam with moments in eight bits beside Adam with moments in float64 on the same gradients,
for 1,500 steps; of the last step the root mean square over that of the exact update, and the slope of one against the
other. bitsandbytes' dynamic codes are written here from their definition: a sign, a decimal exponent of 0 to -6, and as
many equal parts of the interval from 0.1 to 1 as the other bits can tell apart, each at its middle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from jaxlm.devices.chips import parse_topology
from jaxlm.devices.mesh import make_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import load_shape
from jaxlm.planning.compiled import compile_step
from jaxlm.spec import uniform_decoder
from jaxlm.training import adam8bit
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from jaxlm.training.step import make_train_step

NAMES = ("adamw", "adamw_8bit", "muon", "schedule_free", "lion", "adafactor")
GIB = 2**30


def optimizer_config(name: str, rate: float = 3e-4, **more: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=rate, schedule="constant", **more)  # type: ignore[arg-type]


# --- bytes ------------------------------------------------------------------------------------------------------------


def print_bytes(shape: str) -> None:
    """The state's bytes for a trained parameter of a model, all of whose parameters train in float32."""
    for name in NAMES:
        make = partial(make_optimizer, optimizer_config(name), lambda step: 1e-3)
        made = Initializer(Decoder(load_shape(shape)), None, make_mesh(MeshConfig()), make)
        count = sum(leaf.size for leaf in jax.tree.leaves(made.trainable))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.opt_state))
        print(f"{shape} {name:14} {size / GIB:7.2f} GiB, {size / count:5.3f} bytes a parameter")


# --- errors -----------------------------------------------------------------------------------------------------------

Codec = Callable[[Any, int], np.ndarray]


def dynamic_codes(signed: bool) -> np.ndarray:
    """The 256 numbers of bitsandbytes' dynamic codes, in order (Dettmers et al. 2022, section 2.2)."""
    positive: list[float] = []
    for place in range(7):
        ends = np.linspace(0.1, 1, 2 ** (place + (0 if signed else 1)) + 1)
        positive += list(10.0 ** (place - 6) * (ends[:-1] + ends[1:]) / 2)
    return np.array(sorted([*positive, *([-each for each in positive] if signed else []), 0.0, 1.0]))


def nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) + 1e-45
    return codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, x / scale)] * scale


def ours_first(x: np.ndarray, step: int) -> np.ndarray:
    return np.asarray(adam8bit.decode_first(*adam8bit.encode_first(jnp.asarray(x, jnp.float32))), np.float64)


def ours_second(x: np.ndarray, step: int) -> np.ndarray:
    coded = adam8bit.encode_second(jnp.asarray(x, jnp.float32), jnp.int32(step))
    return np.asarray(adam8bit.decode_second(*coded), np.float64)


def table_codecs(first: np.ndarray, second: np.ndarray) -> tuple[Codec, Codec]:
    """Codecs of the two moments that round to the nearest number of a table."""
    return lambda x, step: nearest(x, first), lambda x, step: nearest(x, second)


CODECS: dict[str, tuple[Codec, Codec]] = {
    "jaxlm": (ours_first, ours_second),
    "dynamic (bitsandbytes)": table_codecs(dynamic_codes(True), dynamic_codes(False)),
    "linear": table_codecs(np.linspace(-1, 1, 255), np.linspace(0, 1, 256)),
}


def gradients(kind: str, sizes: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
    """Gradients [64, 256], whose elements have log-normal sizes: of one distribution, drifting, or with heavy tails."""
    if kind == "heavy tails":
        return rng.standard_t(2.5, sizes.shape) * sizes + 0.2 * sizes
    drift = np.exp(np.sin(np.linspace(0, 2 * np.pi, 256) + step / 300)) if kind == "drifting" else 1.0
    return rng.normal(size=sizes.shape) * sizes * drift


def update_error(kind: str, codecs: tuple[Codec, Codec], steps: int = 1500) -> tuple[float, float]:
    """Relative error and slope of the last update."""
    sizes = np.exp(np.random.default_rng(0).normal(0, 1, (64, 256)))
    rng = np.random.default_rng(1)
    kept, exact = [np.zeros_like(sizes) for _ in range(2)], [np.zeros_like(sizes) for _ in range(2)]
    coded = real = sizes
    for step in range(1, steps + 1):
        g = gradients(kind, sizes, step, rng)
        updates = []
        for moments in (kept, exact):
            moments[0] = 0.9 * moments[0] + 0.1 * g
            moments[1] = 0.999 * moments[1] + 0.001 * g**2
            corrected = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            updates.append(corrected[0] / (np.sqrt(corrected[1]) + 1e-8))
        coded, real = updates
        kept = [codec(moment, step) for codec, moment in zip(codecs, kept, strict=True)]
    return float(np.sqrt(np.mean((coded - real) ** 2) / np.mean(real**2))), float(
        np.mean(coded * real) / np.mean(real**2)
    )


def print_errors() -> None:
    for kind in ("one distribution", "drifting", "heavy tails"):
        for name, codecs in CODECS.items():
            error, slope = update_error(kind, codecs)
            print(f"{kind:18} {name:24} error {error:9.3f}, slope {slope:7.3f}", flush=True)


# --- a small model ----------------------------------------------------------------------------------------------------


def print_losses(steps: int, seeds: int = 2) -> None:
    """Losses of a model of 1.4 M parameters on sequences of a random first-order language, by optimizer."""
    spec = uniform_decoder(
        "llama",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
    )
    follows = np.random.default_rng(0).integers(0, 512, (512, 4))
    for name in NAMES[:4]:
        ends = []
        for seed in range(seeds):
            config = optimizer_config(name, 3e-3, warmup_steps=20, weight_decay=0.1)
            schedule = make_schedule(config, steps)
            made = Initializer(Decoder(spec), None, make_mesh(MeshConfig()), partial(make_optimizer, config, schedule))
            state = made.new_state({"params": made.init_params(seed)}, seed)
            step = jax.jit(make_train_step(CrossEntropy(made.model), made.optimizer, schedule, 1.0), donate_argnums=0)
            rng, losses = np.random.default_rng(seed), []
            for _ in range(steps):
                ids = np.zeros((1, 8, 64), np.int32)
                ids[:, :, 0] = rng.integers(0, 512, (1, 8))
                for at in range(1, 64):
                    ids[:, :, at] = follows[ids[:, :, at - 1], rng.integers(0, 4, (1, 8))]
                ones = np.ones_like(ids)
                batch = {
                    "input_ids": ids,
                    "loss_mask": ones.astype(bool),
                    "segment_ids": ones,
                    "positions": np.broadcast_to(np.arange(64, dtype=np.int32), ids.shape),
                    "modality_ids": np.zeros(ids.shape, np.int8),
                }
                state, metrics = step(state, {}, batch)
                losses.append(float(metrics["loss"]))
            ends.append(losses)
        means = np.mean(ends, axis=0)
        marks = ", ".join(f"step {at}: {means[at - 10 : at].mean():.4f}" for at in (50, 100, 200, steps) if at <= steps)
        print(f"{name:14} {marks}  (the best possible: {np.log(4):.4f})", flush=True)


# --- compiled for TPUs ------------------------------------------------------------------------------------------------


def print_compiled(name: str, shape: str, topology: str, rows: int, length: int) -> None:
    """A step's memory and cycles, by libtpu."""
    devices = parse_topology(topology)
    config = RunConfig(
        model=ModelConfig(shape=shape, remat="full"),
        data=DataConfig(sequence_length=length),
        optimizer=optimizer_config(name),
        train=TrainConfig(steps=10, global_batch_size=rows * devices.count, micro_batch_size=rows),
    )
    step = compile_step(config, load_shape(shape), devices, quick=True)
    cycles = "" if step.program is None else f", {(step.program.cycles or 0) / 1e9:.3f} Gcycles"
    peak, arguments, temporaries = (size / GIB for size in (step.peak, step.arguments, step.temporaries))
    print(
        f"{shape} {name} on {topology}, {rows} x {length} a chip: peak {peak:.2f} GiB, "
        f"arguments {arguments:.2f}, beside them {temporaries:.2f}{cycles}"
        + ("" if step.refused is None else f"; refused: {step.refused}"),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compile", metavar="NAME", choices=NAMES)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    if args.compile:
        print_compiled(args.compile, args.shape, args.topology, args.rows, args.length)
    elif args.train:
        print_losses(args.steps)
    else:
        print_bytes(args.shape)
        print_errors()


if __name__ == "__main__":
    main()
