"""The routes as OpenAI's own client uses them, over the fake engine."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from jaxlm.inference.best_of import Judge
from jaxlm.serve.bodies import CompletionBody
from jaxlm.serve.completions import Completions
from jaxlm.serve.problems import Problem
from jaxlm.serve.tokens import Spelling
from jaxlm.tokenizer import Tokenizer
from tests.serve.fake import FakeEngine
from tests.serve.model import ANSWER, running, served

ASK: Any = [{"role": "system", "content": "short"}, {"role": "user", "content": "what is granite?"}]
# SentencePiece's first token brings a space along, behind a prompt; a chat's answer is a turn of its own.
WRITTEN = f" {ANSWER}"


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:rock"]
    assert client.models.retrieve("tiny:rock").id == "tiny:rock"
    with pytest.raises(openai.NotFoundError, match=r"huge.*tiny, tiny:rock"):
        client.models.retrieve("huge")


def test_a_completion_of_every_kind_of_prompt(client: openai.OpenAI, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    ids = [1, *tokenizer.encode("the rock").ids]
    prompts: list[Any] = ["the rock", ["the rock", "the crust"], ids, [ids, ids[:2]]]
    for prompt in prompts:
        reply = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=200)
        count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        assert [choice.text for choice in reply.choices] == [WRITTEN] * count
        assert [choice.finish_reason for choice in reply.choices] == ["stop"] * count
        assert engine.submitted[-count].prompt == tuple(ids)


def test_answers_of_a_prompt_share_it_and_differ(client: openai.OpenAI, engine: FakeEngine) -> None:
    before = len(engine.submitted)
    reply = client.completions.create(model="tiny", prompt=["the", "rock"], n=3, seed=5, max_tokens=100)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert len({choice.text for choice in reply.choices[:3]}) == 3
    assert len(engine.submitted) == before + 2
    again = client.completions.create(model="tiny", prompt=["the", "rock"], n=3, seed=5, max_tokens=100)
    assert [choice.text for choice in reply.choices] == [choice.text for choice in again.choices]


def test_the_settings_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [9], "ignore_eos": True}
    client.chat.completions.create(
        model="tiny:rock",
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["§"],
        max_completion_tokens=8,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": -100},
        user="me",
        extra_body=extra,
    )
    query = engine.submitted[-1]
    options = query.options
    assert (options.temperature, options.top_p, options.seed, options.max_new_tokens) == (0.5, 0.9, 3, 8)
    assert (options.top_k, options.min_p, options.repetition_penalty, options.stop_ids) == (7, 0.1, 1.2, (9,))
    assert (query.adapter, query.frequency_penalty, query.presence_penalty) == ("rock", 0.5, -0.5)
    assert (query.logit_bias, query.ignore_stop_ids, options.stop) == (((5, -100.0),), True, ("§",))


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, temperature=0)
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    first, last, usage = chunks[0].choices[0], chunks[-2].choices[0], chunks[-1]
    assert first.delta.role == "assistant" and last.finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage.choices == [] and usage.usage == whole.usage
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content == ANSWER
    pieces = client.completions.create(model="tiny", prompt="the", temperature=0, stream=True, max_tokens=200)
    assert "".join(piece.choices[0].text for piece in pieces) == WRITTEN


@pytest.mark.parametrize("stop", ["igneous", ["中文", "zzz"], "🌍"])
def test_a_stop_text_ends_the_answer_and_is_not_shown(client: openai.OpenAI, engine: FakeEngine, stop: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, stop=stop, logprobs=True)
    first = stop if isinstance(stop, str) else stop[0]
    choice = reply.choices[0]
    assert choice.message.content == ANSWER.partition(first)[0] and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    spelled = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert spelled.startswith(f" {choice.message.content}".encode())


def test_scores_of_a_text_that_is_held_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    """A token of which a part may begin a stop text is shown in parts; its score comes once."""
    ask: Any = {"model": "tiny", "prompt": "rock", "temperature": 0, "max_tokens": 60, "logprobs": 0}
    chunk, engine.chunk = engine.chunk, 1
    try:
        for stop in ("eXX", "zX", "k?", " i?"):
            reply = client.completions.create(**ask, stop=[stop])
            scored = reply.choices[0].logprobs
            assert reply.choices[0].text == WRITTEN[: len(reply.choices[0].text)] and scored is not None
            assert scored.tokens is not None and len(scored.tokens) == 60
            assert scored.text_offset is not None and scored.text_offset == sorted(scored.text_offset)
    finally:
        engine.chunk = chunk


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_tokens=40, logprobs=True, top_logprobs=3
    )
    scored = reply.choices[0].logprobs
    assert scored is not None and scored.content is not None and len(scored.content) == 40
    assert all(len(token.top_logprobs) == 3 for token in scored.content)
    assert (
        b"".join(bytes(token.bytes or []) for token in scored.content)
        .decode(errors="ignore")
        .startswith(f" {reply.choices[0].message.content}")
    )


def test_what_an_evaluator_asks(client: openai.OpenAI, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    """lm-evaluation-harness: is_greedy compares a token's number with the largest of the alternatives."""
    ids = [1, *tokenizer.encode("granite 花岗岩").ids]
    reply = client.completions.create(
        model="tiny", prompt=[ids, ids[:4]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, prompt in zip(reply.choices, (ids, ids[:4]), strict=True):
        scored = choice.logprobs
        assert scored is not None
        numbers, tops = scored.token_logprobs, scored.top_logprobs
        assert numbers is not None and tops is not None
        assert len(numbers) == len(tops) == len(prompt) + 1 and numbers[0] is None and tops[0] is None
        greedy = [number == max(top.values()) for number, top in zip(numbers[1:], tops[1:], strict=True)]
        wanted = [engine._scored(prompt[:k], t, 1) for k, t in enumerate(prompt) if k]
        assert greedy[:-1] == [score.logprob == score.top[0][1] for score in wanted]
        assert numbers[1:-1] == [score.logprob for score in wanted]
        assert choice.text.startswith(tokenizer.decode(prompt))


def test_the_stop_token_has_its_entry_behind_an_echoed_prompt(
    tokenizer: Tokenizer, client: openai.OpenAI, engine: FakeEngine
) -> None:
    """Else an evaluator, who leaves the last entry out, would lose one of the prompt."""
    engine.script, script = (lambda query, sample: []), engine.script
    try:
        reply = client.completions.create(model="tiny", prompt=[1, 5, 6], max_tokens=1, logprobs=1, echo=True)
    finally:
        engine.script = script
    scored = reply.choices[0].logprobs
    assert scored is not None and scored.tokens is not None and len(scored.tokens) == 4 and scored.tokens[-1] == "</s>"
    assert reply.usage is not None and reply.usage.completion_tokens == 1


def test_a_prompt_alone_is_scored(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="the rock", max_tokens=0, echo=True, logprobs=0)
    scored = reply.choices[0].logprobs
    assert reply.choices[0].text == "the rock" and scored is not None and scored.tokens == ["<s>", " the", " rock"]
    assert scored.text_offset == [0, 0, 3]
    assert reply.usage is not None and (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 0)


SCHEMA: Any = {
    "type": "object",
    "properties": {"rock": {"type": "string", "maxLength": 5}, "hard": {"type": "boolean"}},
    "required": ["rock", "hard"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "description": "a rock", "parameters": SCHEMA}}]


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "rock", "schema": SCHEMA}}
    reply = client.chat.completions.create(model="tiny", messages=ASK, response_format=wanted, seed=1)
    assert sorted(json.loads(reply.choices[0].message.content or "")) == ["hard", "rock"]
    reply = client.chat.completions.create(
        model="tiny", messages=ASK, response_format={"type": "json_object"}, max_tokens=99
    )
    assert (reply.choices[0].message.content or "").startswith("{")


