"""Reading the source for generation: the encoder once, then each layer's keys and values of its states once.

Training goes through `Decoder.hidden`, which has an encoder where its spec has one. While an answer is written the
decoder's layers attend to the keys and values made here, and all beams or samples of a source share them.

Shapes: P sources, S their length, R rows of the decoder, D model, K kv heads, h head dim, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Caches, Weights, extend
from jaxlm.nn.cross_attention import Source


def read_sources(
    decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array, slots: int
) -> tuple[jax.Array, Caches]:
    """Reads sources, and the token that every text of the decoder begins with: the counterpart of `unrolled.prefill`.

    Args:
        tokens: [P, S] int32, each row padded at its end.
        lengths: [P] int32, at least 1.
        slots: of the decoder's caches, at least 1.

    Returns:
        Logits [P, V] float32 of the first token of each answer, and the caches.
    """
    assert decoder.spec.encoder is not None
    caches = source_caches(decoder, weights, tokens, lengths, slots)
    start = jnp.full_like(tokens[:, :1], decoder.spec.encoder.start_token_id)
    return extend(decoder, weights, caches, start, jnp.zeros_like(lengths), jnp.ones_like(lengths))


def source_caches(decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array, slots: int) -> Caches:
    """The caches of decoders that have read sources and begin to write; arguments as those of `read_sources`."""
    states, segment_ids = encoder_states(decoder, weights, tokens, lengths)
    caches: Caches = []
    for number, (layer, lora) in enumerate(zip(weights["params"]["layers"], weights["lora"], strict=True)):
        p = number % len(decoder.spec.period)
        k, v, keys, values = _layer_caches(decoder, p, layer, lora, number, states, slots)
        # Caches are given up to functions as a whole: each layer has an array of its own.
        caches.append((k, v, Source(jnp.copy(segment_ids), None, keys, values)))
    return caches


def encoder_states(
    decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the encoder gives of sources, [P, S, D], and their segment ids, [P, S] int32: 0 in the padding."""
    params = weights["params"]
    parts = {name: params[name] for name in ("embed_tokens", "embed_norm", "encoder") if name in params}
    lora = weights.get("encoder_lora")
    return _encode(decoder, {"params": parts} | ({"lora": {"encoder": lora}} if lora else {}), tokens, lengths)


@partial(jax.jit, static_argnums=0)
def _encode(decoder: Decoder, variables: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    states = cast(jax.Array, decoder.clone(remat="none").apply(variables, tokens, segment_ids, method="encode"))
    return states, segment_ids


@partial(jax.jit, static_argnums=(0, 1, 6))
def _layer_caches(
    decoder: Decoder, period_index: int, layer: Any, lora: Any, number: jax.Array, states: jax.Array, slots: int
) -> tuple[jax.Array, ...]:
    """A layer's caches: empty ones [P, K, slots, h] of its own text, and its keys and values [P, K, S, h]."""
    variables = {"params": layer, "lora": lora} if lora else {"params": layer}
    block, attention = decoder.block(period_index), decoder.spec.period[period_index].attention
    keys, values = cast(Any, block.apply(variables, states, number, method="source_keys"))
    shape = states.shape[0], attention.num_kv_heads, slots, attention.head_dim
    axes = ("batch", "kv_heads", None, None)
    empty = (jnp.zeros(shape, states.dtype) for _ in range(2))
    k, v, keys, values = (nn.with_logical_constraint(x, axes) for x in (*empty, keys, values))
    return k, v, keys, values
