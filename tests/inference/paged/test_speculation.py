"""Guesses change nothing but the number of steps: tokens and log-probabilities are those of an engine without them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.paged.lookup import Lookup
from jaxlm.inference.paged.requests import Piece, Query
from jaxlm.inference.paged.schedule import Scheduler, Shape, Step, Text
from jaxlm.inference.paged.step import Plan
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder
from tests.inference.paged.asking import ask, check_drawn_schedule, content, settle
from tests.inference.test_generation import CONFIG, generator, params

# Greedy and drawn answers of a model that soon repeats itself.
REPEATED = [
    Query((20, 21) * 6, Decoding(max_new_tokens=80), logprobs=2),
    Query((20, 21) * 6, Decoding(max_new_tokens=80, temperature=0.02, seed=4), logprobs=0),
]


@pytest.fixture(scope="module")
def guessing() -> PagedEngine:
    """Few pages and rows, so that guesses find none now and then."""
    return PagedEngine(generator(Decoder(CONFIG), params()), 4, pages=24, slots=8, chunk=16, speculate=3)


def test_a_guess_is_what_followed_before() -> None:
    assert Lookup([1, 2, 3, 4, 9, 2, 3]).guess(3) == [4, 9, 2]
    assert Lookup([7, 2, 3, 5, 1, 2, 3, 6, 0, 1, 2, 3]).guess(2) == [6, 0], "the longer match, not another one"
    assert Lookup([2, 3, 5, 2, 3, 6, 2, 3]).guess(2) == [6, 2], "the latest of equal ones"
    assert Lookup([5, 4, 4, 4]).guess(3) == [4, 4, 4], "what ends with the text repeats"
    for tokens, most in (([1, 2, 3, 4], 3), ([3], 3), ([], 3), ([1, 2, 1, 2, 1, 2], 0)):
        assert Lookup(tokens).guess(most) == []


@given(st.lists(st.integers(0, 2), max_size=14), st.integers(0, 14), st.integers(1, 5))
def test_a_guess_stood_behind_the_same_tokens(tokens: list[int], known: int, most: int) -> None:
    """Against the plain search, sizes from the longest on; asked before and behind the last tokens of a text."""
    wanted: list[int] = []
    for size in (4, 3, 2):
        for start in range(len(tokens) - size - 1, -1, -1):
            if not wanted and tokens[start : start + size] == tokens[-size:]:
                wanted = (tokens[start + size :] * most)[:most]
    grown = tokens[:known]
    lookup = Lookup(grown)
    lookup.guess(1)
    grown += tokens[known:]
    assert lookup.guess(most) == wanted


class Device:
    """A device that keeps the tokens themselves in its pages, and continues what it finds there."""

    def __init__(self, shape: Shape) -> None:
        self.pages, self.last = np.full((shape.pages, shape.slots), -1), np.zeros(shape.rows, int)

    @staticmethod
    def next(text: Sequence[int]) -> int:
        """Mostly what stood three tokens before; what else, depends on the whole text."""
        code = zlib.crc32(np.array(text, np.int32).tobytes())
        return int(text[-3]) if len(text) > 2 and code % 6 else 3 + code % 5

    def step(self, plan: Plan) -> np.ndarray:
        rows, length = len(plan.places), plan.chunks.shape[1]
        newest = np.where(plan.given >= 0, plan.given, self.last) if plan.given is not None else self.last
        at = np.arange(length)
        read = np.where(at < plan.chunk_lengths[:, None], plan.chunk_starts[:, None] + at, -1)
        tokens, places = np.append(newest, plan.chunks), np.append(plan.places, read)
        texts = np.append(np.arange(rows), np.repeat(plan.chunk_rows, length))
        size = self.pages.shape[1]
        for token, place, row in zip(tokens, places, texts, strict=True):
            if place >= 0:
                self.pages[plan.tables[row, place // size], place % size] = token
        chosen = np.zeros(rows, int)
        for row in np.flatnonzero(plan.picks >= 0):
            pick = plan.picks[row]
            text = self.pages[plan.tables[texts[pick]]].reshape(-1)[: places[pick] + 1]
            assert (text >= 0).all()
            chosen[row] = self.last[row] = self.next(text)
        return chosen


@given(data=st.data())
def test_a_schedule_with_guesses_continues_texts_as_they_stand(data: Any) -> None:
    """Without a model: each step finds in the pages the text that it continues, and nothing that was guessed wrong."""
    draw = data.draw
    rows, guesses = draw(st.integers(2, 3)), draw(st.sampled_from([0, 1, 2, 2, 2]))
    shape = Shape(rows, draw(st.integers(5, 15)), 4, 5, ((1, 8), (2, 2)), 4, guesses)
    device, pieces = Device(shape), dict[int, list[Piece]]()

    def taken(text: Text) -> None:
        text.lookup = text.lookup or (Lookup(text.tokens) if guesses else None)

    scheduler = Scheduler(shape, 8, taken, lambda text: None)
    asked = draw(
        st.lists(st.tuples(st.lists(st.integers(3, 5), min_size=1, max_size=9), st.integers(1, 23)), max_size=7)
    )
    waiting = list(enumerate(asked))
    last: tuple[Step, np.ndarray] | None = None
    while waiting or last or scheduler.waiting or scheduler.running:
        while waiting and (not draw(st.integers(0, 4)) or not (last or scheduler.waiting or scheduler.running)):
            number, (prompt, new) = waiting.pop(0)
            query, taker = Query(tuple(prompt), Decoding(max_new_tokens=new)), pieces.setdefault(number, []).append
            limit = min(len(prompt) + new, 20)
            text = Text(number, 0, query, taker, number, (0, 0), limit, False, frozenset({7}), None, None)  # type: ignore[arg-type]
            scheduler.add(text)
        if draw(st.integers(0, 19)) == 0:
            scheduler.cancel(draw(st.integers(0, len(asked))), None)
        step = scheduler.plan()
        now = None if step is None else (step, device.step(step.plan))
        if last is not None:
            scheduler.read(*last, None, None)
        last = now
        for text in scheduler.running:
            assert text.reading or text.known == text.length - 1
    assert scheduler.pages.free + scheduler.pages.cached == shape.pages
    for number, (prompt, new) in enumerate(asked):
        text = list(prompt)
        while len(text) < min(len(prompt) + new, 20) and text[-1] != 7:
            text.append(device.next(text))
        wanted = [token for token in text[len(prompt) :] if token != 7]
        found = [token for piece in pieces[number] for token in piece.ids]
        is_cancelled = pieces[number][-1].finish == "cancelled"
        assert found == (wanted[: len(found)] if is_cancelled else wanted)
    assert scheduler.counts["accepted"] <= scheduler.counts["guessed"]


@settings(max_examples=12)
@given(data=st.data())
def test_answers_are_those_without_guesses(guessing: PagedEngine, alone: list[Any], data: Any) -> None:
    """To the last bit, whoever asks, gives up, and however rows and pages run out."""
    check_drawn_schedule(guessing, alone, data, 1, 8)


def test_guesses_are_accepted_and_refused(engine: PagedEngine, guessing: PagedEngine) -> None:
    """Half of the tokens are guessed ones, and some guesses are wrong; pages that hold wrong ones are found by none."""
    settle(guessing)
    before = guessing.stats()
    for query in (*REPEATED, *REPEATED):
        wanted, found = (ask(each, [query])[0] for each in (engine, guessing))
        assert content(found) == content(wanted)
    settle(guessing)
    after = guessing.stats()
    tokens, guessed, accepted = (
        getattr(after, name) - getattr(before, name)
        for name in ("generation_tokens_total", "guessed_total", "accepted_total")
    )
    assert tokens / 2 < accepted < min(tokens, guessed)
    assert engine.stats().guessed_total == 0


def test_answers_that_are_not_guessed(engine: PagedEngine, guessing: PagedEngine) -> None:
    """Penalties, biases and n-grams that must not repeat depend on the tokens before."""
    settle(guessing)
    before = guessing.stats().guessed_total
    queries = [
        Query((20, 21) * 6, Decoding(max_new_tokens=30, repetition_penalty=1.01)),
        Query((20, 21) * 6, Decoding(max_new_tokens=30, no_repeat_ngram_size=4)),
        Query((20, 21) * 6, Decoding(max_new_tokens=30), logit_bias=((3, -1.0),)),
        Query((20, 21) * 6, Decoding(max_new_tokens=30), frequency_penalty=0.01),
    ]
    wanted, found = (list(map(content, ask(each, queries))) for each in (engine, guessing))
    settle(guessing)
    assert found == wanted and guessing.stats().guessed_total == before


def test_more_guesses_than_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"speculate: 4.*between 0 and 3"):
        PagedEngine(generator(Decoder(CONFIG), params()), 4, speculate=4)
