"""Fused output layer and cross-entropy: never holds the logits of the whole batch.

The forward pass walks over chunks of the length and, when a gradient is wanted, computes it there
and then (Liger's idea, arXiv:2410.10989): the logits of a chunk are used for the loss, turned into
their gradient and dropped. `reference_cross_entropy` is the plain twin.

On a mesh each device walks over its own tokens and its own part of the vocabulary. What devices tell each other: where
the head is split over `embed`, its parts (once, in the compute dtype) and its gradient back; where it is split over
`vocab`, the maximum, the sum and the label's logit of each token, and the gradient of x. Left to itself, XLA gathers
the head anew for every chunk and, for TPUs, the gradient of the logits over all rows.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.kernels.scatter import split_axes, sum_scattered_columns

# Most logits of a chunk on a device (64 MiB in float32), and the tokens that keep its matrix products large: more of
# them when the head trains, as each chunk reads and writes all of its gradient (docs/kernels.md).
CHUNK_LOGITS = 2**24
MIN_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS_HEAD = 2048
NEGATIVE = -1e30  # the logit of a row that only fills up the vocabulary


@flax.struct.dataclass
class LossOutput:
    """Sums over a batch, float32 scalars; `correct` is zero unless asked for."""

    loss: jax.Array
    correct: jax.Array


@flax.struct.dataclass
class TokenLosses:
    """What each token adds to the sums: float32 [B, T]."""

    loss: jax.Array
    correct: jax.Array


def soft_capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap); the logits themselves for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def reference_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    dtype: DTypeLike = jnp.float32,
    soft_cap: float | None = None,
) -> LossOutput:
    """All logits at once in float32; same arguments as `linear_cross_entropy`."""
    logits = jnp.einsum("btd,vd->btv", x.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32)
    logits = soft_capped(logits, soft_cap)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, -1) == labels) & (weights > 0)
    return LossOutput(loss=-jnp.sum(picked * weights), correct=jnp.sum(correct, dtype=jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes that dims are split over; () for a dim that is whole.

    Attributes:
        rows, length: of the tokens.
        vocab, embed: of the head.
    """

    rows: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.rows + self.length


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a walk over the chunks is to find, beside the loss.

    Attributes:
        vocab: V.
        soft_cap: of the logits, see `linear_cross_entropy`.
        filled: the head has rows behind the last one, so that it divides evenly.
        accuracy, grad_x, grad_head: what is wanted.
        by_token: what each token adds to the sums is wanted; with `accuracy` also whether it is right.
    """

    dtype: DTypeLike
    vocab: int
    axes: _Axes
    accuracy: bool
    grad_x: bool = False
    grad_head: bool = False
    filled: bool = False
    soft_cap: float | None = None
    by_token: bool = False


def _axes(x: Any, head: Any) -> _Axes:
    """As the current mesh and logical-axis rules say; rows that do not divide evenly stay whole."""
    rows, length = split_axes(x.shape[:2], ("batch", "length"))
    # The vocabulary is filled up until it divides: any size will do.
    vocab, embed = split_axes((0, head.shape[1]), ("vocab", "embed"))
    # The head's gradient is summed over tokens where it is split: there have to be different tokens.
    return _Axes(rows, length, vocab, embed if set(embed) <= {*rows, *length} else ())


def chunk_count(batch: int, length: int, vocab: int, grad_head: bool) -> int:
    """The number of chunks that [B, T] tokens are cut into, along T; all sizes are those of one device."""
    tokens = max(MIN_CHUNK_TOKENS_HEAD if grad_head else MIN_CHUNK_TOKENS, CHUNK_LOGITS // vocab)
    wanted = min(length, max(1, batch * length // tokens))
    # A few more chunks are cheaper than padding the row, which copies x and its gradient.
    even = next((n for n in range(wanted, 2 * wanted) if length % n == 0), None)
    return even or math.ceil(length / math.ceil(length / wanted))


def _split(a: jax.Array, n: int) -> jax.Array:
    """[B, T, ...] -> [n, B, ceil(T / n), ...]; what is added behind the row is zero, in weights too."""
    size = math.ceil(a.shape[1] / n)
    a = jnp.pad(a, [(0, 0), (0, n * size - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], n, size, *a.shape[2:]), 1, 0)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _walk_local(
    x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, task: _Task
) -> tuple[LossOutput, jax.Array | None, jax.Array | None, TokenLosses | None]:
    """`_walk` on one device: its tokens [b, t], its part of the head [v, d]."""
    axes = task.axes
    matrix = head.astype(task.dtype)
    if axes.embed:
        matrix = jax.lax.all_gather(matrix, axes.embed, axis=1, tiled=True)
    rows = matrix.shape[0]
    first = jax.lax.axis_index(axes.vocab) * rows if axes.vocab else 0
    n = chunk_count(labels.shape[0], labels.shape[1], rows, task.grad_head)

    def over_vocab(reduce: Any, value: Any) -> Any:
        return reduce(value, axes.vocab) if axes.vocab else value

    def body(carry: Any, chunk: tuple[jax.Array, ...]) -> Any:
        out, grad_head = carry
        xs, ys, ws = chunk
        flat, ys, ws = xs.astype(task.dtype).reshape(-1, xs.shape[-1]), ys.reshape(-1), ws.reshape(-1)
        logits = soft_capped(_dot(flat, matrix, 1, 1), task.soft_cap)
        bend = None if task.soft_cap is None else 1.0 - jnp.square(logits / task.soft_cap)  # the cap's derivative
        row = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        if task.filled:
            logits = jnp.where(row < task.vocab, logits, NEGATIVE)
        hot = row == ys[:, None]  # not a gather: most devices do not have the label's row
        largest = over_vocab(jax.lax.pmax, jnp.max(logits, axis=-1))
        total = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
        picked = jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
        total, picked = over_vocab(jax.lax.psum, (total, picked))
        lse = largest + jnp.log(total)
        correct, hits = out.correct, None
        if task.accuracy:
            # The first of equal logits, as argmax has it.
            best = jnp.min(jnp.where(logits == largest[:, None], row, jnp.iinfo(jnp.int32).max), axis=-1)
            hits = (over_vocab(jax.lax.pmin, best) == ys) & (ws > 0)
            correct += jnp.sum(hits, dtype=jnp.float32)
        losses = (lse - picked) * ws
        out = LossOutput(loss=out.loss + jnp.sum(losses), correct=correct)
        tokens = None
        if task.by_token:
            right = jnp.zeros_like(losses) if hits is None else hits.astype(jnp.float32)
            tokens = TokenLosses(losses.reshape(xs.shape[:2]), right.reshape(xs.shape[:2]))
        grad_x = None
        if task.grad_x or task.grad_head:
            grad = (jnp.exp(logits - lse[:, None]) - hot) * ws[:, None]
            grad = (grad if bend is None else grad * bend).astype(task.dtype)
            if task.grad_x:
                grad_x = over_vocab(jax.lax.psum, _dot(grad, matrix, 1, 0).astype(x.dtype)).reshape(xs.shape)
            if task.grad_head:
                grad_head += _dot(grad, flat, 0, 0)
        return (out, grad_head), (grad_x, tokens)

    zero = LossOutput(loss=jnp.float32(0), correct=jnp.float32(0))
    grad_head = jnp.zeros(matrix.shape, jnp.float32) if task.grad_head else None
    (out, grad_head), (grad_x, tokens) = jax.lax.scan(
        body, (zero, grad_head), (_split(x, n), _split(labels, n), _split(weights, n))
    )
    if axes.tokens:
        out = jax.lax.psum(out, axes.tokens)
    if grad_head is not None:
        if axes.embed:
            grad_head = sum_scattered_columns(grad_head, axes.embed)
        others = tuple(name for name in axes.tokens if name not in axes.embed)
        if others:
            grad_head = jax.lax.psum(grad_head, others)
    grad_x, tokens = jax.tree.map(lambda chunks: _join(chunks, x.shape[1]), (grad_x, tokens))
    return out, grad_x, grad_head, tokens


def _walk(
    x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, task: _Task
) -> tuple[LossOutput, jax.Array | None, jax.Array | None, TokenLosses | None]:
    """Sums, and what the task asks for: gradients of the loss (x's in its dtype, the head's in float32), tokens."""
    axes = task.axes
    if axes == _Axes():
        return _walk_local(x, head, labels, weights, task)
    mesh = jax.sharding.get_abstract_mesh()
    # A vocabulary of 32,001 rows (Alpaca's, Vicuna's) divides no mesh.
    more = -head.shape[0] % math.prod(mesh.shape[name] for name in axes.vocab)
    if more:
        head, task = jnp.pad(head, ((0, more), (0, 0))), dataclasses.replace(task, filled=True)
    token, part = P(axes.rows or None, axes.length or None), P(axes.vocab or None, axes.embed or None)
    run = jax.shard_map(
        partial(_walk_local, task=task),
        in_specs=(token, part, token, token),
        out_specs=(P(), token if task.grad_x else P(), part if task.grad_head else P(), token),
        check_vma=False,  # its carry is a sum over tokens at the end only
    )
    out, grad_x, grad_head, tokens = run(x, head, labels, weights)
    return out, grad_x, None if grad_head is None else grad_head[: task.vocab], tokens


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    dtype: DTypeLike,
    accuracy: bool,
    soft_cap: float | None,
) -> LossOutput:
    task = _Task(dtype, head.shape[0], _axes(x, head), accuracy, soft_cap=soft_cap)
    return _walk(x, head, labels, weights, task)[0]


def _loss_fwd(
    x: Any, head: Any, labels: Any, weights: Any, dtype: DTypeLike, accuracy: bool, soft_cap: float | None
) -> tuple[LossOutput, Any]:
    axes = _axes(x.value, head.value)
    # Under LoRA the head is frozen: its gradient, a third of the work here, is not formed.
    task = _Task(dtype, head.value.shape[0], axes, accuracy, x.perturbed, head.perturbed, soft_cap=soft_cap)
    out, grad_x, grad_head, _ = _walk(x.value, head.value, labels.value, weights.value, task)
    return out, (grad_x, grad_head, jnp.zeros((), head.value.dtype))


def _loss_bwd(dtype: DTypeLike, accuracy: bool, soft_cap: float | None, residuals: Any, grads: Any) -> Any:
    grad_x, grad_head, head_like = residuals
    grad = grads.loss
    if isinstance(grad, SymbolicZero):
        return None, None, None, None
    scaled_x = None if grad_x is None else (grad_x * grad).astype(grad_x.dtype)
    return scaled_x, None if grad_head is None else (grad_head * grad).astype(head_like.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def linear_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    accuracy: bool = False,
    soft_cap: float | None = None,
) -> LossOutput:
    """Sum over tokens of weight * cross-entropy of softmax(x head^T).

    Args:
        x: hidden states [B, T, D].
        head: output matrix [V, D].
        labels: [B, T] int32.
        weights: [B, T] float32, constants to differentiation.
        dtype: of the matrix products; they accumulate in float32, and so does everything after them.
        accuracy: also count tokens with weight > 0 whose largest logit is the label.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); None: they stay.
    """
    return _loss(x, head, labels, weights, dtype, accuracy, soft_cap)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_losses(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    dtype: DTypeLike,
    accuracy: bool,
    soft_cap: float | None,
) -> tuple[LossOutput, TokenLosses]:
    task = _Task(dtype, head.shape[0], _axes(x, head), accuracy, soft_cap=soft_cap, by_token=True)
    out, _, _, tokens = _walk(x, head, labels, weights, task)
    assert tokens is not None
    return out, tokens


def _token_losses_fwd(
    x: Any, head: Any, labels: Any, weights: Any, dtype: DTypeLike, accuracy: bool, soft_cap: float | None
) -> tuple[tuple[LossOutput, TokenLosses], Any]:
    values = x.value, head.value, labels.value, weights.value
    wanted = tuple(() if each.perturbed else None for each in (x, head))  # a tree without leaves: no array says it
    return _token_losses(*values, dtype, accuracy, soft_cap), (values, wanted)


def _token_losses_bwd(dtype: DTypeLike, accuracy: bool, soft_cap: float | None, residuals: Any, grads: Any) -> Any:
    (x, head, labels, weights), wanted = residuals
    # The gradient of a sum over tokens, each weighted by what is asked of it: as of a loss with these weights.
    shares = [grad for grad in (grads[0].loss, grads[1].loss) if not isinstance(grad, SymbolicZero)]
    if not shares:
        return None, None, None, None
    grad_x, grad_head = (each == () for each in wanted)
    task = _Task(dtype, head.shape[0], _axes(x, head), False, grad_x, grad_head, soft_cap=soft_cap)
    _, of_x, of_head, _ = _walk(x, head, labels, weights * sum(shares), task)
    return of_x, None if of_head is None else of_head.astype(head.dtype), None, None


_token_losses.defvjp(_token_losses_fwd, _token_losses_bwd, symbolic_zeros=True)


def token_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    accuracy: bool = True,
    soft_cap: float | None = None,
) -> tuple[LossOutput, TokenLosses]:
    """The sums of `linear_cross_entropy`, and what each token adds to them.

    Under a gradient the logits of each chunk are computed twice: how much a token weighs is known behind all of them.
    """
    return _token_losses(x, head, labels, weights, dtype, accuracy, soft_cap)
