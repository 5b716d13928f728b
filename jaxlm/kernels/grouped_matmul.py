"""Matrix products of rows that are sorted into groups, each group with a matrix of its own: the work of a sparse MoE.

How rows lie in their buffer is said in `kernels.groups`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxlm.kernels.grouped_matmul_tpu import tpu_grouped_matmul
from jaxlm.kernels.groups import Groups


def reference_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    """Every row with every matrix, all but its own masked away: the plain twin."""
    block = x.shape[0] // groups.owner.shape[0]
    used = jnp.arange(groups.owner.shape[0]) < groups.live
    mine = jax.nn.one_hot(groups.owner, w.shape[0], dtype=x.dtype) * used[:, None].astype(x.dtype)
    per_row = jnp.repeat(mine, block, axis=0)
    return jnp.einsum("me,mi,eio->mo", per_row, x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def ragged_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    """XLA's own grouped product, which TPUs compile to one kernel; a GPU multiplies every row with all matrices."""
    return jax.lax.ragged_dot(x, w, groups.sizes, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def loop_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    """A loop over the live blocks, one dense product each. For CPUs, where `ragged_dot` computes every row E times."""
    return _loop(x, w, groups)


def _block(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=0)


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _loop_fwd(x: Any, w: Any, groups: Any) -> tuple[jax.Array, Any]:
    trains = () if w.perturbed else None  # a tree without leaves: no array says it
    arrays = jax.tree.map(lambda each: each.value, (x, w, groups))
    return _loop(*arrays), (*arrays, trains)


def _loop(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    size = x.shape[0] // groups.owner.shape[0]

    def one(index: jax.Array, out: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(w, groups.owner[index], keepdims=False)
        product = _dot(_block(x, index, size), matrix, 1, 0).astype(out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, product, index * size, axis=0)

    out = jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, groups.live, one, out)


def _loop_bwd(residuals: Any, grad: Any) -> tuple[jax.Array | None, jax.Array | None, None]:
    x, w, groups, trains = residuals
    if isinstance(grad, SymbolicZero):
        return None, None, None
    size = x.shape[0] // groups.owner.shape[0]

    def one(index: jax.Array, carry: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        grad_x, grad_w = carry
        owner, rows = groups.owner[index], _block(grad, index, size)
        matrix = jax.lax.dynamic_index_in_dim(w, owner, keepdims=False)
        product = _dot(rows, matrix, 1, 1).astype(grad_x.dtype)
        grad_x = jax.lax.dynamic_update_slice_in_dim(grad_x, product, index * size, axis=0)
        return grad_x, None if grad_w is None else grad_w.at[owner].add(_dot(_block(x, index, size), rows, 0, 0))

    # A frozen matrix has no gradient: behind a loop the compiler would not see that nothing reads it.
    grads = jnp.zeros(x.shape, x.dtype), None if trains is None else jnp.zeros(w.shape, jnp.float32)
    grad_x, grad_w = jax.lax.fori_loop(0, groups.live, one, grads)
    return grad_x, None if grad_w is None else grad_w.astype(w.dtype), None


loop_grouped_matmul.defvjp(_loop_fwd, _loop_bwd, symbolic_zeros=True)


def _gpu_grouped_matmul(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    # On use: Mosaic for GPUs is an eighth of what a start on another device imports.
    from jaxlm.kernels.grouped_matmul_gpu import gpu_grouped_matmul

    return gpu_grouped_matmul(x, w, groups)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, Groups], jax.Array]] = {
    "reference": reference_grouped_matmul,
    "ragged": ragged_grouped_matmul,
    "loop": loop_grouped_matmul,
    "pallas_gpu": _gpu_grouped_matmul,
}


@partial(jax.named_call, name="grouped_matmul")
def grouped_matmul(
    x: jax.Array, w: jax.Array, groups: Groups, implementation: str, transposed: bool = False
) -> jax.Array:
    """x [M, I] times the matrix of each row's group, w [E, I, O]: [M, O] in x's dtype, accumulated in float32.

    Args:
        transposed: the matrices are [E, O, I]; only 'pallas_tpu' reads them as they lie.
    """
    if implementation == "pallas_tpu":
        return tpu_grouped_matmul(x, w, groups, transposed)
    return IMPLEMENTATIONS[implementation](x, w.swapaxes(1, 2) if transposed else w, groups)
