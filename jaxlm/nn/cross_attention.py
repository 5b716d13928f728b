"""Attention of a decoder's layer to the states that an encoder gave."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.kernels.backend import AttentionBackend
from jaxlm.nn.attention import MaskSpec, attention, cached_cross_attention
from jaxlm.nn.linear import WithLinears
from jaxlm.spec import AttentionSpec


@flax.struct.dataclass
class Source:
    """What a decoder's layers see of the source.

    Attributes:
        segment_ids: [P, S] int32, 0 for padding: a token of the decoder sees those of its own number.
        states: [P, S, D], what the encoder gave; None where the keys and values are there.
        k, v: [P, K, S, h], this layer's keys and values of the states, computed once for all answers to the source;
            None where they are not there yet.
    """

    segment_ids: jax.Array
    states: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None


class CrossAttention(WithLinears):
    """Grouped-query attention to a source.

    Attributes:
        spec: heads, biases and scale.
        backend: see `SelfAttention.backend`.
    """

    spec: AttentionSpec
    backend: str | AttentionBackend

    def setup(self) -> None:
        s, d = self.spec, {"embed": self.hidden_size}
        queries, keys = (
            {"heads": s.num_heads, "head_dim": s.head_dim},
            {"kv_heads": s.num_kv_heads, "head_dim": s.head_dim},
        )
        self.q_proj = self._linear("q_proj", d, queries, s.qkv_bias)
        self.k_proj = self._linear("k_proj", d, keys, s.qkv_bias)
        self.v_proj = self._linear("v_proj", d, keys, s.qkv_bias)
        self.o_proj = self._linear("o_proj", queries, d, s.o_bias)

    def keys(self, states: jax.Array, layer: jax.Array, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, S, K, h] of states [P, S, D]."""
        axes = ("batch", "length", "kv_heads", None)
        k, v = (project(states, layer, deterministic) for project in (self.k_proj, self.v_proj))
        return nn.with_logical_constraint(k, axes), nn.with_logical_constraint(v, axes)

    def __call__(
        self, x: jax.Array, layer: jax.Array, source: Source, segment_ids: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D].

        Args:
            source: of P rows. With its keys, B / P rows of x, side by side, see each: several beams, for instance.
            segment_ids: [B, T] int32, which of the source each token sees; None: what has the number 1.
        """
        q = self.q_proj(x, layer, deterministic)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", None))
        mask = MaskSpec(causal=False, scale=self.spec.scale, soft_cap=self.spec.soft_cap)
        if source.k is not None and source.v is not None:
            # No query's weights depend on another query: rows that see one source are one row of more queries.
            queries = q.reshape(source.k.shape[0], -1, *q.shape[2:])
            out = cached_cross_attention(queries, source.k, source.v, source.segment_ids != 0, mask).reshape(q.shape)
        else:
            assert source.states is not None
            k, v = self.keys(source.states, layer, deterministic)
            segment_ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
            mask = mask.replace(  # type: ignore[attr-defined]
                segment_ids=segment_ids, key_segment_ids=source.segment_ids
            )
            out = attention(q, k, v, mask, self.backend)
        projected: jax.Array = self.o_proj(out, layer, deterministic)
        return projected
