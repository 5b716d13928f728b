"""One layer of a decoder: norms, attention, and a feed-forward layer, which may be divided into experts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from jaxlm.errors import UserError
from jaxlm.spec.positions import PrefixSpec, RelativeBiasSpec, RopeSpec, check_positive

ROUTERS = ("activation", "activation_released", "learned", "modality")
EXPERT_WEIGHTS = ("k_times", "normalised", "shares")
LAYOUTS = ("dense", "mixtral")
TEXT = "text"  # the modality of every token that belongs to no other
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rms", "layer")
PARALLEL = ("own_norm", "shared_norm")
NORM_PLACES = ("pre", "post", "both", "sum")
QK_NORM_OVER = ("head", "all")


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
        check_positive(self, sizes)
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
        if self.experts is not None and not self.gated:
            raise UserError("config: a feed-forward layer divided into experts has a gate, and this one has none")
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
        check_positive(self, ("residual_scale", "normed_residual"))
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
