"""jaxlm's real train step on a synthetic packed batch, ready to be timed; shared by the training benchmarks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
from jaxlm.kernels.backend import choose_attention, shape_key
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer, TrainState
from jaxlm.training.step import make_eval_step, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass
class TimedStep:
    """A compiled step.

    Attributes:
        run: one step; returns its loss.
        facts: compile times.
        text: the compiled program.
        state: as it is now.
        evaluation: compiles the evaluation of the same batch; returns what runs it, and gives sums on the devices.
    """

    run: Callable[[], float]
    facts: dict[str, Any]
    text: Callable[[], str]
    state: Callable[[], TrainState]
    evaluation: Callable[[], Callable[[], Any]]


def build_step(
    shape: DecoderSpec,
    *,
    lora: LoraConfig | None,
    compute: str,
    params: str,
    rows: int,
    length: int,
    documents: int,
    remat: str,
    attention: str = "auto",
) -> TimedStep:
    """Compiles a step of `rows` rows of `length` tokens, each row packed with `documents` documents."""
    kind, _ = choose_attention(attention, shape_key(shape.attention, compute, length, documents > 1))
    adapters = resolve_lora(shape, lora) if lora else {}
    model = Decoder(shape, adapters, DTYPES[compute], DTYPES[params], kind, remat)
    mesh = make_mesh(MeshConfig())
    settings = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    schedule = make_schedule(settings, 1000)
    initializer = Initializer(model, lora, mesh, partial(make_optimizer, settings, schedule))
    base = initializer.init_params(0)
    frozen = {"params": base} if lora else {}
    state = initializer.new_state({"lora": initializer.init_lora(base, 1)} if lora else {"params": base}, 0)
    del base
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, rows, length)).astype(np.int32)
    document = np.arange(length) * documents // length
    starts = np.searchsorted(document, document)
    batch = put_batch(
        {
            "input_ids": ids,
            "loss_mask": np.ones(ids.shape, bool),
            "segment_ids": np.broadcast_to((document + 1).astype(np.int32), ids.shape),
            "positions": np.broadcast_to((np.arange(length) - starts).astype(np.int32), ids.shape),
        },
        mesh,
    )
    step = make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 1.0)
    started = time.perf_counter()
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        lowered = jitted.lower(state, frozen, batch)
        traced = time.perf_counter()
        program = lowered.compile()
    facts: dict[str, Any] = {
        "trace_s": traced - started,
        "compile_s": time.perf_counter() - traced,
        "attention": str(kind),
    }
    holder = [state]

    def run() -> float:
        holder[0], metrics = program(holder[0], frozen, batch)
        return float(metrics["loss"])

    def evaluation() -> Callable[[], Any]:
        with use_mesh(mesh):
            evaluate = jax.jit(make_eval_step(CrossEntropy(model))).lower(holder[0].trainable, frozen, batch).compile()
        return lambda: evaluate(holder[0].trainable, frozen, batch)

    return TimedStep(run, facts, lambda: program.as_text() or "", lambda: holder[0], evaluation)
