"""Attention of new tokens to keys and values in pages, and their writing into pages, on TPU in Pallas.

The plain twin is in `nn.paged_attention`. Here the pages of a row between the first and the last that a query of it can
see are fetched, several to a step; a page that a row does not have is not. Softmax is by steps, as in FlashAttention
(arXiv:2205.14135); the tile is that of `kernels.decode_attention`. JAX's `ragged_paged_attention` fetches a row from
its beginning whatever the window, knows no ALiBi, and has the kv heads of a slot side by side, for which the plain form
would pay (docs/kernels.md, "Attention over pages").

Shapes: B rows, T new tokens, N pages of a row, P pages in all, S slots of a page, H query and K kv heads of h, G = H/K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Slots of a step with one token, and with a chunk, whose scores [G T, slots] must find room on the chip.
STEP_SLOTS = 1024
CHUNK_SLOTS = 256
# Bytes of a step's keys, and of its values. Each is there twice, so that the next step's are fetched during this one.
STEP_BYTES = 2**20
# Rows of scores for each kv head, G T; a longer chunk is cut, and each part reads the keys that it sees.
QUERY_ROWS = 512
# Bytes of a step's scores in float32; their weights and masks are as large.
SCORE_BYTES = 2**21
# Slots that are written at once: what a memory's tile holds, of any dtype.
TILE = 16
NEGATIVE = -1e30


def unserved(page_size: int) -> str | None:
    """Why the kernel cannot serve pages of a size, in words; None if it can."""
    return None if page_size % TILE == 0 else f"takes pages of a multiple of {TILE} slots, not {page_size}"


def pages_per_step(page_size: int, num_pages: int, chunk: bool) -> int:
    """Pages that a step fetches."""
    return max(1, min(num_pages, (CHUNK_SLOTS if chunk else STEP_SLOTS) // page_size))


def heads_per_step(kv_heads: int, rows: int, slots: int, dim: int, itemsize: int) -> int:
    """The largest divisor of the number of kv heads whose keys and scores find room; at least 1.

    Args:
        rows: of scores for each kv head.
    """
    lanes = pl.cdiv(dim, 128) * 128  # what a head takes on the chip
    most = min(STEP_BYTES // (slots * lanes * itemsize), SCORE_BYTES // (4 * pl.cdiv(rows, 8) * 8 * slots))
    return max(count for count in range(1, kv_heads + 1) if kv_heads % count == 0 and count <= max(1, most))


def tpu_paged_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
        q: [B, T, H, h].
        keys, values: [P, K, S, h], those of the new tokens included; may hold anything where no query looks.
        tables: [B, N] int32, the pages of each row in their order; of those behind its last any number below P.
        starts: [B] int32, the place of each row's first new token.
        lengths: [B] int32, its number of new tokens, of T; what is given for the others is finite. 0: it has none.
        window: number of slots that a query sees, up to its own; None: all.
        scale: of scores; None: 1/sqrt(h).
        soft_cap: scaled scores become cap * tanh(score / cap); None: they stay.
        slopes: [H] float32, ALiBi's: capped scores sink by slope * (place - slot); None: they stay.

    Returns:
        [B, T, H, h] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    _, kv_heads, size, _ = keys.shape
    num_pages, groups = tables.shape[1], heads // kv_heads
    assert unserved(size) is None
    part = max(1, QUERY_ROWS // groups)
    if length > part:
        parts = pl.cdiv(length, part)
        cut = jnp.pad(q, ((0, 0), (0, parts * part - length), (0, 0), (0, 0))).reshape(-1, part, heads, dim)
        at = jnp.arange(parts) * part
        own = jnp.clip(lengths[:, None] - at, 0, part).reshape(-1)
        first = (starts[:, None] + at).reshape(-1)
        again = jnp.repeat(tables, parts, axis=0)
        out = tpu_paged_attention(cut, keys, values, again, first, own, window, scale, soft_cap, slopes)
        return out.reshape(batch, parts * part, heads, dim)[:, :length]
    rows, count = groups * length, pages_per_step(size, num_pages, length > 1)
    slots = count * size
    together = heads_per_step(kv_heads, rows, slots, dim, keys.dtype.itemsize)
    grouped = q.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, rows, dim).astype(keys.dtype)

    high = jnp.where(lengths > 0, jnp.minimum(starts + lengths, num_pages * size), 0) - 1
    high_page = jnp.maximum(high, 0) // size
    low_page = jnp.zeros_like(high) if window is None else jnp.clip((starts - window + 1) // size, 0, high_page)
    steps = jnp.max((high_page - low_page) // count) + 1

    def kernel(
        tables: Any,
        starts: Any,
        high: Any,
        low_page: Any,
        high_page: Any,
        q_ref: Any,
        *refs: Any,
    ) -> None:
        del tables
        k_refs, v_refs, (*slope_ref, out_ref, top, sum_, acc) = refs[:count], refs[count : 2 * count], refs[2 * count :]
        row, step = pl.program_id(0), pl.program_id(2)
        first_page = low_page[row] + step * count

        @pl.when(step == 0)
        def _() -> None:
            top[...] = jnp.full_like(top, NEGATIVE)
            sum_[...] = jnp.zeros_like(sum_)
            acc[...] = jnp.zeros_like(acc)

        @pl.when(first_page <= high_page[row])
        def _() -> None:
            products = [_batched_dot(q_ref[...], k_ref[...], 2) for k_ref in k_refs]
            scores = products[0] if count == 1 else jnp.concatenate(products, axis=2)
            scores = scores / math.sqrt(dim) if scale is None else scores * scale
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            slot = first_page * size + jax.lax.broadcasted_iota(jnp.int32, (1, rows, slots), 2)
            place = jnp.full((1, rows, slots), starts[row])
            if length > 1:
                token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (1, rows, slots), 1), jnp.int32(length))
                place = place + token
            if slopes is not None:
                scores = scores - slope_ref[0][...] * (place - slot).astype(jnp.float32)
            visible = (slot <= place) & (slot <= high[row])
            if window is not None:
                visible &= place - slot < window
            scores = jnp.where(visible, scores, NEGATIVE)
            largest = jnp.maximum(top[...], jnp.max(scores, axis=2, keepdims=True))
            # As in `kernels.decode_attention`: what a token sums up before the first step of which it sees a slot is
            # shrunk to 0 in that step.
            weights = jnp.exp(scores - largest)
            shrink = jnp.exp(top[...] - largest)
            top[...] = largest
            sum_[...] = shrink * sum_[...] + jnp.sum(weights, axis=2, keepdims=True)
            total = shrink * acc[...]
            for number, v_ref in enumerate(v_refs):
                # 0 * NaN is NaN: what nobody sees must be 0 itself.
                slot = (first_page + number) * size + jax.lax.broadcasted_iota(jnp.int32, v_ref.shape, 1)
                held = jnp.where(slot <= high[row], v_ref[...], jnp.zeros_like(v_ref))
                own = weights[:, :, number * size : (number + 1) * size].astype(held.dtype)
                total = total + _batched_dot(own, held, 1)
            acc[...] = total

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            out_ref[...] = (acc[...] / sum_[...]).astype(out_ref.dtype)

    def query(row: Any, head: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        return row, head, 0, 0

    def paged(
        number: int, row: Any, head: Any, step: Any, tables: Any, starts: Any, high: Any, low_page: Any, high_page: Any
    ) -> tuple[Any, ...]:
        # Behind the row's last page this names the same one as in the step before, which is not fetched again.
        behind = jnp.maximum(high_page[row] - low_page[row] - number, 0)
        last = jax.lax.div(behind, jnp.int32(count))
        page = low_page[row] + number + jnp.minimum(step, last) * count
        return tables[row * num_pages + jnp.minimum(page, high_page[row])], head, 0, 0

    spec = pl.BlockSpec((None, together, rows, dim), query)
    pages = [pl.BlockSpec((None, together, size, dim), partial(paged, number)) for number in range(count)]
    in_specs, arrays = [spec, *pages, *pages], [grouped, *[keys] * count, *[values] * count]
    if slopes is not None:  # one for each row of a tile
        in_specs.append(pl.BlockSpec((together, rows, 1), lambda row, head, step, *_: (head, 0, 0)))
        arrays.append(jnp.repeat(slopes.reshape(kv_heads, groups, 1), length, axis=1))
    itemsize = keys.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, kv_heads // together, steps),
            in_specs=in_specs,
            out_specs=spec,
            scratch_shapes=[
                pltpu.VMEM((together, rows, 1), jnp.float32),
                pltpu.VMEM((together, rows, 1), jnp.float32),
                pltpu.VMEM((together, rows, dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # of full rows
            flops=4 * batch * length * heads * dim * num_pages * size,
            bytes_accessed=2 * batch * kv_heads * num_pages * size * dim * itemsize + 2 * q.size * itemsize,
            transcendentals=batch * length * heads * num_pages * size,
        ),
        name="paged_attention",
    )(tables.reshape(-1), starts, high, low_page, high_page, *arrays)
    return out.reshape(batch, kv_heads, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def tpu_write_pages(
    keys: jax.Array, values: jax.Array, new_keys: jax.Array, new_values: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pages with one new token of each row written to them, in place.

    A scatter would do it token by token. Here the tiles that hold the slots are fetched together, each is given its
    row, and all are put back.

    Args:
        keys, values: [P, K, S, h]; given up to this function.
        new_keys, new_values: [B, K, h].
        slots: [B] int32, page * S + slot of each; at least P * S: nothing is written. No two rows write to one page.
    """
    num_pages, kv_heads, size, dim = keys.shape
    batch = len(slots)
    assert unserved(size) is None

    def kernel(slots: Any, k_new: Any, v_new: Any, k_in: Any, v_in: Any, k_out: Any, v_out: Any, *scratch: Any) -> None:
        k_tiles, v_tiles, came, gone = scratch
        parts = (k_new, k_tiles, k_in, k_out), (v_new, v_tiles, v_in, v_out)

        def each(act: Callable[..., None]) -> None:
            """Calls act(row, slot, place of the tile in the pages, number of the part, *part)."""

            def body(row: Any, carry: None) -> None:
                slot = slots[row]

                @pl.when(slot < num_pages * size)
                def _() -> None:
                    tile = jax.lax.div(jax.lax.rem(slot, jnp.int32(size)), jnp.int32(TILE)) * TILE
                    place = jax.lax.div(slot, jnp.int32(size)), slice(None), pl.ds(pl.multiple_of(tile, TILE), TILE)
                    for number, part in enumerate(parts):
                        act(row, slot, place, number, *part)

            jax.lax.fori_loop(0, batch, body, None)

        def fetch(row: Any, slot: Any, place: Any, number: int, new: Any, tiles: Any, source: Any, target: Any) -> Any:
            return pltpu.make_async_copy(source.at[place], tiles.at[row], came.at[number])

        def store(row: Any, slot: Any, place: Any, number: int, new: Any, tiles: Any, source: Any, target: Any) -> Any:
            return pltpu.make_async_copy(tiles.at[row], target.at[place], gone.at[number])

        def merge(row: Any, slot: Any, place: Any, number: int, new: Any, tiles: Any, source: Any, target: Any) -> None:
            line = jax.lax.broadcasted_iota(jnp.int32, (kv_heads, TILE, dim), 1)
            tiles[row] = jnp.where(line == jax.lax.rem(slot, jnp.int32(TILE)), new[row], tiles[row])

        each(lambda *tile: fetch(*tile).start())
        # All have come before the first is changed: a semaphore counts bytes, not which copy brought them.
        each(lambda *tile: fetch(*tile).wait())
        each(merge)
        each(lambda *tile: store(*tile).start())
        each(lambda *tile: store(*tile).wait())

    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(1,),
                in_specs=[whole, whole, any_spec, any_spec],
                out_specs=[any_spec, any_spec],
                scratch_shapes=[
                    *[pltpu.VMEM((batch, kv_heads, TILE, dim), keys.dtype)] * 2,
                    *[pltpu.SemaphoreType.DMA((2,))] * 2,
                ],
            ),
            input_output_aliases={3: 0, 4: 1},
            name="write_pages",
        )(slots, *(x[:, :, None].astype(keys.dtype) for x in (new_keys, new_values)), keys, values)
    )


def _batched_dot(a: jax.Array, b: jax.Array, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((2,), (b_dim,)), ((0,), (0,))), preferred_element_type=jnp.float32)
