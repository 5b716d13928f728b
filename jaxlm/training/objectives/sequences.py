"""Sums over the texts of packed rows: what preferences and rewards are made of.

A document holds up to three texts, one behind the other (`jaxlm/data/preferences.py`); a text ends where a token that
is not trained follows a trained one. The texts of a document do not see each other.

B rows, T tokens, N documents that a row may hold.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.training.objectives.objective import Batch

TEXTS = 3  # of a document at most
LEAST_TOKENS = 4  # of a document


def apart(batch: Batch) -> Batch:
    """The batch with each text as a segment of its own.

    Args:
        batch: leaves [..., T]; segment_ids number the documents of a row.

    Returns:
        segment_ids and positions are the texts'; `weights` [..., T] float32 is 1 where a token is trained, and `places`
        [..., T] int32 says which sum it belongs to, see `text_sums`.
    """
    mask, documents = batch["loss_mask"], batch["segment_ids"]
    mask = mask.at[..., 0].set(False)
    before, last = _behind(mask), _behind(documents)
    opens = documents != last
    next_text = before & ~mask & ~opens
    index = jnp.cumsum(next_text, axis=-1, dtype=jnp.int32)
    text = index - jax.lax.cummax(jnp.where(opens, index, 0), axis=index.ndim - 1)
    starts = opens | next_text
    at = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    positions = at - jax.lax.cummax(jnp.where(starts, at, 0), axis=at.ndim - 1)
    used = documents > 0
    return {
        **batch,
        "segment_ids": jnp.where(used, jnp.cumsum(starts, axis=-1, dtype=jnp.int32), 0),
        "positions": jnp.where(used, positions, 0),
        "weights": mask.astype(jnp.float32),
        "places": jnp.where(used, documents * TEXTS + jnp.minimum(text, TEXTS - 1), 0),
    }


def _behind(values: jax.Array) -> jax.Array:
    """The value of the token before; 0 for the first one."""
    return jnp.roll(values, 1, axis=-1).at[..., 0].set(jnp.zeros((), values.dtype))


def text_sums(values: jax.Array, places: jax.Array) -> jax.Array:
    """Sums [B, N, 3] over each text of each document.

    Args:
        values: [B, T].
        places: of `apart`.
    """
    most = values.shape[-1] // LEAST_TOKENS + 1

    def of_row(values: jax.Array, places: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, places, most * TEXTS)

    return jax.vmap(of_row)(values, places).reshape(-1, most, TEXTS)[:, 1:]


def num_documents(batch: Batch) -> jax.Array:
    """The number of documents in all rows of a batch."""
    documents: Any = batch["segment_ids"]
    return jnp.max(documents, axis=-1).sum()
