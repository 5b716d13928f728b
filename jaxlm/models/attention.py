"""Attention behind one function: `attention(q, k, v, mask, implementation)`.

The mask is a spec (causal, window, segment ids), not an array: an implementation decides how
to honour it. Each fast one is tested against `reference`, values and gradients.
"""

from __future__ import annotations

import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.errors import UserError

Implementation = Literal["auto", "xla", "cudnn", "reference"]
# Query rows per block of the XLA form. Smaller ones skip more of the scores above the diagonal, but each is unrolled in
# the program: for the 110 M benchmark at T = 512 a train step compiles in 7.0 s with 128, 5.5 s with 256, 5.0 s with 512.
QUERY_BLOCK = 256
# Blocks are unrolled in the program; more of them cost compile time and save little.
MAX_BLOCKS = 16
NEGATIVE = -1e30  # finite: a row that is masked everywhere (padding) must not become NaN


@flax.struct.dataclass
class MaskSpec:
    """Which keys a query may see.

    A query sees a key when it is not later in the row (causal), fewer than `window` rows back,
    and of the same segment. Position in the row counts, not the position id.
    """

    segment_ids: jax.Array | None = None  # [B, T] int32, 0 = padding
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def dense(self, q_start: int, q_end: int, k_start: int, k_end: int) -> jax.Array | None:
        """The mask of one tile, [B or 1, 1, q, k] bool (True = may see); None if it hides nothing."""
        rows = jnp.arange(q_start, q_end)[:, None]
        cols = jnp.arange(k_start, k_end)[None, :]
        mask = None
        if self.causal and k_end - 1 > q_start:
            mask = cols <= rows
        if self.window is not None and q_end - 1 - k_start >= self.window:
            near = rows - cols < self.window
            mask = near if mask is None else mask & near
        mask = None if mask is None else mask[None, None]
        if self.segment_ids is not None:
            queries = self.segment_ids[:, None, q_start:q_end, None]
            same = queries == self.segment_ids[:, None, None, k_start:k_end]
            mask = same if mask is None else mask & same
        return mask


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """Plain attention with all T x T scores in float32; the twin that fast forms are held to.

    Args:
        q: [B, T, H, h]; k, v: [B, T, K, h] with H a multiple of K; same dtype.

    Returns:
        [B, T, H, h] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, length, k.shape[2], groups, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(dim)
    dense = mask.dense(0, length, 0, length)
    if dense is not None:
        scores = jnp.where(dense[:, :, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, dim).astype(q.dtype)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """`jax.nn.dot_product_attention` over blocks of queries, each with the keys it can reach."""
    length = q.shape[1]
    block = max(QUERY_BLOCK, math.ceil(length / MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        k_end = end if mask.causal else length
        k_start = 0 if mask.window is None else max(0, start - mask.window + 1)
        outputs.append(
            jax.nn.dot_product_attention(
                q[:, start:end],
                k[:, k_start:k_end],
                v[:, k_start:k_end],
                mask=mask.dense(start, end, k_start, k_end),
                implementation="xla",
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`."""
    window = None if mask.window is None else (mask.window - 1, 0)
    # Segments reach cuDNN only as a dense mask: right, but it computes every tile.
    dense = (
        None
        if mask.segment_ids is None
        else MaskSpec(mask.segment_ids, mask.causal).dense(0, q.shape[1], 0, q.shape[1])
    )
    return jax.nn.dot_product_attention(
        q, k, v, mask=dense, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )


IMPLEMENTATIONS = {"reference": reference_attention, "xla": xla_attention, "cudnn": cudnn_attention}


def choose_attention(requested: Implementation, platform: str, dtype: str, segments: bool) -> tuple[str, str]:
    """Which implementation runs on this platform, and why, for the start-up line.

    Args:
        requested: the config's `model.attention`.
        platform: 'cpu', 'gpu' or 'tpu'.
        dtype: compute dtype.
        segments: whether rows are packed.

    Raises:
        UserError: when the one asked for cannot serve.
    """
    if requested == "cudnn" and platform != "gpu":
        raise UserError(f"model.attention: 'cudnn' needs an NVIDIA GPU, this is {platform}; use 'auto' or 'xla'")
    if requested == "cudnn" and dtype != "bfloat16":
        raise UserError(f"model.attention: 'cudnn' computes in bfloat16, model.dtype is {dtype}; use 'auto' or 'xla'")
    if requested != "auto":
        return requested, "as configured"
    if platform == "gpu" and dtype == "bfloat16" and not segments:
        return "cudnn", "bfloat16 rows without segments on a GPU"
    if platform == "gpu":
        return "xla", "packed segments (cuDNN takes them only as a dense mask)" if segments else f"{dtype} on a GPU"
    return "xla", f"the only fused form for {platform}"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, implementation: str) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
        q: [B, T, H, h]; k, v: [B, T, K, h]; scaled by 1/sqrt(h).
        mask: who sees whom.
        implementation: a key of IMPLEMENTATIONS (see `choose_attention`).

    Returns:
        [B, T, H, h].
    """
    return IMPLEMENTATIONS[implementation](q, k, v, mask)
