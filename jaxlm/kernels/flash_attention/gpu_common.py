"""What the GPU kernels share: shared memory, products of the tensor cores, masks.

Where the interpreter of this JAX lacks a primitive, a plain equivalent stands beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlm.kernels.flash_attention.common import LOG2_E
from jaxlm.kernels.flash_attention.schedule import Spec

LOWEST = -1e30  # finite: the difference of a masked score (-inf) and a maximum is never NaN
WARPGROUPS = 2  # that compute; each has half of a block's rows
# JAX 0.12 has dropped an argument.
_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# Registers of a thread that only copies, and of one that computes: 40 + 2 * 232 of the 504 there are.
COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232


def buffer(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices [..., h], swizzled as the tensor cores read them."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def laid_out(x: jax.Array, layout: Any, spec: Spec) -> jax.Array:
    """x, spread over the threads of a warpgroup in this way."""
    return x if spec.interpret else plgpu.layout_cast(x, layout)


def full(shape: tuple[int, ...], value: float, layout: Any, spec: Spec) -> jax.Array:
    return laid_out(jnp.full(shape, value, jnp.float32), layout, spec)


def iota(shape: tuple[int, int], dim: int, spec: Spec) -> jax.Array:
    if spec.interpret:
        return lax.broadcasted_iota(jnp.int32, shape, dim)
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def vector(ref: Any, layout: Any, spec: Spec) -> jax.Array:
    """A vector from memory, spread over threads like one dim of a tile."""
    return read(ref, spec) if spec.interpret else plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def read(ref: Any, spec: Spec) -> jax.Array:
    """What the interpreter reads in place of the tensor cores, which read as copies write, past the threads' own path.

    On that path the race detector of JAX 0.12 wants a fence between a read and the copy that comes next.
    """
    assert spec.interpret
    value: jax.Array = ref[...]
    plgpu.commit_smem()
    return value


def across(x: jax.Array, shape: tuple[int, int], dim: int) -> jax.Array:
    """A vector over `dim` of a tile, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, (dim,))


def products(
    pairs: Sequence[tuple[Any, Any]], shape: tuple[int, int], spec: Spec, between: Callable[[], None] | None = None
) -> tuple[jax.Array, ...]:
    """a b^T of each pair (both in shared memory), [n, m] float32, issued together.

    Args:
        shape: (n, m).
        between: runs after they are issued, before they are waited for.
    """
    if spec.interpret:
        results = tuple(
            lax.dot_general(read(a, spec), read(b, spec), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            for a, b in pairs
        )
        if between is not None:
            between()
        return results

    def run(*accs: Any) -> tuple[jax.Array, ...]:
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        if between is not None:
            between()
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for _ in pairs))


def add_products(sums: Sequence[tuple[jax.Array, jax.Array, Any]], spec: Spec) -> tuple[jax.Array, ...]:
    """total + a b for each (total, a, b), a in registers, b in shared memory, issued together."""
    if spec.interpret:
        return tuple(
            total + lax.dot_general(a, read(b, spec), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            for total, a, b in sums
        )

    def run(accs: Any) -> None:
        for acc, (_, a, b) in zip(accs, sums, strict=True):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(run)(tuple(plgpu.ACC.init(total) for total, _, _ in sums))


def bent(raw: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array | None]:
    """From products q k^T: scores in units of log 2, and the derivative of the soft cap (None without one)."""
    if spec.soft_cap is None:
        return raw * (spec.scale * LOG2_E), None
    cap = jnp.tanh(raw * (spec.scale / spec.soft_cap))
    return cap * (spec.soft_cap * LOG2_E), 1.0 - cap * cap


def with_slopes(slopes: jax.Array | None, spec: Spec) -> tuple[jax.Array, ...]:
    """What a kernel takes for ALiBi: the slopes, and the numbers from 0 on, which `places` reads; nothing without."""
    return () if slopes is None else (slopes, jnp.arange(max(spec.block_q, spec.block_k), dtype=jnp.float32))


def places(slope: Any, index: Any, size: int, layout: Any, spec: Spec, start: Any = 0) -> jax.Array:
    """As `common.places`, a vector of `size` in this layout; its numbers come from memory, as converting is slow."""
    numbers = vector(index.at[pl.ds(0, size)], layout, spec)
    return (numbers + jnp.asarray(start, jnp.float32)) * (slope * LOG2_E)


def visible(
    spec: Spec, shape: tuple[int, int], q_start: Any, k_start: Any, q_ids: Any, kv_ids: Any, by_keys: bool = False
) -> jax.Array:
    """Which key of a tile is seen by which query, bool: [keys, queries] if `by_keys`, else [queries, keys].

    Args:
        q_start, k_start: place of the first query and key.
        q_ids, kv_ids: segment ids of the tile's queries and keys; None: one segment.
    """
    q_dim, k_dim = (1, 0) if by_keys else (0, 1)
    query = q_start + iota(shape, q_dim, spec)
    key = k_start + iota(shape, k_dim, spec)
    seen = (query < spec.q_length) & (key < spec.kv_length)
    if spec.causal:
        seen &= key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    if q_ids is not None:
        ids = across(q_ids, shape, q_dim)
        seen &= (ids == across(kv_ids, shape, k_dim)) & (ids != 0)
    return seen


def in_order(index: Any, count: int, spec: Spec, reverse: bool) -> Any:
    """Which block the index-th of a grid takes: those with most work first, so that none is left for the end."""
    return count - 1 - index if spec.causal and reverse else index


def sections(ranges: Any, step: Callable[[Any, Any, bool], Any], carry: Any) -> Any:
    """`step(block, carry, masked)` over all blocks of `make_ranges`, without masks where none are needed."""
    first, whole, behind, end = ranges
    carry = lax.fori_loop(first, whole, lambda i, c: step(i, c, True), carry)
    carry = lax.fori_loop(whole, behind, lambda i, c: step(i, c, False), carry)
    return lax.fori_loop(behind, end, lambda i, c: step(i, c, True), carry)


def protect(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of which a masked one cannot reach a result: its weight is 0, and 0 * NaN would be NaN.

    A broken value breaks its key instead: queries that see it get NaN, others nothing of it.
    """
    return k + v * 0, finite(v)


def finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
