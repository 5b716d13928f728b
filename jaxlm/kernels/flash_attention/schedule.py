"""Which pairs of a block of queries and a block of keys a kernel visits, and in which order.

A pair that the mask empties is not in the list at all: it costs no product, no copy and no step of the grid. Lists lie
in scalar memory; without segments they are constants, with segments XLA computes them and their length from the ids.

Shapes: B rows, n_q and n_k blocks, S steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError

# Bits of a step's flags.
Q_FIRST, Q_LAST = 1, 2  # the first and the last pair of this block of queries
K_FIRST, K_LAST = 4, 8  # the same of this block of keys
COMPUTE = 16  # some query sees some key; other pairs are visited only so that their (zero) results are written
MASKED = 32  # not every query sees every key

# Bytes of scalar memory for the lists; there is 1 MiB.
SCALAR_BYTES = 512 * 1024


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about one call.

    Attributes:
        causal, window: as in `flash_attention`.
        soft_cap: scores become cap * tanh(score / cap); None: they stay.
        scale: of the scores.
        q_length, kv_length: true lengths; arrays may be longer.
        block_q, block_k: rows of a block.
        backend: 'tpu' or 'gpu'.
        interpret: run on a CPU, slowly.
    """

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    q_length: int
    kv_length: int
    block_q: int
    block_k: int
    backend: str = "tpu"
    interpret: Any = False

    @property
    def blocks(self) -> tuple[int, int]:
        """(n_q, n_k)"""
        return -(-self.q_length // self.block_q), -(-self.kv_length // self.block_k)

    def visible_pairs(self) -> int:
        """The number of (query, key) pairs of one row and head that causality and the window leave."""
        rows = np.arange(self.q_length)
        last = np.minimum(rows, self.kv_length - 1) if self.causal else np.full_like(rows, self.kv_length - 1)
        first = np.zeros_like(rows) if self.window is None else np.maximum(rows - self.window + 1, 0)
        return int(np.maximum(last - first + 1, 0).sum())


@flax.struct.dataclass
class Schedule:
    """The list of steps; each leaf [S] int32.

    Attributes:
        row, q, k: row of the batch, block of queries, block of keys.
        flags: bits, see above.
        done_row, done_q: the block of queries that is the next to see its last pair, at this step or later.
        steps: their number, an int or an int32 scalar; what lies behind in the lists is not visited.
    """

    row: Any
    q: Any
    k: Any
    flags: Any
    done_row: Any
    done_q: Any
    steps: Any


def _bounds(ids: jax.Array, blocks: int, size: int) -> tuple[jax.Array, ...]:
    """For each block [B, blocks]: its smallest and largest id but 0, and whether all its ids are equal and not 0."""
    largest, smallest = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    ids = jnp.pad(ids, ((0, 0), (0, max(0, blocks * size - ids.shape[1]))))[:, : blocks * size]
    ids = ids.reshape(ids.shape[0], blocks, size)
    low = jnp.min(jnp.where(ids == 0, largest, ids), axis=2)
    high = jnp.max(jnp.where(ids == 0, smallest, ids), axis=2)
    return low, high, (low == high) & jnp.all(ids != 0, axis=2)


def _static_masks(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """(possible, whole), each [n_q, n_k]: some pair, and every pair, is let through by all but the segments."""
    n_q, n_k = spec.blocks
    q_start, k_start = np.arange(n_q)[:, None] * spec.block_q, np.arange(n_k)[None] * spec.block_k
    q_end = np.minimum(q_start + spec.block_q, spec.q_length) - 1
    k_end = np.minimum(k_start + spec.block_k, spec.kv_length) - 1
    possible = np.ones((n_q, n_k), bool)
    whole = (q_start + spec.block_q <= spec.q_length) & (k_start + spec.block_k <= spec.kv_length)
    if spec.causal:
        possible &= k_start <= q_end
        whole &= k_end <= q_start
    if spec.window is not None:
        possible &= q_start - k_end < spec.window
        whole &= q_end - k_start < spec.window
    return possible, whole


def pair_masks(spec: Spec, batch: int, q_ids: jax.Array | None, kv_ids: jax.Array | None) -> tuple[Any, Any]:
    """For each pair of blocks, whether some query sees some key, and whether every query sees every key.

    Returns:
        Two bool arrays [B, n_q, n_k], NumPy's where there are no segments.
    """
    n_q, n_k = spec.blocks
    possible, whole = _static_masks(spec)
    live: Any = np.broadcast_to(possible, (batch, n_q, n_k))
    full: Any = np.broadcast_to(whole, live.shape)
    if q_ids is None:
        return live, full
    assert kv_ids is not None
    q_low, q_high, q_one = (a[:, :, None] for a in _bounds(q_ids, n_q, spec.block_q))
    k_low, k_high, k_one = (a[:, None] for a in _bounds(kv_ids, n_k, spec.block_k))
    return live & (q_low <= k_high) & (k_low <= q_high), full & q_one & k_one & (q_low == k_low)


def make_ranges(spec: Spec, batch: int, q_ids: jax.Array | None, kv_ids: jax.Array | None, by_keys: bool) -> jax.Array:
    """For kernels that walk over neighbouring blocks: where each block begins, and where it need not mask.

    Args:
        by_keys: of each block of keys, which blocks of queries; else of each block of queries, which blocks of keys.

    Returns:
        [B, n, 4] int32: the first block, the first of those that every pair of is visible, the first behind them, the
        first behind all. All four are 0 where nothing is visible. Segments in several pieces make for a range with
        blocks in it that need no visit; they are masked.
    """
    live, full = pair_masks(spec, batch, q_ids, kv_ids)
    xp: Any = np if q_ids is None else jnp
    if by_keys:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    full = full & live
    blocks = np.arange(live.shape[2])
    first = xp.argmax(live, axis=2)
    end = xp.where(live, blocks + 1, 0).max(axis=2)
    whole = xp.where(full.any(axis=2), xp.argmax(full, axis=2), first)
    broken = ~full & (blocks >= whole[..., None])
    behind = xp.where(broken.any(axis=2), xp.argmax(broken, axis=2), live.shape[2])
    return jnp.asarray(xp.stack([first, whole, xp.minimum(behind, end), end], axis=2), jnp.int32)


def make_schedule(spec: Spec, batch: int, q_ids: jax.Array | None, kv_ids: jax.Array | None, by_keys: bool) -> Schedule:
    """The steps of one kernel.

    Args:
        batch: B.
        q_ids, kv_ids: [B, T] and [B, S] int32 segment ids, 0 = padding; None: one segment.
        by_keys: blocks of keys outside, queries inside (the backward pass); else the other way round.

    Raises:
        UserError: when the lists would not fit in scalar memory.
    """
    n_q, n_k = spec.blocks
    possible, _ = _static_masks(spec)
    live, full = pair_masks(spec, batch, q_ids, kv_ids)
    xp: Any = np if q_ids is None else jnp
    # Each block is visited at least once, or its result would never be written.
    q_home = np.minimum(np.arange(n_q) * spec.block_q // spec.block_k, n_k - 1)
    k_home = np.minimum(np.arange(n_k) * spec.block_k // spec.block_q, n_q - 1)
    q_is_home = np.arange(n_k)[None] == q_home[:, None]
    k_is_home = np.arange(n_q)[:, None] == k_home[None]
    keep = live | (q_is_home & ~live.any(axis=2, keepdims=True)) | (k_is_home & ~live.any(axis=1, keepdims=True))
    q_first, q_last = _ends(keep, 2, n_k, xp)
    k_first, k_last = _ends(keep, 1, n_q, xp)
    flags = q_first * Q_FIRST + q_last * Q_LAST + k_first * K_FIRST + k_last * K_LAST
    flags = flags + live * COMPUTE + (live & ~full) * MASKED

    candidate_q, candidate_k = np.nonzero(possible | q_is_home | k_is_home)
    if by_keys:
        order = np.lexsort((candidate_q, candidate_k))
        candidate_q, candidate_k = candidate_q[order], candidate_k[order]
    count = len(candidate_q)
    if 6 * 4 * batch * count > SCALAR_BYTES:
        raise UserError(
            f"attention: {batch} rows of {spec.q_length} make {batch * count} pairs of blocks of {spec.block_q} and "
            f"{spec.block_k}, too many for a TPU's scalar memory; take fewer rows per device or larger blocks"
        )
    kept = keep[:, candidate_q, candidate_k].reshape(-1)
    order = xp.argsort(~kept, stable=True)
    row, pair = order // count, order % count
    q, k = xp.asarray(candidate_q)[pair], xp.asarray(candidate_k)[pair]
    flags = flags[row, q, k]
    done = ((flags & Q_LAST) != 0) & kept[order]
    at = xp.argsort(~done, stable=True)[xp.cumsum(done) - done]
    steps = int(kept.sum()) if xp is np else kept.sum(dtype=np.int32)
    row, q, k, flags, done_row, done_q = (a.astype(np.int32) for a in (row, q, k, flags, row[at], q[at]))
    return Schedule(row, q, k, flags, done_row, done_q, steps)


def _ends(keep: Any, axis: int, size: int, xp: Any) -> tuple[Any, Any]:
    """Which kept entries are the first and the last along an axis."""
    index = np.expand_dims(np.arange(size), [a for a in range(3) if a != axis])
    first = xp.argmax(keep, axis=axis, keepdims=True)
    last = size - 1 - xp.argmax(xp.flip(keep, axis=axis), axis=axis, keepdims=True)
    return keep & (index == first), keep & (index == last)
