"""What a model answers: logits of a few rows of tokens, calculated in float32 one layer at a time.

A layer is read, used and dropped, so models of any size can be compared in little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.weights.leaves import ParamSource

# Rows of the output matrix that are multiplied at a time.
_HEAD_ROWS = 8192


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two models agree.

    Args:
        max_abs: largest difference between two logits.
        kl: mean over tokens of KL(first || second) of the next-token distributions, in nats.
        max_kl: the largest of these.
        top1: share of tokens for which both models find the same next token most likely.
        tokens: number of tokens compared.
    """

    max_abs: float
    kl: float
    max_kl: float
    top1: float
    tokens: int


def logits(source: ParamSource, input_ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32 of token ids [B, T]."""
    import jax
    import jax.numpy as jnp

    from jaxlm.models.decoder import Block, RMSNorm
    from jaxlm.nn.attention import MaskSpec
    from jaxlm.nn.positions import rope_cos_sin

    config = source.config
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    cos, sin = rope_cos_sin(config, positions)
    block = Block(config, {}, jnp.float32, jnp.float32, "xla", True)

    @jax.jit
    def run_layer(params: Any, x: jax.Array) -> jax.Array:
        result: jax.Array = block.apply(
            {"params": params}, x, jnp.int32(0), cos, sin, MaskSpec(window=config.attention.window)
        )[0]
        return result

    table = np.stack([source.read("embed_tokens/embedding", (slice(i, i + 1),))[0] for i in input_ids.ravel()])
    with jax.default_matmul_precision("highest"):
        x = jnp.asarray(table.astype(np.float32).reshape(*input_ids.shape, -1))
        for layer in range(config.num_layers):
            x = run_layer(layer_params(source, layer), x)
        norm = RMSNorm(config.norm.eps, jnp.float32, jnp.float32)
        scale = source.read("norm/scale", ()).astype(np.float32)
        hidden = np.asarray(norm.apply({"params": {"scale": scale}}, x))
    return np.concatenate([hidden @ rows.T for rows in _head_rows(source)], axis=-1)


def layer_params(source: ParamSource, layer: int) -> dict[str, Any]:
    """The parameters of one layer as `models.decoder.Block` takes them, in float32."""
    tree: dict[str, Any] = {}
    for path in source.leaves:
        first, *inner, name = path.split("/")
        if first == "layers":
            node = tree
            for part in inner:
                node = node.setdefault(part, {})
            node[name] = source.read(path, (slice(layer, layer + 1),))[0].astype(np.float32)
    return tree


def _head_rows(source: ParamSource) -> Iterator[np.ndarray]:
    path = "embed_tokens/embedding" if source.config.tied_head else "lm_head/kernel"
    for start in range(0, source.config.vocab_size, _HEAD_ROWS):
        stop = min(start + _HEAD_ROWS, source.config.vocab_size)
        yield source.read(path, (slice(start, stop),)).astype(np.float32)


def random_tokens(vocab_size: int, rows: int = 4, length: int = 32, seed: int = 0) -> np.ndarray:
    """Token ids [rows, length], always the same."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length), np.int32)


def agreement(first: np.ndarray, second: np.ndarray) -> Agreement:
    """Compares logits [..., V] of the tokens that both models have."""
    size = min(first.shape[-1], second.shape[-1])
    a, b = (x[..., :size].astype(np.float64).reshape(-1, size) for x in (first, second))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0)
    top1 = float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
    return Agreement(float(np.abs(a - b).max()), float(kl.mean()), float(kl.max()), top1, len(a))
