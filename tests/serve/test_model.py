"""The server over the engine and a small model: what is asked through HTTP is what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import openai
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.generator import Generator
from jaxlm.inference.loaded import LoadedModel
from jaxlm.inference.model import load_weights
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.inference.prompts import Prompter
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.tokenizer import Tokenizer
from tests.inference.paged.asking import settle
from tests.inference.test_generation import CONFIG, TreeSource
from tests.models.compare import random_tree
from tests.serve.model import running, served


def small_model(tokenizer: Tokenizer) -> Generator:
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    tree = random_tree(nn.unbox(abstract_variables(Decoder(config)))["params"], 0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Generator(Decoder(config), load_weights(Decoder(config), mesh, TreeSource(tree)), mesh, tokenizer.end_ids)


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer) -> LoadedModel:
    return LoadedModel(small_model(tokenizer), Prompter("text", tokenizer))


@pytest.fixture(scope="module")
def judged() -> list[Sequence[int]]:
    """What the reward model has read."""
    return []


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer, judged: list[Sequence[int]]) -> Iterator[openai.OpenAI]:
    generator = small_model(tokenizer)
    engine = PagedEngine(generator, 4, pages=32, chunk=16)
    itself = LoadedModel(generator, Prompter("text", tokenizer))
    judge = itself.judge(itself.spec, 8)
    judge = dataclasses.replace(judge, rewards=lambda texts: (judged.extend(texts), itself.rewards(texts))[1])
    model = served(tokenizer, engine, context=engine.max_length, embed=itself.embed, judge=judge)
    with running(model) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=60)  # until its programs are compiled
        client.completions.create(model="tiny", prompt="rock", max_tokens=1)
        yield client.with_options(max_retries=0)
        settle(engine)  # counts are those of the last step, an answer may be read before they are made
    engine.drain()


def test_an_evaluator_gets_the_models_log_probabilities(
    client: openai.OpenAI, loaded: LoadedModel, tokenizer: Tokenizer
) -> None:
    texts = [[1, *tokenizer.encode(text).ids] for text in ("granite is an igneous rock", "the crust 花")]
    reply = client.completions.create(
        model="tiny", prompt=texts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, ids in zip(reply.choices, texts, strict=True):
        scored = choice.logprobs
        assert scored is not None and scored.token_logprobs is not None and scored.top_logprobs is not None
        numbers, tops = scored.token_logprobs[1:], scored.top_logprobs[1:]
        wanted = loaded.log_probs(ids[:1], ids[1:])
        np.testing.assert_allclose(numbers[:-1], wanted, rtol=0, atol=2e-5)  # sums in another order
        best = loaded.logits(ids).argmax(axis=-1)
        greedy = [number == max(top.values()) for number, top in zip(numbers, tops, strict=True)]
        assert greedy == [*(best[:-1] == ids[1:]), True]


def test_answers_are_those_of_generate(client: openai.OpenAI, loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    prompts = ["the crust of the earth", "rock", "granite is"]
    ids = [[1, *tokenizer.encode(prompt).ids] for prompt in prompts]
    reply = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0, logprobs=0)
    for choice, answer in zip(reply.choices, loaded.generate(ids, Decoding(max_new_tokens=12)), strict=True):
        assert choice.finish_reason == answer.finish and reply.usage is not None
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == len(answer.ids) + (answer.finish == "stop")
        assert choice.text == answer.text  # also where a model without training writes halves of characters


def test_drawn_answers_depend_on_the_seed_alone(client: openai.OpenAI) -> None:
    prompts = ["the crust", "rock", "granite", "mica and"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=12, seed=4, n=2)
    for number, prompt in enumerate(prompts):
        alone = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=4, n=2)
        texts = [choice.text for choice in together.choices[2 * number : 2 * number + 2]]
        assert [choice.text for choice in alone.choices] == texts


def test_a_stream_is_the_whole_reply(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "the crust", "max_tokens": 20, "seed": 2, "stop": ["a", "�"]}
    whole = client.completions.create(**ask)  # type: ignore[call-overload]
    pieces = client.completions.create(**ask, stream=True)  # type: ignore[call-overload]
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_embeddings_are_the_models(client: openai.OpenAI, loaded: LoadedModel) -> None:
    texts = ["granite is an igneous rock", "rock"]
    reply = client.embeddings.create(model="tiny", input=texts)
    np.testing.assert_allclose([entry.embedding for entry in reply.data], loaded.embed(texts), rtol=0, atol=2e-5)


def test_the_best_of_several_answers_are_those_that_the_reward_model_prefers(
    client: openai.OpenAI, judged: list[Sequence[int]], loaded: LoadedModel, tokenizer: Tokenizer
) -> None:
    """With itself as the judge: the reward of a text is the logit of the end token behind it."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": ["the crust", "rock"], "max_tokens": 8, "seed": 4}
    judged.clear()
    reply = client.completions.create(**ask, n=2, best_of=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3] and len(judged) == 10
    prompts = [[1, *tokenizer.encode(text).ids] for text in ask["prompt"]]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == sum(map(len, judged)) - 5 * sum(map(len, prompts))  # all that was drawn
    drawn = client.completions.create(**ask, n=5)
    end = loaded.spec.reward_token_id
    for number, prompt in enumerate(prompts):
        texts = judged[5 * number : 5 * number + 5]
        assert all(list(ids[: len(prompt)]) == prompt for ids in texts)
        rewards = [float(loaded.logits(ids)[-1, end]) for ids in texts]
        assert len({round(reward, 3) for reward in rewards}) == 5
        order = np.argsort(rewards)[::-1][:2]
        for choice, place in zip(reply.choices[2 * number : 2 * number + 2], order, strict=True):
            assert choice.reward == pytest.approx(rewards[place], abs=1e-4)  # type: ignore[attr-defined]
            assert choice.text == drawn.choices[5 * number + place].text


def test_a_beam_search_is_that_of_generate_and_names_what_it_has_not(
    client: openai.OpenAI, loaded: LoadedModel, tokenizer: Tokenizer
) -> None:
    ids = [1, *tokenizer.encode("granite is").ids]
    (expected, *_) = loaded.generate([ids], Decoding(max_new_tokens=6, num_beams=2))
    asked = dict(model="tiny", prompt=[ids], max_tokens=6, temperature=0, extra_body={"num_beams": 2})
    reply = client.completions.create(**asked)  # type: ignore[call-overload]
    assert reply.choices[0].text == expected.text
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**asked, logprobs=1)  # type: ignore[call-overload]
    assert error.value.param == "num_beams" and "a beam search has no logprobs" in error.value.message
