"""The train step and the evaluation step: pure functions of (state, base parameters, batch)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import MoeRunConfig, TrainConfig
from jaxlm.kernels.cross_entropy import LossOutput
from jaxlm.models.decoder import Decoder, with_saved_modules
from jaxlm.training.optimizer import Schedule
from jaxlm.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def loss_weights(loss_mask: jax.Array, normalisation: str, group_rows: int) -> jax.Array:
    """Weight of each target token [A, B, T] float32, so that the loss of a step is one weighted sum.

    Args:
        loss_mask: [A, B, T] bool, True where the token is a target. Column 0 never is.
        normalisation: 'tokens': every target of the global batch weighs the same. 'mean_of_means': targets
            weigh the same within a group of rows, and groups that have any weigh the same among each other.
        group_rows: rows of a group, i.e. the micro batch of one device.
    """
    mask = loss_mask.at[..., 0].set(False).astype(jnp.float32)
    if normalisation == "tokens":
        return mask / jnp.maximum(mask.sum(), 1.0)
    a, b, t = mask.shape
    grouped = mask.reshape(a, b // group_rows, group_rows, t)
    counts = grouped.sum(axis=(2, 3), keepdims=True)
    groups = jnp.maximum((counts > 0).sum(), 1)
    return (grouped / jnp.maximum(counts, 1.0) / groups).reshape(a, b, t)


def merged_variables(trainable: Any, frozen: Any) -> dict[str, Any]:
    """What `Model.apply` takes, from the trained and the frozen tree."""
    if "params" in trainable:
        return {"params": trainable["params"]}
    return with_saved_modules(frozen["params"], trainable["lora"])


def apply_loss(
    model: Decoder, variables: Any, micro: Batch, weights: jax.Array, packed: bool, **options: Any
) -> tuple[LossOutput, Any]:
    """`Decoder.loss` of a batch with leaves [B, T], and what its routers noted.

    A dense model needs no modality_ids, and notes {}.
    """
    found = model.apply(
        variables,
        micro["input_ids"],
        weights,
        positions=micro["positions"],
        segment_ids=micro["segment_ids"] if packed else None,
        modality_ids=None if model.config.experts is None else micro["modality_ids"],
        method="loss",
        mutable=["moe"],
        **options,
    )
    out, notes = cast(tuple[LossOutput, Any], found)
    return out, notes


def moe_figures(notes: Any, config: MoeRunConfig, steps: int) -> tuple[jax.Array | float, Metrics]:
    """The routers' weighted losses, and figures to be summed over `steps` micro-steps.

    Returns:
        What is added to the loss, and figures: router_balance and router_z (means over layers); expert_use
        [L, modalities, E] and modality_tokens [modalities], the tokens that used each expert and those there were.
        Nothing for a dense model.
    """
    if "moe" not in notes:
        return 0.0, {}
    found = notes["moe"]["layers"]["mlp"]
    figures = {"expert_use": found["used"], "modality_tokens": found["tokens"][0]}
    penalty: jax.Array | float = 0.0
    if "balance_loss" in found:
        balance, z = found["balance_loss"].mean() / steps, found["z_loss"].mean() / steps
        figures |= {"router_balance": balance, "router_z": z}
        penalty = config.balance_loss * balance + config.z_loss * z
    return penalty, figures


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: TrainConfig,
    clip_norm: float,
    group_rows: int,
    packed: bool = True,
    moe: MoeRunConfig = MoeRunConfig(),  # noqa: B008 (frozen)
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics); not jitted.

    With `packed` false rows hold one document each and the attention is told so: padding stands behind it, where no
    token looks.

    The batch has leaves [A, B, T]; A micro-steps are scanned and their gradients summed in float32.
    A step whose loss or gradient is not finite leaves weights and optimizer as they were; it is counted.
    """

    def loss_fn(
        trainable: Any, frozen: Any, micro: Batch, weights: jax.Array, key: jax.Array, steps: int
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        out, notes = apply_loss(
            model,
            merged_variables(trainable, frozen),
            micro,
            weights,
            packed,
            deterministic=False,
            rngs={"dropout": key},
        )
        # The routers' losses are means over tokens: each micro-step counts alike.
        penalty, figures = moe_figures(notes, moe, steps)
        return out.loss + penalty, (out.loss, figures)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = loss_weights(batch["loss_mask"], config.loss_normalisation, group_rows)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
        steps = weights.shape[0]
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def micro_step(carry: Any, inputs: Any) -> tuple[Any, Metrics]:
            loss, grads = carry
            micro, micro_weights, index = inputs
            key = jax.random.fold_in(step_key, index)
            (_, (more, figures)), more_grads = grad_fn(state.trainable, frozen, micro, micro_weights, key, steps)
            return (loss + more, jax.tree.map(lambda g, m: g + m.astype(jnp.float32), grads, more_grads)), figures

        if steps == 1:
            micro = {name: value[0] for name, value in batch.items()}
            key = jax.random.fold_in(step_key, 0)
            (_, (loss, figures)), grads = grad_fn(state.trainable, frozen, micro, weights[0], key, steps)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trainable)
            carry = jnp.float32(0), zeros
            (loss, grads), figures = jax.lax.scan(micro_step, carry, (batch, weights, jnp.arange(steps)))
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
            "target_tokens": (weights > 0).sum(),
            "tokens": (batch["segment_ids"] > 0).sum(),
            "skipped": new_state.skipped,
            **figures,
        }
        return new_state, metrics

    return step


# Both take the place of the old state where it is fast. Bytes in use at once, as multiples of the float32 parameters
# (their moments are two, their gradients one): on a CPU a select keeps old and new moments, on a GPU a branch copies
# all it is given (7.0 against 4.8, H200); a TPU does not care (4.3).
def update_by_branch(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """`update(old)` where `wanted` (a bool), else `old`."""
    return jax.lax.cond(wanted, update, lambda old: old, old)


def update_by_select(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """As `update_by_branch`; whatever comes out of `update`, NaN too, is dropped where it is not wanted."""
    return jax.tree.map(lambda new, before: jnp.where(wanted, new, before), update(old), old)


def make_eval_step(model: Decoder, packed: bool = True) -> Callable[[Any, Any, Batch], Metrics]:
    """(trainable, frozen, batch with leaves [1, B, T]) -> sums of loss, hits and target tokens; not jitted."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Metrics:
        micro = {name: value[0] for name, value in batch.items()}
        weights = micro["loss_mask"].at[:, 0].set(False).astype(jnp.float32)
        out, _ = apply_loss(model, merged_variables(trainable, frozen), micro, weights, packed, accuracy=True)
        return {"loss": out.loss, "correct": out.correct, "target_tokens": weights.sum()}

    return step
