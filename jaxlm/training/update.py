"""The update of what trains, where its step is wanted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_in_place(
    optimizer: optax.GradientTransformation, wanted: jax.Array, grads: Any, trainable: Any, opt_state: Any
) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after an update; as they were where it is not wanted (a bool)."""

    def update(old: tuple[Any, Any]) -> tuple[Any, Any]:
        trainable, opt_state = old
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    after: tuple[Any, Any] = jax.lax.platform_dependent(
        wanted,
        (trainable, opt_state),
        cpu=partial(update_by_branch, update),
        default=partial(update_by_select, update),
    )
    return after


# A branch is cheaper on a CPU, a select on GPU and TPU; the measurements are in docs/kernels.md.
def update_by_branch(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """`update(old)` where `wanted` (a bool), else `old`."""
    return jax.lax.cond(wanted, update, lambda old: old, old)


def update_by_select(update: Callable[[Any], Any], wanted: jax.Array, old: Any) -> Any:
    """As `update_by_branch`; `update` is computed anyway, and dropped, NaN too, where it is not wanted."""
    return jax.tree.map(lambda new, before: jnp.where(wanted, new, before), update(old), old)
