"""The experts of a sparse feed-forward layer in one loop over blocks of rows, for CPUs.

The same as gathering rows, a grouped product, act(gate) * up, another grouped product and a weighted sum; but the
rows of a block stay in the cache from the first step to the last, and gate and up are all that is kept for the backward
pass. `groups` says how blocks lie; the steps of `grouped_matmul` one after the other are the plain twin.

Shapes: N tokens, I inputs, O outputs, E experts, f neurons of each, k rows of a token at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.kernels.groups import Groups

Activation = Callable[[jax.Array], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def loop_experts(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    token: jax.Array,
    slot: jax.Array,
    groups: Groups,
    activation: Activation = jax.nn.silu,
) -> jax.Array:
    """Tokens through their experts: the weighted sum [N, O] of what these give, in x's dtype.

    Args:
        x: [N, I].
        gate_up: [E, I, 2 f], gate before up.
        down: [E, f, O].
        weights: [N, k] float32, the factor of each row's output.
        token: [rows] int32, the token in each row; N where there is none.
        slot: [N, k] int32, the rows of each token; `rows` for none.
        groups: which rows belong to which expert.
        activation: of the gate.
    """
    return _forward(x, gate_up, down, weights, token, slot, groups, activation)[0]


def _part(a: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis=0)


def _put(a: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part.astype(a.dtype), index * part.shape[0], axis=0)


def _rows(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.take(x, where, axis=0, mode="fill", fill_value=0)


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _owned(w: jax.Array, groups: Groups, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w, groups.owner[index], keepdims=False)


def _forward(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    token: jax.Array,
    slot: jax.Array,
    groups: Groups,
    activation: Activation,
) -> tuple[jax.Array, Any]:
    size = token.shape[0] // groups.owner.shape[0]

    def one(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, y = carry
        both = _dot(_rows(x, _part(token, index, size)), _owned(gate_up, groups, index), 1, 0).astype(x.dtype)
        gate, up = jnp.split(both, 2, axis=1)
        out = _dot(activation(gate) * up, _owned(down, groups, index), 1, 0)
        return _put(hidden, both, index), _put(y, out, index)

    buffers = (jnp.zeros((token.shape[0], width), x.dtype) for width in (gate_up.shape[2], down.shape[2]))
    hidden, y = jax.lax.fori_loop(0, groups.live, one, tuple(buffers))
    out = jnp.einsum("nko,nk->no", _rows(y, slot), weights, preferred_element_type=jnp.float32).astype(x.dtype)
    return out, (x, gate_up, down, weights, token, slot, groups, hidden)


def _with_slope(activation: Activation, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An activation's values and its derivative."""
    if activation is jax.nn.silu:
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        return silu, sigmoid + silu * (1 - sigmoid)
    return jax.jvp(activation, (gate,), (jnp.ones_like(gate),))


def _backward(activation: Activation, residuals: Any, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    x, gate_up, down, weights, token, slot, groups, hidden = residuals
    size = token.shape[0] // groups.owner.shape[0]
    factors = jnp.zeros(token.shape[0], jnp.float32).at[slot].set(weights.astype(jnp.float32), mode="drop")

    def one(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        grad_x, grad_gate_up, grad_down, grad_factors = carry
        owner, mine = groups.owner[index], _part(token, index, size)
        factor, grad_y = _part(factors, index, size)[:, None], _rows(grad, mine)
        gate, up = jnp.split(_part(hidden, index, size).astype(jnp.float32), 2, axis=1)
        value, slope = _with_slope(activation, gate)
        h = value * up
        # The gradient of h before the factor: its product with h is the gradient of the factor, and outputs need not
        # be kept.
        back = _dot(grad_y, _owned(down, groups, index), 1, 1)
        grad_factors = _put(grad_factors, (h * back).sum(axis=1), index)
        back = back * factor
        both = jnp.concatenate([back * up * slope, back * value], axis=1).astype(x.dtype)
        grad_down = grad_down.at[owner].add(_dot((h * factor).astype(x.dtype), grad_y, 0, 0))
        grad_gate_up = grad_gate_up.at[owner].add(_dot(_rows(x, mine), both, 0, 0))
        grad_x = _put(grad_x, _dot(both, _owned(gate_up, groups, index), 1, 1), index)
        return grad_x, grad_gate_up, grad_down, grad_factors

    start = (
        jnp.zeros((token.shape[0], x.shape[1]), x.dtype),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
        jnp.zeros(token.shape, jnp.float32),
    )
    grad_x, grad_gate_up, grad_down, grad_factors = jax.lax.fori_loop(0, groups.live, one, start)
    return (
        _rows(grad_x, slot).astype(jnp.float32).sum(axis=1).astype(x.dtype),
        grad_gate_up.astype(gate_up.dtype),
        grad_down.astype(down.dtype),
        _rows(grad_factors, slot).astype(weights.dtype),
        None,
        None,
        None,
    )


loop_experts.defvjp(_forward, _backward)
