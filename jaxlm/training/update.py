"""The update of what trains, where its step is wanted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_in_place(
    optimizer: optax.GradientTransformation,
    wanted: jax.Array,
    factor: jax.Array,
    grads: Any,
    trainable: Any,
    opt_state: Any,
) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after an update; as they were where it is not wanted (a bool).

    Args:
        factor: of the gradients, float32. Multiplied here, beside what reads them: before the branch of a CPU they
            would be written a second time, four bytes a parameter.
    """

    def update(old: tuple[Any, Any]) -> tuple[Any, Any]:
        trainable, opt_state = old
        # In the parameters' dtype, or the optimizer's moments would change theirs from one step to the next.
        scaled = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), grads, trainable)
        updates, opt_state = optimizer.update(scaled, opt_state, trainable)
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
