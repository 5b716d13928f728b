"""Attention behind one function: `attention(q, k, v, mask, backend)`.

The mask is a spec (causal, window, segment ids; scale, soft cap, ALiBi and relative bias of the scores), not an array:
a backend decides how to honour it, or is refused by name. Each fast one is tested against `reference`, values and
gradients.

Shapes: B rows, T/S query/key length, H query heads, K kv heads, h head dim, G = H / K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxlm.errors import UserError
from jaxlm.kernels.backend import AttentionBackend, unserved_scores
from jaxlm.kernels.decode_attention import MAX_TOKENS, tpu_decode_attention
from jaxlm.kernels.flash_attention import Backend as Device
from jaxlm.kernels.flash_attention import flash_attention
from jaxlm.nn.positions import alibi_slopes
from jaxlm.sharding import SEQUENCE, TENSOR

# Query rows per block of the XLA form. Smaller ones skip more of the scores above the diagonal, but each is unrolled in
# the program, which takes longer to compile (docs/kernels.md, "XLA's form in blocks").
QUERY_BLOCK = 256
# Blocks are unrolled in the program; more of them cost compile time and save little.
MAX_BLOCKS = 16
NEGATIVE = -1e30  # finite: a row that is masked everywhere (padding) must not become NaN


@flax.struct.dataclass
class MaskSpec:
    """Which keys a query may see, and what becomes of the products of the two before the softmax.

    A query sees a key when it is not later in the row (causal), fewer than `window` rows back,
    and of the same segment. Position in the row counts, not the position id.

    Keys of other rows than the queries' (cross-attention) have segment ids of their own, and neither order nor window
    between them and the queries: `causal` is False. Padding then sees nothing and is seen by nothing; a query that sees
    nothing gets 0.

    Under a causal mask, keys of a prefix are seen by the queries before them too: a prompt by all of its own tokens
    (prefix LM, arXiv:1910.10683; ChatGLM-6B).

    A score is product * scale; then, with a soft cap, cap * tanh(score / cap); then, with ALiBi, less slope * distance;
    then, with a relative bias, plus that of its head at its distance. The distance is that in the row: of tokens of one
    segment, which lie side by side, that of their position ids too.
    """

    segment_ids: jax.Array | None = None  # [B, T] int32, 0 = padding
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    scale: float | None = flax.struct.field(pytree_node=False, default=None)  # None: 1/sqrt(h)
    soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)
    alibi: bool = flax.struct.field(pytree_node=False, default=False)
    key_segment_ids: jax.Array | None = None  # [B, S] int32, 0 = padding; None: the keys are those of the queries' rows
    bias: jax.Array | None = None  # [H, T + S - 1] float32, trained; by place of key - place of query, from -(T - 1) on
    prefix: jax.Array | None = None  # [B, T] bool: which tokens are in the prefix of their segment; None: none

    def scaled(self, products: jax.Array, dim: int) -> jax.Array:
        """Products of vectors of `dim` numbers, or gradients of scores, times the scale."""
        return products / math.sqrt(dim) if self.scale is None else products * self.scale

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scaled scores below the soft cap."""
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def biased(self, scores: jax.Array, q_start: int, k_start: int, q_length: int) -> jax.Array:
        """Capped scores of a tile [B, K, G, q, k], all heads, with ALiBi and the relative bias.

        Args:
            q_length: T.
        """
        if not self.alibi and self.bias is None:
            return scores
        kv_heads, groups, queries, keys = scores.shape[1:]
        if self.alibi:
            distance = np.abs(np.arange(q_start, q_start + queries)[:, None] - np.arange(k_start, k_start + keys))
            slopes = alibi_slopes(kv_heads * groups).reshape(kv_heads, groups, 1, 1)
            scores = scores - slopes * jnp.asarray(distance, jnp.float32)
        if self.bias is not None:
            near = self.bias[:, _distances(q_start, q_start + queries, k_start, k_start + keys, q_length)]
            scores = scores + _toeplitz(near, queries, keys).reshape(kv_heads, groups, queries, keys)
        return scores

    def dense(self, q_start: int, q_end: int, k_start: int, k_end: int) -> jax.Array | None:
        """The mask of one tile, [B or 1, 1, q, k] bool (True = may see); None if it hides nothing."""
        rows = jnp.arange(q_start, q_end)[:, None]
        cols = jnp.arange(k_start, k_end)[None, :]
        mask = None
        if self.causal and k_end - 1 > q_start:
            mask = cols <= rows
        if self.prefix is not None and mask is not None:
            mask = mask | self.prefix[:, None, k_start:k_end]
        if self.window is not None and q_end - 1 - k_start >= self.window:
            near = rows - cols < self.window
            mask = near if mask is None else mask & near
        if mask is not None:
            mask = mask[None, None] if self.prefix is None else mask[:, None]
        if self.segment_ids is not None:
            same = self.same_segment(np.s_[:, None, q_start:q_end, None], np.s_[:, None, None, k_start:k_end])
            mask = same if mask is None else mask & same
        return mask

    def same_segment(self, rows: Any, cols: Any) -> jax.Array:
        """Whether a query and a key are of one segment, bool; `rows` and `cols` index the ids, which there are."""
        assert self.segment_ids is not None
        queries = self.segment_ids[rows]
        if self.key_segment_ids is None:
            return queries == self.segment_ids[cols]
        keys = self.key_segment_ids[cols]
        return (queries == keys) & (keys != 0)


