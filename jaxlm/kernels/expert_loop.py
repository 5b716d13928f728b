"""The experts of a sparse feed-forward layer in one loop over blocks of rows, for CPUs.

The same as gathering rows, a grouped product, act(gate) * up, another grouped product and a weighted sum; but the
rows of a block stay in the cache from the first step to the last, and gate and up are all that is kept for the backward
pass. No gradient is formed of matrices that do not train. `groups` says how blocks lie; the steps of `grouped_matmul`
one after the other are the plain twin.

Shapes: N tokens, I inputs, O outputs, E experts, f neurons of each, k rows of a token at most, R and S further inputs
and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxlm.kernels.groups import Groups

Activation = Callable[[jax.Array], jax.Array]


def loop_experts(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    token: jax.Array,
    slot: jax.Array,
    groups: Groups,
    activation: Activation = jax.nn.silu,
    more_gate_up: jax.Array | None = None,
    more_down: jax.Array | None = None,
) -> jax.Array:
    """Tokens through their experts: the weighted sum [N, O + S] of what these give, in x's dtype.

    Args:
        x: [N, I + R].
        gate_up: [E, I, 2 f], gate before up.
        down: [E, f, O].
        weights: [N, k] float32, the factor of each row's output.
        token: [rows] int32, the token in each row; N where there is none.
        slot: [N, k] int32, the rows of each token; `rows` for none.
        groups: which rows belong to which expert.
        activation: of the gate.
        more_gate_up: [E, R, 2 f], the rows below those of gate_up, which may train when these do not; None: R is 0.
        more_down: [E, f, S], the columns beside those of down; None: S is 0.
    """
    arrays = x, gate_up, more_gate_up, down, more_down, weights, token, slot, groups
    return _loop_experts(*arrays, activation, gate_up.shape[1], down.shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(9, 10, 11))
def _loop_experts(
    x: jax.Array,
    gate_up: jax.Array,
    more_gate_up: jax.Array | None,
    down: jax.Array,
    more_down: jax.Array | None,
    weights: jax.Array,
    token: jax.Array,
    slot: jax.Array,
    groups: Groups,
    activation: Activation,
    inputs: int,
    outputs: int,
) -> jax.Array:
    gate_up, down = joined(gate_up, more_gate_up, 1), joined(down, more_down, 2)
    return _forward(x, gate_up, down, weights, token, slot, groups, activation)[0]


def joined(matrices: jax.Array, more: jax.Array | None, dim: int) -> jax.Array:
    """[E, ...] and what belongs behind them along a dim."""
    return matrices if more is None else jnp.concatenate([matrices, more], axis=dim)


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
) -> tuple[jax.Array, jax.Array]:
    """The output, and gate and up of every row."""
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
    return out, hidden


def _loop_fwd(
    x: Any,
    gate_up: Any,
    more_gate_up: Any,
    down: Any,
    more_down: Any,
    weights: Any,
    token: Any,
    slot: Any,
    groups: Any,
    activation: Activation,
    inputs: int,
    outputs: int,
) -> tuple[jax.Array, Any]:
    wanted = tuple(() if each.perturbed else None for each in (gate_up, down))  # trees without leaves: no array says it
    arrays = x, gate_up, more_gate_up, down, more_down, weights, token, slot, groups
    values = jax.tree.map(lambda each: each.value, arrays)
    x, gate_up, more_gate_up, down, more_down, weights, token, slot, groups = values
    gate_up, down = joined(gate_up, more_gate_up, 1), joined(down, more_down, 2)
    y, hidden = _forward(x, gate_up, down, weights, token, slot, groups, activation)
    return y, (x, gate_up, down, weights, token, slot, groups, hidden, wanted)


def with_slope(activation: Activation, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An activation's values and its derivative."""
    if activation is jax.nn.silu:
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        return silu, sigmoid + silu * (1 - sigmoid)
    return jax.jvp(activation, (gate,), (jnp.ones_like(gate),))


def _loop_bwd(
    activation: Activation, inputs: int, outputs: int, residuals: Any, grad: Any
) -> tuple[jax.Array | None, ...]:
    x, gate_up, down, weights, token, slot, groups, hidden, wanted = residuals
    if isinstance(grad, SymbolicZero):
        return (None,) * 9
    # The part of each matrix that has a gradient: all of it, or what belongs to others than those that are frozen.
    first_input, first_output = (0 if each == () else end for each, end in zip(wanted, (inputs, outputs), strict=True))
    size = token.shape[0] // groups.owner.shape[0]
    factors = jnp.zeros(token.shape[0], jnp.float32).at[slot].set(weights.astype(jnp.float32), mode="drop")

    def one(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        grad_x, grad_gate_up, grad_down, grad_factors = carry
        owner, mine = groups.owner[index], _part(token, index, size)
        factor, grad_y = _part(factors, index, size)[:, None], _rows(grad, mine)
        gate, up = jnp.split(_part(hidden, index, size).astype(jnp.float32), 2, axis=1)
        value, slope = with_slope(activation, gate)
        h = value * up
        # The gradient of h before the factor: its product with h is the gradient of the factor, and outputs need not
        # be kept.
        back = _dot(grad_y, _owned(down, groups, index), 1, 1)
        grad_factors = _put(grad_factors, (h * back).sum(axis=1), index)
        back = back * factor
        both = jnp.concatenate([back * up * slope, back * value], axis=1).astype(x.dtype)
        if grad_down.size:
            product = _dot((h * factor).astype(x.dtype), grad_y[:, first_output:], 0, 0)
            grad_down = grad_down.at[owner].add(product)
        if grad_gate_up.size:
            grad_gate_up = grad_gate_up.at[owner].add(_dot(_rows(x, mine)[:, first_input:], both, 0, 0))
        grad_x = _put(grad_x, _dot(both, _owned(gate_up, groups, index), 1, 1), index)
        return grad_x, grad_gate_up, grad_down, grad_factors

    start = (
        jnp.zeros((token.shape[0], x.shape[1]), x.dtype),
        jnp.zeros(gate_up[:, first_input:].shape, jnp.float32),
        jnp.zeros(down[..., first_output:].shape, jnp.float32),
        jnp.zeros(token.shape, jnp.float32),
    )
    grad_x, grad_gate_up, grad_down, grad_factors = jax.lax.fori_loop(0, groups.live, one, start)
    of_gate_up, of_down = grad_gate_up.astype(gate_up.dtype), grad_down.astype(down.dtype)
    return (
        _rows(grad_x, slot).astype(jnp.float32).sum(axis=1).astype(x.dtype),
        of_gate_up[:, :inputs] if wanted[0] == () else None,
        of_gate_up[:, inputs - first_input :] if gate_up.shape[1] > inputs else None,
        of_down[..., :outputs] if wanted[1] == () else None,
        of_down[..., outputs - first_output :] if down.shape[2] > outputs else None,
        _rows(grad_factors, slot).astype(weights.dtype),
        None,
        None,
        None,
    )


_loop_experts.defvjp(_loop_fwd, _loop_bwd, symbolic_zeros=True)
