"""A whole model: its layers, where their weights lie, and what lies outside of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxlm.errors import UserError
from jaxlm.jsonfields import build
from jaxlm.spec.layers import AttentionSpec, ExpertsSpec, FeedForwardSpec, LayerSpec, NormSpec
from jaxlm.spec.positions import LearnedPositionsSpec, PrefixSpec, RelativeBiasSpec, RopeSpec, check_positive

ENCODER = "encoder/"  # where the paths of an encoder's leaves begin


@dataclass(frozen=True)
class Stack:
    """Layers of one description whose weights lie in the same leaves, stacked along the first dim.

    Args:
        path: where the leaves begin: 'layers', 'layers/0', 'tail/1'.
        layer: the description that they share.
        numbers: which layers of the model they are, in the order of the stack.
    """

    path: str
    layer: LayerSpec
    numbers: range

    def leaf(self, path: str) -> str:
        """The whole path of a leaf, given as a row of the name table has it."""
        return f"{self.path}/{path.removeprefix(ENCODER)}"


def is_stacked(path: str) -> bool:
    """Whether a leaf belongs to a `Stack`, so that its first dim is the layer."""
    return path.removeprefix(ENCODER).startswith(("layers/", "tail/"))


class _Layered:
    """What decoder and encoder share: layers by a period that repeats."""

    num_layers: int
    period: tuple[LayerSpec, ...]
    _below: ClassVar[str] = ""  # where the paths of its stacks begin

    def _check_layers(self) -> None:
        if not self.period:
            raise UserError("config: period is empty; it describes at least one layer")
        if len(self.period) > 1 and len(set(self.period)) == 1:
            raise UserError("config: period repeats one description; write it once, as where weights lie depends on it")

    def layer(self, number: int) -> LayerSpec:
        """The description of a layer."""
        return self.period[number % len(self.period)]

    def layers(self) -> Iterator[LayerSpec]:
        """The description of every layer, in order."""
        return (self.layer(number) for number in range(self.num_layers))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Where the weights of all layers lie (the rule in this module's docstring)."""
        size, whole, below = len(self.period), self.num_layers - self.num_layers % len(self.period), self._below
        if size == 1:
            return (Stack(f"{below}layers", self.period[0], range(self.num_layers)),)
        full = [Stack(f"{below}layers/{p}", self.period[p], range(p, whole, size)) for p in range(size) if whole]
        rest = enumerate(range(whole, self.num_layers))
        return (*full, *(Stack(f"{below}tail/{p}", self.period[p], range(n, n + 1)) for p, n in rest))

    @property
    def relative_bias(self) -> RelativeBiasSpec | None:
        """Of the self-attention, one table for all layers; None for none."""
        return self.period[0].attention.relative_bias


@dataclass(frozen=True)
class EncoderSpec(_Layered):
    """An encoder of another text, the source, whose states the decoder's layers attend to.

    It has the decoder's hidden size, embedding of tokens and kind of norms; a norm of its own stands at its end.

    Args:
        num_layers, period: as those of `DecoderSpec`; attention sees all of the source.
        start_token_id: the token that every text of the decoder begins with.
    """

    num_layers: int
    period: tuple[LayerSpec, ...]
    start_token_id: int
    _below: ClassVar[str] = ENCODER

    def __post_init__(self) -> None:
        check_positive(self, ("num_layers", "start_token_id"), zero=("num_layers", "start_token_id"))
        self._check_layers()
        for layer in self.period:
            if layer.attention.causal or layer.cross_attention is not None or layer.feed_forward.experts is not None:
                raise UserError("config: a layer of the encoder is not causal, and has no cross_attention or experts")
            if layer.attention.rope is not None:
                raise UserError("config: a layer of the encoder has no rope; set it to null")
        _check_one_bias(self.period)


def _check_one_bias(period: tuple[LayerSpec, ...]) -> None:
    """Refuses layers that cannot share one table of relative bias."""
    tables = {
        (layer.attention.relative_bias, layer.attention.relative_bias and layer.attention.num_heads) for layer in period
    }
    if len(tables) > 1:
        raise UserError("config: layers differ in their relative_bias; one table serves them all")


