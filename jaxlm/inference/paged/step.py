"""The serving engine's programs as pure functions: one token for each text, and a few chunks of prompts beside them.

R rows, each a text in progress; Q chunks of C tokens; P pages of a text, M in all; V vocabulary; N = R + Q C tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.sampling import Settings, adjusted, choose_any
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Caches, Weights, head_params, next_states, padded_tokens

# The most alternatives to a token whose log-probabilities are given (OpenAI's limit).
TOP = 20


@flax.struct.dataclass
class RowState:
    """What the device keeps of each row.

    Attributes:
        last: [R] int32, the newest token.
        counts: [R, V] int32, how often the answer holds each token; of rows without penalties anything.
        prompt: [R, V] bool, the tokens of the prompt; likewise.
        bias: [R, V] float32, added to logits; likewise.
    """

    last: Any
    counts: Any
    prompt: Any
    bias: Any


@flax.struct.dataclass
class RowSettings:
    """How each row is decoded; it changes when a row is taken up.

    Attributes:
        settings: temperature and so on; sizes of n-grams and stop ids are not read here.
        keys: [R, 2] uint32.
        frequency, presence: [R] float32, penalties.
        adjusted: [R] bool: the row has a penalty or a bias.
        logprobs: [R] bool: log-probabilities are wanted.
    """

    settings: Settings
    keys: Any
    frequency: Any
    presence: Any
    adjusted: Any
    logprobs: Any


@flax.struct.dataclass
class Plan:
    """What one step computes.

    Attributes:
        tables: [R, P] int32, pages of each text.
        places: [R] int32, where each row's newest token stands; -1: the row is not given a token by it.
        picks: [R] int32, index among the N tokens of the one behind which the row's next token comes; -1: none.
        numbers: [R] int32, how many tokens the answer has.
        chunks: [Q, C] int32, tokens of prompts.
        chunk_rows, chunk_starts, chunk_lengths: [Q] int32.
        targets: [Q, C] int32, the tokens behind those of the chunks.
        wants_prompt: bool: log-probabilities of the targets are wanted.
        constrained: [R] bool; such a row chooses among `allowed`.
        allowed: [R, ceil(V / 32)] uint32, a bit for each token.
        adapters: [R] int32, what each row's tokens choose (see `nn.linear.AdapterBank`).
        given: [R] int32, a token that the host knows: a row's newest one, or a guess that stands in a row without a
            text; -1: the newest one as the device has it. None: nobody guesses.
        owners: [R] int32, the row whose settings a row has: a guess has those of its text. None: nobody guesses.
    """

    tables: Any
    places: Any
    picks: Any
    numbers: Any
    chunks: Any
    chunk_rows: Any
    chunk_starts: Any
    chunk_lengths: Any
    targets: Any
    wants_prompt: Any
    constrained: Any
    allowed: Any
    adapters: Any
    given: Any = None
    owners: Any = None


# Fields of a plan that have a number, or a list of them, for each row.
BY_ROW = ("tables", "places", "picks", "numbers", "constrained", "allowed", "adapters", "given", "owners")


@flax.struct.dataclass
class Scores:
    """Log-probabilities of tokens [...], float32, and of the best ones in their place [..., TOP], the best first."""

    chosen: Any
    top: Any
    top_ids: Any


def step(
    decoder: Decoder, weights: Weights, pages: Caches, state: RowState, rows: RowSettings, plan: Plan
) -> tuple[Caches, RowState, jax.Array, Scores, Scores]:
    """Reads the tokens of a plan and chooses the next ones.

    Returns:
        Pages and state; the tokens chosen [R] and their scores; scores of the targets [Q, C].
    """
    count, vocab_size = plan.places.shape[0], decoder.spec.vocab_size
    at = jnp.arange(plan.chunks.shape[1])
    chunk_places = jnp.where(at < plan.chunk_lengths[:, None], plan.chunk_starts[:, None] + at, -1)
    newest, guesses = state.last, plan.given is not None
    if guesses:
        newest = jnp.where(plan.given >= 0, plan.given, newest)
        rows = jax.tree.map(lambda leaf: leaf[plan.owners], rows)
    tokens = jnp.concatenate([newest, plan.chunks.reshape(-1)])
    places = jnp.concatenate([plan.places, chunk_places.reshape(-1)])
    chosen = jnp.concatenate([plan.adapters, jnp.repeat(plan.adapters[plan.chunk_rows], plan.chunks.shape[1])])
    x, pages = next_states(decoder, weights, pages, tokens, places, plan.tables, plan.chunk_rows, chosen, guesses)
    logits = _logits(decoder, weights, x[jnp.maximum(plan.picks, 0)])
    scores = jax.lax.cond(jnp.any(rows.adjusted), _adjusted, lambda logits, *_: logits, logits, state, rows)
    scores = jax.lax.cond(jnp.any(plan.constrained), _constrained, lambda scores, _: scores, scores, plan)
    chosen = choose_any(scores, rows.keys, plan.numbers, rows.settings)
    is_new = plan.picks >= 0
    counted = jnp.where(is_new, chosen, vocab_size)  # out of bounds: dropped
    state = state.replace(  # type: ignore[attr-defined]
        last=jnp.where(is_new, chosen, state.last),
        counts=state.counts.at[jnp.arange(count), counted].add(1, mode="drop"),
    )
    best = jax.lax.cond(jnp.any(rows.logprobs & is_new), _scores, _no_scores, logits, chosen)
    behind = jax.lax.cond(
        plan.wants_prompt,
        partial(_target_scores, decoder, count),
        lambda weights, x, targets: _no_scores(jnp.zeros((*targets.shape, vocab_size)), targets),
        weights,
        x[count:],
        plan.targets,
    )
    return pages, state, chosen, best, behind


def step_of_few(
    decoder: Decoder, few: int, weights: Weights, pages: Caches, state: RowState, rows: RowSettings, plan: Plan
) -> tuple[Caches, RowState, jax.Array, Scores, Scores]:
    """`step` of the first `few` rows alone: no other row is given a token by the plan, and none has a chunk in it."""
    all_rows = plan.places.shape[0]

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[:few], tree)

    by_row = {name: first(getattr(plan, name)) for name in BY_ROW}
    # The chunks' tokens stand behind those of the rows.
    by_row["picks"] = jnp.where(by_row["picks"] < all_rows, by_row["picks"], by_row["picks"] - all_rows + few)
    plan = plan.replace(**by_row)  # type: ignore[attr-defined]
    pages, new, chosen, best, behind = step(decoder, weights, pages, first(state), first(rows), plan)
    state = jax.tree.map(lambda whole, part: whole.at[:few].set(part), state, new)
    return pages, state, chosen, best, behind


def _logits(decoder: Decoder, weights: Weights, x: jax.Array) -> jax.Array:
    count = x.shape[0]
    x = jnp.pad(x, ((0, padded_tokens(decoder.spec, count) - count), (0, 0)))
    logits = cast(jax.Array, decoder.apply({"params": head_params(weights["params"])}, x, method="head"))
    # XLA would see that only some rows are read, and norm and multiply those alone.
    return logits if len(logits) == count else jax.lax.optimization_barrier(logits)[:count]


def _adjusted(logits: jax.Array, state: RowState, rows: RowSettings) -> jax.Array:
    changed = adjusted(logits, state.counts, state.prompt, state.bias, rows.settings, rows.frequency, rows.presence)
    return jnp.where(rows.adjusted[:, None], changed, logits)


def _constrained(scores: jax.Array, plan: Plan) -> jax.Array:
    token = jnp.arange(scores.shape[1])
    allowed = (plan.allowed[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1
    return jnp.where(plan.constrained[:, None] & (allowed == 0), -jnp.inf, scores)


def _scores(logits: jax.Array, tokens: jax.Array) -> Scores:
    """Of the model's own distribution: before penalties, temperature and filters."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logprobs, min(TOP, logits.shape[-1]))
    return Scores(jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0], top, ids)