def _distances(q_start: int, q_end: int, k_start: int, k_end: int, q_length: int) -> slice:
    """Where the distances of a tile stand in `MaskSpec.bias`."""
    return slice(k_start - q_end + q_length, k_end - 1 - q_start + q_length)


def _toeplitz(vectors: jax.Array, queries: int, keys: int) -> jax.Array:
    """The tile [H, q, k] with one number on each diagonal, from [H, q + k - 1] by distance, from -(q - 1) on.

    Without a gather, whose gradient would be a scatter: the vector and one number more, repeated, are read in rows that
    are one shorter, so that each row begins one number earlier than the one above it.
    """
    heads, count = vectors.shape
    first = vectors[:, queries - 1 :]
    period = jnp.concatenate([first, jnp.zeros((heads, 1), vectors.dtype), vectors[:, : queries - 1]], axis=1)
    return jnp.tile(period, (1, queries))[:, : queries * count].reshape(heads, queries, count)[:, :, :keys]


def _diagonal_sums(tile: jax.Array) -> jax.Array:
    """Sums along the diagonals of [H, q, k], [H, q + k - 1]: the transpose of `_toeplitz`."""
    heads, queries, keys = tile.shape
    vectors = jax.ShapeDtypeStruct((heads, queries + keys - 1), tile.dtype)
    sums: jax.Array = jax.linear_transpose(partial(_toeplitz, queries=queries, keys=keys), vectors)(tile)[0]
    return sums


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """Plain attention with all T x T scores in float32; the twin that fast forms are held to.

    Args:
        q: [B, T, H, h]; k, v: [B, S, K, h] with H a multiple of K; same dtype.

    Returns:
        [B, T, H, h] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, length, k.shape[2], groups, dim)
    products = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = mask.biased(mask.capped(mask.scaled(products, dim)), 0, 0, length)
    dense = mask.dense(0, length, 0, k.shape[1])
    if dense is not None:
        scores = jnp.where(dense[:, :, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if dense is not None and mask.key_segment_ids is not None:
        weights = jnp.where(dense[:, :, None], weights, jnp.zeros((), v.dtype))  # a query may see no key at all
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, dim).astype(q.dtype)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """Attention over blocks of queries, each with the keys it can reach; arguments as `reference_attention`.

    The gradient is its own, as in FlashAttention (arXiv:2205.14135): only the output and the log-normalisers are kept,
    weights are formed again (docs/kernels.md, "XLA's form in blocks").
    """
    arrays = {name: getattr(mask, name) for name in ("segment_ids", "key_segment_ids", "prefix")}
    single = mask.replace(**dict.fromkeys(arrays), bias=None)  # type: ignore[attr-defined]
    return _blockwise(q, k, v, arrays, mask.bias, single)


def _blocks(length: int, kv_length: int, mask: MaskSpec) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block."""
    window, forward = mask.window, mask.causal and mask.prefix is None
    size = max(QUERY_BLOCK, math.ceil(length / MAX_BLOCKS))
    return [
        (
            slice(start, min(start + size, length)),
            slice(
                0 if window is None else max(0, start - window + 1),
                min(start + size, length) if forward else kv_length,
            ),
        )
        for start in range(0, length, size)
    ]


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, h] -> [B, K, G, T, h]: queries beside the kv head that serves them."""
    batch, length, heads, dim = q.shape
    return q.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    """The inverse of `_grouped`."""
    batch, kv_heads, groups, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, mask: MaskSpec, rows: slice, cols: slice) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a block, masked, [B, K, G, rows, cols] float32; and the derivative of the soft cap there, if any."""
    products = _einsum("bkgqd,bksd->bkgqs", q[:, :, :, rows], k[:, :, cols])
    scores = mask.capped(mask.scaled(products, q.shape[-1]))
    slope = None if mask.soft_cap is None else 1.0 - jnp.square(scores / mask.soft_cap)
    scores = mask.biased(scores, rows.start, cols.start, q.shape[3])
    dense = mask.dense(rows.start, rows.stop, cols.start, cols.stop)
    # A query that may see no key at all has weights of 0, where others have one key at least, themselves.
    hidden = NEGATIVE if mask.key_segment_ids is None else -jnp.inf
    return scores if dense is None else jnp.where(dense[:, :, None], scores, hidden), slope


