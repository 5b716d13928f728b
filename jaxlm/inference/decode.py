"""The decoding step as pure functions: rows take up prompts, all rows are given tokens, on the device.

R rows of the batch, N room for tokens, V vocabulary, S slots of a cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.sampling import Method, Settings, choose, penalize
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Caches, Weights, next_logits


@flax.struct.dataclass
class State:
    """Texts that are being generated, a row each.

    Attributes:
        tokens: [R, N] int32: the prompt, then the new tokens; anything behind them.
        lengths: [R] int32: tokens of prompt and answer.
        starts: [R] int32: tokens of the prompt.
        limits: [R] int32: a row ends when it has this many tokens.
        finished: [R] bool: the row is free, or has ended by a stop id, its limit or from outside.
        keys: [R, 2] uint32: random keys.
        seen: [R, V] bool: tokens that stand in the text; None without a repetition penalty.
        log_probs: [R, N] float32: of the new tokens, by the model's logits as they are; None where nobody asks.
    """

    tokens: Any
    lengths: Any
    starts: Any
    limits: Any
    finished: Any
    keys: Any
    seen: Any
    log_probs: Any = None


def new_state(
    prompts: list[list[int]],
    limits: list[int],
    room: int,
    keys: np.ndarray,
    vocab_size: int,
    method: Method,
    log_probs: bool = False,
) -> State:
    """The state before the first new token, in NumPy arrays.

    Args:
        prompts: token ids of each row; an empty one is a row that only fills up the batch.
        limits: most tokens, prompt and answer, of each row.
        room: N, at least every limit.
        keys: [R, 2] uint32.
        log_probs: note those of the new tokens.
    """
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([max(1, len(prompt)) for prompt in prompts], np.int32)
    seen = None
    if method.penalty:
        seen = np.zeros((len(prompts), vocab_size), bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
    finished = np.array([not prompt for prompt in prompts])
    noted = np.zeros(tokens.shape, np.float32) if log_probs else None
    return State(tokens, lengths, lengths.copy(), np.array(limits, np.int32), finished, keys, seen, noted)


@partial(jax.jit, static_argnames="method", donate_argnums=1)
def append(logits: jax.Array, state: State, settings: Settings, *, method: Method) -> State:
    """The state with one more token in each row that is not finished.

    Args:
        logits: [R, V] float32 after each row's last token.
        settings: of each row; a stop id ends its text and is appended too.
    """
    scores = penalize(logits, state.tokens, state.lengths, state.seen, settings, method)
    chosen = choose(scores, state.keys, state.lengths - state.starts, settings, method)
    rows = jnp.arange(len(chosen))
    # A finished row is given nothing: its position is out of bounds, and dropped.
    position = jnp.where(state.finished, state.tokens.shape[1], state.lengths)
    lengths = jnp.where(state.finished, state.lengths, state.lengths + 1)
    seen = state.seen
    if method.penalty:
        seen = seen.at[rows, jnp.where(state.finished, scores.shape[1], chosen)].set(True, mode="drop")
    log_probs = state.log_probs
    if log_probs is not None:
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
        log_probs = log_probs.at[rows, position].set(picked, mode="drop")
    stopped = jnp.any(chosen[:, None] == settings.stop_ids, axis=1)
    new: State = state.replace(  # type: ignore[attr-defined]
        tokens=state.tokens.at[rows, position].set(chosen, mode="drop"),
        lengths=lengths,
        finished=state.finished | (lengths >= state.limits) | stopped,
        seen=seen,
        log_probs=log_probs,
    )
    return new


@partial(jax.jit, static_argnums=0, static_argnames="method", donate_argnums=(2, 3))
def step(
    decoder: Decoder,
    weights: Weights,
    caches: Caches,
    state: State,
    settings: Settings,
    steps: jax.Array,
    *,
    method: Method,
) -> tuple[Caches, State]:
    """Appends up to `steps` tokens to each row, and ends early when all rows are finished.

    The caches hold all but the last token of each row, and must have a slot for every token there will be.
    """
    rows = jnp.arange(state.lengths.shape[0])

    def unfinished(carry: Any) -> jax.Array:
        count, _, state = carry
        return (count < steps) & ~jnp.all(state.finished)

    def one_more(carry: Any) -> Any:
        count, caches, state = carry
        last = state.lengths - 1
        logits, caches = next_logits(decoder, weights, caches, state.tokens[rows, last], last)
        return count + 1, caches, append(logits, state, settings, method=method)

    _, caches, state = jax.lax.while_loop(unfinished, one_more, (jnp.int32(0), caches, state))
    return caches, state


@partial(jax.jit, donate_argnums=0)
def admit(state: State, new: State, rows: jax.Array) -> State:
    """The state with the rows of `new` in `rows`; the other rows stay as they are.

    Args:
        new: n rows with the same N; whether tokens are `seen` is noted in both or in neither.
        rows: [n] int32; a row of `new` whose number is R or more is left out.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    admitted: State = jax.tree.map(put, state, new)
    return admitted