def test_a_schema_that_outgrows_its_limits_ends_its_own_answer_alone(client: openai.OpenAI) -> None:
    """llguidance follows some 600 properties that may come next, and sees that there are more when they do."""
    schema = {"type": "object", "properties": {f"p{k}": {"type": "null"} for k in range(700)}}
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    with pytest.raises(openai.BadRequestError, match="the schema cannot be followed") as refused:
        client.chat.completions.create(model="tiny", messages=ASK, response_format=wanted)
    assert refused.value.param == "response_format"
    assert client.get("/models", cast_to=object) and client.completions.create(model="tiny", prompt="rock").choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_tool_is_called_when_it_must(client: openai.OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice, seed=2)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls" and message.content is None and message.tool_calls
    call: Any = message.tool_calls[0]
    assert call.function.name == "look_up" and sorted(json.loads(call.function.arguments)) == ["hard", "rock"]


def test_calls_go_back_into_the_template(client: openai.OpenAI, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"rock": "granite"}'}}
    turns: Any = [
        *ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "igneous"},
    ]
    client.chat.completions.create(model="tiny", messages=turns, tools=TOOLS, max_tokens=3)
    text = tokenizer.decode(engine.submitted[-1].prompt)
    assert '<tool_call>{"name": "look_up", "arguments": {"rock": "granite"}}</tool_call>' in text
    assert "<|tool|>igneous" in text and '"description": "a rock"' in text and text.endswith("<|assistant|>")


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64, which must be the same numbers."""
    reply = client.embeddings.create(model="tiny", input=["rock", "the rock"])
    plain = client.embeddings.create(model="tiny", input=["rock", "the rock"], encoding_format="float")
    assert [entry.embedding for entry in reply.data] == [entry.embedding for entry in plain.data]
    assert reply.data[1].embedding[0] == 3 and reply.usage.prompt_tokens == 5


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"store": True}, "store", "not a field"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"temperature": "1"}, "temperature", "a number"),
    ({"temperature": -1}, "temperature", "-1"),
    ({"temperature": 1e-300}, "temperature", "between 1e-06 and 1e+06"),
    ({"temperature": 0, "top_p": 7}, "top_p", "between 0 and 1"),
    ({"top_k": -5}, "top_k", "between -1 and"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 2, "temperature": 0}, "n", "equal answers"),
    ({"num_beams": 129, "temperature": 0}, "num_beams", "between 1 and 128"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": [""]}, "stop", "not empty"),
    ({"stop": "a" * 1001}, "stop", "more than 1,000"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "0 to 399"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "0 to 399"),
    ({"logit_bias": {"1": 200}}, "logit_bias", "-100 and 100"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "one of them"),
    ({"max_tokens": 0}, "max_tokens", "between 1"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "True"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"messages": []}, "messages", "nothing to answer"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "boss"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "user", "content": "rock " * 600}]}, "messages", "context of 512"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "rock"}}}},
        "response_format",
        "cannot be followed",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(fields)[:40] for fields, _, _ in REFUSED])
def test_what_is_not_served_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body={"model": "tiny", "messages": ASK, **fields}, cast_to=object)
    error: Any = refused.value.body
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"513 tokens.*512"):
        client.completions.create(model="tiny", prompt=[5] * 513)
    with pytest.raises(openai.BadRequestError, match=r"5 to 400.*0 to 399"):
        client.completions.create(model="tiny", prompt=[5, 400])
    with pytest.raises(openai.BadRequestError, match=r"260 answers.*256 may wait"):  # not a 429, which is tried again
        client.completions.create(model="tiny", prompt=[[5]] * 130, n=2)


def test_knowlms_server(url: str, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    """Instruction and input go into the template; its fields, and its reply's."""
    body = {"instruction": "name it", "input": "a rock", "parameters": {"temperature": 0, "max_tokens": 4, "top_k": -1}}
    reply = httpx2.post(f"{url}/generate", json=body)
    assert reply.json() == {"generated_text": "**Granite**", "num_output_tokens_cf": 4, "error": None}
    assert "name it\n\na rock" in tokenizer.decode(engine.submitted[-1].prompt)
    assert httpx2.post(f"{url}/generate", json={"instruction": "x", "beams": 2}).json()["error"]["param"] == "beams"


