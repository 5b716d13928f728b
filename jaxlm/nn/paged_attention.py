"""Attention of the serving engine: tokens of many texts side by side, keys and values in pages.

A text's keys and values lie in pages of a few slots each, which a table lists in the order of the text; texts that
begin alike share pages. A step's tokens are flat: one new token for each of R texts, then Q chunks of C tokens of
prompts. All of a layer but its attention sees N = R + Q C tokens.

What a token is given does not depend on its neighbours, on how a prompt was cut into chunks, or on the number of pages:
the plain form walks over blocks of slots whose places are those in the text, adds them up in that order, and a block
that a query does not see changes nothing, to the last bit.

Shapes: N tokens of a step, R texts, P pages of a text, M pages in all, page slots of a page, H query and K kv heads of
h, G = H / K.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.backend import AttentionBackend
from jaxlm.kernels.paged_attention import tpu_paged_attention, tpu_write_pages, unserved
from jaxlm.nn.attention import NEGATIVE, MaskSpec
from jaxlm.nn.positions import alibi_slopes

# Slots that are multiplied at once; the order of sums follows from it.
BLOCK = 128
# Queries of a kv head that are multiplied at once, at least: XLA's CPU backend sums a single row's product in another
# order than that of two rows or more.
LEAST_QUERIES = 2
# It also sums rows of an array that has fewer numbers than this in an order of its own.
LEAST_SUMMED = 4096
# Bytes of keys that a CPU collects at once: they, and as many of values, are multiplied while its caches hold them.
COLLECTED = 2**20


def least_tokens(width: int) -> int:
    """The number of tokens whose rows of `width` numbers are summed like those of any larger number of tokens."""
    return max(2, -(-LEAST_SUMMED // width))


@flax.struct.dataclass
class PagedCache:
    """Keys and values of one layer, and where the tokens of a step stand.

    Attributes:
        k, v: [M, K, page, h]; slots that hold no token yet hold anything finite.
        tables: [R, P] int32, the pages of each text.
        chunk_rows: [Q] int32, the text of each chunk.
        places: [N] int32, the place of each token in its text; -1: it is padding, is not written and sees nothing.
        length: C; tokens behind those of the chunks are padding too.
        shared: several of the R tokens may be written to one page, so they are not written by the kernel, which puts
            back what it fetched before.
    """

    k: jax.Array
    v: jax.Array
    tables: jax.Array
    chunk_rows: jax.Array
    places: jax.Array
    length: int = flax.struct.field(pytree_node=False)
    shared: bool = flax.struct.field(pytree_node=False, default=False)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, backend: str | AttentionBackend
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of a step's tokens to their own texts, into whose pages their keys and values are written first.

        Args:
            q: [1, N, H, h]; k, v: [1, N, K, h].
            mask: causal, without segments, relative bias or prefix.
            backend: 'pallas_tpu' has kernels for pages that it can serve (see `why_plain`); all others, and other
                pages, are read by the plain form.

        Returns:
            [1, N, H, h] in q's dtype (scores and softmax in float32), and the cache with the new keys and values.
        """
        assert mask.causal and mask.segment_ids is None and mask.prefix is None and mask.bias is None
        slopes = jnp.asarray(alibi_slopes(q.shape[2])) if mask.alibi else None
        name = backend if isinstance(backend, str) else backend.name
        kernel = why_plain(name, self.k.shape[2]) is None
        attend = partial(_attend, mask=mask, length=self.length, kernel=kernel, shared=self.shared)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            spec = nn.logical_to_mesh_axes(("kv_heads",))
            heads = None if spec is None else spec[0]
            token, page = P(None, heads, None), P(None, heads, None, None)
            attend = jax.shard_map(
                attend,
                in_specs=(token, token, token, page, page, P(), P(), P(), P(heads)),
                out_specs=(token, page, page),
                check_vma=False,
            )
        where = self.tables, self.chunk_rows, self.places
        out, new_k, new_v = attend(q[0], k[0], v[0], self.k, self.v, *where, slopes)
        return out[None], self.replace(k=new_k, v=new_v)  # type: ignore[attr-defined]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    chunk_rows: jax.Array,
    places: jax.Array,
    slopes: jax.Array | None,
    mask: MaskSpec,
    length: int,
    kernel: bool,
    shared: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, chunks = tables.shape[0], chunk_rows.shape[0]
    used, padding = rows + chunks * length, q.shape[0] - rows - chunks * length
    q, k, v, places = (x[:used] for x in (q, k, v, places))
    read = partial(_kernel_attention if kernel else plain_attention, mask=mask, slopes=slopes)
    if kernel and not shared:
        k_pages, v_pages = tpu_write_pages(k_pages, v_pages, k[:rows], v[:rows], _slots(k_pages, tables, places[:rows]))
        first, row = rows, jnp.repeat(chunk_rows, length, total_repeat_length=chunks * length)
    else:
        first, row = (
            0,
            jnp.concatenate([jnp.arange(rows), jnp.repeat(chunk_rows, length, total_repeat_length=chunks * length)]),
        )
    if len(row):
        k_pages, v_pages = (
            written(pages, new[first:], tables[row], places[first:]) for pages, new in ((k_pages, k), (v_pages, v))
        )
    out = [read(q[:rows, None], k_pages, v_pages, tables, places[:rows, None])[:, 0]]
    if chunks:
        parts = (x[rows:].reshape(chunks, length, *x.shape[1:]) for x in (q, places))
        queries, at = parts
        out.append(read(queries, k_pages, v_pages, tables[chunk_rows], at).reshape(chunks * length, *q.shape[1:]))
    return jnp.pad(jnp.concatenate(out), ((0, padding), (0, 0), (0, 0))), k_pages, v_pages