def _seen(x: jax.Array, mask: MaskSpec, rows: slice, cols: slice) -> jax.Array:
    """x [B, K, S, h] of a block's keys; 0 where none of its queries may look: a weight of 0 times NaN is NaN.

    A NaN that some queries of a block see still reaches all of them: telling those apart would take a second product.
    """
    keys, seen = x[:, :, cols], None
    if mask.prefix is not None:
        dense = mask.dense(rows.start, rows.stop, cols.start, cols.stop)
        seen = None if dense is None else dense[:, 0]
    elif mask.segment_ids is not None:  # keys out of a causal block's reach are not among `cols`
        seen = mask.same_segment(np.s_[:, rows, None], np.s_[:, None, cols])
    return keys if seen is None else jnp.where(seen.any(axis=1)[:, None, :, None], keys, jnp.zeros((), x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, arrays: dict[str, Any], bias: jax.Array | None, single: MaskSpec
) -> jax.Array:
    """`xla_attention`; `single` is the mask without its arrays, which is static, `arrays` those without a gradient."""
    return _blockwise_fwd(q, k, v, arrays, bias, single)[0]


def _blockwise_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, arrays: dict[str, Any], bias: jax.Array | None, single: MaskSpec
) -> tuple[jax.Array, Any]:
    mask = single.replace(**arrays, bias=bias)  # type: ignore[attr-defined]
    q_heads, k_heads, v_heads = _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    outputs, normalisers = [], []
    for rows, cols in _blocks(q.shape[1], k.shape[1], mask):
        scores, _ = _scores(q_heads, k_heads, mask, rows, cols)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        if mask.key_segment_ids is not None:
            largest = jnp.maximum(largest, NEGATIVE)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if mask.key_segment_ids is not None:
            total = jnp.where(total == 0, 1.0, total)
        outputs.append(_einsum("bkgqs,bksd->bkgqd", weights.astype(v.dtype), _seen(v_heads, mask, rows, cols)) / total)
        normalisers.append(largest + jnp.log(total))
    # Named for remat policies, which do not see into a function with a gradient of its own.
    out = checkpoint_name(_ungrouped(jnp.concatenate(outputs, axis=3)).astype(q.dtype), "attention_out")
    lse = checkpoint_name(jnp.concatenate(normalisers, axis=3), "attention_out")
    return out, (q, k, v, arrays, bias, out, lse)