def test_an_alpaca_template_has_a_place_for_input(tokenizer: Tokenizer, engine: FakeEngine) -> None:
    with running(served(tokenizer, engine, "alpaca")) as (url, _):
        ask: Any = {"messages": [{"role": "user", "content": "name it", "input": "a rock"}], "max_tokens": 2}
        assert httpx2.post(f"{url}/v1/chat/completions", json=ask).status_code == 200
        assert "### Instruction:\nname it\n\n### Input:\na rock" in tokenizer.decode(engine.submitted[-1].prompt)
        ask["messages"] = [{"role": "system", "content": "short"}, *ask["messages"]]
        error = httpx2.post(f"{url}/v1/chat/completions", json=ask).json()["error"]
        assert "alpaca takes one message" in error["message"]


def test_tokens_go_there_and_back(url: str, tokenizer: Tokenizer) -> None:
    """As lm-evaluation-harness asks for them."""
    tokens = httpx2.post(f"{url}/tokenize", json={"prompt": "granite 花", "add_special_tokens": False}).json()["tokens"]
    assert tokens == tokenizer.encode("granite 花").ids
    assert httpx2.post(f"{url}/detokenize", json={"tokens": tokens}).json() == {"prompt": "granite 花"}
    info = httpx2.get(f"{url}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["chat_template"]) == ("</s>", "<s>", tokenizer.chat_template)
    chat = httpx2.post(f"{url}/tokenize", json={"messages": ASK}).json()
    assert chat["count"] == len(chat["tokens"]) and chat["max_model_len"] == 512


def test_tokens_that_read_alike_have_entries_of_their_own(tokenizer: Tokenizer) -> None:
    """Else the most probable one might be missing among the alternatives."""
    spelling = Spelling(tokenizer)
    byte, letter = (next(k for k in range(*span) if spelling.text(k) == "{") for span in ((3, 259), (259, 400)))
    assert spelling.keyed([(letter, -1.0), (byte, -2.0), (letter, -1.0)]) == {"{": -1.0, f"token_id:{byte}": -2.0}
    half = tokenizer.encode("花").ids[-1]
    assert spelling.text(half) == "bytes:\\xb1" and spelling.spelled(half) == b"\xb1"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"best_of": 3}, r"best_of: 3 must be n \(1\).*--reward_model"),
        ({"n": 2, "best_of": 1, "judge": True}, "best_of: 1 must be between 2 and 128"),
        ({"best_of": 500, "judge": True}, "best_of: 500 must be between 1 and 128"),
        ({"best_of": 3, "stream": True, "judge": True}, "best_of: 3 with stream"),
        ({"best_of": 3, "temperature": 0, "judge": True}, "temperature must be above 0"),
        ({"best_of": 3, "num_beams": 2, "judge": True}, "num_beams 1"),
        ({"best_of": 3, "max_tokens": 0, "echo": True, "judge": True}, "no answer to choose"),
        ({"best_of": 3, "max_tokens": 90, "judge": True}, "the reward model reads at most 64"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_by_its_field(
    body: dict[str, Any], message: str, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    values = dict(body)
    judge = Judge(lambda texts: np.zeros(len(texts), np.float32), 2, 64) if values.pop("judge", False) else None
    with pytest.raises(Problem, match=message) as refused:
        Completions(
            CompletionBody(prompt="the rock", **values), served(tokenizer, engine, judge=judge), Spelling(tokenizer)
        )
    assert refused.value.param == "best_of" and refused.value.status == 400
