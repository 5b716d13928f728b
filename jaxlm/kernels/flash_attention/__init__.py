"""Flash attention: exact softmax attention that never stores the T x T scores, forward and backward.

`jaxlm.nn.attention.reference_attention` is the plain twin. See docs/kernels.md for what bounds the speed.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxlm.errors import UserError
from jaxlm.kernels.flash_attention import tpu, tpu_backward
from jaxlm.kernels.flash_attention.common import LOG2_E
from jaxlm.kernels.flash_attention.schedule import Spec

Axes = str | tuple[str, ...] | None
Backend = Literal["tpu", "gpu"]

# Rows of a block of queries and of keys.
BLOCK = 512
# Lengths are padded to whole registers of this number of lanes; blocks at the end of a row may still be ragged.
LANES = 128


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    slopes: jax.Array | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    rows_axes: Axes = None,
    heads_axes: Axes = None,
    backend: Backend = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention by a Pallas kernel, differentiable in q, k and v.

    A query sees a key of its own segment that is not later (causal) and fewer than `window` places back, by place in
    the row. NaN and infinity elsewhere do not reach it, nor do they reach its gradient.

    Args:
        q: [B, T, H, h]; k, v: [B, S, K, h] of the same dtype; K divides H.
        segment_ids: [B, T] int32; 0 is padding, which sees nothing and is seen by nothing. None: one segment.
        kv_segment_ids: [B, S]; None: those of the queries.
        soft_cap: scores become cap * tanh(score / cap).
        scale: of scores; None: 1/sqrt(h).
        slopes: [H] float32, ALiBi's: capped scores sink by slope * (query - key), by place in the row; no gradient
            flows into them. None: they stay. Only with `causal`.
        block_q, block_k: rows of a block; None: on a TPU BLOCK, or the length where that is shorter; on a GPU
            `gpu.blocks`.
        rows_axes, heads_axes: mesh axes over which B, and H and K, are split.
        backend: for which kind of device.
        interpret: for tests: run on a CPU (see `pallas_call`; for a GPU kernel its `InterpretGPUParams`).

    Returns:
        [B, T, H, h] in q's dtype (0 where a query sees nothing), and log-sum-exp of the scores [B, T, H] float32
        (-inf there).

    Raises:
        UserError: shapes that do not go together; rows too long for the chip; what `unsupported` names.
    """
    batch, q_length, heads, dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise UserError(
            f"flash_attention: q {q.shape}, k {k.shape} and v {v.shape} do not go together; "
            "give q [B, T, H, h] and k, v [B, S, K, h] with K a divisor of H"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise UserError(f"flash_attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype")
    if window is not None and window < 1:
        raise UserError(f"flash_attention: window {window} lets a query see nothing; give at least 1, or None")
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    for name, ids, length in (("segment_ids", segment_ids, q_length), ("kv_segment_ids", kv_segment_ids, kv_length)):
        if ids is not None and ids.shape != (batch, length):
            raise UserError(f"flash_attention: {name} {ids.shape} should be {(batch, length)}, as q and k have it")
    if slopes is not None and (slopes.shape != (heads,) or not causal):
        raise UserError(
            f"flash_attention: slopes {slopes.shape} of {heads} heads, causal is {causal}; give one for each head, and "
            "causal attention, or use attention 'xla'"
        )
    if (segment_ids is None) != (kv_segment_ids is None):
        raise UserError("flash_attention: kv_segment_ids without segment_ids; give those of the queries too")
    reason = unsupported(backend, dtype=q.dtype, head_dim=dim, heads=heads, kv_heads=kv_heads)
    if reason and not interpret:
        raise UserError(f"flash_attention: {reason}; use attention 'xla'")
    default_q, default_k = _for_gpus()[0].blocks(dim) if backend == "gpu" else (BLOCK, BLOCK)
    block_q, block_k = block_q or default_q, block_k or default_k
    if backend == "tpu":
        block_q, block_k = min(block_q, _whole(q_length, LANES)), min(block_k, _whole(kv_length, LANES))
    spec = Spec(
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=1 / math.sqrt(dim) if scale is None else scale,
        q_length=q_length,
        kv_length=kv_length,
        block_q=block_q,
        block_k=block_k,
        backend=backend,
        interpret=interpret,
    )
    axes = rows_axes, heads_axes
    # A TPU's registers hold parts of T x h; a GPU's copies find a head's rows wherever they lie, but only whole blocks.
    unit = LANES if backend == "tpu" else math.lcm(block_q, block_k)
    if backend == "gpu":
        q, k, v = (_padded(x, 1, unit) for x in (q, k, v))
    else:
        q, k, v = (_padded(x.swapaxes(1, 2), 2, unit) for x in (q, k, v))
    q_ids, kv_ids = (
        None if ids is None else _padded(ids.astype(jnp.int32), 1, unit) for ids in (segment_ids, kv_segment_ids)
    )
    out, lse = _flash(q, k, v, q_ids, kv_ids, slopes, spec, axes)
    if backend == "gpu":
        return out[:, :q_length], lse[:, :, :q_length].swapaxes(1, 2)
    return out[:, :, :q_length].swapaxes(1, 2), lse[:, :, 0, :q_length].swapaxes(1, 2)


def unsupported(backend: Backend, *, dtype: Any, head_dim: int, heads: int, kv_heads: int) -> str | None:
    """Why the kernel of this kind of device cannot serve; None when it can.

    Args:
        dtype: of q, k and v.
    """
    if heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} kv heads"
    if backend == "tpu":
        return None
    if jnp.dtype(dtype).itemsize != 2:
        return f"a GPU's tensor cores take bfloat16 or float16 here, not {jnp.dtype(dtype).name}"
    if head_dim % 16 or head_dim > 256:
        return f"head dim {head_dim} is not a multiple of 16 up to 256"
    reason: str | None = _for_gpus()[0].broken_compiler()
    return reason


