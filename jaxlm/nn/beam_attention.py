"""Attention of beams, which continue one another's texts without taking over one another's keys and values.

The n rows of one search lie side by side. When a row goes on with another's text, only a list changes that says, for
each slot, which of the n rows holds it; each row writes its own new tokens. A query is multiplied with the keys of all
n rows and sees, of each slot, the one that its list names: n times the products, where reordering would read and write
all caches at every token.

Shapes: R rows of P searches, n = R / P beams, S slots, H query and K kv heads of h, G = H / K.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.backend import AttentionBackend
from jaxlm.nn.attention import NEGATIVE, MaskSpec, bias_of_slots, with_written
from jaxlm.nn.positions import alibi_slopes


@flax.struct.dataclass
class Lineage:
    """Which row holds each slot of a text.

    Attributes:
        holders: [R, S] int32, number of the row among those of its search, 0 to n - 1.
        beams: n.
    """

    holders: jax.Array
    beams: int = flax.struct.field(pytree_node=False)

    @classmethod
    def new(cls, rows: int, slots: int, beams: int) -> Lineage:
        """Each row holds all of its text."""
        return cls(jnp.broadcast_to(_own(rows, beams)[:, None], (rows, slots)), beams)

    def written(self, places: jax.Array) -> Lineage:
        """With each row's own slot at `places` [R]; beyond the last slot: nothing changes."""
        rows = len(self.holders)
        new = self.holders.at[jnp.arange(rows), places].set(_own(rows, self.beams), mode="drop")
        return Lineage(new, self.beams)

    def continued(self, origin: jax.Array) -> Lineage:
        """Each row as a continuation of the row `origin` [R], one of its search's."""
        return Lineage(self.holders[origin], self.beams)

    def gathered(self, cache: jax.Array) -> jax.Array:
        """A cache [R, K, S, h] in which each row holds all of its text."""
        rows, slots = self.holders.shape
        holder = self.holders + (jnp.arange(rows) // self.beams * self.beams)[:, None]
        return cache[holder[:, None], jnp.arange(cache.shape[1])[:, None], jnp.arange(slots)]


def _own(rows: int, beams: int) -> jax.Array:
    return jnp.arange(rows, dtype=jnp.int32) % beams


@flax.struct.dataclass
class BeamCache:
    """Keys and values of one layer.

    Attributes:
        k, v: [R, K, S, h]; slots that hold no token yet hold anything finite.
        places: [R, 1] int32, where each row's new token stands.
        lineage: with the new tokens' slots.
    """

    k: jax.Array
    v: jax.Array
    places: jax.Array
    lineage: Lineage

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, backend: str | AttentionBackend
    ) -> tuple[jax.Array, BeamCache]:
        """Attention of each row's new token to its text, with its key and value written first; arguments as those of
        `nn.attention.cached_attention`. There is no kernel for it.

        Returns:
            [R, 1, H, h] in q's dtype (scores and softmax in float32), and the new cache.
        """
        assert mask.causal and mask.segment_ids is None and mask.prefix is None and q.shape[1] == 1
        slopes = jnp.asarray(alibi_slopes(q.shape[2])) if mask.alibi else None
        attend = partial(_attend, beams=self.lineage.beams, mask=mask.replace(bias=None))  # type: ignore[attr-defined]
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            # The rows of a search are on one device.
            spec = nn.logical_to_mesh_axes(("batch", "kv_heads", "length"))
            rows, heads, length = (None, None, None) if spec is None else spec
            token, slot = P(rows, length, heads, None), P(rows, heads, None, None)
            attend = jax.shard_map(
                attend,
                in_specs=(token, token, token, slot, slot, P(rows, length), P(rows, None), P(heads), P(heads)),
                out_specs=(token, slot, slot),
                check_vma=False,
            )
        out, new_k, new_v = attend(q, k, v, self.k, self.v, self.places, self.lineage.holders, slopes, mask.bias)
        return out, self.replace(k=new_k, v=new_v)  # type: ignore[attr-defined]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    places: jax.Array,
    holders: jax.Array,
    slopes: jax.Array | None,
    bias: jax.Array | None,
    beams: int,
    mask: MaskSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, _, heads, dim = q.shape
    kv_heads, slots = cache_k.shape[1:3]
    searches, groups = rows // beams, heads // kv_heads
    keys, values = with_written(cache_k, k, places), with_written(cache_v, v, places)
    # Dims of scores: search, row that holds the slot, kv head, row that asks, head of the group, slot.
    asked = q.reshape(searches, 1, beams, kv_heads, groups, dim).swapaxes(2, 3)
    asked = jnp.broadcast_to(asked, (searches, beams, kv_heads, beams, groups, dim))
    shape = (*asked.shape[:-1], slots)
    products = jnp.einsum(
        "nqd,nsd->nqs", asked.reshape(rows * kv_heads, -1, dim), keys, preferred_element_type=jnp.float32
    )
    scores = mask.capped(mask.scaled(products, dim)).reshape(shape)
    behind = (places - jnp.arange(slots)).reshape(searches, 1, 1, beams, 1, slots)
    if slopes is not None:
        scores = scores - slopes.reshape(kv_heads, 1, groups, 1) * behind.astype(jnp.float32)
    if bias is not None:
        shifts = bias_of_slots(bias, places).reshape(searches, 1, beams, kv_heads, groups, slots)
        scores = scores + shifts.swapaxes(2, 3)
    is_held = holders.reshape(searches, 1, 1, beams, 1, slots) == jnp.arange(beams)[:, None, None, None, None]
    visible = is_held & (behind >= 0)
    if mask.window is not None:
        visible &= behind < mask.window
    weights: Any = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=(1, 5)).astype(values.dtype)
    seen = jnp.einsum("nqs,nsd->nqd", weights.reshape(*products.shape), values, preferred_element_type=jnp.float32)
    out = seen.reshape(*shape[:-1], dim).sum(axis=1).swapaxes(1, 2).reshape(q.shape)
    return out.astype(q.dtype), keys.reshape(cache_k.shape), values.reshape(cache_v.shape)
