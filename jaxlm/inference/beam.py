"""Beam search with the rules of transformers' `GenerationMixin._beam_search`, so that it finds the same texts.

Each prompt has n running beams and keeps the n best complete answers. Shapes: B prompts, n beams, C candidates of a
step, N room for tokens, V vocabulary; rows of the model are B * n.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.sampling import Method, Settings, penalize
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Caches, Weights, continued, gathered, next_logits
from jaxlm.nn.beam_attention import Lineage

WORST = -1e9  # transformers' score of what must not be chosen; finite, so that two of them still compare


@dataclasses.dataclass(frozen=True)
class Beams:
    """Settings of the search that the compiled program depends on."""

    beams: int
    early_stopping: bool | Literal["never"]
    num_stop_ids: int

    @property
    def candidates(self) -> int:
        """Continuations looked at in a step: enough to go on with n beams when the others end."""
        return max(2, 1 + self.num_stop_ids) * self.beams


@flax.struct.dataclass
class BeamState:
    """The search, for each of B prompts.

    Attributes:
        tokens: [B, n, N] int32, running texts, prompt included.
        scores: [B, n] float32, their summed log-probabilities.
        lengths: [B] int32, tokens of the running texts.
        starts, limits: [B] int32, tokens of the prompt; most tokens of prompt and answer.
        done_tokens: [B, n, N] int32, the best complete texts, and what they are worth:
        done_scores: [B, n] float32, after the length penalty.
        done_lengths: [B, n] int32.
        complete: [B, n] bool, which of them are complete answers.
        finished: [B] bool, the search has ended.
        seen: [B * n, V] bool, tokens of the running texts; None without a repetition penalty.
    """

    tokens: Any
    scores: Any
    lengths: Any
    starts: Any
    limits: Any
    done_tokens: Any
    done_scores: Any
    done_lengths: Any
    complete: Any
    finished: Any
    seen: Any


def new_beams(
    prompts: list[list[int]], limits: list[int], room: int, beams: int, vocab_size: int, method: Method
) -> BeamState:
    """The state before the first token; arguments as those of `decode.new_state`."""
    count = len(prompts)
    tokens = np.zeros((count, beams, room), np.int32)
    scores = np.full((count, beams), WORST, np.float32)
    scores[:, 0] = 0.0  # all beams are alike so far: let one of them count
    for row, prompt in enumerate(prompts):
        tokens[row, :, : len(prompt)] = prompt
    lengths = np.array([max(1, len(prompt)) for prompt in prompts], np.int32)
    seen = None
    if method.penalty:
        seen = np.zeros((count * beams, vocab_size), bool)
        for row, prompt in enumerate(prompts):
            seen[row * beams : (row + 1) * beams, prompt] = True
    return BeamState(
        tokens=tokens,
        scores=scores,
        lengths=lengths,
        starts=lengths.copy(),
        limits=np.array(limits, np.int32),
        done_tokens=tokens.copy(),
        done_scores=np.full((count, beams), WORST, np.float32),
        done_lengths=np.zeros((count, beams), np.int32),
        complete=np.zeros((count, beams), bool),
        finished=np.array([not prompt for prompt in prompts]),
        seen=seen,
    )


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, m, ...] at index [B, k]: [B, k, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


@partial(jax.jit, static_argnames=("method", "beams"), donate_argnums=1)
def advance(
    logits: jax.Array,
    state: BeamState,
    settings: Settings,
    stops: jax.Array,
    length_penalty: jax.Array,
    *,
    method: Method,
    beams: Beams,
) -> tuple[BeamState, jax.Array]:
    """One step of the search.

    Args:
        logits: [B * n, V] float32 of the running beams.

    Returns:
        The state, and for each row of the caches [B * n] the row it now continues.
    """
    count, n = state.scores.shape
    vocab_size = logits.shape[-1]
    rows = state.tokens.reshape(count * n, -1)
    lengths = jnp.repeat(state.lengths, n)
    log_probs = penalize(jax.nn.log_softmax(logits, axis=-1), rows, lengths, state.seen, settings, method)
    totals = log_probs.reshape(count, n, vocab_size) + state.scores[..., None]
    best_totals, index = jax.lax.top_k(totals.reshape(count, n * vocab_size), beams.candidates)
    parents, new = index // vocab_size, (index % vocab_size).astype(jnp.int32)

    texts = _pick(state.tokens, parents)
    position = jnp.broadcast_to(state.lengths[:, None, None], (*parents.shape, 1))
    texts = jnp.put_along_axis(texts, position, new[..., None], axis=2, inplace=False, mode="drop")
    ended = jnp.isin(new, stops) | (state.lengths + 1 >= state.limits)[:, None]

    # Those that go on: the n best that have not ended.
    going = best_totals + ended * WORST
    kept = jax.lax.top_k(going, n)[1]
    # Those that have ended compete with the answers found before, if they are among the n best of this step.
    worth = best_totals / (state.lengths + 1 - state.starts)[:, None].astype(jnp.float32) ** length_penalty
    if beams.early_stopping is True:
        worth += jnp.all(state.complete, axis=1, keepdims=True) * WORST
    answers = ended & (jnp.arange(beams.candidates) < n)[None]
    worth += ~answers * WORST
    done_scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, worth], axis=1), n)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return _pick(jnp.concatenate([old, new], axis=1), best)

    parents_kept = _pick(parents, kept)
    lengths_now = jnp.broadcast_to((state.lengths + 1)[:, None], parents.shape)
    seen = state.seen
    origin = (jnp.arange(count)[:, None] * n + parents_kept).reshape(-1)
    if method.penalty:
        seen = seen[origin].at[jnp.arange(count * n), _pick(new, kept).reshape(-1)].set(True)
    after: BeamState = state.replace(  # type: ignore[attr-defined]
        tokens=_pick(texts, kept),
        scores=_pick(going, kept),
        lengths=state.lengths + 1,
        done_tokens=merged(state.done_tokens, texts),
        done_scores=done_scores,
        done_lengths=merged(state.done_lengths, lengths_now),
        complete=merged(state.complete, answers),
        seen=seen,
    )
    over = ~_hopeful(after, length_penalty, beams) | jnp.all(ended, axis=1)
    if beams.early_stopping is True:
        over = over | jnp.all(after.complete, axis=1)
    after = after.replace(finished=over)  # type: ignore[attr-defined]

    # A search that has ended stays as it was.
    def hold(old: Any, new: Any) -> Any:
        done = jnp.repeat(state.finished, old.shape[0] // count)
        return jnp.where(done.reshape(-1, *(1,) * (old.ndim - 1)), old, new)

    return jax.tree.map(hold, state, after), hold(jnp.arange(count * n), origin)


def _hopeful(state: BeamState, length_penalty: jax.Array, beams: Beams) -> jax.Array:
    """Whether the best running beam could still beat the worst of the complete answers."""
    length = (state.lengths - state.starts).astype(jnp.float32)
    if beams.early_stopping == "never":
        # The longest answer has the best chance when length is rewarded.
        longest = (state.limits - state.starts).astype(jnp.float32)
        length = jnp.where(length_penalty > 0, longest, length)
    possible = state.scores[:, 0] / length**length_penalty
    worst = jnp.where(state.complete, jnp.min(state.done_scores, axis=1, keepdims=True), WORST)
    return jnp.any(possible[:, None] > worst, axis=1)


@partial(jax.jit, static_argnums=0, static_argnames=("method", "beams"), donate_argnums=(2, 3))
def search(
    decoder: Decoder,
    weights: Weights,
    caches: Caches,
    state: BeamState,
    settings: Settings,
    stops: jax.Array,
    length_penalty: jax.Array,
    steps: jax.Array,
    *,
    method: Method,
    beams: Beams,
) -> tuple[Caches, BeamState]:
    """Up to `steps` steps of the search; the counterpart of `decode.step`."""

    def unfinished(carry: Any) -> jax.Array:
        step, *_, state = carry
        return (step < steps) & ~jnp.all(state.finished)

    def one_more(carry: Any) -> Any:
        step, caches, lineage, state = carry
        last = jnp.repeat(state.lengths - 1, beams.beams)
        rows = state.tokens.reshape(len(last), -1)
        lineage = lineage.written(last)
        logits, caches = next_logits(decoder, weights, caches, rows[jnp.arange(len(last)), last], last, lineage)
        state, origin = advance(logits, state, settings, stops, length_penalty, method=method, beams=beams)
        return step + 1, continued(decoder, caches, origin), lineage.continued(origin), state

    count, _, slots, _ = caches[0][0].shape
    start = jnp.int32(0), caches, Lineage.new(count, slots, beams.beams), state
    _, caches, lineage, state = jax.lax.while_loop(unfinished, one_more, start)
    return gathered(decoder, caches, lineage), state
