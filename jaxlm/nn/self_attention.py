"""Grouped-query self-attention as a layer: projections, norms, positions, attention, and a cache of keys and values."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import UserError
from jaxlm.kernels.backend import AttentionBackend
from jaxlm.nn.attention import KVCache, MaskSpec, attention, kv_head_copies_here
from jaxlm.nn.beam_attention import BeamCache
from jaxlm.nn.linear import WithLinears
from jaxlm.nn.norms import Norm
from jaxlm.nn.paged_attention import PagedCache
from jaxlm.nn.positions import apply_partial_rope, apply_rope_by_halves
from jaxlm.spec import AttentionSpec

# Keys and values of a layer: a row for each text, rows that share them, or in pages.
Cache = KVCache | BeamCache | PagedCache


class SelfAttention(WithLinears):
    """Grouped-query self-attention.

    Attributes:
        spec: heads, biases, norms and window.
        backend: a key of `attention.IMPLEMENTATIONS`, or the backend that `kernels.backend.choose_attention` returned.
    """

    spec: AttentionSpec
    backend: str | AttentionBackend

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        cos: jax.Array | None,
        sin: jax.Array | None,
        segment_ids: jax.Array | None,
        deterministic: bool,
        cache: Cache | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, D] -> [B, T, D], and the keys and values: of these tokens, or `cache` with them written to it.

        Args:
            layer: index of this layer.
            cos, sin: [B, T, h/2] float32, or for fewer dims (see `rope_cos_sin`); None without rotary positions.
            segment_ids: [B, T] int32, 0 for padding; None: one segment. With a prefix, -n for its tokens in segment n
                (see `prefix_positions`).
            deterministic: whether nothing is dropped.
            bias: by distance, where the description has a relative bias (see `positions.relative_bias`); the vector of
                a cache where there is one.
        """
        s = self.spec
        if (bias is None) != (s.relative_bias is None):
            raise UserError("attention.relative_bias: this kind of model has no table of relative biases")
        entered = self._entered("qkv_proj", {"embed": self.hidden_size}, x, layer, deterministic)

        def project(name: str, num_heads: int, axis: str, split: str | None) -> jax.Array:
            outputs = {axis: num_heads, "head_dim": s.head_dim}
            linear = self._linear(name, {"embed": self.hidden_size}, outputs, s.qkv_bias)
            return nn.with_logical_constraint(
                linear(x, layer, deterministic, entered), ("batch", "length", split, None)
            )

        def normed(name: str, heads: jax.Array) -> jax.Array:
            if s.qk_norm is None:
                return heads
            norm = Norm(s.qk_norm, self.dtype, self.param_dtype, name=name)
            if s.qk_norm_over == "head":
                return norm(heads)
            return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)

        def turned(heads: jax.Array) -> jax.Array:
            if cos is None or sin is None:
                return heads
            if s.prefix is not None:
                return apply_rope_by_halves(heads, cos, sin)
            return apply_partial_rope(heads, cos, sin, s.rotary_interleaved)

        # Where kv heads cannot be split evenly, every device computes all of them, and has copies of those it needs.
        copies = kv_head_copies_here(s.num_kv_heads)
        kv_split = "kv_heads" if copies == 1 else None
        q = normed("q_norm", project("q_proj", s.num_heads, "heads", "heads"))
        q = checkpoint_name(turned(q), "q")
        k = normed("k_norm", project("k_proj", s.num_kv_heads, "kv_heads", kv_split))
        k = checkpoint_name(turned(k), "k")
        v = checkpoint_name(project("v_proj", s.num_kv_heads, "kv_heads", kv_split), "v")
        if copies > 1:
            axes = ("batch", "length", "kv_heads", None)
            k, v = (nn.with_logical_constraint(jnp.repeat(x, copies, axis=2), axes) for x in (k, v))
        mask = MaskSpec(causal=s.causal, window=s.window, scale=s.scale, soft_cap=s.soft_cap, alibi=s.alibi, bias=bias)
        if cache is None:
            if s.prefix is None or segment_ids is None:
                mask = mask.replace(segment_ids=segment_ids)  # type: ignore[attr-defined]
            else:
                mask = mask.replace(segment_ids=jnp.abs(segment_ids), prefix=segment_ids < 0)  # type: ignore[attr-defined]
            out = attention(q, k, v, mask, self.backend)
            cache = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2), None)
        else:
            out, cache = cache.attend(q, k, v, mask, self.backend)
        inputs = {"heads": s.num_heads, "head_dim": s.head_dim}
        projected = self._linear("o_proj", inputs, {"embed": self.hidden_size}, s.o_bias)(out, layer, deterministic)
        return projected, cache
