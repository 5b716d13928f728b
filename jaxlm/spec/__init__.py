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

from jaxlm.spec.decoder import (
    ENCODER,
    DecoderSpec,
    EncoderSpec,
    Stack,
    differences,
    flatten,
    is_stacked,
    uniform_decoder,
)
from jaxlm.spec.layers import (
    ROUTERS,
    TEXT,
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
)
from jaxlm.spec.positions import (
    DEFAULT_THETA,
    ROPE_TYPES,
    LearnedPositionsSpec,
    PrefixSpec,
    RelativeBiasSpec,
    RopeSpec,
)

__all__ = [
    "DEFAULT_THETA",
    "ENCODER",
    "ROPE_TYPES",
    "ROUTERS",
    "TEXT",
    "AttentionSpec",
    "DecoderSpec",
    "EncoderSpec",
    "ExpertsSpec",
    "FeedForwardSpec",
    "LayerSpec",
    "LearnedPositionsSpec",
    "NormSpec",
    "PrefixSpec",
    "RelativeBiasSpec",
    "RopeSpec",
    "Stack",
    "differences",
    "flatten",
    "is_stacked",
    "uniform_decoder",
]
