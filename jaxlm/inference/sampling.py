"""From logits to the next token: penalties, filters, sampling.

Each rule is transformers' (`generation/logits_process.py`) and applied in its order: repetition penalty, repeated
n-grams, temperature, top-k, top-p, min-p. Everything is a pure function of arrays with a row per text, so that rows of
one batch may have settings of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Decoding

# Top-k looks at this many candidates or a power of two times as many; k itself may change without compiling anew.
LEAST_CANDIDATES = 64
# Where all tokens are to be sorted, this many of the best are looked at first: a nucleus seldom has more of a trained
# model's tokens. Sums of probabilities that are nearer to top_p than MARGIN may be rounded to its other side.
LEADING = 1024
MARGIN = 1e-5
# Codes of `Settings.draw`; above them: how many of the best candidates are sorted and filtered.
GREEDY = -1
UNSORTED = 0


@dataclasses.dataclass(frozen=True)
class Method:
    """What the compiled program of a batch can do; which row needs what is a number in `Settings`.

    The program computes each way of drawing for all rows and takes each row's own. So a row's token does not depend
    on the settings of its neighbours.

    Args:
        draws: the codes that rows have, ascending: GREEDY, UNSORTED, or a number of sorted candidates.
        penalty: some row has a repetition penalty.
        ngrams: sizes of n-grams that must not repeat in some row.
    """

    draws: tuple[int, ...] = (GREEDY,)
    penalty: bool = False
    ngrams: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: Decoding, vocab_size: int) -> Method:
        """What one text needs."""
        draw = GREEDY
        if options.temperature > 0 and options.top_k > 0:
            draw = LEAST_CANDIDATES
            while draw < options.top_k:
                draw *= 2
            draw = min(draw, vocab_size)
        elif options.temperature > 0:
            draw = vocab_size if options.top_p < 1 else UNSORTED
        ngrams = (options.no_repeat_ngram_size,) if options.no_repeat_ngram_size else ()
        return cls((draw,), options.repetition_penalty != 1, ngrams)

    def __or__(self, other: Method) -> Method:
        """What a batch needs that holds rows of both."""

        def both(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted({*mine, *theirs}))

        return Method(both(self.draws, other.draws), self.penalty or other.penalty, both(self.ngrams, other.ngrams))


@flax.struct.dataclass
class Settings:
    """How each of R rows is decoded.

    Attributes:
        draw: [R] int32, see `Method.draws`.
        temperature, top_p, min_p, repetition_penalty: [R] float32; top_p 1, min_p 0 and repetition_penalty 1 are off.
        top_k: [R] int32; 0 is off.
        ngram: [R] int32, size of n-grams that must not repeat; 0 is off.
        stop_ids: [R, n] int32, tokens that end the text; -1 fills up.
    """

    draw: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    ngram: Any
    stop_ids: Any

    @classmethod
    def of(cls, options: Decoding, rows: int, vocab_size: int, stop_ids: Sequence[int] = ()) -> Settings:
        """The same settings for each of `rows` rows, in NumPy arrays."""

        def full(value: float, dtype: Any = np.float32) -> np.ndarray:
            return np.full(rows, value, dtype)

        return cls(
            draw=full(Method.of(options, vocab_size).draws[0], np.int32),
            temperature=full(options.temperature or 1.0),
            top_k=full(options.top_k, np.int32),
            top_p=full(options.top_p),
            min_p=full(options.min_p),
            repetition_penalty=full(options.repetition_penalty),
            ngram=full(options.no_repeat_ngram_size, np.int32),
            stop_ids=np.tile(np.array(sorted(set(stop_ids)), np.int32), (rows, 1)),
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
    for size in method.ngrams:
        banned = _repeating(tokens, lengths, size, scores.shape[1]) & (settings.ngram == size)[:, None]
        scores = jnp.where(banned, -jnp.inf, scores)
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


def filtered(logits: jax.Array, settings: Settings, candidates: int) -> tuple[jax.Array, jax.Array | None]:
    """Logits after temperature, top-k, top-p and min-p; what is filtered out is -inf.

    Args:
        logits: [R, V] float32.
        candidates: C, the number of best tokens that top-k and top-p look at; UNSORTED: no row has either.

    Returns:
        ([R, C], the tokens [R, C] they belong to), or ([R, V], None) when nothing had to be sorted.
    """
    scaled = logits / settings.temperature[:, None]
    ids = None
    if candidates:
        scaled, ids = jax.lax.top_k(scaled, candidates)
        rank = jnp.arange(candidates)[None]
        top_k = settings.top_k[:, None]
        scaled = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, scaled)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        better = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The best one always stays; top_p 1 must not lose the last ones to rounding.
        top_p = settings.top_p[:, None]
        scaled = jnp.where((better < top_p) | (top_p >= 1) | (rank == 0), scaled, -jnp.inf)
    return _above_min_p(scaled, settings), ids


def leading(logits: jax.Array, settings: Settings, candidates: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best of `filtered` with all tokens sorted, without sorting all.

    Returns:
        Scores [R, C] and tokens [R, C] as `filtered` has them first; and [R] bool, whether all that it leaves is among
        them for certain. Where it is not, scores may be others.
    """
    scaled = logits / settings.temperature[:, None]
    best, ids = jax.lax.top_k(scaled, candidates)
    rank = jnp.arange(candidates)[None]
    top_k, top_p = settings.top_k[:, None], settings.top_p[:, None]
    best = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, best)
    # Not its first column: behind a second slice, XLA no longer sees that few are asked for, and sorts all.
    largest = jnp.max(best, axis=-1, keepdims=True)
    weights = jnp.exp(best - largest)
    total = jnp.where(top_k > 0, jnp.sum(weights, axis=-1, keepdims=True), _sum_of_exp(scaled - largest))
    probabilities = weights / total
    sums = jnp.cumsum(probabilities, axis=-1)
    better = sums - probabilities
    has_all = jnp.where(top_k > 0, top_k <= candidates, sums[:, -1:] > top_p + MARGIN)
    is_clear = (jnp.abs(better - top_p) > MARGIN) | (top_p >= 1) | (rank == 0)
    best = jnp.where((better < top_p) | (top_p >= 1) | (rank == 0), best, -jnp.inf)
    return _above_min_p(best, settings), ids, has_all[:, 0] & jnp.all(is_clear, axis=-1)