def _for_gpus() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The GPU's kernels, imported on use: Mosaic for GPUs is an eighth of what a start on another device imports."""
    from jaxlm.kernels.flash_attention import gpu, gpu_backward, gpu_common

    return gpu, gpu_backward, gpu_common


def _whole(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _padded(x: jax.Array, axis: int, unit: int) -> jax.Array:
    more = _whole(x.shape[axis], unit) - x.shape[axis]
    return jnp.pad(x, [(0, more if at == axis else 0) for at in range(x.ndim)]) if more else x


def _sharded(
    run: Callable[..., Any], axes: tuple[Axes, Axes], inputs: str, outputs: str, backend: str
) -> Callable[..., Any]:
    """`run` on each device's rows and heads.

    't' stands for a tensor (TPU: [B, H, T, h], GPU: [B, T, H, h]), 'l' for a number of each query [B, H, ...], 'i' for
    segment ids [B, ...], 's' for slopes [H].
    """
    if axes == (None, None):
        return run
    rows, heads = axes
    specs = {"t": P(rows, None, heads) if backend == "gpu" else P(rows, heads), "l": P(rows, heads), "i": P(rows)}
    specs["s"] = P(heads)
    # A kernel says nothing about how its results vary over the mesh.
    return jax.shard_map(
        run, in_specs=tuple(specs[c] for c in inputs), out_specs=tuple(specs[c] for c in outputs), check_vma=False
    )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    slopes: jax.Array | None,
    spec: Spec,
    axes: tuple[Axes, Axes],
) -> tuple[jax.Array, jax.Array]:
    return _flash_fwd(q, k, v, q_ids, kv_ids, slopes, spec, axes)[0]


def _flash_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    slopes: jax.Array | None,
    spec: Spec,
    axes: tuple[Axes, Axes],
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    forward = tpu.forward
    if spec.backend == "gpu":
        gpu, _, common = _for_gpus()
        forward = gpu.forward
        k, v = common.protect(k, v)
    run = _sharded(partial(forward, spec=spec), axes, "tttiis", "tl", spec.backend)
    out, lse = run(q, k, v, q_ids, kv_ids, slopes)
    # Named for remat policies: with both at hand the kernel need not run again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_out")
    return (out, lse / LOG2_E), (q, k, v, q_ids, kv_ids, slopes, out, lse)


def _flash_bwd(spec: Spec, axes: tuple[Axes, Axes], residuals: Any, grads: Any) -> tuple[Any, ...]:
    q, k, v, q_ids, kv_ids, slopes, out, lse = residuals
    grad, grad_lse = grads
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    delta = delta.swapaxes(1, 2) if spec.backend == "gpu" else delta[:, :, None]
    # A gradient that is broken for one query is broken for all keys it sees, and the weights have to show it.
    lse = lse + delta * 0.0
    grad = grad.astype(q.dtype)
    backward = tpu_backward.backward
    if spec.backend == "gpu":
        _, gpu_backward, common = _for_gpus()
        backward = gpu_backward.backward
        q, k, grad = map(common.finite, (q, k, grad))  # what was broken has broken lse and delta
    run = _sharded(partial(backward, spec=spec), axes, "tttiillts", "ttt", spec.backend)
    grad_q, grad_k, grad_v = run(q, k, v, q_ids, kv_ids, lse, delta - grad_lse, grad, slopes)
    return grad_q, grad_k, grad_v, None, None, None


_flash.defvjp(_flash_fwd, _flash_bwd)
