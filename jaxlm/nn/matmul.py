"""The product of activations and a weight, with a gradient of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.kernels.scatter import split_axes, sum_scattered
from jaxlm.sharding import SEQUENCE

# Of a product on an NVIDIA GPU: XLA's kernel for one row reads the matrix at half the speed (benchmarks/README.md).
LEAST_ROWS = 8


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None = None
) -> jax.Array:
    """x [*rows, *in] times kernel [*in, *out] in `dtype`, accumulated in float32.

    Own gradient for three reasons: each backend gets all three products in the shape it is fast at, the kernel's
    gradient keeps the float32 accumulator instead of going through bfloat16, and devices sum it in parts.

    Args:
        in_dims: number of dims that are contracted.
        axes: logical axes of the kernel; None: how its gradient is summed is left to the partitioner.
    """
    return product(x, kernel, in_dims, dtype)


def product(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, factor: jax.Array | None = None
) -> jax.Array:
    """As `matmul`, with the gradient that JAX finds; `factor` [*out] float32 multiplies what was accumulated."""
    rows = x.ndim - in_dims
    out = jax.ShapeDtypeStruct(x.shape[:rows] + kernel.shape[in_dims:], dtype)
    y = _by_backend(_times, x.astype(dtype), kernel.astype(dtype), rows, in_dims, out, factor=factor)
    # Named, so that a remat policy can keep it: in `dtype`, not as the float32 accumulator.
    return checkpoint_name(y, "matmul")


def product_transposed(grad: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike) -> jax.Array:
    """grad [*rows, *out] times the transposed kernel [*in, *out]: [*rows, *in] in `dtype`, accumulated in float32."""
    rows = grad.ndim - (kernel.ndim - in_dims)
    out = jax.ShapeDtypeStruct(grad.shape[:rows] + kernel.shape[:in_dims], dtype)
    grad, kernel = grad.astype(dtype), kernel.astype(dtype)
    return _by_backend(_times_transposed, grad, kernel, rows, in_dims, out, _gradient_is_flat(kernel))


def _gradient_is_flat(kernel: jax.Array) -> bool:
    """Whether the products of a gradient are those of matrices on a TPU too.

    A TPU computes the feed-forward layer's gradients faster as matrices, but not its forward product, into which the
    activation is fused (docs/kernels.md, "Shapes of products").
    """
    return kernel.ndim == 2


def _by_backend(
    multiply: Callable[[jax.Array, jax.Array, int, int], jax.Array],
    a: jax.Array,
    b: jax.Array,
    a_split: int,
    b_split: int,
    out: jax.ShapeDtypeStruct | jax.Array,
    flat_on_tpu: bool = False,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A product of arrays in the shapes they have, or of two matrices; with the shape and dtype of `out`.

    XLA's CPU backend is slow on more than two dims. On a TPU a product can write the layout that attention reads, where
    two dims would cost copies (docs/kernels.md, "Shapes of products"). Rows that are split over two mesh axes cannot
    become one dim.

    Args:
        a_split, b_split: dims before this one become the rows of the matrix, the others its columns.
        flat_on_tpu: whether two dims are the better shape on a TPU too.
        factor: float32, the product's trailing dims; it multiplies the accumulator, before the one rounding.
    """
    factors = () if factor is None else (factor,)

    def flat(a: jax.Array, b: jax.Array, *factors: jax.Array) -> jax.Array:
        y = multiply(as_matrix(a, a_split), as_matrix(b, b_split), 1, 1)
        for each in factors:
            y = y * each.reshape(-1)
        # Cast first: behind a reshape the cast would not become part of the product.
        return y.astype(out.dtype).reshape(out.shape)

    def whole(a: jax.Array, b: jax.Array, *factors: jax.Array) -> jax.Array:
        y = multiply(a, b, a_split, b_split)
        for each in factors:
            y = y * each
        return y.astype(out.dtype)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape.get(SEQUENCE, 1) > 1:
        return whole(a, b, *factors)
    if flat_on_tpu:
        return flat(a, b, *factors)
    return cast(jax.Array, jax.lax.platform_dependent(a, b, *factors, tpu=whole, default=flat))


def as_matrix(x: jax.Array, split: int) -> jax.Array:
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


