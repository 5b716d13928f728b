"""The engine's rows: admission while others go on, settings of each row, rows that are freed and taken again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference import rows
from jaxlm.inference.engine import Answer, Engine, Request, Slot
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights
from jaxlm.models.decoder import Decoder
from tests.inference.test_generation import CONFIG, TreeSource, generator, params

# Every way of drawing, both penalties, stop ids and limits of a row's own.
MIXED = [
    Decoding(max_new_tokens=20),
    Decoding(max_new_tokens=9, temperature=1.0, top_k=5, seed=1),
    Decoding(max_new_tokens=30, temperature=0.7, top_p=0.8, seed=2),
    Decoding(max_new_tokens=14, temperature=1.3, seed=3),
    Decoding(max_new_tokens=25, repetition_penalty=1.4),
    Decoding(max_new_tokens=25, no_repeat_ngram_size=2, stop_ids=(58, 11, 12, 13, 14)),
    Decoding(max_new_tokens=22, temperature=1.0, min_p=0.1, no_repeat_ngram_size=3, repetition_penalty=1.1, seed=4),
    Decoding(max_new_tokens=12, temperature=1.0, top_k=80, top_p=0.9, seed=5),
]
PROMPTS = [[5, 9, 30], [7] * 20, [11, 3, 60, 61], [88], [20, 21, 20, 21, 20], [4, 5] * 9, [70, 71], [33] * 3]
REQUESTS = [Request(prompt, how, number) for number, (prompt, how) in enumerate(zip(PROMPTS, MIXED, strict=True))]


@pytest.fixture(scope="module")
def model() -> Generator:
    return generator(Decoder(CONFIG), params())


@pytest.fixture(scope="module")
def alone(model: Generator) -> list[Answer]:
    """Each request's answer in an engine of its own."""
    answers = []
    for request in REQUESTS:
        engine = Engine(model, 1)
        ((slot,),) = engine.admit([request])
        finish(engine)
        answers.append(slot.answer)
    return answers


def finish(engine: Engine, tokens: int = 7) -> dict[Slot, list[int]]:
    """Steps until all rows have ended; what the steps returned, per slot."""
    returned: dict[Slot, list[int]] = {}
    while True:
        idle = engine.idle
        for slot, new in engine.step(tokens):
            returned.setdefault(slot, []).extend(new)
        if idle:
            return returned


def test_the_answers_alone_are_those_of_a_session(model: Generator, alone: list[Answer]) -> None:
    for request, answer in zip(REQUESTS, alone, strict=True):
        assert model.generate([request.prompt], request.options, [request.number]) == [[answer]]
    assert {answer.finish for answer in alone} == {"length", "stop"}


def test_rows_with_different_settings_do_not_change_each_other(model: Generator, alone: list[Answer]) -> None:
    engine = Engine(model, len(REQUESTS))
    slots = [slot for (slot,) in engine.admit(REQUESTS)]
    returned = finish(engine)
    assert [slot.answer for slot in slots] == alone
    assert returned == {slot: slot.ids for slot in slots}, "every token is returned once"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_taken_again_while_others_go_on(model: Generator, alone: list[Answer], count: int) -> None:
    """Eight requests through two or three rows, each admitted as soon as one is free."""
    engine = Engine(model, count)
    waiting, answers, under_way = list(enumerate(REQUESTS)), {}, {}
    while waiting or under_way:
        while waiting and engine.free:
            number, request = waiting.pop(0)
            ((slot,),) = engine.admit([request])
            under_way[slot] = number
        engine.step(4)
        for slot in [slot for slot in under_way if slot.complete]:
            answers[under_way.pop(slot)] = slot.answer
            engine.release(slot)
    assert [answers[number] for number in range(len(REQUESTS))] == alone
    assert engine.free == count


def test_a_long_prompt_is_admitted_beside_a_short_answer(model: Generator, alone: list[Answer]) -> None:
    """The caches of all rows, and the room for their tokens, grow in the middle."""
    engine = Engine(model, 3)
    ((short,),) = engine.admit([REQUESTS[2]])
    engine.step(3)
    long = Request([9, 8, 7] * 33, Decoding(max_new_tokens=20), 1)
    ((other,),) = engine.admit([long])
    finish(engine)
    assert short.answer == alone[2]
    assert other.answer == model.generate([long.prompt], long.options)[0][0]


def test_samples_of_a_request_have_rows_of_their_own(model: Generator) -> None:
    options = replace(MIXED[1], samples=3)
    engine = Engine(model, 5)
    ((first,),) = engine.admit([REQUESTS[0]])
    (slots,) = engine.admit([Request(PROMPTS[1], options, 6)])
    assert len({slot.row for slot in (first, *slots)}) == 4
    finish(engine)
    assert [slot.answer for slot in slots] == model.generate([PROMPTS[1]], options, [6])[0]


def test_a_row_that_is_given_up_does_not_hold_up_the_others(model: Generator, alone: list[Answer]) -> None:
    engine = Engine(model, 2)
    (given_up,), (kept,) = engine.admit([Request(PROMPTS[0], Decoding(max_new_tokens=100)), REQUESTS[6]])
    engine.step(2)
    engine.release(given_up)
    written = len(given_up.ids)
    finish(engine)
    assert kept.answer == alone[6]
    assert len(given_up.ids) == written
    ((again,),) = engine.admit([REQUESTS[4]])
    assert again.row == given_up.row
    finish(engine)
    assert again.answer == alone[4]


