"""What is asked of the serving engine, and what it answers: token ids in, token ids with log-probabilities out.

The engine knows no text. Whoever asks makes texts of the pieces (`jaxlm.inference.text`), and cancels an answer whose
text holds a stop text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from jaxlm.config import Decoding

Finish = Literal["stop", "length", "context", "cancelled"]


class Constraint(Protocol):
    """A grammar that an answer must follow; each answer has one of its own.

    Both methods raise UserError where the grammar cannot be followed any further; that ends this answer alone.
    """

    def allowed(self) -> np.ndarray:
        """[ceil(V / 32)] uint32: bit v % 32 of word v // 32 says whether token v may come next."""

    def accept(self, token: int) -> None:
        """Goes on behind a token that was chosen."""


@dataclasses.dataclass(frozen=True)
class Query:
    """A prompt to be answered.

    Args:
        prompt: token ids.
        options: how; `samples` answers share the prompt. Stop texts are left to who asks.
        adapter: name of a loaded adapter; None: the base alone.
        logprobs: for each new token its log-probability and those of this many best tokens; 0: of the chosen one alone;
            None: none. They are of the model's own distribution: before penalties, temperature and filters.
        prompt_logprobs: the same for the prompt's tokens.
        frequency_penalty: taken from a token's logit for each time that the answer holds it.
        presence_penalty: taken from it once.
        logit_bias: (token, added to its logit).
        ignore_stop_ids: an answer goes on behind stop ids.
        constraint: makes the grammar of one answer.
    """

    prompt: tuple[int, ...]
    options: Decoding
    adapter: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_stop_ids: bool = False
    constraint: Callable[[], Constraint] | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the best tokens in its place, the best first.

    `logprob` is None for a prompt's first token. The chosen token's number in `top` is the same float.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one answer is given by a step.

    Args:
        sample: which of the query's answers.
        ids: new tokens, without a stop id that ended the answer.
        logprobs: of `ids` (and of the stop id behind them), where they were asked for.
        prompt: of the prompt's tokens; with the first piece of sample 0 only.
        cached: the number of the prompt's tokens whose keys and values were there already; with the first piece.
        finish: why the answer ends; None: it goes on.
    """

    sample: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] | None = None
    cached: int = 0
    finish: Finish | None = None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts for the metrics page; those that end in `_total` only grow."""

    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_cached: int
    prefix_queries_total: int
    prefix_hits_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    retracted_total: int
    guessed_total: int
    accepted_total: int


class AnswerFailed(Exception):
    """An answer could not be written because of its cause; the engine goes on."""


# Called in the engine's thread with pieces as they come, with a UserError or AnswerFailed that ended an answer, or with
# any other error where it has ended the engine.
Deliver = Callable[[Piece | Exception], None]


class EngineThread(Protocol):
    """The engine as the server sees it; every method may be called from any thread."""

    def submit(self, query: Query, deliver: Deliver) -> int:
        """Queues a query; its ticket.

        Raises:
            UserError: for a query that the model cannot answer (too long, unknown adapter, settings out of range).
            QueueFull: too many wait already.
        """

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """Ends a query's answers, or one of them; their pages are free after the step at hand."""

    def stats(self) -> EngineStats: ...

    def ready(self) -> tuple[int, int]:
        """(programs compiled, programs in all); the engine answers once both are the same."""

    def drain(self) -> None:
        """Takes no more queries, answers those that it has, and ends."""


class QueueFull(Exception):
    """Too many queries wait; the server says 429."""
