"""Every family answers the three kinds of requests as its PyTorch module does; `evaluate` in docs/models.md."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from jaxlm.config import Decoding
from jaxlm.evaluation.asking import ask, make_plan
from jaxlm.evaluation.journal import Answered
from jaxlm.evaluation.likelihood import Choices
from jaxlm.evaluation.task import Answer, Generate, LogLikelihood, NextToken, Request
from jaxlm.models.families import FAMILIES
from tests.evaluation.test_likelihood import by_torch, pair
from tests.models.matrix import settle

pytest.importorskip("torch")

STOP = 2  # see `pair`
NEW = 5
# Where a special token of a small config lies: no text has these.
IDS = [index for index in range(3, 37) if index not in (30, 31, 32, 33)]


class Signs:
    """Each token is a sign, and each sign a token."""

    adds_eos, eos_id = False, STOP
    run_bytes: ClassVar[dict[int, int]] = {}

    def __init__(self, opening: tuple[int, ...] = ()) -> None:
        self.opening, self.opens_answers = opening, bool(opening)

    def encode(self, text: str) -> Any:
        return SimpleNamespace(ids=[ord(sign) - 0x4E00 for sign in text])

    def encode_batch(self, texts: Sequence[str], *_: Any) -> list[Any]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *_: Any, **__: Any) -> str:
        return "".join(chr(0x4E00 + index) for index in ids)


def written_by_torch(module: Any, context: Sequence[int]) -> list[int]:
    """The most probable token, and again, each from the whole text."""
    torch = pytest.importorskip("torch")
    has_encoder = module.config.is_encoder_decoder
    text = [module.config.decoder_start_token_id] if has_encoder else list(context)
    before = len(text)
    while len(text) < before + NEW:
        tokens = torch.tensor([text])
        given = (
            dict(input_ids=torch.tensor([context]), decoder_input_ids=tokens) if has_encoder else dict(input_ids=tokens)
        )
        with torch.no_grad():
            best = int(module(**given, use_cache=False).logits[0, -1].argmax())
        if best == STOP:
            break
        text.append(best)
    return text[before:]


@pytest.mark.parametrize(
    "family", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_kind_of_request(family: str, request: pytest.FixtureRequest) -> None:
    """Log-likelihoods and next tokens to 1e-4, and the very text."""
    module, model = pair(family)
    prefix = model.decoder.spec.prefix
    opening = () if prefix is None else (prefix.mask_ids[0], prefix.start_id)
    tokenizer: Any = Signs(opening)
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return tokenizer.decode(rng.choice(IDS, length).tolist())

    contexts = [text(length) for length in (9, 4, 12)]
    continuations = (text(1), text(4), text(2))
    requests: list[Request] = []
    for record, context in enumerate(contexts):
        requests += [
            LogLikelihood(record=record, part="choice", context=context, continuations=continuations),
            NextToken(record=record, part="next", context=context, ids=(5, 11, 36)),
            Generate(record=record, part="text", context=context, settings=Decoding(max_new_tokens=NEW)),
        ]
    prompter: Any = SimpleNamespace(tokenizer=tokenizer, adds_bos=bool(opening), is_text=True)
    plan = make_plan(requests, model, prompter, 4, ["a", "b", "c"])
    answered = Answered()
    ask(plan, model, tokenizer, answered, lambda count: None)
    for number, each in enumerate(requests):
        context = (*tokenizer.encode(cast(str, each.context)).ids, *opening)
        answer: Answer = answered.answers[number]
        if isinstance(each, Generate):
            assert tokenizer.encode(answer.texts[0]).ids == written_by_torch(module, context)
            continue
        wanted = (
            tuple((index,) for index in each.ids)
            if isinstance(each, NextToken)
            else tuple(tuple(tokenizer.encode(text).ids) for text in continuations)
        )
        expected = by_torch(module, Choices(context, wanted))
        np.testing.assert_allclose(answer.log_probs, expected.log_probs, rtol=0, atol=1e-4)
        assert answer.is_greedy == expected.is_greedy
    settle(request, family, "evaluate")
