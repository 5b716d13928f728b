"""Those who ask an engine, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from jaxlm.config import Decoding
from jaxlm.inference.paged.requests import Finish, Piece, Query, TokenLogprob
from jaxlm.inference.paged.thread import PagedEngine
from tests.inference.test_engine import MIXED, PROMPTS

LONG = [(7 * i) % 90 for i in range(60)]
QUERIES = [
    *(Query(tuple(prompt), how, logprobs=3) for prompt, how in zip(PROMPTS, MIXED, strict=True)),
    Query((*LONG, 5), Decoding(max_new_tokens=30, temperature=0.9, seed=6, samples=3), logprobs=0),
    Query((*LONG, 6), Decoding(max_new_tokens=10), logprobs=0, prompt_logprobs=2),
    Query((*LONG[:33], 6), Decoding(max_new_tokens=200), frequency_penalty=0.7, presence_penalty=0.2, logprobs=1),
    Query((4, 4), Decoding(max_new_tokens=20), logit_bias=((7, 90.0), (8, 90.0)), presence_penalty=1.5),
]


class Answers:
    """The answers to one query, as they come."""

    def __init__(self, engine: PagedEngine, query: Query) -> None:
        count = query.options.samples
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self.finish: list[Finish | None] = [None] * count
        self.prompt: tuple[TokenLogprob, ...] | None = None
        self.cached: list[int] = [0] * count
        self.error: Exception | None = None
        self._ended = threading.Event()
        self._engine = engine
        self.ticket = engine.submit(query, self._take)

    def _take(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception):
            self.error = piece
            self._ended.set()
            return
        assert self.finish[piece.sample] is None, "nothing comes behind the end"
        self.ids[piece.sample].extend(piece.ids)
        self.logprobs[piece.sample].extend(piece.logprobs)
        self.finish[piece.sample] = piece.finish
        self.cached[piece.sample] += piece.cached
        self.prompt = self.prompt or piece.prompt
        if None not in self.finish:
            self._ended.set()

    def cancel(self, sample: int | None = None) -> None:
        self._engine.cancel(self.ticket, sample)

    def wait(self) -> Answers:
        assert self._ended.wait(300), "the engine gives no answer"
        if self.error is not None:
            raise self.error
        return self


def content(answers: Answers) -> Any:
    return answers.ids, answers.logprobs, answers.finish, answers.prompt


def ask(engine: PagedEngine, queries: Sequence[Query]) -> list[Answers]:
    """The answers to queries that are asked together."""
    answers = [Answers(engine, query) for query in queries]
    return [each.wait() for each in answers]


def check_drawn_schedule(engine: PagedEngine, alone: Sequence[Any], data: Any, least: int, most: int) -> None:
    """Asks some of QUERIES, gives some of them up, and holds all answers to those of queries that were asked alone.

    Args:
        alone: the `content` of each of QUERIES.
        data: hypothesis's `st.data()`.
        least, most: bounds of the number of queries.
    """
    asked, cancelled = [], set()
    for _ in range(data.draw(st.integers(least, most))):
        number = data.draw(st.integers(0, len(QUERIES) - 1))
        asked.append((number, Answers(engine, QUERIES[number])))
        if data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.integers(0, len(asked) - 1))
            asked[victim][1].cancel()
            cancelled.add(victim)
    for index, (number, answers) in enumerate(asked):
        answers.wait()
        if index in cancelled:
            whole = alone[number][0]
            assert all(ids == full[: len(ids)] for ids, full in zip(answers.ids, whole, strict=True))
        else:
            assert content(answers) == alone[number]
    settle(engine)


def settle(engine: PagedEngine) -> None:
    """Waits until the engine is idle; then every page is free or kept."""
    for _ in range(500):
        stats = engine.stats()
        if not stats.running and not stats.waiting and stats.pages_free + stats.pages_cached == stats.pages:
            return
        time.sleep(0.01)
    raise AssertionError(f"pages are lost: {engine.stats()}")
