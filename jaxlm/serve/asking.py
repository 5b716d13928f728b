"""From bodies to queries: prompts as tokens, settings as the engine has them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from jaxlm.config import Decoding
from jaxlm.data.records import Record
from jaxlm.errors import UserError
from jaxlm.fields import shown
from jaxlm.inference.options import check_decoding, check_stop_ids
from jaxlm.inference.paged.requests import Constraint, Query
from jaxlm.inference.prompts import Prompter
from jaxlm.serve.bodies import Message, Sampling, Tool
from jaxlm.serve.problems import Problem, of_user_error
from jaxlm.serve.served import Served
from jaxlm.tokenizer import Tokenizer

MOST_SAMPLES, MOST_STOPS, MOST_LOGPROBS = 128, 4, 20
LONGEST_STOP = 1000  # characters; all answers are searched for it while they are written
# What the engine calls the fields, where it is not the same.
NAMES = {"samples": "n", "max_new_tokens": "max_tokens", "stop_ids": "stop_token_ids"}


def decoding(body: Sampling, max_tokens: int, served: Served) -> Decoding:
    """The settings of an answer.

    Raises:
        Problem: a value out of its range.
    """
    in_range("n", body.n, 1, MOST_SAMPLES)
    in_range("num_beams", body.num_beams, 1, MOST_SAMPLES)
    in_range("max_tokens", max_tokens, 1, 2**31 - 1)
    in_range("frequency_penalty", body.frequency_penalty, -2, 2)
    in_range("presence_penalty", body.presence_penalty, -2, 2)
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    if len(stop) > MOST_STOPS:
        raise Problem(f"stop: {len(stop)} texts; at most {MOST_STOPS} can be given", param="stop")
    if any(len(text) > LONGEST_STOP for text in stop):
        raise Problem(f"stop: a text of more than {LONGEST_STOP:,} characters", param="stop")
    in_range("top_k", body.top_k, -1, 2**31 - 1)
    in_range("top_p", body.top_p, 0, 1)
    in_range("min_p", body.min_p, 0, 1)
    draws = body.temperature > 0  # at 0 the filters leave the most probable token, which is all that is looked at
    options = Decoding(
        max_new_tokens=max_tokens,
        temperature=float(body.temperature),
        top_k=max(0, body.top_k) if draws else 0,
        top_p=float(body.top_p) if draws else 1.0,
        min_p=float(body.min_p) if draws else 0.0,
        repetition_penalty=float(body.repetition_penalty),
        no_repeat_ngram_size=body.no_repeat_ngram_size,
        num_beams=body.num_beams,
        length_penalty=float(body.length_penalty),
        samples=body.n,
        stop=stop,
        stop_ids=body.stop_token_ids,
        seed=secrets.randbits(32) if body.seed is None else body.seed % 2**32,
    )
    try:
        check_decoding(options)
        check_stop_ids(options, served.vocab_size)
    except UserError as error:
        key, _, rest = str(error).partition(":")
        raise Problem(f"{NAMES.get(key, key)}:{rest}", param=NAMES.get(key, key)) from None
    return options


def make_query(
    ids: Sequence[int],
    body: Sampling,
    options: Decoding,
    served: Served,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    constraint: Callable[[], Constraint] | None = None,
) -> Query:
    """What the engine is asked: a prompt, and the settings of a body.

    Raises:
        Problem: an unknown model, or a bias of what is no token.
    """
    return Query(
        tuple(ids),
        options,
        served.adapter(body.model),
        logprobs,
        prompt_logprobs,
        float(body.frequency_penalty),
        float(body.presence_penalty),
        _logit_bias(body, served),
        body.ignore_eos,
        constraint,
    )


def _logit_bias(body: Sampling, served: Served) -> tuple[tuple[int, float], ...]:
    """(token, added to its logit).

    Raises:
        Problem: a key that is not a token id of the model, or a bias beyond 100.
    """
    result = []
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < served.vocab_size):
            known = f"the model has the token ids 0 to {served.vocab_size - 1}"
            raise Problem(f"logit_bias: {shown(name)} is not a token; {known}", param="logit_bias")
        in_range("logit_bias", value, -100, 100)
        result.append((int(name), float(value)))
    return tuple(result)


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raises Problem for a value out of [low, high]."""
    if not low <= value <= high:
        limits = " and ".join(f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (low, high))
        raise Problem(f"{name}: {shown(value)} must be between {limits}", param=name)


def plain_prompts(value: Any, served: Served, param: str, bos: bool = True) -> list[tuple[int, ...]]:
    """Prompts as they stand: a text, texts, token ids, or lists of token ids.

    Args:
        bos: begin texts with the tokenizer's bos where it does so itself.

    Raises:
        Problem: it is none of these, or `Served.checked` refuses one.
    """
    tokenizer = served.tokenizer
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        wanted = "a text, a list of texts, token ids, or a list of lists of token ids"
        raise Problem(f"{param}: {shown(value)} must be {wanted}", param=param)
    return [
        served.checked(plain_ids(tokenizer, prompt, bos) if isinstance(prompt, str) else prompt, param)
        for prompt in prompts
    ]


def plain_ids(tokenizer: Tokenizer, text: str, bos: bool) -> list[int]:
    """Tokens of a text as it stands."""
    opening = tokenizer.opening if bos and tokenizer.adds_bos else ()
    try:
        ids = tokenizer.encode(text).ids
    except UserError as error:
        raise of_user_error(error, "prompt") from None
    return [*ids, *opening] if tokenizer.opens_answers else [*opening, *ids]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(index) is int for index in value)


def chat_prompt(messages: Sequence[Message], tools: Sequence[Tool], prompter: Prompter, served: Served) -> list[int]:
    """Tokens of a conversation that ends with a question, in the model's template.

    Raises:
        Problem: the template has no place for it.
    """
    if prompter.is_text:
        raise Problem(
            f"messages: {served.name} has no chat template; use /v1/completions, or start the server with --template",
            param="messages",
        )
    if not messages or messages[-1].role not in ("user", "tool"):
        text = "messages: the last one must be of the role user or tool: there is nothing to answer"
        raise Problem(text, param="messages")
    try:
        if prompter.takes_turns:
            turns: dict[str, Any] = {"messages": [_turn(message, number) for number, message in enumerate(messages)]}
            if tools:
                turns["tools"] = [_described(tool) for tool in tools]
            ids = prompter.record(Record("messages", turns))
        elif len(messages) > 1 or tools:
            raise Problem(
                f"messages: the template {prompter.name} takes one message of the role user, found "
                f"{', '.join(message.role for message in messages)}{' and tools' if tools else ''}",
                param="messages",
            )
        else:
            ids = prompter.question(messages[0].text, messages[0].input, "messages")
    except UserError as error:
        raise of_user_error(error, "messages") from None
    return list(served.checked(ids, "messages"))


def _turn(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates expect it: arguments of calls are objects there."""
    extra = "" if message.input is None else f"\n\n{message.input}"
    turn: dict[str, Any] = {"role": message.role, "content": None if message.content is None else message.text + extra}
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            turn[key] = getattr(message, key)
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, number)},
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str, number: int) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        key = f"messages[{number}].tool_calls"
        raise Problem(f"{key}: arguments {shown(text)} must be an object as JSON text", param=key)
    return values


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates show it."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    return {"type": "function", "function": {**function, "parameters": tool.function.parameters}}