def _no_scores(logits: jax.Array, tokens: jax.Array) -> Scores:
    shape = (*tokens.shape, min(TOP, logits.shape[-1]))
    return Scores(jnp.zeros(tokens.shape), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))


def _target_scores(decoder: Decoder, rows: int, weights: Weights, x: jax.Array, targets: jax.Array) -> Scores:
    """Scores of targets [Q, C] behind the states x [Q C, D], as many at a time as the step chooses tokens for."""
    fill = -x.shape[0] % rows
    x = jnp.pad(x, ((0, fill), (0, 0))).reshape(-1, rows, x.shape[1])
    tokens = jnp.pad(targets.reshape(-1), (0, fill)).reshape(-1, rows)
    scores = jax.lax.map(lambda part: _scores(_logits(decoder, weights, part[0]), part[1]), (x, tokens))
    count = targets.size

    def placed(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(-1, *leaf.shape[2:])[:count].reshape(*targets.shape, *leaf.shape[2:])

    return cast(Scores, jax.tree.map(placed, scores))


def begin(state: RowState, row: jax.Array, text: jax.Array, start: jax.Array, bias: jax.Array) -> RowState:
    """The state for a text with penalties or a bias.

    Args:
        text: int32 of any fixed length, prompt and answer so far; V and above fill up.
        start: tokens of the prompt.
        bias: [V].
    """
    is_answer = jnp.arange(text.shape[0]) >= start
    beyond = state.counts.shape[1]
    counts = jnp.zeros_like(state.counts[0]).at[jnp.where(is_answer, text, beyond)].add(1, mode="drop")
    prompt = jnp.zeros_like(state.prompt[0]).at[jnp.where(is_answer, beyond, text)].set(True, mode="drop")
    new: RowState = state.replace(  # type: ignore[attr-defined]
        counts=state.counts.at[row].set(counts),
        prompt=state.prompt.at[row].set(prompt),
        bias=state.bias.at[row].set(bias),
    )
    return new


def new_state(rows: int, vocab_size: int) -> RowState:
    """The state of rows that are free, in NumPy arrays."""
    shape = rows, vocab_size
    return RowState(
        np.zeros(rows, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    )
