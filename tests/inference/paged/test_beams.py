"""Beam searches beside the engine."""

from __future__ import annotations

import pytest

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.paged.requests import AnswerFailed, Query
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder
from tests.inference.paged.asking import Answers, ask, settle
from tests.inference.test_generation import CONFIG, generator, params

PROMPT = (3, 14, 15, 9)
BEAMS = Decoding(max_new_tokens=12, num_beams=3, samples=2, repetition_penalty=1.3)


def test_the_best_beams_are_those_of_generate(engine: PagedEngine) -> None:
    (expected,) = generator(Decoder(CONFIG), params()).generate([PROMPT], BEAMS)
    others = Query(PROMPT, Decoding(max_new_tokens=20))
    answers, beside = ask(engine, [Query(PROMPT, BEAMS), others])
    assert [tuple(ids) for ids in answers.ids] == [answer.ids for answer in expected]
    assert answers.finish == [answer.finish for answer in expected]
    assert len(beside.ids[0]) == 20
    settle(engine)


def test_a_search_that_nobody_waits_for_ends(engine: PagedEngine) -> None:
    asked = [Answers(engine, Query(PROMPT, BEAMS)) for _ in range(3)]
    asked[1].cancel()
    asked[2].cancel()
    assert asked[0].wait().finish[0] != "cancelled"
    assert [each.wait().finish for each in asked[1:]] == [["cancelled", "cancelled"]] * 2
    settle(engine)


def test_a_search_that_fails_ends_alone(engine: PagedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> bool:
        raise RuntimeError("out of memory")

    query = Query(PROMPT, BEAMS)  # whose programs are compiled
    with monkeypatch.context() as patched:
        patched.setattr(engine._beams, "_go_on", fails)
        with pytest.raises(AnswerFailed) as failed:
            ask(engine, [query])
    assert str(failed.value.__cause__) == "out of memory"
    assert ask(engine, [query])[0].finish[0] != "cancelled"
    settle(engine)


def test_what_a_search_does_not_do_is_refused(engine: PagedEngine) -> None:
    with pytest.raises(UserError, match="a beam search has no logprobs, logit_bias"):
        engine.submit(Query(PROMPT, BEAMS, logprobs=2, logit_bias=((1, 2.0),)), lambda piece: None)
