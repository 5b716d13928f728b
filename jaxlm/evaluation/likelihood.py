"""Log-likelihoods of continuations; what several of them have in common is read once.

The contexts of a batch are read into a cache (the unrolled runner's, as for generation). Their logits score the first
token of every continuation, and all of those that have one token only. Longer continuations are read one after the
other into the slots behind their context, each over the one before: a query sees no slot behind its own. So a context
costs as much as with one continuation, and no cache is copied. What all contexts of a batch begin with (few-shot
examples) is read in one row.

The plain twin, `plain_scores`, reads every context with every continuation. Models whose earlier tokens depend on later
ones (a prefix that sees all of itself, dynamic RoPE, longrope across its switch) are always read so.

Shapes: R rows, W width of the contexts, S slots of the cache, D model, V vocabulary, C continuations, N scored tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.rows import DeviceModel, bucket, divisible, fetch, power_of_two
from jaxlm.models.decoder import Decoder
from jaxlm.models.encoder_decoder import read_sources, source_caches
from jaxlm.models.unrolled import Caches, grow, head_params, last_layer, logits_of, prefill, read_on, repeat_rows
from jaxlm.sharding import ROW_AXES
from jaxlm.spec import DecoderSpec

# Scored tokens whose logits are in memory at a time.
CHUNK = 256
# A common beginning that is shorter is not worth a pass of its own.
LEAST_PREFIX = 32

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Choices:
    """A context and what may follow it.

    Attributes:
        context: token ids, at least one; an encoder reads them where the model has one.
        continuations: token ids of each, at least one.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    def tokens(self, spec: DecoderSpec) -> int:
        """Tokens that the longest continuation is read behind and with: the last one is predicted only."""
        before = len(self.context) if spec.encoder is None else 1
        return before + max(map(len, self.continuations), default=1) - 1


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the continuations of one context.

    Attributes:
        log_probs: sum over a continuation's tokens of their natural log-probabilities.
        is_greedy: whether each of its tokens was the most probable one.
    """

    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]


def check(model: DeviceModel, choices: Choices) -> None:
    """Raises UserError for what the model cannot read: nothing, too much, or ids that it does not have."""
    spec, longest = model.decoder.spec, model.max_length
    if not choices.context:
        raise UserError(
            "the context is empty: there is nothing that the answers could follow; has the tokenizer a bos?"
        )
    if not choices.continuations or not all(choices.continuations):
        raise UserError("a continuation is empty: there is nothing to score")
    tokens = choices.tokens(spec)
    if spec.encoder is not None:
        tokens = max(tokens, len(choices.context))
    if tokens > longest:
        raise UserError(
            f"context and continuation have {tokens} tokens, the model reads at most {longest}; shorten them, e.g. "
            "with fewer examples"
        )
    ids = [*choices.context, *(index for each in choices.continuations for index in each)]
    if not 0 <= min(ids) <= max(ids) < spec.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"token id {wrong}: the model has 0 to {spec.vocab_size - 1}; the tokenizer is another model's")


def width(length: int) -> int:
    """A length rounded up by at most an eighth, so that batches of like length share programs."""
    step = max(8, power_of_two(length) // 16)
    return -(-length // step) * step


def is_shared(spec: DecoderSpec, batch: Sequence[Choices]) -> bool:
    """Whether the keys and values of a context are the same whatever follows it."""
    ropes = [layer.attention.rope for layer in spec.period]
    if spec.prefix is not None or any(rope is not None and rope.rope_type == "dynamic" for rope in ropes):
        return False
    switch = spec.switch_length
    return switch is None or len({len(each.context) > switch for each in batch} | {_total(batch, spec) > switch}) == 1


def _total(batch: Sequence[Choices], spec: DecoderSpec) -> int:
    return max(each.tokens(spec) for each in batch)


def scores(model: DeviceModel, batch: Sequence[Choices], rows: int) -> list[Scores]:
    """Scores of a batch of contexts, which are read together.

    Args:
        batch: at most `rows`; see `check`.
        rows: rows to compute, so that batches of different sizes share their programs.

    Raises:
        UserError: some of the logits are not finite.
    """
    if not is_shared(model.decoder.spec, batch):
        return plain_scores(model, batch, rows)
    count = divisible(rows, model.mesh)
    # Longest first, so that each pass has continuations of like length.
    orders = [sorted(range(len(each.continuations)), key=lambda k: -len(each.continuations[k])) for each in batch]
    by_rank = [[each.continuations[k] for k in order] for each, order in zip(batch, orders, strict=True)]
    most = max(map(len, by_rank))
    with use_mesh(model.mesh):
        logits, caches = _read_contexts(model, batch, count)
        firsts = np.zeros((count, power_of_two(most)), np.int32)
        for row, ranked in enumerate(by_rank):
            firsts[row, : len(ranked)] = [ids[0] for ids in ranked]
        found, right = fetch(_next_scores(logits, firsts), model.mesh)
        del logits
        parts: list[list[list[float]]] = [[[float(found[row, k])] for k in range(most)] for row in range(len(batch))]
        greedy = np.array(right[: len(batch), :most])
        starts = [len(each.context) if model.decoder.spec.encoder is None else 1 for each in batch]
        for k in range(most):
            longer = {row: ranked[k] for row, ranked in enumerate(by_rank) if k < len(ranked) and len(ranked[k]) > 1}
            if longer:
                caches, values, hits = _read_continuations(model, caches, longer, starts, count)
                for row, logs in values.items():
                    parts[row][k] += logs
                    greedy[row, k] &= hits[row]
    result = []
    for row, order in enumerate(orders):
        ranks = [order.index(k) for k in range(len(order))]
        sums = tuple(math.fsum(parts[row][k]) for k in ranks)
        result.append(Scores(sums, tuple(bool(greedy[row, k]) for k in ranks)))
    return _finite(result)


def plain_scores(model: DeviceModel, batch: Sequence[Choices], rows: int) -> list[Scores]:
    """As `scores`, each continuation with its own context: the twin that sharing is held to."""
    pairs = [(each.context, ids) for each in batch for ids in each.continuations]
    count, flat = divisible(rows, model.mesh), []
    with use_mesh(model.mesh):
        for start in range(0, len(pairs), count):
            flat += _pair_scores(model, pairs[start : start + count], count)
    found = iter(flat)
    result = []
    for each in batch:
        own = [next(found) for _ in each.continuations]
        result.append(Scores(tuple(value for value, _ in own), tuple(hit for _, hit in own)))
    return _finite(result)


def _finite(result: list[Scores]) -> list[Scores]:
    if not all(math.isfinite(value) for each in result for value in each.log_probs):
        raise UserError(
            "model: some of its logits are not finite: weights are damaged, or overflow in this dtype; try "
            "--model.dtype float32, and look at the weights with `convert inspect`"
        )
    return result


# --- the shared way ---------------------------------------------------------------------------------------------------


def _read_contexts(model: DeviceModel, batch: Sequence[Choices], count: int) -> tuple[jax.Array, Caches]:
    """Logits [R, V] behind every context, and the caches with room for the longest continuation."""
    decoder, weights, spec = model.decoder, model.weights, model.decoder.spec
    contexts = [each.context for each in batch]
    total = _total(batch, spec)
    if spec.encoder is not None:
        tokens, lengths = _padded(contexts, count, max(map(len, contexts)))
        return read_sources(decoder, weights, *_placed(model, tokens, lengths), bucket(total))
    common = 0 if spec.switch_length is not None and total > spec.switch_length else _common(contexts)
    slots = max(power_of_two(total), width(max(map(len, contexts))))
    if common < LEAST_PREFIX or len(batch) < 2:
        tokens, lengths = _padded(contexts, count, max(map(len, contexts)))
        return prefill(decoder, weights, *_placed(model, tokens, lengths), slots)
    alone = divisible(1, model.mesh)
    tokens, lengths = _padded([contexts[0][:common]] * alone, alone, common)
    # The padding behind the prefix is overwritten, or lies behind every query.
    _, caches = prefill(decoder, weights, *_placed(model, tokens, lengths), tokens.shape[1])
    rest = [ids[common:] for ids in contexts]
    tokens, lengths = _padded(rest, count, max(map(len, rest)))
    slots = max(slots, power_of_two(common + tokens.shape[1]))
    caches = repeat_rows(grow(caches, max(slots, caches[0][0].shape[2])), count // alone)
    starts = np.full(count, common, np.int32)
    x, caches = _read_on(model, caches, tokens, starts, lengths)
    return logits_of(decoder, weights, jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]), caches


def _common(contexts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens that all contexts begin with; at least one of each is left over."""
    first, last = min(contexts), max(contexts)
    most = min(map(len, contexts)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def _read_continuations(
    model: DeviceModel, caches: Caches, longer: Mapping[int, Ids], starts: list[int], count: int
) -> tuple[Caches, dict[int, list[float]], dict[int, bool]]:
    """The caches, and of one continuation in some rows the log-probabilities of all tokens but the first."""
    size = bucket(max(map(len, longer.values())) - 1, 2)
    tokens, lengths, places = np.zeros((count, size), np.int32), np.ones(count, np.int32), np.zeros(count, np.int32)
    targets: list[tuple[int, int, int]] = []
    for row, ids in longer.items():
        tokens[row, : len(ids) - 1], lengths[row] = ids[:-1], len(ids) - 1
        targets += [(row, at, target) for at, target in enumerate(ids[1:])]
    # Rows without one are given a token that nothing sees.
    places[: len(starts)] = starts
    x, caches = _read_on(model, caches, tokens, places, lengths)
    values, hits = _scores_at(model, x, targets)
    logs: dict[int, list[float]] = {row: [] for row in longer}
    all_hit = dict.fromkeys(longer, True)
    for (row, _, _), value, hit in zip(targets, values, hits, strict=True):
        logs[row].append(float(value))
        all_hit[row] &= bool(hit)
    return caches, logs, all_hit


# --- the plain way ----------------------------------------------------------------------------------------------------


def _pair_scores(model: DeviceModel, pairs: Sequence[tuple[Ids, Ids]], count: int) -> list[tuple[float, bool]]:
    decoder, weights = model.decoder, model.weights
    if decoder.spec.encoder is None:
        texts = [[*context, *ids[:-1]] for context, ids in pairs]
        tokens, lengths = _padded(texts, count, max(map(len, texts)))
        x = last_layer(decoder, weights, *_placed(model, tokens, lengths))
        firsts = [len(context) - 1 for context, _ in pairs]
    else:
        sources, sizes = _padded([context for context, _ in pairs], count, max(len(context) for context, _ in pairs))
        texts = [[decoder.spec.encoder.start_token_id, *ids[:-1]] for _, ids in pairs]
        tokens, lengths = _padded(texts, count, max(map(len, texts)))
        caches = source_caches(decoder, weights, *_placed(model, sources, sizes), tokens.shape[1])
        x, _ = _read_on(model, caches, tokens, np.zeros(count, np.int32), lengths)
        firsts = [0] * len(pairs)
    targets = [(row, firsts[row] + at, target) for row, (_, ids) in enumerate(pairs) for at, target in enumerate(ids)]
    values, hits = _scores_at(model, x, targets)
    logs: list[list[float]] = [[] for _ in pairs]
    greedy = [True] * len(pairs)
    for (row, _, _), value, hit in zip(targets, values, hits, strict=True):
        logs[row].append(float(value))
        greedy[row] &= bool(hit)
    return [(math.fsum(log), hit) for log, hit in zip(logs, greedy, strict=True)]


# --- parts of both ----------------------------------------------------------------------------------------------------


def _padded(texts: Sequence[Ids], count: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """[R, W] and [R]: the texts, and rows that only fill up."""
    tokens, lengths = np.zeros((count, width(longest)), np.int32), np.ones(count, np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def _placed(model: DeviceModel, tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
    sharding = NamedSharding(model.mesh, P(ROW_AXES))
    return jax.device_put(tokens, sharding), jax.device_put(lengths, sharding)


def _read_on(
    model: DeviceModel, caches: Caches, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[jax.Array, Caches]:
    """`unrolled.read_on` of arrays [R, T], [R] and [R] on the host."""
    sharding = NamedSharding(model.mesh, P(ROW_AXES))
    places = (jax.device_put(array, sharding) for array in (starts, lengths))
    return read_on(model.decoder, model.weights, caches, jax.device_put(tokens, sharding), *places)


def _scores_at(
    model: DeviceModel, x: jax.Array, targets: Sequence[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N] of (row, place, token), by x [R, T, D] of the last layer, and which are the largest."""
    size = len(targets)
    padded = np.zeros((3, bucket(size) if size <= CHUNK else CHUNK * power_of_two(-(-size // CHUNK))), np.int32)
    padded[:, :size] = np.array(targets, np.int32).T
    out = _scores_of_tokens(model.decoder, head_params(model.weights["params"]), x, *padded)
    values, hits = fetch(out, model.mesh)
    return values[:size], hits[:size]


@partial(jax.jit, static_argnums=0)
def _scores_of_tokens(
    decoder: Decoder, head: Any, x: jax.Array, rows: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[N] and [N], by chunks: the logits of all tokens together would be the largest array of the run."""
    chunk = min(len(targets), CHUNK)

    def of_chunk(entries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, ids = entries
        logits: Any = decoder.apply({"params": head}, states, method="head")
        values, hits = _of_logits(logits, ids[:, None])
        return values[:, 0], hits[:, 0]

    states = x[rows, places].reshape(-1, chunk, x.shape[-1])
    values, hits = jax.lax.map(of_chunk, (states, targets.reshape(-1, chunk)))
    return values.reshape(-1), hits.reshape(-1)


@jax.jit
def _next_scores(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [R, C] of ids [R, C] by logits [R, V], and which are the largest."""
    return _of_logits(logits, ids)


def _of_logits(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values = jnp.take_along_axis(logits, ids, axis=-1) - normaliser
    return values, ids == jnp.argmax(logits, axis=-1)[:, None]