@dataclass(frozen=True)
class DecoderSpec(_Layered):
    """A language model that continues a text, and may read another one by an encoder.

    Args:
        family: the key of its family (see `models.families`).
        vocab_size: V.
        hidden_size: D.
        num_layers: L.
        period: descriptions of consecutive layers, repeated until there are L layers.
        norm: of every layer, and of the last hidden states.
        tied_head: the embedding is the output matrix too.
        embedding_scale: what embeddings are multiplied with, rounded to the compute dtype; None for nothing.
        learned_positions: vectors of positions [.., D], added to the scaled embedding; None for none.
        embedding_norm: whether there is a norm behind the embedding.
        logits_scale: what logits are multiplied with, before the cap: the last hidden states are, behind their norm, in
            the compute dtype (T5's d**-0.5; Granite's divisor, inverted); None for nothing.
        embedding_size: dims of a token's embedding and of the output matrix, where they are not D: a matrix without a
            bias turns an embedding into a hidden state, another the last hidden state into what the output matrix
            takes (OPT-350m); None for D.
        final_norm: whether the last hidden states have a norm.
        logits_soft_cap: logits become cap * tanh(logits / cap), in float32 (Gemma 2); None for no cap.
        normed_head: each row of the output matrix is divided by its length (Baichuan 2).
        max_position_embeddings: number of positions that the model was trained for, before any RoPE scaling.
        initializer_range: standard deviation of fresh weights.
        encoder: reads the source; None for a decoder alone.
        bos_token_id, eos_token_id, pad_token_id: what the checkpoint says of its special tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    period: tuple[LayerSpec, ...]
    norm: NormSpec = NormSpec()
    tied_head: bool = False
    embedding_scale: float | None = None
    embedding_norm: bool = False
    logits_soft_cap: float | None = None
    logits_scale: float | None = None
    normed_head: bool = False
    learned_positions: LearnedPositionsSpec | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    embedding_size: int | None = None
    final_norm: bool = True
    encoder: EncoderSpec | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "max_position_embeddings", "initializer_range")
        # A spec without layers counts what lies outside of them.
        numbers = ("logits_soft_cap", "logits_scale", "embedding_size")
        check_positive(self, (*sizes, *numbers), zero=("num_layers",))
        self._check_layers()
        if len({layer.feed_forward.experts for layer in self.period} - {None}) > 1:
            raise UserError("config: layers are divided into experts in different ways; they must share one division")
        if len({layer.attention.prefix for layer in self.period}) > 1:
            raise UserError("config: layers have different prefixes; they must share one")
        if not all(layer.attention.causal for layer in self.period):
            raise UserError("config: a layer of the decoder is causal; causal false is for the encoder's")
        if any((layer.cross_attention is None) == (self.encoder is not None) for layer in self.period):
            raise UserError("config: the layers of a decoder have cross_attention if and only if there is an encoder")
        if self.encoder is not None and (self.learned_positions is not None or self.prefix is not None):
            raise UserError("config: learned_positions and prefix are not supported in models with an encoder")
        _check_one_bias(self.period)

    @property
    def reward_token_id(self) -> int:
        """The token whose logit behind an answer is the reward that a reward model gives it: the one that ends answers.

        Such a scalar head is a row of the output matrix, which every format has a place for.
        """
        end = self.eos_token_id
        return (end[0] if isinstance(end, tuple) else end) or 0

    def refuse_encoder(self, what: str) -> None:
        """For code that can do nothing with a model that has an encoder; `what` names it.

        Raises:
            UserError: it has one.
        """
        if self.encoder is not None:
            raise UserError(f"{what}: a {self.family} model has an encoder, which is not supported here")

    def part(self, encoder: bool) -> DecoderSpec | EncoderSpec:
        """The layers of the decoder, or those of its encoder."""
        if not encoder:
            return self
        assert self.encoder is not None
        return self.encoder

    @property
    def total_layers(self) -> int:
        """Number of layers, those of the encoder included."""
        return self.num_layers + (0 if self.encoder is None else self.encoder.num_layers)

    @property
    def attention_layers(self) -> tuple[AttentionSpec, ...]:
        """Every kind of attention in the model, the decoder's first: to itself, to the source, the encoder's."""
        cross = (layer.cross_attention for layer in self.period if layer.cross_attention is not None)
        encoder = () if self.encoder is None else self.encoder.period
        return (*(layer.attention for layer in self.period), *cross, *(layer.attention for layer in encoder))

    @property
    def uniform_layer(self) -> LayerSpec:
        """The description that all layers share, for code that can do nothing with layers that differ.

        Raises:
            UserError: the layers differ.
        """
        if len(set(self.period)) > 1:
            raise UserError(f"a {self.family} model's layers differ from each other, which is not supported here")
        return self.period[0]

    @property
    def attention(self) -> AttentionSpec:
        """The attention that all layers share; raises as `uniform_layer`."""
        return self.uniform_layer.attention

    @property
    def feed_forward(self) -> FeedForwardSpec:
        """The feed-forward layer that all layers share; raises as `uniform_layer`."""
        return self.uniform_layer.feed_forward

    @property
    def prefix(self) -> PrefixSpec | None:
        """Which tokens of a text see each other; None: each sees those before it."""
        return self.period[0].attention.prefix

    @property
    def experts(self) -> ExpertsSpec | None:
        """How feed-forward layers are divided into experts; None when every layer is dense."""
        return next((e for layer in self.period if (e := layer.feed_forward.experts) is not None), None)

    def with_layers(self, change: Callable[[LayerSpec], LayerSpec]) -> DecoderSpec:
        """The same model with every layer's description changed."""
        return dataclasses.replace(self, period=tuple(map(change, self.period)))

    def with_attention(self, **changes: Any) -> DecoderSpec:
        """The same model with these fields of every attention layer changed."""
        replace = dataclasses.replace
        return self.with_layers(lambda layer: replace(layer, attention=replace(layer.attention, **changes)))

    def with_feed_forward(self, **changes: Any) -> DecoderSpec:
        """The same model with these fields of every feed-forward layer changed."""
        replace = dataclasses.replace
        return self.with_layers(lambda layer: replace(layer, feed_forward=replace(layer.feed_forward, **changes)))

    def with_experts(self, experts: ExpertsSpec | None) -> DecoderSpec:
        """The same model with every feed-forward layer divided like that, or none."""
        return self.with_feed_forward(experts=experts)

    @property
    def learned_router(self) -> bool:
        """Whether a layer has a trained router."""
        return self.experts is not None and self.experts.router == "learned"

    @property
    def embedding_dims(self) -> int:
        """Number of dims of a token's embedding and of the output matrix."""
        return self.embedding_size or self.hidden_size

    @property
    def max_length(self) -> int:
        """Longest row the positions are made for, in tokens: RoPE scaling stretches max_position_embeddings."""
        longest = min(_stretched(layer.attention.rope, self.max_position_embeddings) for layer in self.period)
        return longest if self.learned_positions is None else min(longest, self.learned_positions.num_positions)

    @property
    def switch_length(self) -> int | None:
        """`RopeSpec.switch_length` of the layers, None where no layer has one: what a cache holds of a text ends there.

        Raises:
            UserError: it differs between layers.
        """
        ropes = (layer.attention.rope for layer in self.period)
        lengths = {rope.switch_length for rope in ropes if rope is not None} - {None}
        if len(lengths) > 1:
            raise UserError(f"config: original_max_position_embeddings of longrope differs between layers: {lengths}")
        return next(iter(lengths), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "model") -> DecoderSpec:
        """Reads what `to_dict` gave, through JSON.

        Args:
            where: the file and the section, for errors.

        Raises:
            UserError: when a field is unknown, missing, of another type, or no model can have it.
        """
        return build(cls, values, where)


