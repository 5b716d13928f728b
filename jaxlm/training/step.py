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


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, schedule: Schedule, clip_norm: float
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics); not jitted.

    The batch has leaves [A, B, T]; A micro-steps are scanned and their gradients summed in float32.
    A step whose loss or gradient is not finite leaves weights and optimizer as they were; it is counted.

    Args:
        clip_norm: the gradient is scaled down to this norm over all parameters; 0: it is not clipped.
    """

    def micro_loss(
        trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int
    ) -> tuple[jax.Array, MicroLoss]:
        share = objective.loss(trainable, frozen, micro, key, micro_steps)
        return share.total, share

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
            figures = jax.tree.map(lambda value: value.sum(axis=0), figures)

        grad_norm = optax.tree.norm(grads)
        factor = jnp.float32(1.0)
        if clip_norm > 0:
            factor = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
        # In the parameters' dtype, or the optimizer's moments would change theirs from one step to the next.
        grads = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), grads, state.trainable)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(old: tuple[Any, Any]) -> tuple[Any, Any]:
            trainable, opt_state = old
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        trainable, opt_state = jax.lax.platform_dependent(
            finite,
            (state.trainable, state.opt_state),
            cpu=partial(update_by_branch, update),
            default=partial(update_by_select, update),
        )
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


# A branch is cheaper on a CPU, a select on GPU and TPU; the measurements are in docs/kernels.md.
def update_by_branch(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """`update(old)` where `wanted` (a bool), else `old`."""
    return jax.lax.cond(wanted, update, lambda old: old, old)


def update_by_select(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """As `update_by_branch`; `update` is computed anyway, and dropped, NaN too, where it is not wanted."""
    return jax.tree.map(lambda new, before: jnp.where(wanted, new, before), update(old), old)


def make_eval_step(objective: Objective) -> Callable[[Any, Any, Batch], Metrics]:
    """(trainable, frozen, batch with leaves [1, B, T]) -> the objective's sums; not jitted."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Metrics:
        return objective.evaluate(trainable, frozen, {name: value[0] for name, value in batch.items()})

    return step
