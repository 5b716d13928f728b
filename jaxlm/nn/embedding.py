"""The look-up of token embeddings, with a gradient that no device holds as a whole for long."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.kernels.scatter import split_axes, sum_scattered_columns
from jaxlm.nn.ordered_weight import OrderedWeight


def embedded(table: jax.Array | OrderedWeight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows [B, T, D] in `dtype` of a table [V, D], or columns of its transpose, for ids [B, T]."""
    return table.columns(ids, dtype) if isinstance(table, OrderedWeight) else look_up(table, ids, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embedding: jax.Array, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows [B, T, D] in `dtype` of the table [V, D] for ids [B, T].

    The gradient is summed in float32.
    """
    # Whole rows for the look-up: a gather from split rows would leave tokens unsharded. Cast first: devices send less.
    table = nn.with_logical_constraint(embedding.astype(dtype), ("vocab", "act_embed"))
    return jnp.take(table, ids, axis=0)


def _fwd(embedding: jax.Array, ids: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(embedding, ids, dtype), (embedding, ids)


def _bwd(dtype: DTypeLike, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    embedding, ids = residuals
    (vocab, embed), tokens = split_axes(embedding.shape, ("vocab", "embed")), split_axes(ids.shape, ("batch", "length"))
    token_axes = tokens[0] + tokens[1]
    if not embed or not set(embed) <= set(token_axes):
        return _sum_by_id(ids, grad, embedding.shape[0]).astype(embedding.dtype), None

    def local(ids: jax.Array, grad: jax.Array) -> jax.Array:
        rows = embedding.shape[0]
        if vocab:
            rows //= jax.lax.axis_size(vocab)
            ids = ids - jax.lax.axis_index(vocab) * rows
        gradient = sum_scattered_columns(_sum_by_id(ids, grad, rows), embed)
        others = tuple(name for name in token_axes if name not in embed)
        return jax.lax.psum(gradient, others) if others else gradient

    run = jax.shard_map(local, in_specs=(P(*tokens), P(*tokens)), out_specs=P(vocab, embed), check_vma=False)
    return run(ids, grad).astype(embedding.dtype), None


def _sum_by_id(ids: jax.Array, grad: jax.Array, rows: int) -> jax.Array:
    """[rows, D] float32: grad [B, T, D] summed over the tokens of each id; ids that have no row do not count."""
    ids = jnp.where(ids < 0, rows, ids)  # a negative one would count from the end
    table = jnp.zeros((rows, grad.shape[-1]), jnp.float32)
    return table.at[ids].add(grad.astype(jnp.float32), mode="drop")


look_up.defvjp(_fwd, _bwd)