def test_a_stopped_answer_is_complete(model: Generator) -> None:
    engine = Engine(model, 1)
    ((slot,),) = engine.admit([Request(PROMPTS[0], Decoding(max_new_tokens=100))])
    engine.step(3)
    engine.stop(slot)
    assert engine.idle and slot.answer.finish == "stop" and slot.answer.complete
    assert [(told, new) for told, new in engine.step()] == [(slot, [])], "its end is told once"
    assert engine.step() == []


def test_kept_rows_are_read_on(model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two conversations in one engine: each goes on with its own row, and reads only what is new."""
    widths = []
    extend = rows.extend

    def extend_noting(*arguments: Any) -> Any:
        widths.append(int(arguments[5][0]))
        return extend(*arguments)

    monkeypatch.setattr(rows, "extend", extend_noting)
    engine = Engine(model, 3, keep=True)
    options = Decoding(max_new_tokens=8)
    talks = [PROMPTS[1], PROMPTS[5]]
    for turn in range(3):
        for talk, prompt in enumerate(talks):
            ((slot,),) = engine.admit([Request(prompt, options)])
            finish(engine)
            assert slot.answer == model.generate([prompt], options)[0][0]
            talks[talk] = [*prompt, *slot.ids, 40 + turn, 50 + talk]
            engine.release(slot)
    assert widths == [3] * 4


def test_a_kept_row_is_given_to_another_prompt_when_no_other_is_free(model: Generator, alone: list[Answer]) -> None:
    engine = Engine(model, 1, keep=True)
    for number in (1, 5, 4):
        ((slot,),) = engine.admit([REQUESTS[number]])
        finish(engine)
        assert slot.answer == alone[number]
        engine.release(slot)


def test_a_kept_text_is_forgotten_when_its_row_is_taken(model: Generator, alone: list[Answer]) -> None:
    engine = Engine(model, 2, keep=True)
    ((first,),) = engine.admit([REQUESTS[0]])
    finish(engine)
    engine.release(first)
    both = [slot for (slot,) in engine.admit([REQUESTS[2], REQUESTS[5]])]
    numbers = dict(zip(both, (2, 5), strict=True))
    (kept,) = (slot for slot in both if slot.row == first.row)
    (given_up,) = (slot for slot in both if slot is not kept)
    engine.step(2)
    engine.release(given_up)
    prompt = [*PROMPTS[0], *first.ids, 50]
    ((again,),) = engine.admit([Request(prompt, Decoding(max_new_tokens=8))])
    assert again.row == given_up.row
    finish(engine)
    assert again.answer == model.generate([prompt], Decoding(max_new_tokens=8))[0][0]
    assert kept.answer == alone[numbers[kept]]


def test_admission_on_a_mesh(alone: list[Answer]) -> None:
    """Rows over the data axis, heads over the tensor axis, prompts admitted while others go on."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    decoder = Decoder(CONFIG)
    model = Generator(decoder, load_weights(decoder, mesh, TreeSource(params())), mesh, [2])
    engine = Engine(model, 5)
    assert engine.rows == 6
    slots = [slot for (slot,) in engine.admit(REQUESTS[:3])]
    engine.step(3)
    slots += [slot for (slot,) in engine.admit(REQUESTS[3:6])]
    finish(engine)
    assert [slot.answer for slot in slots] == alone[:6]


def test_what_an_engine_refuses(model: Generator) -> None:
    engine = Engine(model, 2)
    with pytest.raises(UserError, match="num_beams"):
        engine.admit([Request([5], Decoding(num_beams=2))])
    with pytest.raises(UserError, match="temperature: -1"):
        engine.admit([Request([5], Decoding(temperature=-1.0))])
    with pytest.raises(UserError, match="stop_ids: 96"):
        engine.admit([Request([5], Decoding(stop_ids=(96,)))])
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.admit([Request([], Decoding())])
    with pytest.raises(ValueError, match="3 rows are needed, 2 of 2 are free"):
        engine.admit(REQUESTS[:3])


def test_log_probs_are_of_the_model_and_not_of_what_was_filtered(model: Generator) -> None:
    """Of a row that draws from its best tokens and of one that is admitted later, by the same tokens read at once."""
    requests = [Request([5, 9, 30], MIXED[1], 1), Request([7] * 20, MIXED[3], 3)]
    engine = Engine(model, 2, log_probs=True)
    ((first,),) = engine.admit(requests[:1])
    engine.step(3)
    ((second,),) = engine.admit(requests[1:])
    finish(engine)
    texts = np.zeros((2, 40), np.int32)
    for row, slot in enumerate((first, second)):
        text = [*slot.request.prompt, *slot.ids]
        texts[row, : len(text)] = text
    scores = jax.nn.log_softmax(model.decoder.apply({"params": params()}, texts))
    for row, slot in enumerate((first, second)):
        places = np.arange(len(slot.ids)) + len(slot.request.prompt) - 1
        assert slot.log_probs == pytest.approx(scores[row, places, np.array(slot.ids)].tolist(), abs=1e-4)
    assert Engine(model, 1).admit(requests[:1])[0][0].log_probs == []
