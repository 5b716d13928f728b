"""The decoder that a `DecoderSpec` describes, as pure functions of (params, lora, tokens).

`Decoder.embed`, `Decoder.block` and `Decoder.head` are the only places that know the embedding, a layer, and the last
norm with the output matrix. Three runners go through them: scanned (`Decoder.hidden`, `loss` and the call, here: all
layers of a stack in one loop, for training), unrolled with caches (`models.unrolled`, for generation) and streamed
(`models.streamed`, one layer's weights in memory at a time).

Layers are stacked and scanned; `jaxlm.spec` says where their tensors lie.
Shapes: B batch, T length, D model, h head dim, V vocabulary, L layers, P layers of a period.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from jaxlm.kernels.backend import AttentionBackend
from jaxlm.kernels.cross_entropy import (
    LossOutput,
    TokenLosses,
    linear_cross_entropy,
    soft_capped,
    token_cross_entropy,
)
from jaxlm.nn.cross_attention import CrossAttention, Source
from jaxlm.nn.embedding import embedded, look_up
from jaxlm.nn.experts import ExpertsFeedForward
from jaxlm.nn.feed_forward import FeedForward
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.matmul import with_least_rows
from jaxlm.nn.norms import Norm
from jaxlm.nn.ordered_weight import OrderedWeight
from jaxlm.nn.positions import prefix_positions, relative_bias, rope_cos_sin
from jaxlm.nn.routers import modality_ids as ids_of_modalities
from jaxlm.nn.self_attention import Cache, SelfAttention
from jaxlm.spec import ENCODER, DecoderSpec, EncoderSpec, LayerSpec, NormSpec

# What the forward pass stores for the backward pass; everything else of a layer is computed again.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "qkv": jax.checkpoint_policies.save_only_these_names("q", "k", "v"),
    "qkv_out": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention_out"),
    "dots": jax.checkpoint_policies.save_only_these_names("matmul"),
}

# cos and sin, each [B, T, h/2] float32; None for a layer without rotary positions.
Angles = tuple[jax.Array | None, jax.Array | None]


class Block(nn.Module):
    """One decoder layer; a scan body: (x, layer, broadcast inputs) -> (x, None).

    Attributes:
        spec: what the layer computes.
        norm: what its norms compute.
        hidden_size: D.
        init_std, adapters, dtype, param_dtype: see `WithLinears`.
        attention: see `SelfAttention.backend`.
        deterministic: no dropout.
        keep_kv: return the layer's keys and values (see `SelfAttention`), not None.
        experts: how a feed-forward layer of experts computes (see `ExpertsFeedForward`).
        router_noise: see `ExpertsFeedForward`.
    """

    spec: LayerSpec
    norm: NormSpec
    hidden_size: int
    init_std: float
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike
    attention: str | AttentionBackend
    deterministic: bool = True
    keep_kv: bool = False
    experts: str = "dense"
    router_noise: float = 0.0

    def setup(self) -> None:
        shared = (self.hidden_size, self.init_std, self.adapters, self.dtype, self.param_dtype)
        norm = partial(Norm, self.norm, self.dtype, self.param_dtype)
        if self.spec.norm_before:
            self.input_layernorm = norm()
            if self.spec.parallel != "shared_norm":
                self.post_attention_layernorm = norm()
        if self.spec.norm_after:
            self.attention_output_norm = norm()
            self.feed_forward_output_norm = norm()
        self.self_attn = SelfAttention(*shared, self.spec.attention, self.attention)
        if self.spec.feed_forward.experts is None:
            self.mlp: Any = FeedForward(*shared, self.spec.feed_forward)
        else:
            self.mlp = ExpertsFeedForward(*shared, self.spec.feed_forward, self.experts, self.router_noise)
        if self.spec.cross_attention is not None:
            self.cross_attention_layernorm = norm()
            own = adapters_below(self.adapters, "cross_attn/")
            shared = (self.hidden_size, self.init_std, own, self.dtype, self.param_dtype)
            self.cross_attn = CrossAttention(*shared, self.spec.cross_attention, self.attention)

    def attend(
        self,
        x: jax.Array,
        layer: jax.Array,
        angles: Angles,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        bias: jax.Array | None = None,
        source: Source | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """The layer up to its feed-forward part.

        Args:
            x: [B, T, D].
            layer: index of this layer in the model.
            segment_ids: [B, T] int32, 0 for padding; None: one segment.
            cache: keys and values of earlier tokens, in generation (see `SelfAttention`).
            bias: of the self-attention, by distance (see `MaskSpec.bias`).
            source: what a layer with cross-attention attends to.

        Returns:
            what the feed-forward part is added to [B, T, D], mostly x with attention added; what that part sees
            [B, T, D]; keys and values.
        """
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        normed = self.input_layernorm(x) if self.spec.norm_before else x
        if self.spec.normed_residual is not None:
            x = normed * jnp.asarray(self.spec.normed_residual, self.dtype)
        attended, key_values = self.self_attn(normed, layer, *angles, segment_ids, self.deterministic, cache, bias)
        if self.spec.norms in ("post", "both"):
            attended = self.attention_output_norm(attended)
        middle = x + self._scaled(attended)
        if self.spec.norms == "sum":
            middle = self.attention_output_norm(middle)
        if self.spec.cross_attention is not None:
            assert source is not None
            normed = self.cross_attention_layernorm(middle)
            middle = middle + self._scaled(self.cross_attn(normed, layer, source, segment_ids, self.deterministic))
        if not self.spec.norm_before:
            return middle, middle, key_values
        if self.spec.parallel == "shared_norm":
            return middle, normed, key_values
        normed = self.post_attention_layernorm(x if self.spec.parallel else middle)
        if self.spec.normed_residual is not None:
            middle = normed * jnp.asarray(self.spec.normed_residual, self.dtype)
        return middle, normed, key_values

    def add_feed_forward(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """x [B, T, D] of `attend` with the output of the feed-forward part added."""
        if self.spec.norms in ("post", "both"):
            out = self.feed_forward_output_norm(out)
        x = x + self._scaled(out)
        return self.feed_forward_output_norm(x) if self.spec.norms == "sum" else x

    @nn.nowrap
    def _scaled(self, out: jax.Array) -> jax.Array:
        return out if self.spec.residual_scale is None else out * self.spec.residual_scale

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        angles: Angles,
        segment_ids: jax.Array | None = None,
        modality: jax.Array | None = None,
        cache: Cache | None = None,
        bias: jax.Array | None = None,
        source: Source | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, T, D] -> [B, T, D], and keys and values with `keep_kv`, else None; arguments as in `attend`.

        Args:
            modality: [B, T] integers, for a layer of experts.
        """
        x, normed, key_values = self.attend(x, layer, angles, segment_ids, cache, bias, source)
        if self.spec.feed_forward.experts is None:
            out = self.mlp(normed, layer, self.deterministic)
        else:
            assert modality is not None
            out = self.mlp(normed, layer, self.deterministic, modality)
        x = self.add_feed_forward(x, out)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        return x, key_values if self.keep_kv else None

    def source_keys(self, states: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, K, S, h] of an encoder's states [P, S, D], for `Source`."""
        k, v = self.cross_attn.keys(states, layer)
        return k.swapaxes(1, 2), v.swapaxes(1, 2)