def _dot(a: jax.Array, b: jax.Array, a_dims: range, b_dims: range) -> jax.Array:
    dims = ((tuple(a_dims), tuple(b_dims)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _times(x: jax.Array, kernel: jax.Array, rows: int, in_dims: int) -> jax.Array:
    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _dot(x, kernel, range(rows, x.ndim), range(in_dims))

    return with_least_rows(multiply, x, kernel) if x.ndim == 2 and rows == 1 else multiply(x, kernel)


def with_least_rows(multiply: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> jax.Array:
    """multiply(x, *others), x [n, I] -> [n, O]; on an NVIDIA GPU of LEAST_ROWS at least, with zeros behind x."""
    rows = x.shape[0]
    if rows >= LEAST_ROWS:
        return multiply(x, *others)

    def filled(x: jax.Array, *others: jax.Array) -> jax.Array:
        y = multiply(jnp.pad(x, ((0, LEAST_ROWS - rows), (0, 0))), *others)
        # XLA would see that only some rows are read, and multiply those alone.
        return jax.lax.optimization_barrier(y)[:rows]

    return cast(jax.Array, jax.lax.platform_dependent(x, *others, cuda=filled, default=multiply))


def _times_transposed(grad: jax.Array, kernel: jax.Array, rows: int, in_dims: int) -> jax.Array:
    return _dot(grad, kernel, range(rows, grad.ndim), range(in_dims, kernel.ndim))


def _transposed_times(x: jax.Array, grad: jax.Array, rows: int, _: int) -> jax.Array:
    return _dot(x, grad, range(rows), range(rows))


def _matmul_fwd(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not through `matmul`: a remat policy does not see into a function with a gradient of its own.
    return product(x, kernel, in_dims, dtype), (x, kernel)


def _matmul_bwd(
    in_dims: int,
    dtype: DTypeLike,
    axes: tuple[str, ...] | None,
    residuals: tuple[jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    grad, rows = grad.astype(dtype), x.ndim - in_dims
    flat = _gradient_is_flat(kernel)
    return (
        _by_backend(_times_transposed, grad, kernel.astype(dtype), rows, in_dims, x, flat),
        _kernel_gradient(x.astype(dtype), grad, kernel, rows, axes, flat),
    )


def _kernel_gradient(
    x: jax.Array, grad: jax.Array, kernel: jax.Array, rows: int, axes: tuple[str, ...] | None, flat: bool
) -> jax.Array:
    """The kernel's gradient [*in, *out] from x [*rows, *in] and grad [*rows, *out].

    Where the kernel is split over `embed`, each device keeps its part of the sum and no other (docs/kernels.md, "Sums
    of gradients").
    """
    split = [()] * kernel.ndim if axes is None else split_axes(kernel.shape, axes)
    tokens = split_axes(x.shape[:rows], ("batch", "length")) if rows == 2 else []
    token_axes = [name for names in tokens for name in names]
    at = axes.index("embed") if axes is not None and "embed" in axes else 0
    shards, inner = split[at], [() if dim == at else names for dim, names in enumerate(split)]
    inner_axes = {name for names in inner for name in names}
    if not shards or not set(shards) <= set(token_axes) or inner_axes & set(token_axes):
        return _by_backend(_transposed_times, x, grad, rows, rows, kernel, flat)

    def local(x: jax.Array, grad: jax.Array) -> jax.Array:
        # The dim that is cut up comes first, so that parts are contiguous.
        a, b = (x, grad) if at == 0 else (grad, x)
        out = jax.ShapeDtypeStruct(a.shape[rows:] + b.shape[rows:], jnp.float32)
        gradient = sum_scattered(_by_backend(_transposed_times, a, b, rows, rows, out, flat), shards)
        others = tuple(name for name in token_axes if name not in shards)
        gradient = jax.lax.psum(gradient, others) if others else gradient
        return gradient if at == 0 else jnp.moveaxis(gradient, 0, -1)

    in_dims = x.ndim - rows
    specs = P(*tokens, *inner[:in_dims]), P(*tokens, *inner[in_dims:])
    return jax.shard_map(local, in_specs=specs, out_specs=P(*split), check_vma=False)(x, grad).astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)