def _stretched(rope: RopeSpec | None, length: int) -> int:
    if rope is None:
        return length
    if rope.rope_type in ("linear", "dynamic"):
        return int(length * (rope.factor or 1.0))
    if rope.rope_type == "yarn":
        return max(length, int((rope.factor or 1.0) * (rope.original_max_position_embeddings or length)))
    return length


def uniform_decoder(
    family: str,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope: RopeSpec | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: NormSpec | None = None,
    window: int | None = None,
    experts: ExpertsSpec | None = None,
    norm_eps: float = 1e-5,
    **more: Any,
) -> DecoderSpec:
    """A decoder whose layers are all alike, by the numbers of one layer and fields of `DecoderSpec`."""
    attention = AttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        rope=rope or RopeSpec(),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        window=window,
    )
    layer = LayerSpec(attention, FeedForwardSpec(intermediate_size, bias=mlp_bias, experts=experts))
    return DecoderSpec(family, vocab_size, hidden_size, num_layers, (layer,), NormSpec(norm_eps), **more)


def differences(first: DecoderSpec, second: DecoderSpec) -> Iterator[tuple[str, Any, Any]]:
    """(field, first, second) of everything that two decoders do not have in common."""
    left, right = flatten(first), flatten(second)
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name) and not name.endswith("experts.layout"):
            yield name, left.get(name), right.get(name)


def flatten(spec: DecoderSpec) -> dict[str, Any]:
    """Every number of a decoder by name: 'vocab_size', 'attention.num_heads'; 'period[1].…' where layers differ."""
    return _flat(spec.to_dict(), "")


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{key}.")
        elif key == "period":
            # Without its number where there is one description only.
            for number, layer in enumerate(value):
                fields |= _flat(layer, f"{prefix}{key}[{number}]." if len(value) > 1 else prefix)
        else:
            fields[f"{prefix}{key}"] = value
    return fields