class Period(nn.Module):
    """The P layers of a period, one after the other; a scan body like `Block`, over `layer` [P] and angles of each.

    `more` is what all of them are given besides.
    """

    blocks: tuple[Callable[..., Any], ...]  # `Block` with all arguments but its name

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layers: jax.Array,
        angles: tuple[Angles, ...],
        *more: Any,
    ) -> tuple[jax.Array, None]:
        for p, block in enumerate(self.blocks):
            x, _ = block(name=str(p))(x, layers[p], angles[p], *more)
        return x, None


class Tail(nn.Module):
    """The layers after the last whole period, each a stack of one."""

    blocks: tuple[Callable[..., Any], ...]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layers: jax.Array,
        angles: tuple[Angles, ...],
        *more: Any,
    ) -> jax.Array:
        for p, block in enumerate(self.blocks):
            x, _ = block(name=str(p))(x, layers[p : p + 1], angles[p], *more)
        return x


class Encoder(nn.Module):
    """The layers that read the source, and the norm behind them.

    Attributes:
        spec: of the layers.
        norm: see `DecoderSpec.norm`.
        init_std, dtype, param_dtype: see `WithLinears`.
    """

    spec: EncoderSpec
    norm: NormSpec
    init_std: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, options: Sequence[Mapping[str, Any]], remat: str
    ) -> jax.Array:
        """States [P, S, D] of embeddings [P, S, D]; `options` and `remat` as in `run_stacks`."""
        bias = None
        if self.spec.relative_bias is not None:
            table = _bias_table(self.spec, self.init_std, self.param_dtype, name="relative_bias")()
            bias = relative_bias(table, self.spec.relative_bias, x.shape[1], x.shape[1], bidirectional=True)
        angles: tuple[Angles, ...] = ((None, None),) * len(options)
        x = run_stacks(x, angles, options, self.spec.num_layers, remat, segment_ids, None, None, bias)
        out: jax.Array = Norm(self.norm, self.dtype, self.param_dtype, name="norm")(x)
        return out


