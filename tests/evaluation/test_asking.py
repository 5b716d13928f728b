"""Requests as token ids: where texts are cut, what an encoder reads, and which answers belong to which request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.asking import Writing, ask, by_record, check_requests, make_plan, pair_ids
from jaxlm.evaluation.journal import Answered
from jaxlm.evaluation.likelihood import Choices
from jaxlm.evaluation.task import Answer, Generate, LogLikelihood, NextToken, Question, Request
from jaxlm.inference.generator import Generator
from jaxlm.inference.prompts import Prompter
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from tests.evaluation.test_likelihood import by_torch, pair


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def answers_to(
    requests: list[Request], model: Generator, prompter: Prompter, batch_size: int = 2
) -> tuple[Any, list[Answer]]:
    plan = make_plan(requests, model, prompter, batch_size, [f"r{n}" for n in range(9)])
    answered = Answered()
    ask(plan, model, prompter.tokenizer, answered, lambda count: None)
    return plan, [answered.answers[number] for number in range(len(requests))]


@pytest.mark.nightly
def test_texts_are_cut_as_lm_eval_cuts_them(tokenizer: Tokenizer) -> None:
    """The context has the tokens that it has alone; its last white space belongs to the continuation."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    from jaxlm.evaluation.harness import JaxlmModel

    lm: Any = JaxlmModel.__new__(JaxlmModel)
    lm.tokenizer, lm._prompter, lm.backend = tokenizer, Prompter("text", tokenizer), "causal"
    for context, text in (
        ("Question: rock", " sand"),
        ("rock ", "sand"),
        ("rock  ", " lava"),
        ("ro", "ckx"),
        ("a:", "b"),
    ):
        mine = pair_ids(tokenizer, tokenizer.opening, context, text)
        assert mine == lm._encode_pair(context, text)


def test_each_request_gets_its_own_answers(tokenizer: Tokenizer) -> None:
    """Of every kind, in any order, also where a continuation changes how the end of the context would be cut."""
    module, model = pair("llama", vocab_size=320, max_position_embeddings=64)
    prompter = Prompter("text", tokenizer)
    ids = [tokenizer.encode(word).ids[0] for word in ("rock", "sand", "lava")]
    requests: list[Request] = [
        LogLikelihood(record=0, context="ro", continuations=(" sand", "ck sand", " lava iron", "ck iron")),
        Generate(record=0, part="text", context="rock sand", settings=Decoding(max_new_tokens=3)),
        NextToken(record=1, context="rock sand", ids=(ids[2], ids[0])),
        LogLikelihood(record=1, part="turn", context=Question("rock"), continuations=("sand",)),
        Generate(record=2, context="rock " * 90, settings=Decoding(max_new_tokens=3)),
        LogLikelihood(record=3, context="", continuations=("sand",)),
    ]
    check_requests(requests, 4)
    plan, answers = answers_to(requests, model, prompter)
    before = list(tokenizer.opening)
    for text, value in zip(requests[0].continuations, answers[0].log_probs, strict=True):  # type: ignore[attr-defined]
        context, continuation = pair_ids(tokenizer, before, "ro", text)
        expected = by_torch(module, Choices(tuple(context), (tuple(continuation),)))
        assert value == pytest.approx(expected.log_probs[0], abs=1e-4), text
    assert len(answers[1].texts) == 1 and answers[1].finishes == ("length",)
    context = (*before, *tokenizer.encode("rock sand").ids)
    expected = by_torch(module, Choices(context, ((ids[2],), (ids[0],))))
    assert answers[2].log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert len(answers[3].log_probs) == 1
    assert "r2" in (answers[4].error or "") and "context is 64" in (answers[4].error or "")
    assert plan.fed[5].context == tuple(before)
    parts = by_record(4, requests, dict(enumerate(answers)))
    assert [set(each) for each in parts] == [{"answer", "text"}, {"answer", "turn"}, {"answer"}, {"answer"}]


@pytest.mark.slow
def test_an_encoder_reads_the_context(tokenizer: Tokenizer) -> None:
    """And the decoder the continuation, which is cut into tokens by itself."""
    module, model = pair("t5", vocab_size=320)
    prompter = Prompter("text", tokenizer, for_encoder=True)
    requests: list[Request] = [
        LogLikelihood(record=0, context="rock sand", continuations=("lava", "iron zinc")),
        Generate(record=1, context="rock sand", settings=Decoding(max_new_tokens=2)),
    ]
    plan, answers = answers_to(requests, model, prompter)
    context = (*tokenizer.opening, *tokenizer.encode("rock sand").ids)
    expected = by_torch(module, Choices(context, tuple(tuple(tokenizer.encode(t).ids) for t in ("lava", "iron zinc"))))
    assert answers[0].log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert isinstance(plan.fed[1], Writing) and len(answers[1].texts) == 1


def test_parts_that_a_template_has_no_place_for_are_refused(tokenizer: Tokenizer) -> None:
    _, model = pair("llama", vocab_size=320, max_position_embeddings=512)
    turns = Question("rock", turns=(("sand", "lava"),))
    for question, message in ((turns, "no place for earlier turns"), (Question("x", system="y"), "a system message")):
        requests: list[Request] = [LogLikelihood(record=0, context=question, continuations=("sand",))]
        plan = make_plan(requests, model, Prompter("text", tokenizer), 2, ["r0"])
        assert message in str(plan.fed[0])
    chat = Prompter("vicuna_v1.1", tokenizer)
    plan = make_plan([LogLikelihood(record=0, context=turns, continuations=("a",))], model, chat, 2, ["r0"])
    assert "USER: sand ASSISTANT: lava" in tokenizer.decode(plan.fed[0].context)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="max_new_tokens: 0"):
        make_plan([Generate(record=0, context="a", settings=Decoding(max_new_tokens=0))], model, chat, 2, ["r0"])
