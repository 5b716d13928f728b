"""LLaMA and its relatives as pure functions of (params, lora, tokens).

Layers are stacked and scanned: every tensor below `layers` has the layer as its first dim.
Shapes: B batch, T length, D model, H query heads, K kv heads, h head dim, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxlm.kernels.backend import AttentionBackend
from jaxlm.kernels.cross_entropy import LossOutput, linear_cross_entropy
from jaxlm.nn.attention import KVCache, MaskSpec, attention, cached_attention
from jaxlm.nn.embedding import look_up
from jaxlm.nn.experts import MoeMLP
from jaxlm.nn.experts import modality_ids as find_modalities
from jaxlm.nn.linear import Linear
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.positions import apply_rope, rope_cos_sin
from jaxlm.spec import DecoderSpec

# What the backward pass finds stored; everything else of a layer is computed again.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "qkv": jax.checkpoint_policies.save_only_these_names("q", "k", "v"),
    "qkv_out": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention_out"),
    "dots": jax.checkpoint_policies.save_only_these_names("matmul"),
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale: Any = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            (x.shape[-1],),
            self.param_dtype,
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderSpec
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str | AttentionBackend
    quantized: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        mask: MaskSpec,
        deterministic: bool,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D] -> [B, T, D], and the keys and values: of these tokens, or `cache` with them written to it."""
        c = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = Linear(
                (c.hidden_size,),
                (heads, c.attention.head_dim),
                ("embed",),
                (axis, "head_dim"),
                use_bias=c.attention.qkv_bias,
                adapter=self.adapters.get(name),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                init_std=c.initializer_range,
                quantized=self.quantized,
                name=name,
            )(x, layer, deterministic)
            return nn.with_logical_constraint(y, ("batch", "length", axis, None))

        q = checkpoint_name(apply_rope(project("q_proj", c.attention.num_heads, "heads"), cos, sin), "q")
        k = checkpoint_name(apply_rope(project("k_proj", c.attention.num_kv_heads, "kv_heads"), cos, sin), "k")
        v = checkpoint_name(project("v_proj", c.attention.num_kv_heads, "kv_heads"), "v")
        if cache is None:
            out = attention(q, k, v, mask, self.implementation)
            cache = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2), None)
        else:
            out, cache = cached_attention(q, k, v, cache, c.attention.window, self.implementation)
        projected = Linear(
            (c.attention.num_heads, c.attention.head_dim),
            (c.hidden_size,),
            ("heads", "head_dim"),
            ("embed",),
            use_bias=c.attention.o_bias,
            adapter=self.adapters.get("o_proj"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            init_std=c.initializer_range,
            quantized=self.quantized,
            name="o_proj",
        )(out, layer, deterministic)
        return projected, cache


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    config: DecoderSpec
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike
    quantized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config

        def linear(name: str, d_in: int, d_out: int, in_axis: str, out_axis: str) -> Linear:
            return Linear(
                (d_in,),
                (d_out,),
                (in_axis,),
                (out_axis,),
                use_bias=c.feed_forward.bias,
                adapter=self.adapters.get(name),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                init_std=c.initializer_range,
                quantized=self.quantized,
                name=name,
            )

        # In this order a TPU's compiler makes the activation part of the gate's product when it is computed again, and
        # keeps the weights near: LLaMA-2-7B, v5e, 2.01 against 2.12 Gcycles a step.
        up = linear("up_proj", c.hidden_size, c.feed_forward.size, "embed", "mlp")(x, layer, deterministic)
        gate = linear("gate_proj", c.hidden_size, c.feed_forward.size, "embed", "mlp")(x, layer, deterministic)
        h = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        return linear("down_proj", c.feed_forward.size, c.hidden_size, "mlp", "embed")(h, layer, deterministic)


class Block(nn.Module):
    """One pre-norm decoder layer; a scan body: (x, layer, broadcast inputs) -> (x, None).

    Attributes:
        keep_kv: return the layer's keys and values (see `Attention`) in place of None.
        quantized: weights are int8 (see `Linear`).
        experts: how an MoE feed-forward computes (see `MoeMLP`).
        router_noise: see `MoeMLP`.
    """

    config: DecoderSpec
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str | AttentionBackend
    deterministic: bool
    keep_kv: bool = False
    quantized: bool = False
    experts: str = "dense"
    router_noise: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        mask: MaskSpec,
        modality: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        shared = (c, self.adapters, self.dtype, self.param_dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        normed = RMSNorm(c.norm.eps, self.dtype, self.param_dtype, name="input_layernorm")(x)
        attended, kept = Attention(*shared, self.implementation, self.quantized, name="self_attn")(
            normed, layer, cos, sin, mask, self.deterministic, cache
        )
        x = x + attended
        normed = RMSNorm(c.norm.eps, self.dtype, self.param_dtype, name="post_attention_layernorm")(x)
        if c.experts is None:
            x = x + MLP(*shared, self.quantized, name="mlp")(normed, layer, self.deterministic)
        else:
            assert modality is not None
            mlp = MoeMLP(*shared, self.quantized, self.experts, self.router_noise, name="mlp")
            x = x + mlp(normed, layer, self.deterministic, modality)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        return x, kept if self.keep_kv else None


class Decoder(nn.Module):
    """Decoder-only language model.

    Attributes:
        config: the shape.
        adapters: LoRA by linear-layer name (see `resolve_lora`); empty for none.
        dtype: compute dtype.
        param_dtype: dtype of the base parameters.
        attention: a key of `attention.IMPLEMENTATIONS`, or what `choose_attention` found.
        remat: a key of REMAT_POLICIES, or 'none'.
        experts: how an MoE feed-forward computes (see `moe.MoeMLP`).
        router_noise: see `moe.MoeMLP`.
    """

    config: DecoderSpec
    adapters: Mapping[str, LoraSpec] = dataclasses.field(default_factory=dict)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | AttentionBackend = "xla"
    remat: str = "full"
    experts: str = "dense"
    router_noise: float = 0.0

    @nn.compact
    def hidden(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        modality_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Final hidden states [B, T, D] (normed) and the output matrix [V, D].

        Args:
            input_ids: [B, T] int32.
            positions: [B, T] int32; default 0..T-1.
            segment_ids: [B, T] int32; tokens see only their own segment. None: one segment.
            deterministic: no dropout.
            modality_ids: [B, T] integers, for a model of experts; None: by the ranges of token ids in its config.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        embed_init = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        matrix = ((c.vocab_size, c.hidden_size), embed_init, self.param_dtype)
        embedding = _Matrix(*matrix, "embedding", name="embed_tokens")()
        x = look_up(embedding, input_ids, self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        cos, sin = rope_cos_sin(c, positions)
        mask = MaskSpec(segment_ids=segment_ids, window=c.attention.window)
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "moe": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            c,
            self.adapters,
            self.dtype,
            self.param_dtype,
            self.attention,
            deterministic,
            experts=self.experts,
            router_noise=self.router_noise,
            name="layers",
        )
        if c.experts is None:
            modality_ids = None
        elif modality_ids is None:
            modality_ids = find_modalities(c.experts, input_ids, segment_ids)
        x, _ = layers(x, jnp.arange(c.num_layers), cos, sin, mask, modality_ids)
        x = RMSNorm(c.norm.eps, self.dtype, self.param_dtype, name="norm")(x)
        if c.tied_head:
            return x, embedding
        head = _Matrix(*matrix, "kernel", name="lm_head")()
        return x, head

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits [B, T, V] float32."""
        x, head = self.hidden(input_ids, positions, segment_ids, deterministic)
        return output_logits(x, head, self.dtype)

    def loss(
        self,
        input_ids: jax.Array,
        weights: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        accuracy: bool = False,
        modality_ids: jax.Array | None = None,
    ) -> LossOutput:
        """Weighted next-token cross-entropy, without logits of the whole batch.

        Args:
            input_ids: [B, T].
            weights: [B, T] float32; weights[b, t] weighs the prediction OF token t (made at t - 1);
                weights[:, 0] is ignored, there is nothing to predict it from.
            accuracy: also count tokens whose largest logit is right.
            modality_ids: [B, T], see `hidden`.

        Returns:
            LossOutput with sums over the batch, float32 scalars.
        """
        x, head = self.hidden(input_ids, positions, segment_ids, deterministic, modality_ids)
        labels = jnp.roll(input_ids, -1, axis=1)
        shifted = jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)
        return linear_cross_entropy(x, head, labels, shifted, dtype=self.dtype, accuracy=accuracy)


def output_logits(x: jax.Array, head: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D] by the output matrix [V, D]."""
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    dims = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(flat, head.astype(dtype), dims, preferred_element_type=jnp.float32)
    return logits.reshape(*x.shape[:-1], -1)


def abstract_variables(model: Decoder) -> Any:
    """Shapes, dtypes and logical axes (boxed) of the collections `params` and, with adapters, `lora`."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(lambda key, ids: model.init({"params": key}, ids), jax.random.key(0), tokens)


class _Matrix(nn.Module):
    """A bare matrix parameter under a module name of its own (`embed_tokens/embedding`, `lm_head/kernel`)."""

    shape: tuple[int, int]
    initializer: Callable[..., Any]
    param_dtype: DTypeLike
    param_name: str

    @nn.compact
    def __call__(self) -> jax.Array:
        value: jax.Array = self.param(self.param_name, self.initializer, self.shape, self.param_dtype)
        return value


def with_saved_modules(params: Any, lora: Any) -> dict[str, Any]:
    """The variables to apply: `params` with the adapter's fully trained modules in place, and the factors.

    Args:
        params: base parameters.
        lora: the `lora` collection, or an empty dict; its `modules_to_save` subtree has the paths of params.
    """
    factors = dict(lora)
    saved = factors.pop("modules_to_save", {})

    def replaced(base: Any, new: Any) -> Any:
        if not isinstance(new, Mapping):
            return new
        return {**base, **{key: replaced(base[key], value) for key, value in new.items()}}

    variables = {"params": replaced(params, saved)}
    if factors:
        variables["lora"] = factors
    return variables