def _blockwise_bwd(single: MaskSpec, residuals: Any, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, arrays, bias, out, lse = residuals
    mask = single.replace(**arrays, bias=bias)  # type: ignore[attr-defined]
    kv_heads, dtype = k.shape[2], q.dtype
    q_heads, k_heads, v_heads = _grouped(q, kv_heads), k.swapaxes(1, 2), v.swapaxes(1, 2)
    grad_heads = _grouped(grad.astype(dtype), kv_heads)
    # Row sums of weight * its gradient, from the output instead of the weights.
    delta = _grouped(jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True), kv_heads)
    grad_q = []
    # With h before the keys: behind them, a CPU would have the weights transposed, and jump from row to row of them.
    grad_k, grad_v = (jnp.zeros(x.mT.shape, jnp.float32) for x in (k_heads, v_heads))
    grad_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    for rows, cols in _blocks(q.shape[1], k.shape[1], mask):
        scores, slope = _scores(q_heads, k_heads, mask, rows, cols)
        weights = jnp.exp(scores - lse[:, :, :, rows])
        grad_rows = grad_heads[:, :, :, rows]
        grad_weights = _einsum("bkgqd,bksd->bkgqs", grad_rows, _seen(v_heads, mask, rows, cols))
        grad_scores = weights * (grad_weights - delta[:, :, :, rows])
        if grad_bias is not None:
            tile = grad_scores.sum(axis=0).reshape(q.shape[2], *grad_scores.shape[3:])
            near = _distances(rows.start, rows.stop, cols.start, cols.stop, q.shape[1])
            grad_bias = grad_bias.at[:, near].add(_diagonal_sums(tile))
        grad_scores = mask.scaled(grad_scores, q.shape[-1])
        grad_scores = grad_scores if slope is None else grad_scores * slope
        grad_scores, weights = grad_scores.astype(dtype), weights.astype(dtype)
        grad_q.append(_einsum("bkgqs,bksd->bkgqd", grad_scores, _seen(k_heads, mask, rows, cols)))
        grad_k = grad_k.at[..., cols].add(_einsum("bkgqd,bkgqs->bkds", q_heads[:, :, :, rows], grad_scores))
        grad_v = grad_v.at[..., cols].add(_einsum("bkgqd,bkgqs->bkds", grad_rows, weights))
    return (
        _ungrouped(jnp.concatenate(grad_q, axis=3)).astype(q.dtype),
        grad_k.transpose(0, 3, 1, 2).astype(k.dtype),
        grad_v.transpose(0, 3, 1, 2).astype(v.dtype),
        dict.fromkeys(arrays),
        None if bias is None or grad_bias is None else grad_bias.astype(bias.dtype),
    )


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`."""
    window = None if mask.window is None else (mask.window - 1, 0)
    # Segments reach cuDNN only as a dense mask: right, but it computes every tile.
    dense = (
        None if mask.segment_ids is None else mask.replace(window=None).dense(0, q.shape[1], 0, k.shape[1])  # type: ignore[attr-defined]
    )
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=dense,
        scale=mask.scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    if dense is None or mask.key_segment_ids is None:
        return out
    return jnp.where(dense[:, 0].any(axis=-1)[..., None, None], out, jnp.zeros((), out.dtype))


def pallas_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: MaskSpec,
    backend: Device = "tpu",
    block_q: int | None = None,
    block_k: int | None = None,
) -> jax.Array:
    """The Pallas kernel for a kind of device (`kernels.flash_attention`); rows and heads stay where the mesh has them.

    Padding (segment 0) sees nothing and its output is 0, unlike in the plain form.
    """
    rows = heads = None
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = nn.logical_to_mesh_axes(("batch", "attention_heads"))
        rows, heads = (None, None) if spec is None else spec
        names = () if rows is None else (rows,) if isinstance(rows, str) else rows
        if q.shape[0] % math.prod(mesh.shape[name] for name in names):
            rows = None  # parameters are initialised with a single row
    return flash_attention(
        q,
        k,
        v,
        mask.segment_ids,
        kv_segment_ids=mask.key_segment_ids,
        causal=mask.causal,
        window=mask.window,
        soft_cap=mask.soft_cap,
        scale=mask.scale,
        slopes=jnp.asarray(alibi_slopes(q.shape[2])) if mask.alibi else None,
        block_q=block_q,
        block_k=block_k,
        rows_axes=rows,
        heads_axes=heads,
        backend=backend,
    )[0]


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference_attention,
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "pallas_tpu": pallas_attention,
    "pallas_gpu": partial(pallas_attention, backend="gpu"),
}
# These name what a remat policy may keep themselves.
_NAME_THEIR_OUTPUT = ("xla", "pallas_tpu", "pallas_gpu")


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, backend: str | AttentionBackend) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
        q: [B, T, H, h]; k, v: [B, S, K, h]; S is T unless the mask says which keys of other rows are seen.
        mask: who sees whom, and the scores' scale, soft cap, ALiBi and relative bias.
        backend: a key of IMPLEMENTATIONS, or one with its blocks (see `kernels.backend`).

    Returns:
        [B, T, H, h].

    Raises:
        UserError: the backend does not compute such scores.
    """
    chosen = _serving(backend, mask)
    _check_shapes(q, k, mask)
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get(SEQUENCE, 1) > 1
    if split:
        q, k, v, mask = _whole_rows(
            q, k, v, mask, kv_head_copies(k.shape[2], mesh.shape[SEQUENCE] * mesh.shape[TENSOR])
        )
    blocks = {} if chosen.block_q is None else dict(block_q=chosen.block_q, block_k=chosen.block_k)
    out = IMPLEMENTATIONS[chosen.name](q, k, v, mask, **blocks)
    out = out if chosen.name in _NAME_THEIR_OUTPUT else checkpoint_name(out, "attention_out")
    return _to(_PARTS, _to(_WHOLE, out)) if split else out


def _serving(backend: str | AttentionBackend, mask: MaskSpec) -> AttentionBackend:
    """The backend, refused where it would compute other scores."""
    chosen = AttentionBackend(backend) if isinstance(backend, str) else backend
    lack = unserved_scores(chosen.name, mask.soft_cap, mask.alibi, mask.bias is not None, mask.prefix is not None)
    if lack is not None:
        raise UserError(f"attention: {chosen.name!r} cannot serve: {lack}; use 'auto' or 'xla'")
    return chosen


def _check_shapes(q: jax.Array, k: jax.Array, mask: MaskSpec) -> None:
    lengths = q.shape[1], k.shape[1]
    if mask.key_segment_ids is not None or lengths[0] != lengths[1]:
        assert not mask.causal and mask.window is None, "keys of other rows have no order with the queries"
        assert (mask.segment_ids is None) == (mask.key_segment_ids is None), (
            "queries and keys have segment ids, or none"
        )
    assert mask.bias is None or mask.bias.shape == (q.shape[2], sum(lengths) - 1), "bias is [H, T + S - 1]"
    assert mask.prefix is None or (mask.causal and mask.window is None), "a prefix is the exception of a causal mask"


def kv_head_copies(kv_heads: int, devices: int) -> int:
    """The number of copies of each kv head with which all devices have the same number of whole heads."""
    return devices // math.gcd(kv_heads, devices)


def kv_head_copies_here(kv_heads: int) -> int:
    """The same for the devices that heads are split over on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else kv_head_copies(kv_heads, mesh.shape.get(TENSOR, 1))


# Dims [B, T, H, h] outside of attention, and inside.
_PARTS = ("batch", "length", "heads", None)
_WHOLE = ("batch", "attention_length", "attention_heads", None)


def _to(axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, axes)


def _whole_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, copies: int
) -> tuple[jax.Array, jax.Array, jax.Array, MaskSpec]:
    """From a part of each row and all heads to whole rows and a part of the heads: an all-to-all (arXiv:2309.14509).

    Devices then do the same work, whatever the mask, and any implementation serves. K and V could stay where they are
    and go around in a ring instead; with causal masks the devices at the end of a row would do most of the work.

    Args:
        copies: number of copies of each kv head, where there are fewer heads than devices.
    """
    # Both sides of each move are named: XLA else moves what the tensor is made of (halves under RoPE), or gathers where
    # gradients come back.
    q, k, v = (_to(_PARTS, x) for x in (q, k, v))
    if copies > 1:  # gathered: more devices than one want each
        k, v = (jnp.repeat(_to(("batch", "attention_length", "kv_heads", None), x), copies, axis=2) for x in (k, v))
    q, k, v = (_to(_WHOLE, x) for x in (q, k, v))
    for name in ("segment_ids", "key_segment_ids", "prefix"):
        if getattr(mask, name) is not None:
            mask = mask.replace(**{name: _to(_WHOLE[:2], getattr(mask, name))})  # type: ignore[attr-defined]
    return q, k, v, mask


@flax.struct.dataclass
class KVCache:
    """Keys and values of one layer.

    Attributes:
        k, v: [B, K, S, h]; slot s of a row holds the token at place s of its text. Slots behind a row's last token hold
            anything: no query looks there before they are written.
        places: [B, T] int32, where the tokens of this step stand; None while a prompt is read.
    """

    k: jax.Array
    v: jax.Array
    places: jax.Array | None

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, backend: str | AttentionBackend
    ) -> tuple[jax.Array, KVCache]:
        """See `cached_attention`."""
        return cached_attention(q, k, v, self, mask, backend)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, mask: MaskSpec, backend: str | AttentionBackend
) -> tuple[jax.Array, KVCache]:
    """Attention of a few new tokens to a cache, into which their keys and values are written first.

    Args:
        q: [B, T, H, h]; k, v: [B, T, K, h], all at `cache.places`; a place beyond the last slot is not written.
        mask: causal and without segments. A query sees slots up to its own place, the last `window` of them. A relative
            bias is [H, S] here, for distances from -(S - 1) to 0. There is no prefix: a new token sees one that lies
            before it like any other, and one that it is part of is read by `attention`, as a whole.
        backend: 'pallas_tpu' reads only the slots that are seen, for up to MAX_TOKENS new tokens; all others, and more
            new tokens, compute with all slots.

    Returns:
        [B, T, H, h] in q's dtype (scores and softmax in float32), and the new cache.
    """
    assert cache.places is not None
    assert mask.causal and mask.segment_ids is None and mask.prefix is None
    assert mask.bias is None or mask.bias.shape == (q.shape[2], cache.k.shape[2]), "bias is [H, S]"
    name = _serving(backend, mask).name
    attend: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = partial(
        _cached_attention,
        mask=mask.replace(bias=None),  # type: ignore[attr-defined]
        kernel=name == "pallas_tpu" and q.shape[1] <= MAX_TOKENS,
    )
    slopes = jnp.asarray(alibi_slopes(q.shape[2])) if mask.alibi else None
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # Rows and heads become one dim in there, which a partitioner could split only by gathering the cache.
        spec = nn.logical_to_mesh_axes(("batch", "kv_heads", "length"))
        rows, heads, length = (None, None, None) if spec is None else spec
        token, slot = P(rows, length, heads, None), P(rows, heads, None, None)
        attend = jax.shard_map(
            attend,
            in_specs=(token, token, token, slot, slot, P(rows, length), P(heads), P(heads)),
            out_specs=(token, slot, slot),
            check_vma=False,  # a kernel's result does not say over which axes it varies
        )
    out, new_k, new_v = attend(q, k, v, cache.k, cache.v, cache.places, slopes, mask.bias)
    return out, KVCache(new_k, new_v, cache.places)


def _cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    places: jax.Array,
    slopes: jax.Array | None,
    bias: jax.Array | None,
    mask: MaskSpec,
    kernel: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, length, heads, _ = q.shape
    kv_heads, slots = cache_k.shape[1:3]
    groups = heads // kv_heads
    keys, values = with_written(cache_k, k, places), with_written(cache_v, v, places)
    if kernel:
        keys, values = keys.reshape(cache_k.shape), values.reshape(cache_v.shape)
        out = tpu_decode_attention(q, keys, values, places, mask.window, mask.scale, mask.soft_cap, slopes)
        return out, keys, values
    behind = places[:, None, None, :, None] - jnp.arange(slots)
    visible = behind >= 0 if mask.window is None else (behind >= 0) & (behind < mask.window)
    shifts: jax.Array | None = None
    if slopes is not None:
        shifts = -slopes.reshape(kv_heads, groups, 1, 1) * behind.astype(jnp.float32)
    if bias is not None:
        shifts = bias_of_slots(bias, places).reshape(batch, kv_heads, groups, length, slots)
    out = _over_slots(q, keys, values, visible, shifts, mask)
    return out, keys.reshape(cache_k.shape), values.reshape(cache_v.shape)


def with_written(cache: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
    """A cache [B, K, S, h] as [B K, S, h] with new keys or values [B, T, K, h] at places [B, T]."""
    batch, kv_heads, slots, dim = cache.shape
    length, pairs = places.shape[1], batch * kv_heads
    # Rows and heads as one dim: with B = 1, XLA's CPU backend otherwise lays the cache out anew at every step.
    index = jnp.broadcast_to(jnp.arange(pairs)[:, None], (pairs, length)), jnp.repeat(places, kv_heads, axis=0)
    new = new.swapaxes(1, 2).reshape(pairs, length, dim)
    return cache.reshape(pairs, slots, dim).at[index].set(new.astype(cache.dtype), mode="drop")


def bias_of_slots(bias: jax.Array, places: jax.Array) -> jax.Array:
    """[H, S] of distances up to 0 -> [B, H, T, S], of every slot for queries at these places [B, T].

    Slots behind the query get 0. Places beyond the last slot count as the last.
    """
    slots = bias.shape[1]
    ahead = jnp.pad(bias, ((0, 0), (0, slots - 1)))
    starts = jnp.maximum(slots - 1 - places, 0)
    read = jax.vmap(jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(ahead, start, slots, axis=1)))
    return read(starts).swapaxes(1, 2)


def _over_slots(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, shifts: jax.Array | None, mask: MaskSpec
) -> jax.Array:
    """Attention of q [B, T, H, h] to keys and values [B K, S, h].

    Args:
        visible: bool, broadcast to [B, K, G, T, S].
        shifts: what is added to the capped scores, broadcast likewise.
        mask: for scale and soft cap.
    """
    batch, length, heads, dim = q.shape
    pairs, slots, _ = keys.shape
    kv_heads = pairs // batch
    groups = heads // kv_heads
    # One small product for each row and kv head; queries of a group and of several places share its keys.
    grouped = q.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    products = _einsum("nqd,nsd->nqs", grouped.reshape(pairs, groups * length, dim), keys)
    scores = mask.capped(mask.scaled(products, dim)).reshape(batch, kv_heads, groups, length, slots)
    if shifts is not None:
        scores = scores + shifts
    scores = jnp.where(visible, scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = _einsum("nqs,nsd->nqd", weights.reshape(pairs, groups * length, slots), values)
    out = out.reshape(batch, kv_heads, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out.astype(q.dtype)


def cached_cross_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array | None, mask: MaskSpec
) -> jax.Array:
    """Attention of a few new tokens to keys and values of another row that were computed once.

    Every query sees all of its row's source, so that the tokens of several answers to one source (beams) can lie side
    by side as T queries of one row, and share its keys and values.

    Args:
        q: [B, T, H, h].
        k, v: [B, K, S, h], as `KVCache` has them.
        source: [B, S] bool, which of them are tokens and not padding; None: all.
        mask: for scale and soft cap.

    Returns:
        [B, T, H, h] in q's dtype (scores and softmax in float32); 0 where a row has no source.
    """
    assert not mask.causal and mask.window is None and not mask.alibi
    assert mask.segment_ids is None and mask.key_segment_ids is None and mask.bias is None
    attend: Callable[..., jax.Array] = partial(_cached_cross_attention, mask=mask)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = nn.logical_to_mesh_axes(("batch", "kv_heads", "length"))
        rows, heads, length = (None, None, None) if spec is None else spec
        token, slot = P(rows, length, heads, None), P(rows, heads, None, None)
        attend = jax.shard_map(attend, in_specs=(token, slot, slot, P(rows)), out_specs=token, check_vma=False)
    return attend(q, k, v, source)


def _cached_cross_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array | None, mask: MaskSpec
) -> jax.Array:
    batch, kv_heads, slots, dim = k.shape
    visible = jnp.ones((batch, slots), bool) if source is None else source
    keys, values = (x.reshape(batch * kv_heads, slots, dim) for x in (k, v))
    out = _over_slots(q, keys, values, visible[:, None, None, None], None, mask)
    return out if source is None else jnp.where(source.any(axis=1)[:, None, None, None], out, jnp.zeros((), out.dtype))
