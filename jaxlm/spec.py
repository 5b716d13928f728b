"""A decoder described by data: what a family's file says, and what the layers compute. No JAX, no words of any format.

Shapes in the project's letters: V vocabulary, D model, L layers, H query heads, K kv heads, h head dim, F feed-forward,
E experts.

Layers are described by a period of P descriptions that repeats: layer n has `period[n % P]`. `DecoderSpec.stacks` says
where their weights lie, and is the rule that the decoder and the table of names follow:

    P = 1    layers/…      [L, …]        every layer
    P > 1    layers/{p}/…  [L // P, …]   layer n = i * P + p at index i, one scan over the repetitions
             tail/{p}/…    [1, …]        the L % P layers after the last whole period, n = L - L % P + p

An encoder's layers lie likewise, below 'encoder/'.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxlm.errors import UserError
from jaxlm.jsonfields import build

DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROUTERS = ("activation", "activation_released", "learned", "modality")
EXPERT_WEIGHTS = ("k_times", "normalised", "shares")
LAYOUTS = ("dense", "mixtral")
TEXT = "text"  # the modality of every token that belongs to no other
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rms", "layer")
PARALLEL = ("own_norm", "shared_norm")
NORM_PLACES = ("pre", "post", "both", "sum")
QK_NORM_OVER = ("head", "all")
ENCODER = "encoder/"  # where the paths of an encoder's leaves begin


def _check_positive(spec: Any, names: tuple[str, ...], zero: tuple[str, ...] = ()) -> None:
    """Refuses sizes that no tensor can have; fields may be None where that means something."""
    for name in names:
        value = getattr(spec, name)
        if (value is not None and not 0 <= value < 1 << 31) or (value == 0 and name not in zero):
            raise UserError(f"config: {name} is {value!r}; expected a positive number")


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dim, in float32.

    Args:
        eps: added to the mean square, or to the variance.
        kind: rms: x / rms(x) * scale (arXiv:1910.07467); layer: (x - mean(x)) / std(x) * scale (arXiv:1607.06450).
        offset: added to the scale that is stored: 1 where a checkpoint has weights around 0, as Gemma's.
        bias: whether a bias is added.
        scale: whether there is a scale; without, it is 1.
    """

    eps: float = 1e-5
    kind: str = "rms"
    offset: float = 0.0
    bias: bool = False
    scale: bool = True

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise UserError(f"config: norm.kind {self.kind!r} is not one of {', '.join(NORMS)}")
        if not 0 < self.eps < 1 << 31:
            raise UserError(f"config: norm.eps is {self.eps!r}; expected a positive number")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    Source: transformers `modeling_rope_utils.py`, whose field names these are; llama3 from Meta's LLaMA 3.1 release;
    yarn from arXiv:2309.00071; dynamic NTK and linear scaling as LLaMA's forks use them; longrope from
    arXiv:2402.13753: texts of more than `original_max_position_embeddings` tokens are turned by `long_factor`, all
    others by `short_factor`, which have a number for each pair of dims that turns.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_THETA
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    frequency_dtype: str | None = None  # what frequencies are rounded to: 'float16' in ChatGLM-6B; None for nothing

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope: rope_type {self.rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        if not self.rope_theta > 0:
            raise UserError(f"rope: rope_theta is {self.rope_theta!r}; expected a positive number")
        if self.frequency_dtype not in (None, "float16"):
            raise UserError(f"rope: frequency_dtype {self.frequency_dtype!r} is not 'float16'")
        for name in _NEEDED.get(self.rope_type, ("factor",)):
            if getattr(self, name) is None:
                raise UserError(f"rope: rope_type {self.rope_type!r} needs a {name!r}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if (factors is not None) != (self.rope_type == "longrope"):
                raise UserError(f"rope: {name} belongs to rope_type 'longrope', not to {self.rope_type!r}")
            if factors is not None and not all(factor > 0 for factor in factors):
                raise UserError(f"rope: {name} is {list(factors)}; expected positive numbers")

    @property
    def switch_length(self) -> int | None:
        """The longest text that `short_factor` turns; None where frequencies do not change at once."""
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None


# rope_type -> the parameters that it cannot do without; of the others it is `factor`.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LearnedPositionsSpec:
    """A trained vector for each position, added to the token's.

    Args:
        num_rows: number of rows of the table.
        offset: row of position 0: 2 in OPT, whose first rows belong to padding.
    """

    num_rows: int
    offset: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, ("num_rows", "offset"), zero=("offset",))
        if self.offset >= self.num_rows:
            raise UserError(
                f"config: learned_positions has {self.num_rows} rows, all of them below offset {self.offset}"
            )

    @property
    def num_positions(self) -> int:
        """Number of positions that have a row."""
        return self.num_rows - self.offset


@dataclass(frozen=True)
class RelativeBiasSpec:
    """A trained bias of scores by the distance of query and key, one for each head (T5, arXiv:1910.10683).

    Args:
        num_buckets: number of classes of distances: near ones have one each, far ones share (see
            `nn.positions.relative_buckets`).
        max_distance: from here on all distances are in the last class.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        _check_positive(self, ("num_buckets", "max_distance"))
        # Half of the buckets are for keys behind the query, and half of those for single distances.
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"config: a relative bias of {self.num_buckets} buckets up to distance {self.max_distance}: 4 divides "
                "the number of buckets, and half of it is below the distance"
            )


@dataclass(frozen=True)
class PrefixSpec:
    """GLM's rows (arXiv:2103.10360): the tokens of a text in front of the first `start_id` see each other.

    From that token on, positions stay what the first mask token's is; the first half of each head turns by them, the
    second half by the number of tokens since, which is 0 in front.

    Args:
        start_id: the token that an answer begins with.
        mask_ids: the mask tokens; the first of them that the text has counts.
    """

    start_id: int
    mask_ids: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention: of a row to itself, or to the states that an encoder gave (`LayerSpec.cross_attention`).

    Args:
        num_heads: H.
        num_kv_heads: K; divides H.
        head_dim: h.
        rope: rotary positions; None for none, so that without `alibi` and `relative_bias` only the mask tells tokens
            apart (NoPE).
        alibi: scores sink with the distance of query and key, in each head at a slope of its own (arXiv:2108.12409).
        qkv_bias: whether q, k and v have a bias.
        o_bias: whether the output projection has a bias.
        qk_norm: a norm of q and of k, before the positions; None for none.
        qk_norm_over: head: over the dims of each head, with one scale for all heads (Qwen 3); all: over the dims of all
            heads together (OLMo 2).
        window: each token sees the last `window` tokens, itself among them; None for all.
        rotary_dim: number of dims of a head that positions turn, the first ones; None for all h.
        rotary_interleaved: dims 2 i and 2 i + 1 turn together (GPT-J), not i and i + h / 2.
        scale: what scores are multiplied with; None for h**-0.5.
        soft_cap: scaled scores become cap * tanh(score / cap) (Gemma 2); None for no cap.
        causal: whether a token sees no later ones.
        relative_bias: what is added to scores by distance; None for nothing. The table belongs to the model, whose
            layers may share it.
        prefix: which tokens of a text see each other, and its positions; None: each sees those before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None = RopeSpec()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    alibi: bool = False
    qk_norm_over: str = "head"
    causal: bool = True
    relative_bias: RelativeBiasSpec | None = None
    prefix: PrefixSpec | None = None

    def __post_init__(self) -> None:
        sizes = ("num_heads", "num_kv_heads", "head_dim", "window", "rotary_dim", "scale", "soft_cap")
        _check_positive(self, sizes)
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise UserError(
                f"config: rotary_dim {self.rotary_dim} is not an even number up to head_dim {self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"config: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.qk_norm_over not in QK_NORM_OVER:
            raise UserError(f"config: qk_norm_over {self.qk_norm_over!r} is not one of {', '.join(QK_NORM_OVER)}")
        if self.rope is not None and self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} must be even for rotary embeddings")
        pairs = (self.rotary_dim or self.head_dim) // 2
        for name in ("short_factor", "long_factor"):
            factors = None if self.rope is None else getattr(self.rope, name)
            if factors is not None and len(factors) != pairs:
                raise UserError(f"rope: {name} has {len(factors)} numbers; {pairs} pairs of dims turn")
        if self.rope is None and (self.rotary_dim is not None or self.rotary_interleaved):
            raise UserError("config: rotary_dim and rotary_interleaved describe rotary positions, but rope is null")
        if self.prefix is not None and (self.rope is None or self.head_dim % 4 or self.rotary_dim or self.window):
            raise UserError(
                "config: a layer with a prefix turns both halves of a head that 4 divides, without a window"
            )
        if self.rope is not None and self.alibi:
            raise UserError(
                "config: a layer has rotary positions or alibi, not both; set rope to null or alibi to false"
            )
        if self.relative_bias is not None and (self.rope is not None or self.alibi):
            raise UserError(
                "config: a layer with a relative bias has no other positions; set rope to null, alibi to false"
            )

    @property
    def rotary(self) -> RopeSpec:
        """The rotary positions, for code that can do nothing without.

        Raises:
            UserError: there are none.
        """
        if self.rope is None:
            raise UserError("a model without rotary positions is not supported here")
        return self.rope


@dataclass(frozen=True)
class ExpertsSpec:
    """The feed-forward layer as E experts: contiguous blocks of its F neurons, F / E each.

    Args:
        num_experts: E.
        router: which experts a token uses. activation: those whose neurons' activations sum highest (SciMind's design);
            activation_released: as SciMind's code computes it, see `nn.experts`; learned: by a trained linear router;
            modality: a fixed set for each modality.
        modalities: names by modality id; the first is text.
        ranges: token ids [start, stop) of each modality but text, in the order of `modalities`.
        top_k: number of experts that a token uses, by modality id.
        shared: router modality: the first `shared` experts serve every modality.
        layout: the Hugging Face layout that the model came in, and goes out in unless another is asked for: 'dense'
            (with the experts in files beside it) or 'mixtral'. It changes nothing that is computed.
        weights: router learned: what the outputs of a token's experts are weighted with. normalised: the softmax over
            them, so that the weights sum to 1 (Mixtral, Qwen3-MoE); shares: their shares of the softmax over all
            experts (Qwen3-MoE without norm_topk_prob); k_times: k times the softmax over them, so that equal weights
            give the plain sum, as in the dense layer, and for a k of 1 the share.
    """

    num_experts: int
    router: str
    modalities: tuple[str, ...] = (TEXT,)
    ranges: tuple[tuple[int, int], ...] = ()
    top_k: tuple[int, ...] = ()
    shared: int = 0
    layout: str = dataclasses.field(default="dense", compare=False)
    weights: str = "k_times"

    def __post_init__(self) -> None:
        if self.weights not in EXPERT_WEIGHTS:
            raise UserError(f"moe.weights: {self.weights!r} is not one of {', '.join(EXPERT_WEIGHTS)}")
        if self.layout not in LAYOUTS:
            raise UserError(f"moe.layout: {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.num_experts < 1:
            raise UserError(f"moe.experts: {self.num_experts} must be at least 1")
        if self.router not in ROUTERS:
            raise UserError(f"moe.router: {self.router!r} is not one of {', '.join(ROUTERS)}")
        if self.modalities[:1] != (TEXT,) or len(set(self.modalities)) != len(self.modalities):
            raise UserError(f"moe.modalities: {list(self.modalities)}: names must differ, and the first is {TEXT!r}")
        if len(self.ranges) != len(self.modalities) - 1:
            raise UserError(
                f"moe.ranges: {len(self.ranges)} ranges of tokens for {len(self.modalities) - 1} modalities"
            )
        for name, (start, stop) in zip(self.modalities[1:], self.ranges, strict=True):
            if not 0 <= start < stop:
                raise UserError(f"moe.ranges: {name}: tokens {start} to {stop} are not a range")
        ordered = sorted(self.ranges)
        for (_, stop), (start, _) in itertools.pairwise(ordered):
            if start < stop:
                raise UserError(f"moe.ranges: {ordered}: two modalities share tokens")
        if len(self.top_k) != len(self.modalities):
            raise UserError(f"moe.top_k: {len(self.top_k)} numbers for the modalities {', '.join(self.modalities)}")
        for name, k in zip(self.modalities, self.top_k, strict=True):
            if not 1 <= k <= self.num_experts:
                raise UserError(
                    f"moe.top_k: {name}: {k}; there are {self.num_experts} experts, so it is 1 to {self.num_experts}"
                )
        if not 0 <= self.shared <= min(self.top_k):
            raise UserError(f"moe.shared: {self.shared}; every modality uses them, so at most {min(self.top_k)}")

    @property
    def max_top_k(self) -> int:
        """The largest number of experts that any token uses."""
        return max(self.top_k)


@dataclass(frozen=True)
class FeedForwardSpec:
    """down(activation(gate(x)) * up(x)), with F neurons; or down(activation(up(x))).

    Args:
        size: F.
        activation: one of ACTIVATIONS; gelu_tanh is the approximation by tanh.
        bias: whether its linear layers have a bias.
        experts: the F neurons divided into experts; None for a dense layer.
        gated: whether there is a gate.
    """

    size: int
    activation: str = "silu"
    bias: bool = False
    experts: ExpertsSpec | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        if self.experts is not None and not (self.gated and self.activation == "silu"):
            raise UserError("config: a feed-forward layer divided into experts has a gate and the activation 'silu'")
        if not 0 < self.size < 1 << 31:
            raise UserError(f"config: intermediate_size is {self.size!r}; expected a positive number")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"config: activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.experts is not None and self.size % self.experts.num_experts:
            raise UserError(
                f"moe.experts: {self.experts.num_experts} does not divide the {self.size} neurons of the "
                "feed-forward layer; experts are of equal size"
            )


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention and feed-forward, each computed from the hidden states and added to them.

    Args:
        norms: pre: attention and feed-forward see a norm of the hidden states (LLaMA); post: they see the hidden states
            themselves, and what they give has a norm before it is added (OLMo 2); both: what they see and what they
            give have one (Gemma 2); sum: they see the hidden states themselves, and the sum has a norm (BERT).
        parallel: None: the feed-forward layer sees the hidden states with attention added. own_norm: it sees those that
            attention sees, through a norm of its own (GPT-NeoX); shared_norm: through the same norm (GPT-J, Phi).
        residual_scale: what attention and feed-forward give is multiplied with it before it is added (Granite); None
            for nothing.
        normed_residual: what attention and feed-forward give is added to what they see, their norm of the hidden
            states, times this (ChatGLM-6B); None: to the hidden states.
        cross_attention: attention to an encoder's states, between the two, with a norm of its own; None for none.
    """

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norms: str = "pre"
    parallel: str | None = None
    residual_scale: float | None = None
    normed_residual: float | None = None
    cross_attention: AttentionSpec | None = None

    def __post_init__(self) -> None:
        _check_positive(self, ("residual_scale", "normed_residual"))
        if self.normed_residual is not None and (self.norms != "pre" or self.parallel is not None):
            raise UserError("config: normed_residual belongs to norms 'pre' and a feed-forward layer behind attention")
        if self.norms not in NORM_PLACES:
            raise UserError(f"config: norms {self.norms!r} is not one of {', '.join(NORM_PLACES)}")
        if not self.norm_before and self.parallel is not None:
            raise UserError(
                f"config: parallel {self.parallel!r} names a norm before the layers; norms {self.norms!r} has none"
            )
        if self.parallel not in (None, *PARALLEL):
            raise UserError(f"config: parallel {self.parallel!r} is not one of {', '.join(PARALLEL)}")
        cross = self.cross_attention
        if cross is None:
            return
        if self.norms != "pre" or self.parallel is not None:
            raise UserError("config: a layer with cross_attention has norms 'pre', and is not parallel")
        heads = ((each.num_heads, each.num_kv_heads, each.head_dim) for each in (cross, self.attention))
        if len(set(heads)) > 1:
            raise UserError(
                "config: cross_attention has the heads of the layer's attention; set them to the same numbers"
            )
        if cross.rope or cross.alibi or cross.relative_bias or cross.causal or cross.window or cross.qk_norm:
            raise UserError(
                "config: cross_attention sees all of the source: set causal to false, and rope, alibi, relative_bias, "
                "window and qk_norm to none"
            )

    @property
    def norm_before(self) -> bool:
        """Whether attention and feed-forward see a norm of the hidden states."""
        return self.norms in ("pre", "both")

    @property
    def norm_after(self) -> bool:
        """Whether what they give, or its sum with the hidden states, has a norm."""
        return self.norms != "pre"


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
        _check_positive(self, ("num_layers", "start_token_id"), zero=("num_layers", "start_token_id"))
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
        _check_positive(self, (*sizes, *numbers), zero=("num_layers",))
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
