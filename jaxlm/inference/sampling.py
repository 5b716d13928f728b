"""From logits to the next token: penalties, filters, sampling.

Each rule is transformers' (`generation/logits_process.py`) and applied in its order: repetition penalty, repeated
n-grams, temperature, top-k, top-p, min-p. Everything is a pure function of arrays with a row per text, so that rows of
one batch may have settings of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Decoding

# Top-k looks at this many candidates or a power of two times as many; k itself may change without compiling anew.
LEAST_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Method:
    """What the compiled program does; the rest are numbers in `Settings`.

    Args:
        sample: draw, instead of taking the best.
        candidates: sort and filter this many of the best; 0: no filter needs a sorted list.
        penalty: the repetition penalty is on.
        ngram: no n-gram of this size may repeat; 0 is off.
    """

    sample: bool = False
    candidates: int = 0
    penalty: bool = False
    ngram: int = 0

    @classmethod
    def of(cls, options: Decoding, vocab_size: int) -> Method:
        sample = options.temperature > 0
        candidates = 0
        if sample and options.top_k > 0:
            candidates = LEAST_CANDIDATES
            while candidates < options.top_k:
                candidates *= 2
            candidates = min(candidates, vocab_size)
        elif sample and options.top_p < 1:
            candidates = vocab_size
        return cls(sample, candidates, options.repetition_penalty != 1, options.no_repeat_ngram_size)


@flax.struct.dataclass
class Settings:
    """Numbers of each row, float32 or int32 [R].

    top_k 0 and top_p 1 are off.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, options: Decoding, rows: int) -> Settings:
        def full(value: float, dtype: Any = np.float32) -> np.ndarray:
            return np.full(rows, value, dtype)

        return cls(
            temperature=full(options.temperature or 1.0),
            top_k=full(options.top_k, np.int32),
            top_p=full(options.top_p),
            min_p=full(options.min_p),
            repetition_penalty=full(options.repetition_penalty),
        )


def penalize(
    scores: jax.Array, tokens: jax.Array, lengths: jax.Array, seen: jax.Array | None, settings: Settings, method: Method
) -> jax.Array:
    """Scores with the repetition penalty and without tokens that would repeat an n-gram.

    Args:
        scores: [R, V] float32, logits or log-probabilities.
        tokens: [R, N] int32, each row's text so far, of `lengths` [R] tokens.
        seen: [R, V] bool, the tokens of that text; None when there is no penalty.
    """
    if method.penalty:
        assert seen is not None
        penalty = settings.repetition_penalty[:, None]
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if method.ngram:
        scores = jnp.where(_repeating(tokens, lengths, method.ngram, scores.shape[1]), -jnp.inf, scores)
    return scores


def _repeating(tokens: jax.Array, lengths: jax.Array, size: int, vocab_size: int) -> jax.Array:
    """[R, V]: the tokens that followed an earlier occurrence of the last size - 1 tokens."""
    rows, room = tokens.shape
    behind = jnp.arange(room)
    # An n-gram ends at e when tokens[e - size + 1 .. e - 1] are the text's last ones; e itself must be in the text.
    match = (behind[None] >= size - 1) & (behind[None] < lengths[:, None]) & (lengths[:, None] >= size - 1)
    for back in range(1, size):
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0)[:, None], axis=1)
        match = match & (jnp.roll(tokens, back, axis=1) == last)
    banned = jnp.zeros((rows, vocab_size), bool)
    return banned.at[jnp.arange(rows)[:, None], tokens].max(match, mode="drop")


def filtered(logits: jax.Array, settings: Settings, method: Method) -> tuple[jax.Array, jax.Array | None]:
    """Logits after temperature, top-k, top-p and min-p; what is filtered out is -inf.

    Returns:
        ([R, C], the tokens [R, C] they belong to), or ([R, V], None) when nothing had to be sorted.
    """
    scaled = logits / settings.temperature[:, None]
    ids = None
    if method.candidates:
        scaled, ids = jax.lax.top_k(scaled, method.candidates)
        rank = jnp.arange(method.candidates)[None]
        top_k = settings.top_k[:, None]
        scaled = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, scaled)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        better = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The best one always stays; top_p 1 must not lose the last ones to rounding.
        top_p = settings.top_p[:, None]
        scaled = jnp.where((better < top_p) | (top_p >= 1) | (rank == 0), scaled, -jnp.inf)
    largest = jnp.max(scaled, axis=-1, keepdims=True)
    # p < min_p * p_max, without the softmax.
    return jnp.where(scaled < largest + jnp.log(settings.min_p[:, None]), -jnp.inf, scaled), ids


def choose(logits: jax.Array, keys: jax.Array, counts: jax.Array, settings: Settings, method: Method) -> jax.Array:
    """The next token of each row, int32 [R].

    Args:
        logits: [R, V] float32, penalties applied.
        keys: [R, 2] uint32 key data; row and step alone decide what is drawn, not the batch.
        counts: [R] int32, how many tokens the row has been given.
    """
    if not method.sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores, ids = filtered(logits, settings, method)

    def draw(key: jax.Array, count: jax.Array, scores: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), count), scores)

    drawn = jax.vmap(draw)(keys, counts, scores)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]
    return drawn.astype(jnp.int32)


def row_keys(seed: int, numbers: Sequence[int], samples: int) -> np.ndarray:
    """Key data [len(numbers) * samples, 2] uint32: of each prompt, by its number, and of each of its samples."""
    return np.array(
        [
            np.random.SeedSequence([seed, number, sample]).generate_state(2)
            for number in numbers
            for sample in range(samples)
        ],
        np.uint32,
    )
