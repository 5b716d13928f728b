"""The serving engine: answers that depend on nothing but their query, and nothing that is lost."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.engine import Engine, Request
from jaxlm.inference.paged import layout
from jaxlm.inference.paged.layout import in_words, laid_out
from jaxlm.inference.paged.programs import Programs, few_rows, programs_in_words, usual_programs
from jaxlm.inference.paged.requests import Query, TokenLogprob
from jaxlm.inference.paged.step import _logits
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.families import SHAPES
from jaxlm.models.unrolled import next_states
from jaxlm.nn.ordered_weight import OrderedWeight
from jaxlm.nn.weight_types import OutputMajorWeight
from jaxlm.spec import uniform_decoder
from tests.inference.paged.asking import QUERIES, Answers, ask, check_drawn_schedule, content, settle
from tests.inference.test_engine import MIXED, PROMPTS, finish
from tests.inference.test_generation import CONFIG, generator, params
from tests.models.compare import random_tree


def test_answers_are_those_of_the_slots(alone: list[Any]) -> None:
    slots = Engine(generator(Decoder(CONFIG), params()), len(MIXED))
    admitted = slots.admit([Request(prompt, how) for prompt, how in zip(PROMPTS, MIXED, strict=True)])
    finish(slots)
    for (slot,), (ids, _, ends, _) in zip(admitted, alone, strict=False):
        assert (tuple(ids[0]), ends[0]) == (slot.answer.ids, slot.answer.finish)


@settings(max_examples=12)
@given(data=st.data())
def test_answers_do_not_depend_on_others(engine: PagedEngine, alone: list[Any], data: Any) -> None:
    """To the last bit, log-probabilities included, whoever asks, gives up, and however pages run out."""
    check_drawn_schedule(engine, alone, data, 2, 12)


def test_a_token_is_the_same_beside_many_others() -> None:
    """More of them than there are in the steps of the engine here: 140, which fill an array of 4,096 numbers."""
    decoder = Decoder(CONFIG)
    weights = laid_out(decoder, generator(decoder, params()).weights, {128, 142}, {2})
    assert re.match(r"14 (matrices as loaded|laid out \[out, in\])", in_words(weights))
    pages = [(jnp.zeros((9, 2, 8, 8)), jnp.zeros((9, 2, 8, 8))) for _ in range(CONFIG.num_layers)]
    step = jax.jit(partial(next_states, decoder, weights))
    tables, tokens = np.arange(4, dtype=np.int32).reshape(2, 2), np.arange(142, dtype=np.int32) % 90
    places = np.where(np.arange(142) < 2, 0, -1).astype(np.int32)
    alone, _ = step(pages, tokens[:2], places[:2], tables, np.zeros(0, np.int32))
    beside, _ = step(pages, tokens, places, tables, np.zeros(1, np.int32))
    np.testing.assert_array_equal(alone, beside[:2])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["as loaded", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_wide_models_token_is_the_same_in_steps_of_all_sizes(
    tied: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sums have blocks: few rows, some groups of them, and many; and near the training forward's."""
    monkeypatch.setattr(layout, "prefers_packed", lambda: packed)
    layer = dict(num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1536)
    spec = uniform_decoder(
        "llama", vocab_size=1024, hidden_size=768, tied_head=tied, max_position_embeddings=64, **layer
    )
    decoder = Decoder(spec)
    tree = random_tree(nn.unbox(abstract_variables(decoder))["params"], 1, std=0.04)
    weights = laid_out(decoder, generator(decoder, tree).weights, {6, 8, 32, 72}, {6, 8, 32})
    kernel = weights["params"]["layers"][0]["mlp"]["gate_proj"]["kernel"]
    if not packed and not isinstance(kernel, OrderedWeight):
        pytest.skip("this machine has no such order; the engine lays such matrices out [out, in]")
    assert isinstance(kernel, OutputMajorWeight if packed else OrderedWeight)
    step = jax.jit(partial(next_states, decoder, weights))
    head = jax.jit(partial(_logits, decoder, weights))
    tokens = np.arange(72, dtype=np.int32) % 1024
    states = {}
    for rows, length in ((2, 0), (8, 0), (32, 0), (8, 64)):
        pages = [(jnp.zeros((40, 4, 8, 64)), jnp.zeros((40, 4, 8, 64))) for _ in range(spec.num_layers)]
        tables, count = np.arange(rows, dtype=np.int32)[:, None], rows + length
        places = np.where(np.arange(count) < rows, 0, -1).astype(np.int32)
        chunks = np.zeros(int(length > 0), np.int32)
        states[count], _ = step(pages, tokens[:count], places, tables, chunks)
    for count, few in ((32, 8), (72, 8), (8, 2)):
        np.testing.assert_array_equal(states[few], states[count][:few])
    logits = head(states[8])
    np.testing.assert_array_equal(head(states[2]), logits[:2])
    np.testing.assert_array_equal(logits, head(states[32])[:8])
    expected = np.asarray(jax.jit(decoder.apply)({"params": tree}, tokens[:8, None])[:, 0])
    ulps = np.abs(logits - expected).max(axis=1) / np.spacing(np.abs(expected).max(axis=1))
    assert ulps.max() <= 16, ulps