class Decoder(nn.Module):
    """Language model, with or without an encoder; hashable, so that jitted functions take it as a static argument.

    Attributes:
        spec: its description.
        adapters: LoRA by linear-layer name (see `resolve_lora`); empty for none.
        dtype: compute dtype.
        param_dtype: dtype of the base parameters.
        attention: a key of `attention.IMPLEMENTATIONS`, or the backend that `choose_attention` returned.
        remat: a key of REMAT_POLICIES, or 'none'.
        experts: how a feed-forward layer of experts computes (see `ExpertsFeedForward`).
        router_noise: see `ExpertsFeedForward`.
    """

    spec: DecoderSpec
    adapters: Mapping[str, LoraSpec] = dataclasses.field(default_factory=dict)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | AttentionBackend = "xla"
    remat: str = "full"
    experts: str = "dense"
    router_noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", FrozenDict(self.adapters))  # which has a hash
        super().__post_init__()

    def setup(self) -> None:
        s = self.spec
        init = nn.with_logical_partitioning(nn.initializers.normal(s.initializer_range), ("vocab", "embed"))
        matrix = ((s.vocab_size, s.embedding_dims), init, self.param_dtype)
        self.embed_tokens = _Matrix(*matrix, "embedding")
        if s.final_norm:
            self.norm = Norm(s.norm, self.dtype, self.param_dtype)
        if s.embedding_size is not None:
            # [outputs, inputs], as the output matrix.
            into, out = (s.hidden_size, s.embedding_size), (s.embedding_size, s.hidden_size)
            normal, boxed = nn.initializers.normal(s.initializer_range), nn.with_logical_partitioning
            self.project_in = _Matrix(into, boxed(normal, ("embed", None)), self.param_dtype, "kernel")
            self.project_out = _Matrix(out, boxed(normal, (None, "embed")), self.param_dtype, "kernel")
        if s.learned_positions is not None:
            # Rows over devices as those of the vocabulary.
            shape = s.learned_positions.num_rows, s.hidden_size
            self.embed_positions = _Matrix(shape, init, self.param_dtype, "embedding")
        if s.embedding_norm:
            self.embed_norm = Norm(s.norm, self.dtype, self.param_dtype)
        if not s.tied_head:
            self.lm_head = _Matrix(*matrix, "kernel")
        if s.relative_bias is not None:
            self.relative_bias = _bias_table(s, s.initializer_range, self.param_dtype)
        if s.encoder is not None:
            self.encoder = Encoder(s.encoder, s.norm, s.initializer_range, self.dtype, self.param_dtype)

    # --- the parts of a decoder ---------------------------------------------------------------------------------------

    def embed(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """The input of the first layer [B, T, D], for tokens [B, T].

        Args:
            positions: [B, T], for learned positions; default 0..T-1. NaN comes of one that has no row.
        """
        x = embedded(self.embed_tokens(), input_ids, self.dtype)
        if self.spec.embedding_scale is not None:
            x = x * jnp.asarray(self.spec.embedding_scale, self.dtype)
        if self.spec.embedding_size is not None:
            x = jnp.dot(x, self.project_in().astype(self.dtype).T)
        if self.spec.learned_positions is not None:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
            x = x + look_up(self.embed_positions(), positions + self.spec.learned_positions.offset, self.dtype)
        if self.spec.embedding_norm:
            x = self.embed_norm(x)
        return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))

    @nn.nowrap
    def block(self, number: int, keep_kv: bool = False) -> Block:
        """Layer `number`, to be applied to its own parameters, without dropout."""
        return Block(**self._block_options(self.spec.layer(number), True), keep_kv=keep_kv, parent=None)

    def encode(self, ids: jax.Array, segment_ids: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """The encoder's states [P, S, D] of sources [P, S]; `segment_ids` [P, S] are 0 in the padding."""
        assert self.spec.encoder is not None
        options = [
            self._block_options(layer, deterministic) | {"adapters": adapters_below(self.adapters, ENCODER)}
            for layer in self.spec.encoder.period
        ]
        states: jax.Array = self.encoder(self.embed(ids), segment_ids, options, self.remat)
        return states

    @nn.nowrap
    def _block_options(self, layer: LayerSpec, deterministic: bool) -> dict[str, Any]:
        return dict(
            spec=layer,
            norm=self.spec.norm,
            hidden_size=self.spec.hidden_size,
            init_std=self.spec.initializer_range,
            adapters=self.adapters,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            attention=self.attention,
            deterministic=deterministic,
            experts=self.experts,
            router_noise=self.router_noise,
        )

    def head(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] float32 from the output of the last layer [..., D]."""
        return self._logits(*self._normed(x))

    def last_states(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] from the output of the last layer [..., D]: behind the last norm, if any."""
        return self.norm(x) if self.spec.final_norm else x

    def _logits(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of what `_normed` gives."""
        return soft_capped(output_logits(x, matrix, self.dtype), self.spec.logits_soft_cap)

    def _normed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the output matrix takes [..., e], and that matrix [V, e]; e is D but for an `embedding_size`."""
        x = self.last_states(x)
        if self.spec.logits_scale is not None:
            x = x * self.spec.logits_scale
        if self.spec.embedding_size is not None:
            x = jnp.dot(x.astype(self.dtype), self.project_out().astype(self.dtype).T)
        matrix = self.embed_tokens() if self.spec.tied_head else self.lm_head()
        return x, _unit_rows(matrix) if self.spec.normed_head else matrix

    # --- inputs of the layers beside x --------------------------------------------------------------------------------

    @nn.nowrap
    def prefixed(
        self, input_ids: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Positions, places in the answer and segment ids (see `prefix_positions`); as given without a prefix."""
        if self.spec.prefix is None:
            return positions, None, segment_ids
        return prefix_positions(self.spec.prefix, input_ids, positions, segment_ids)

    @nn.nowrap
    def angles(
        self, positions: jax.Array, lengths: jax.Array | None = None, places: jax.Array | None = None
    ) -> tuple[Angles, ...]:
        """cos and sin (see `rope_cos_sin`) for each layer of the period; computed once where layers agree.

        Args:
            places: [B, T], those in the answer, by which the second half of a head turns where there is a prefix.
        """
        by_rope: dict[Any, Angles] = {}
        result: list[Angles] = []
        for layer in self.spec.period:
            if layer.attention.rope is None:
                result.append((None, None))
                continue
            key = layer.attention.rope, layer.attention.rotary_dim or layer.attention.head_dim
            if places is not None:
                half, longest = (key[0], key[1] // 2), self.spec.max_position_embeddings
                pairs = zip(*(rope_cos_sin(*half, longest, by, lengths) for by in (positions, places)), strict=True)
                cos, sin = (jnp.concatenate(pair, axis=-1) for pair in pairs)
                by_rope[key] = cos, sin
            if key not in by_rope:
                by_rope[key] = rope_cos_sin(*key, self.spec.max_position_embeddings, positions, lengths)
            result.append(by_rope[key])
        return tuple(result)

    def bias(self, length: int, kv_length: int) -> jax.Array | None:
        """The relative bias of the layers' self-attention, as `positions.relative_bias` has it; None without one."""
        spec = self.spec.relative_bias
        return None if spec is None else relative_bias(self.relative_bias(), spec, length, kv_length, False)

    @nn.nowrap
    def modality(self, input_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array | None:
        """Modality ids [B, T] by the ranges of token ids in the spec; None for a dense model."""
        experts = self.spec.experts
        return None if experts is None else ids_of_modalities(experts, input_ids, segment_ids)

    # --- the scanned runner -------------------------------------------------------------------------------------------

    @nn.compact
    def hidden(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        modality_ids: jax.Array | None = None,
        encoder_ids: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """What the output matrix takes [B, T, D], and that matrix [V, D] (see `_normed`).

        Args:
            input_ids: [B, T] int32.
            positions: [B, T] int32; default 0..T-1.
            segment_ids: [B, T] int32; tokens see only their own segment. None: one segment.
            deterministic: no dropout.
            modality_ids: [B, T] integers, for a model of experts; None: by the ranges of token ids in its spec.
            encoder_ids: [B, S] int32, the source, for a model with an encoder.
            encoder_segment_ids: [B, S] int32, 0 for padding: a token sees the source of its own segment. None: as one.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.embed(input_ids, positions)
        if self.spec.experts is None:
            modality_ids = None
        elif modality_ids is None:
            modality_ids = self.modality(input_ids, segment_ids)
        positions, places, segment_ids = self.prefixed(input_ids, positions, segment_ids)
        angles = self.angles(positions, places=places)
        options = [self._block_options(layer, deterministic) for layer in self.spec.period]
        more: tuple[Any, ...] = segment_ids, modality_ids
        if self.spec.encoder is not None:
            assert encoder_ids is not None
            if encoder_segment_ids is None:
                encoder_segment_ids = jnp.ones_like(encoder_ids)
            states = self.encode(encoder_ids, encoder_segment_ids, deterministic)
            more = (*more, None, self.bias(*[input_ids.shape[1]] * 2), Source(encoder_segment_ids, states))
        x = run_stacks(x, angles, options, self.spec.num_layers, self.remat, *more)
        return self._normed(x)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        **source: Any,
    ) -> jax.Array:
        """Logits [B, T, V] float32; `source` is what `hidden` takes besides."""
        return self._logits(*self.hidden(input_ids, positions, segment_ids, deterministic, **source))

    def loss(
        self,
        input_ids: jax.Array,
        weights: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        accuracy: bool = False,
        modality_ids: jax.Array | None = None,
        **source: Any,
    ) -> LossOutput:
        """Weighted next-token cross-entropy, without logits of the whole batch.

        Args:
            input_ids: [B, T].
            weights: [B, T] float32; weights[b, t] weighs the prediction of token t, which is made at t - 1;
                weights[:, 0] is ignored.
            accuracy: also count tokens whose largest logit is right.
            modality_ids: [B, T], see `hidden`.
            source: what `hidden` takes besides.

        Returns:
            LossOutput with sums over the batch, float32 scalars.
        """
        x, matrix = self.hidden(input_ids, positions, segment_ids, deterministic, modality_ids, **source)
        labels, shifted = _predicted(input_ids, weights)
        cap = self.spec.logits_soft_cap
        return linear_cross_entropy(x, matrix, labels, shifted, dtype=self.dtype, accuracy=accuracy, soft_cap=cap)

    def token_losses(
        self,
        input_ids: jax.Array,
        weights: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        modality_ids: jax.Array | None = None,
        deterministic: bool = True,
        accuracy: bool = True,
    ) -> tuple[LossOutput, TokenLosses]:
        """The sums of `loss`, and what the prediction of each token [B, T] adds to them."""
        x, matrix = self.hidden(input_ids, positions, segment_ids, deterministic, modality_ids)
        labels, shifted = _predicted(input_ids, weights)
        options: dict[str, Any] = {"dtype": self.dtype, "accuracy": accuracy, "soft_cap": self.spec.logits_soft_cap}
        sums, tokens = token_cross_entropy(x, matrix, labels, shifted, **options)
        return sums, jax.tree.map(lambda each: jnp.roll(each, 1, axis=1), tokens)


def _predicted(input_ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token [B, T] that each place predicts, and its weight."""
    return jnp.roll(input_ids, -1, axis=1), jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)


def run_stacks(
    x: jax.Array,
    angles: tuple[Angles, ...],
    options: Sequence[Mapping[str, Any]],
    num_layers: int,
    remat: str,
    *more: Any,
) -> jax.Array:
    """All layers, one loop over the repetitions of the period; their modules are those of the caller.

    Args:
        options: of `Block`, for each layer of the period.
        remat: see `Decoder`.
        more: what all layers are given besides x, their number and angles, in the order of `Block`.
    """
    block: Any = Block
    if remat != "none":
        block = nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    size, layers = len(options), jnp.arange(num_layers)
    if size == 1:
        x, _ = _stacked(block, num_layers, len(more))(**options[0], name="layers")(x, layers, angles[0], *more)
        return x
    repeats, rest = divmod(num_layers, size)
    if repeats:
        blocks = tuple(partial(block, **each) for each in options)
        rows = layers[: repeats * size].reshape(repeats, size)
        x, _ = _stacked(Period, repeats, len(more))(blocks, name="layers")(x, rows, angles, *more)
    if rest:
        single = tuple(partial(_stacked(block, 1, len(more)), **each) for each in options[:rest])
        x = Tail(single, name="tail")(x, layers[repeats * size :], angles, *more)
    return x


def _stacked(body: Any, length: int, inputs: int) -> Any:
    """A scan over `length` layers whose tensors lie in a stack.

    Args:
        inputs: number of those that all layers are given alike.
    """
    return nn.scan(
        body,
        variable_axes={"params": 0, "lora": 0, "moe": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, *[nn.broadcast] * inputs),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _unit_rows(matrix: jax.Array) -> jax.Array:
    """The rows of a matrix, each divided by its length, in float32 but for the result."""
    rows = matrix.astype(jnp.float32)
    squared = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    # The bound below the root: a row of zeros has a gradient of zeros, not of NaN.
    return (rows * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))).astype(matrix.dtype)


def output_logits(x: jax.Array, matrix: jax.Array | OrderedWeight, dtype: DTypeLike) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D] by the output matrix [V, D], or by its transpose, stored."""
    if isinstance(matrix, OrderedWeight):
        return matrix.times(x, jnp.float32)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    dims = (((1,), (1,)), ((), ()))

    def multiply(flat: jax.Array, matrix: jax.Array) -> jax.Array:
        return jax.lax.dot_general(flat, matrix, dims, preferred_element_type=jnp.float32)

    logits = with_least_rows(multiply, flat, matrix.astype(dtype))
    return logits.reshape(*x.shape[:-1], -1)


def example_inputs(spec: DecoderSpec) -> dict[str, Any]:
    """What a model is applied to where only the shapes of its parameters matter."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return {"input_ids": tokens} | ({} if spec.encoder is None else {"encoder_ids": tokens})


@lru_cache(maxsize=4)  # a start asks several times, and tracing a model takes a third of a second
def abstract_variables(model: Decoder) -> Any:
    """Shapes, dtypes and logical axes (boxed) of the collections `params` and, with adapters, `lora`; a shared tree."""
    return jax.eval_shape(lambda key: model.init({"params": key}, **example_inputs(model.spec)), jax.random.key(0))


def abstract_layer(model: Decoder, number: int) -> Any:
    """As `abstract_variables`, of one layer by itself: without the dim of the stack."""

    def init(key: jax.Array) -> Any:
        ids = jnp.zeros((1, 8), jnp.int32)
        x = jnp.zeros((1, 8, model.spec.hidden_size), model.dtype)
        angles = model.angles(ids, places=ids if model.spec.prefix else None)[number % len(model.spec.period)]
        more: tuple[Any, ...] = ()
        if model.spec.encoder is not None:
            relative = model.spec.relative_bias
            bias = None if relative is None else jnp.zeros((model.spec.period[0].attention.num_heads, 15), jnp.float32)
            more = None, bias, Source(jnp.ones_like(ids), x)
        return model.block(number).init(key, x, jnp.int32(0), angles, None, model.modality(ids), *more)

    return jax.eval_shape(init, jax.random.key(0))


class _Matrix(nn.Module):
    """A bare matrix parameter under a module name of its own (`embed_tokens/embedding`, `lm_head/kernel`), or the
    `OrderedWeight` of its transpose."""

    shape: tuple[int, int]
    initializer: Callable[..., Any]
    param_dtype: DTypeLike
    param_name: str

    @nn.compact
    def __call__(self) -> Any:
        given: Any = self.get_variable("params", self.param_name)
        if isinstance(given, OrderedWeight):  # not through `param`, which compares it with a fresh array
            return given
        return self.param(self.param_name, self.initializer, self.shape, self.param_dtype)


def _bias_table(spec: DecoderSpec | EncoderSpec, init_std: float, param_dtype: DTypeLike, **more: Any) -> _Matrix:
    """The table [U, H] of a relative bias."""
    attention = spec.period[0].attention
    assert attention.relative_bias is not None
    init = nn.with_logical_partitioning(nn.initializers.normal(init_std), ("buckets", "heads"))
    shape = attention.relative_bias.num_buckets, attention.num_heads
    return _Matrix(shape, init, param_dtype, "embedding", **more)


def adapters_below(adapters: Mapping[str, LoraSpec], path: str) -> Mapping[str, LoraSpec]:
    """The adapters of linear layers whose names begin with a path ('encoder/'), by the rest of them."""
    return FrozenDict({name.removeprefix(path): spec for name, spec in adapters.items() if name.startswith(path)})


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
