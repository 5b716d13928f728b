"""How far two models agree: logits of a few rows of tokens, calculated in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxlm.models import streamed
from jaxlm.weights.leaves import ParamSource


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
    """Logits [B, T, V] float32 of token ids [B, T], one layer's weights in memory at a time."""
    return streamed.logits(source.config, source.read, input_ids)


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