def test_pages_run_out_without_harm(engine: PagedEngine, alone: list[Any]) -> None:
    before = engine.stats().retracted_total
    numbers = [10, 8, 10, 9, 10]
    for number, answers in zip(numbers, ask(engine, [QUERIES[number] for number in numbers]), strict=True):
        assert content(answers) == alone[number]
    assert engine.stats().retracted_total > before
    settle(engine)


def test_log_probabilities_are_those_of_the_training_forward(alone: list[Any]) -> None:
    """Within a few units in the last place of the logits, whose sums XLA orders by the length of a row."""
    decoder, tree = Decoder(CONFIG), params()
    forward = jax.jit(lambda ids: jax.nn.log_softmax(decoder.apply({"params": tree}, ids)))
    worst = 0.0
    for query, (ids, logprobs, _, prompt) in zip(QUERIES, alone, strict=True):
        for answer, scored in zip(ids, logprobs, strict=True):
            text = [*query.prompt, *answer]
            row = np.asarray(forward(np.array([text + [0] * (128 - len(text))])))[0]
            known = [*(prompt or [TokenLogprob(token, None) for token in query.prompt]), *scored]
            for place, each in enumerate(known[: len(text)]):
                assert each.token == text[place]
                if each.logprob is None:
                    continue
                expected = row[place - 1]
                worst = max(worst, abs(each.logprob - expected[each.token]) / np.spacing(np.abs(expected).max()))
                best = np.argsort(-expected, kind="stable")[: len(each.top)]
                assert [token for token, _ in each.top] == best.tolist()
                assert dict(each.top).get(each.token, each.logprob) == each.logprob
    assert 0 < worst <= 16, worst


def test_a_prefix_is_read_once(engine: PagedEngine) -> None:
    query = Query(tuple(range(40, 80)), Decoding(max_new_tokens=2))
    first, second = (ask(engine, [query])[0] for _ in range(2))
    assert (first.cached, second.cached) == ([0], [32])  # 4 pages of 8: the last token is always read
    assert first.ids == second.ids
    sampled = ask(engine, [dataclasses.replace(query, options=Decoding(max_new_tokens=2, temperature=1.0, samples=3))])
    assert sampled[0].cached == [32] * 3


def test_penalties_and_bias_are_openais(engine: PagedEngine, alone: list[Any]) -> None:
    ids = alone[11][0][0]
    # Two tokens are lifted above all others; each time one is taken it sinks once, below the other, and no further.
    assert set(ids) == {7, 8} and ids[0] != ids[1]
    (answers,) = ask(
        engine, [Query((4, 4), Decoding(max_new_tokens=9), logit_bias=((7, 90.0), (8, 89.0)), frequency_penalty=2.5)]
    )
    counts = [answers.ids[0].count(token) for token in (7, 8)]
    assert sum(counts) == 9 and abs(counts[0] - counts[1]) <= 3


