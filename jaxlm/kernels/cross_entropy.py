"""Fused output layer and cross-entropy: never holds the logits of the whole batch.

The forward pass walks over chunks of the length and, when a gradient is wanted, computes it there
and then (Liger's idea, arXiv:2410.10989): the logits of a chunk are used for the loss, turned into
their gradient and dropped. `reference_cross_entropy` is the plain twin.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

# A chunk has so many logits on a device (64 MiB in float32), but enough tokens to keep the matrix products large.
CHUNK_LOGITS = 2**24
MIN_CHUNK_TOKENS = 512
# Mesh axes that rows are split over, as in `parallel.mesh`, which lies above this package.
ROW_AXES = ("data", "fsdp", "expert")


@flax.struct.dataclass
class LossOutput:
    """Sums over a batch, float32 scalars; `correct` is zero unless asked for."""

    loss: jax.Array
    correct: jax.Array


def reference_cross_entropy(
    x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, dtype: DTypeLike = jnp.float32
) -> LossOutput:
    """All logits at once in float32; same arguments as `linear_cross_entropy`."""
    logits = jnp.einsum("btd,vd->btv", x.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, -1) == labels) & (weights > 0)
    return LossOutput(loss=-jnp.sum(picked * weights), correct=jnp.sum(correct, dtype=jnp.float32))


def _chunks(batch: int, length: int, vocab: int) -> int:
    """How many chunks a batch of [B, T] is cut into: along T, since rows may be sharded over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)
    tokens = max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // vocab)
    wanted = min(length, max(1, (batch * length) // shards // tokens))
    return math.ceil(length / math.ceil(length / wanted))


def _split(a: jax.Array, n: int) -> jax.Array:
    """[B, T, ...] -> [n, B, ceil(T / n), ...]; what is added behind the row is zero, in weights too."""
    size = math.ceil(a.shape[1] / n)
    a = jnp.pad(a, [(0, 0), (0, n * size - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], n, size, *a.shape[2:]), 1, 0)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _chunk_logits(x: jax.Array, head: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(flat, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _chunk_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """logits [n, V] -> (weighted loss, log-normaliser [n], one-hot [n, V] bool)."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    picked = jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
    return jnp.sum((lse - picked) * weights), lse, hot


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, dtype: DTypeLike) -> jax.Array:
    n = _chunks(x.shape[0], x.shape[1], head.shape[0])
    head = head.astype(dtype)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        xs, ys, ws = chunk
        loss, _, _ = _chunk_loss(_chunk_logits(xs.astype(dtype), head), ys.reshape(-1), ws.reshape(-1))
        return total + loss, None

    total, _ = jax.lax.scan(body, jnp.float32(0), (_split(x, n), _split(labels, n), _split(weights, n)))
    return total


def _loss_fwd(x: Any, head: Any, labels: Any, weights: Any, dtype: DTypeLike) -> tuple[jax.Array, Any]:
    n = _chunks(x.value.shape[0], x.value.shape[1], head.value.shape[0])
    # Under LoRA the head is frozen: its gradient, a third of the work here, is not formed.
    head_trains = head.perturbed
    matrix = head.value.astype(dtype)

    def body(carry: Any, chunk: tuple[jax.Array, ...]) -> Any:
        total, grad_head = carry
        xs, ys, ws = chunk
        xs = xs.astype(dtype)
        ws = ws.reshape(-1)
        logits = _chunk_logits(xs, matrix)
        loss, lse, hot = _chunk_loss(logits, ys.reshape(-1), ws)
        grad = (jnp.exp(logits - lse[:, None]) - hot) * ws[:, None]
        grad = grad.astype(dtype)
        grad_x = jax.lax.dot_general(grad, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        if head_trains:
            flat = xs.reshape(-1, xs.shape[-1])
            grad_head += jax.lax.dot_general(grad, flat, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (total + loss, grad_head), grad_x.reshape(xs.shape).astype(x.value.dtype)

    grad_head = jnp.zeros(matrix.shape, jnp.float32) if head_trains else None
    chunks = (_split(x.value, n), _split(labels.value, n), _split(weights.value, n))
    (total, grad_head), grad_x = jax.lax.scan(body, (jnp.float32(0), grad_head), chunks)
    return total, (_join(grad_x, x.value.shape[1]), grad_head, jnp.zeros((), head.value.dtype))


def _loss_bwd(dtype: DTypeLike, residuals: Any, grad: Any) -> Any:
    grad_x, grad_head, head_like = residuals
    if isinstance(grad, SymbolicZero):
        return None, None, None, None
    scaled = None if grad_head is None else (grad_head * grad).astype(head_like.dtype)
    return (grad_x * grad).astype(grad_x.dtype), scaled, None, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _correct(x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, dtype: DTypeLike) -> jax.Array:
    n = _chunks(x.shape[0], x.shape[1], head.shape[0])
    head = head.astype(dtype)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        xs, ys, ws = chunk
        best = jnp.argmax(_chunk_logits(xs.astype(dtype), head), axis=-1)
        hits = (best == ys.reshape(-1)) & (ws.reshape(-1) > 0)
        return total + jnp.sum(hits, dtype=jnp.float32), None

    total, _ = jax.lax.scan(body, jnp.float32(0), (_split(x, n), _split(labels, n), _split(weights, n)))
    return total


def linear_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    accuracy: bool = False,
) -> LossOutput:
    """Sum over tokens of weight * cross-entropy of softmax(x head^T).

    Args:
        x: hidden states [B, T, D].
        head: output matrix [V, D].
        labels: [B, T] int32.
        weights: [B, T] float32, constants to differentiation.
        dtype: of the matrix products; they accumulate in float32, and so does everything after them.
        accuracy: also count tokens with weight > 0 whose largest logit is the label.
    """
    loss = _loss(x, head, labels, weights, dtype)
    if not accuracy:
        return LossOutput(loss=loss, correct=jnp.float32(0))
    args = jax.lax.stop_gradient((x, head))
    return LossOutput(loss=loss, correct=_correct(*args, labels, weights, dtype))
