"""A decoder described by data: what a family's file says, and what the layers compute. No JAX, no words of any format.

Shapes in the project's letters: V vocabulary, D model, L layers, H query heads, K kv heads, h head dim, F feed-forward.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROUTERS = ("activation", "activation_released", "learned", "modality")
LAYOUTS = ("dense", "mixtral")
TEXT = "text"  # the modality of every token that belongs to no other


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm (arXiv:1910.07467): x / rms(x) * scale, in float32.

    Args:
        eps: added to the mean square.
    """

    eps: float = 1e-5


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    Source: transformers `modeling_rope_utils.py`, whose field names these are; llama3 from Meta's LLaMA 3.1 release; yarn
    from arXiv:2309.00071; dynamic NTK and linear scaling as LLaMA's forks use them.
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


@dataclass(frozen=True)
class AttentionSpec:
    """Causal grouped-query self-attention.

    Args:
        num_heads: H.
        num_kv_heads: K; divides H.
        head_dim: h.
        rope: rotary positions.
        qkv_bias: whether q, k and v have a bias.
        o_bias: whether the output projection has a bias.
        qk_norm: a norm over the head dim of q and of k, before the positions; None for none.
        window: each token sees the last `window` tokens, itself among them; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec = RopeSpec()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None


@dataclass(frozen=True)
class ExpertsSpec:
    """The feed-forward layer as E experts: contiguous blocks of its F neurons, F / E each.

    Args:
        experts: E.
        router: which experts a token uses. activation: those whose neurons' activations sum highest (SciMind's design);
            activation_released: as SciMind's code computes it, see `nn.moe`; learned: by a trained linear router;
            modality: a fixed set for each modality.
        modalities: names by modality id; the first is text.
        ranges: token ids [start, stop) of each modality but text, in the order of `modalities`.
        top_k: number of experts that a token uses, by modality id.
        shared: router modality: the first `shared` experts serve every modality.
        layout: the Hugging Face layout that the model came in, and goes out in unless another is asked for: 'dense'
            (with the experts in files beside it) or 'mixtral'. It changes nothing that is computed.
    """

    experts: int
    router: str
    modalities: tuple[str, ...] = (TEXT,)
    ranges: tuple[tuple[int, int], ...] = ()
    top_k: tuple[int, ...] = ()
    shared: int = 0
    layout: str = dataclasses.field(default="dense", compare=False)


@dataclass(frozen=True)
class FeedForwardSpec:
    """down(activation(gate(x)) * up(x)), with F neurons.

    Args:
        size: F.
        activation: 'silu'.
        bias: whether its linear layers have a bias.
        experts: the F neurons divided into experts; None for a dense layer.
    """

    size: int
    activation: str = "silu"
    bias: bool = False
    experts: ExpertsSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention, then feed-forward, each behind a norm of its input."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only language model.

    Args:
        family: the key of its family (see `models.families`).
        vocab_size: V.
        hidden_size: D.
        num_layers: L.
        period: descriptions of consecutive layers, repeated until there are L layers.
        norm: of every layer, and of the last hidden states.
        tied_head: the embedding is the output matrix too.
        max_position_embeddings: number of positions that the model was trained for, before any RoPE scaling.
        initializer_range: standard deviation of fresh weights.
        bos_token_id, eos_token_id, pad_token_id: what the checkpoint says of its special tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    period: tuple[LayerSpec, ...]
    norm: NormSpec = NormSpec()
    tied_head: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