def why_plain(backend: str, page: int) -> str | None:
    """Why pages of this many slots are read by the plain form, in words; None: a kernel reads them."""
    return "only TPUs have a kernel for pages" if backend != "pallas_tpu" else unserved(page)


def _kernel_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    places: jax.Array,
    mask: MaskSpec,
    slopes: jax.Array | None,
) -> jax.Array:
    """`paged_attention` of tokens that stand one after the other, padding behind them."""
    lengths = jnp.sum(places >= 0, axis=1).astype(jnp.int32)
    scores = mask.window, mask.scale, mask.soft_cap, slopes
    return tpu_paged_attention(q, k_pages, v_pages, tables, jnp.maximum(places[:, 0], 0), lengths, *scores)


def plain_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    places: jax.Array,
    mask: MaskSpec,
    slopes: jax.Array | None,
) -> jax.Array:
    """`paged_attention`; on a CPU of a few texts at a time, so that short ones are not read as far as long ones."""
    texts, (_, kv_heads, slots, dim) = q.shape[0], k_pages.shape
    few = max(1, COLLECTED // (kv_heads * max(BLOCK, slots) * dim * k_pages.dtype.itemsize))
    whole = partial(paged_attention, mask=mask, slopes=slopes)
    if texts <= few:
        return whole(q, k_pages, v_pages, tables, places)

    def by_parts(
        q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, tables: jax.Array, places: jax.Array
    ) -> jax.Array:
        def parts(x: jax.Array, fill: int = 0) -> jax.Array:
            x = jnp.pad(x, ((0, -texts % few), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)
            return x.reshape(-1, few, *x.shape[1:])

        out = jax.lax.map(
            lambda part: whole(part[0], k_pages, v_pages, *part[1:]), (parts(q), parts(tables), parts(places, -1))
        )
        return out.reshape(-1, *q.shape[1:])[:texts]

    return cast(jax.Array, jax.lax.platform_dependent(q, k_pages, v_pages, tables, places, cpu=by_parts, default=whole))


def _slots(pages: jax.Array, tables: jax.Array, places: jax.Array) -> jax.Array:
    """Page * slots of a page + slot of new tokens; behind the last page for padding."""
    count, size = pages.shape[0], pages.shape[2]
    page = jnp.take_along_axis(tables, jnp.maximum(places, 0)[:, None] // size, axis=1)[:, 0]
    return jnp.where(places < 0, count, page) * size + jnp.maximum(places, 0) % size


def written(pages: jax.Array, new: jax.Array, tables: jax.Array, places: jax.Array) -> jax.Array:
    """Pages [M, K, page, h] with new keys or values [N, K, h] at their places [N] of texts with tables [N, P]."""
    count, slots = pages.shape[0], pages.shape[2]
    page = jnp.take_along_axis(tables, jnp.maximum(places, 0)[:, None] // slots, axis=1)[:, 0]
    page = jnp.where(places < 0, count, page)  # out of bounds: dropped
    return pages.at[page, :, places % slots].set(new.astype(pages.dtype), mode="drop")


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    places: jax.Array,
    mask: MaskSpec,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of tokens to texts whose keys and values lie in pages.

    Args:
        q: [n, T, H, h], T tokens of each of n texts.
        k_pages, v_pages: [M, K, page, h], those of the new tokens included.
        tables: [n, P] int32.
        places: [n, T] int32: a token sees the slots of its text up to its own, the last `window` of them; -1: none.
        mask: for window, scale and soft cap.
        slopes: [H] float32, ALiBi's.

    Returns:
        [n, T, H, h] in q's dtype; anything finite for tokens that see nothing.
    """
    texts, length, heads, dim = q.shape
    kv_heads, slots = k_pages.shape[1:3]
    groups, together = heads // kv_heads, max(1, BLOCK // slots)
    block = together * slots
    least = max(LEAST_QUERIES, -(-LEAST_SUMMED // (texts * kv_heads * block)), groups * length)
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % together)))
    fill = least - groups * length
    grouped = q.reshape(texts, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    grouped = jnp.pad(grouped.reshape(texts, kv_heads, groups * length, dim), ((0, 0), (0, 0), (0, fill), (0, 0)))
    place = jnp.pad(jnp.tile(places, (1, groups)), ((0, 0), (0, fill)), constant_values=-1)[:, None, :, None]
    last = places.max(axis=1)
    first = jnp.int32(0)
    if mask.window is not None:
        first = jnp.min(jnp.where(places < 0, last.max(), places)) - mask.window + 1
    shift: jax.Array | None = None
    if slopes is not None:
        shift = jnp.repeat(slopes.reshape(kv_heads, groups), length, axis=1)
        shift = jnp.pad(shift, ((0, 0), (0, fill)))[None, :, :, None]

    def of_block(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, number * together, together, axis=1)
        slot = number * block + jnp.arange(block)
        keys = k_pages[ids].swapaxes(1, 2).reshape(texts, kv_heads, block, dim)
        values = v_pages[ids].swapaxes(1, 2).reshape(texts, kv_heads, block, dim)
        # 0 * NaN is NaN: what no token of the text sees must be 0 itself.
        is_seen = (slot <= last[:, None])[:, None, :, None]
        values = jnp.where(is_seen, values, jnp.zeros((), values.dtype))
        products = jnp.einsum("nkmd,nksd->nkms", grouped, keys, preferred_element_type=jnp.float32)
        scores = mask.capped(mask.scaled(products, dim))
        behind = place - slot
        if shift is not None:
            scores = scores - shift * behind.astype(jnp.float32)
        visible = behind >= 0 if mask.window is None else (behind >= 0) & (behind < mask.window)
        scores = jnp.where(visible, scores, NEGATIVE)
        largest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        # Before the first block that a query sees, every score is the largest and every weight 1: what comes of that is
        # shrunk to 0 there. Behind the last one, nothing shrinks and every weight is 0.
        weights, shrink = jnp.exp(scores - largest), jnp.exp(top - largest)
        seen = jnp.einsum("nkms,nksd->nkmd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        # By itself: in one loop with the sum, the product that follows is rounded with some shapes and not with others.
        added = jax.lax.optimization_barrier(jnp.sum(weights, axis=-1, keepdims=True))
        return largest, shrink * total + added, shrink * acc + seen

    shape = texts, kv_heads, least
    start = jnp.full((*shape, 1), NEGATIVE, jnp.float32), jnp.zeros((*shape, 1)), jnp.zeros((*shape, dim))
    bounds = jnp.maximum(first, 0) // block, last.max() // block + 1
    _, total, acc = jax.lax.fori_loop(*bounds, of_block, start)
    out = (acc / jnp.maximum(total, 1.0))[:, :, : groups * length]
    out = out.reshape(texts, kv_heads, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out.astype(q.dtype)
