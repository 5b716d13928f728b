"""The train step and the evaluation step: pure functions of (state, frozen trees, batch), for any objective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.training.objectives.objective import Batch, Metrics, MicroLoss, Objective
from jaxlm.training.optimizer import Schedule
from jaxlm.training.state import TrainState
from jaxlm.training.update import update_in_place

# (whether it is wanted, a factor of the gradients, gradients, parameters, optimizer's state) -> the parameters and the
# state after an update.
Update = Callable[[jax.Array, jax.Array, Any, Any, Any], tuple[Any, Any]]

# What becomes of the figures of micro-steps whose names end so; others are added up.
EXTREMES: dict[str, Any] = {"min": jnp.min, "max": jnp.max}


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    clip_norm: float,
    update: Update | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics); not jitted.

    The batch has leaves [A, B, T]; A micro-steps are scanned and their gradients summed in float32.
    A step whose loss or gradient is not finite leaves weights and optimizer as they were; it is counted.

    Args:
        clip_norm: the gradient is scaled down to this norm over all parameters; 0: it is not clipped.
        update: how the optimizer is applied; None: in place.
    """

    def micro_loss(
        trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int
    ) -> tuple[jax.Array, MicroLoss]:
        share = objective.loss(trainable, frozen, micro, key, micro_steps)
        return share.total, share

    apply = partial(update_in_place, optimizer) if update is None else update
    differentiate = jax.value_and_grad(micro_loss, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = objective.prepare(batch)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
        micro_steps = jax.tree.leaves(batch)[0].shape[0]

        def gradient(micro: Batch, index: Any) -> tuple[MicroLoss, Any]:
            key = jax.random.fold_in(step_key, index)
            (_, share), grads = differentiate(state.trainable, frozen, micro, key, micro_steps)
            return share, grads

        def micro_step(sums: Any, inputs: Any) -> tuple[Any, Metrics]:
            loss, grads = sums
            share, more = gradient(*inputs)
            grads = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), grads, more)
            return (loss + share.loss, grads), share.figures

        if micro_steps == 1:
            share, grads = gradient({name: value[0] for name, value in batch.items()}, 0)
            loss, figures = share.loss, share.figures
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trainable)
            inputs = batch, jnp.arange(micro_steps)
            (loss, grads), figures = jax.lax.scan(micro_step, (jnp.float32(0), zeros), inputs)
            figures = {name: EXTREMES.get(name.rpartition("/")[2], jnp.sum)(each, 0) for name, each in figures.items()}

        with jax.named_scope("gradient_norm"):
            grad_norm = optax.tree.norm(grads)
        factor = jnp.float32(1.0)
        if clip_norm > 0:
            factor = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        with jax.named_scope("optimizer"):
            trainable, opt_state = apply(finite, factor, grads, state.trainable, state.opt_state)
        new_state = state.replace(  # type: ignore[attr-defined]
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),  # the optimizer's count stands still when it skips
            "skipped": new_state.skipped,
            **figures,
        }
        return new_state, metrics

    return step


def make_eval_step(objective: Objective) -> Callable[[Any, Any, Batch], Metrics]:
    """(trainable, frozen, batch with leaves [1, B, T]) -> the objective's sums; not jitted."""

    def evaluate(trainable: Any, frozen: Any, batch: Batch) -> Metrics:  # a trace tells programs by their names
        return objective.evaluate(trainable, frozen, {name: value[0] for name, value in batch.items()})

    return evaluate