def _sum_of_exp(scores: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(scores), axis=-1, keepdims=True)


def _above_min_p(scaled: jax.Array, settings: Settings) -> jax.Array:
    largest = jnp.max(scaled, axis=-1, keepdims=True)
    # p < min_p * p_max, without the softmax.
    return jnp.where(scaled < largest + jnp.log(settings.min_p[:, None]), -jnp.inf, scaled)


def choose(logits: jax.Array, keys: jax.Array, counts: jax.Array, settings: Settings, method: Method) -> jax.Array:
    """The next token of each row, int32 [R].

    Args:
        logits: [R, V] float32, penalties applied.
        keys: [R, 2] uint32 key data; row and step alone decide what is drawn, not the batch.
        counts: [R] int32, how many tokens the row has been given.
    """
    chosen: jax.Array | None = None
    for draw in method.draws:
        if draw == GREEDY:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            tokens = _drawn(logits, keys, counts, settings, draw)
        chosen = tokens if chosen is None else jnp.where(settings.draw == draw, tokens, chosen)
    assert chosen is not None, "a method has at least one way to draw"
    return chosen


def _drawn(logits: jax.Array, keys: jax.Array, counts: jax.Array, settings: Settings, candidates: int) -> jax.Array:
    def draw(key: jax.Array, count: jax.Array, scores: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), count), scores)

    def drawn(scores: jax.Array, ids: jax.Array | None) -> jax.Array:
        tokens = jax.vmap(draw)(keys, counts, scores)
        if ids is not None:
            tokens = jnp.take_along_axis(ids, tokens[:, None], axis=1)[:, 0]
        return tokens.astype(jnp.int32)

    def among_all() -> jax.Array:
        return drawn(*filtered(logits, settings, candidates))

    if candidates < 4 * LEADING:
        return among_all()
    # The same token either way: a row's random numbers go by rank, and do not depend on how many there are.
    scores, ids, is_certain = leading(logits, settings, LEADING)
    is_enough = jnp.all(is_certain | (settings.draw != candidates))
    return cast(jax.Array, jax.lax.cond(is_enough, lambda: drawn(scores, ids), among_all))


def choose_any(logits: jax.Array, keys: jax.Array, counts: jax.Array, settings: Settings) -> jax.Array:
    """As `choose`, in one program for all ways of drawing; those that no row uses are skipped when it runs.

    Args:
        settings: `draw` is one of `draw_codes`.
    """
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    for code in draw_codes(logits.shape[1])[1:]:
        drawn = partial(_drawn, candidates=code)
        wanted = settings.draw == code
        chosen = jax.lax.cond(
            jnp.any(wanted),
            lambda chosen, wanted=wanted, drawn=drawn: jnp.where(wanted, drawn(logits, keys, counts, settings), chosen),
            lambda chosen: chosen,
            chosen,
        )
    return chosen


def draw_codes(vocab_size: int) -> tuple[int, ...]:
    """The codes of `choose_any`: a few candidates are sorted, or all tokens."""
    return tuple(dict.fromkeys((GREEDY, UNSORTED, min(LEAST_CANDIDATES, vocab_size), vocab_size)))


def adjusted(
    logits: jax.Array,
    counts: jax.Array,
    prompt: jax.Array,
    bias: jax.Array,
    settings: Settings,
    frequency: jax.Array,
    presence: jax.Array,
) -> jax.Array:
    """Logits [R, V] with the repetition penalty, then OpenAI's penalties and bias, as its API reference has them.

    Args:
        counts: [R, V] int32, how often the answer holds each token.
        prompt: [R, V] bool, whether the prompt holds it.
        bias: [R, V] float32.
        frequency, presence: [R] float32, taken off for each time that the answer holds a token, and once.
    """
    used = counts > 0
    penalty = settings.repetition_penalty[:, None]
    logits = jnp.where(used | prompt, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    return logits - counts * frequency[:, None] - used * presence[:, None] + bias


def row_keys(seed: int, numbers: Sequence[int], samples: int) -> np.ndarray:
    """Key data [len(numbers) * samples, 2] uint32: each prompt's, by its number, and each of its samples'."""
    return np.array(
        [
            np.random.SeedSequence([seed, number, sample]).generate_state(2)
            for number in numbers
            for sample in range(samples)
        ],
        np.uint32,
    )