class Only:
    """A grammar: token after token of a list, then anything that is even; nothing behind five tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.left, self.count = list(tokens), 0

    def allowed(self) -> np.ndarray:
        bits = np.zeros(CONFIG.vocab_size, bool)
        if self.left:
            bits[self.left[0]] = True
        elif self.count < 5:
            bits[::2] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        self.count += 1
        if self.left:
            assert token == self.left.pop(0)


def test_a_grammar_is_followed_beside_texts_without_one(engine: PagedEngine, alone: list[Any]) -> None:
    grammar = Query((5, 9, 30), Decoding(max_new_tokens=20, temperature=1.5), constraint=lambda: Only([9, 11]))
    free, bound = ask(engine, [QUERIES[0], grammar])
    assert content(free) == alone[0]
    assert bound.ids[0][:2] == [9, 11] and len(bound.ids[0]) == 5 and not any(token % 2 for token in bound.ids[0][2:])
    assert bound.finish == ["stop"]


class Fails:
    """A grammar that can be followed for two tokens."""

    def __init__(self, method: str) -> None:
        self.method, self.count = method, 0

    def allowed(self) -> np.ndarray:
        if self.method == "allowed" and self.count == 2:
            raise UserError("the grammar is too large")
        return np.full(CONFIG.vocab_size // 32, 2**32 - 1, np.uint32)

    def accept(self, token: int) -> None:
        if self.method == "accept" and self.count == 2:
            raise UserError("the grammar is too large")
        self.count += 1


def test_a_grammar_that_cannot_be_followed_ends_its_answer_alone(engine: PagedEngine, alone: list[Any]) -> None:
    for method in ("allowed", "accept"):
        grammar = Query((5, 9, 30), Decoding(max_new_tokens=20, seed=1), constraint=partial(Fails, method))
        free, bound = (Answers(engine, query) for query in (QUERIES[0], grammar))
        with pytest.raises(UserError, match="too large"):
            bound.wait()
        assert len(bound.ids[0]) == 2 and content(free.wait()) == alone[0]
    settle(engine)


def test_nothing_is_compiled_for_a_query(engine: PagedEngine, alone: list[Any]) -> None:
    compiled: list[str] = []

    def listen(name: str, *_: Any, **__: Any) -> None:
        if "compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    ask(engine, QUERIES)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled and engine.ready() == (4, 4)


def test_a_start_that_nobody_waits_for_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ends while it compiles its first program compiles no other."""
    ends, compiled = threading.Event(), []
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr(Programs, "_compile_begin", lambda self: ends.wait(60))
    monkeypatch.setattr(Programs, "_compile_step", lambda self, *sizes: compiled.append(sizes))
    cancel = Programs.cancel
    monkeypatch.setattr(Programs, "cancel", lambda self: (cancel(self), ends.set()))
    engine = PagedEngine(generator(Decoder(CONFIG), params()), 2, pages=24, slots=8, chunk=16)
    engine.drain()
    assert not compiled
    with pytest.raises(CancelledError):
        engine.wait()


def test_the_number_of_programs_is_told_beforehand(engine: PagedEngine) -> None:
    assert programs_in_words(CONFIG, 2, [(1, 8), (2, 8)]).startswith(f"{engine.ready()[1]}: ")
    spec = SHAPES["llama-2-7b"]
    words = usual_programs(spec, 16, "cpu")
    assert words.startswith("7: ") and "2 or 8 or 16 answers" in words and "4 x 16 (few answers) tokens" in words
    # A chunk's quarter is less than a TPU's page.
    assert usual_programs(spec, 8, "tpu").startswith("4: ")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query(tuple(range(90)) * 2, Decoding()), "180 tokens.*128"),
        (Query((), Decoding()), "empty"),
        (Query((96,), Decoding()), "96"),
        (Query((1,), Decoding(num_beams=2), logprobs=0), "num_beams: 2"),
        (Query((1,), Decoding(), adapter="geo"), "geo"),
        (Query((1,), Decoding(), logprobs=21), "logprobs: 21"),
        (Query((1,), Decoding(), logit_bias=((96, 1.0),)), "logit_bias: 96"),
        (Query((1,), Decoding(), presence_penalty=float("nan")), "presence_penalty"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine: PagedEngine, query: Query, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine.submit(query, lambda piece: None)


@pytest.mark.slow
def test_a_step_of_few_rows_gives_what_one_of_all_gives() -> None:
    """To the last bit: a query alone is decoded by the one program, among many by the other."""
    model = generator(Decoder(CONFIG), params())
    engine = PagedEngine(model, 256, pages=2600, slots=8, chunk=16, queue=1000)
    few = few_rows(CONFIG, 256)
    assert few < 200 and programs_in_words(CONFIG, 256, [(1, 8), (2, 8)]).startswith("7: ") and engine.ready()[1] == 7
    how = [
        Decoding(max_new_tokens=12 + number % 7, temperature=0.7 * (number % 2), seed=number) for number in range(220)
    ]
    queries = [Query((3 + number % 80, 14, 15), each, logprobs=2) for number, each in enumerate(how)]
    single = [content(ask(engine, [query])[0]) for query in queries[:6]]
    assert [content(each) for each in ask(engine, queries)][:6] == single
    settle(engine)
    engine.drain()
