"""`/v1/chat/completions`: conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxlm.inference.paged.requests import TokenLogprob
from jaxlm.serve.answers import Asked, Delta
from jaxlm.serve.asking import MOST_LOGPROBS, chat_prompt, decoding, in_range, make_query
from jaxlm.serve.bodies import ChatBody
from jaxlm.serve.completions import Counted, finish_reason, heading, wants_usage
from jaxlm.serve.grammar import Grammars
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.problems import Problem
from jaxlm.serve.replies import Reply, events, whole
from jaxlm.serve.served import Served
from jaxlm.serve.tokens import Spelling
from jaxlm.serve.tools import CallReader, call_form, offered


class Chat:
    """A body's query, and the reply.

    Raises:
        Problem: for what cannot be answered.
    """

    def __init__(self, body: ChatBody, served: Served, spelling: Spelling, grammars: Grammars) -> None:
        tools = offered(body)
        form = call_form(served, body) if tools else None
        constraint = grammars.constraint(body, tools, form)
        self._body, self._served, self._spelling = body, served, spelling
        self._usage = wants_usage(body)
        in_range("top_logprobs", body.top_logprobs, 0, MOST_LOGPROBS)
        if body.top_logprobs and not body.logprobs:
            raise Problem("top_logprobs: it goes with logprobs: true", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise Problem("max_tokens: the older name of max_completion_tokens; give one of them", param="max_tokens")
        ids = chat_prompt(body.messages, tools, served.prompter(served.adapter(body.model)), served)
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        options = decoding(body, served.context - len(ids) if asked is None else asked, served)
        self._readers = [CallReader(form, tools) for _ in range(body.n)]
        best = body.top_logprobs if body.logprobs else None
        self._query = make_query(ids, body, options, served, best, constraint=constraint)
        self._counted = Counted([self._query])
        self._heading = heading("chat.completion.chunk" if body.stream else "chat.completion", "chatcmpl", served, body)

    def reply(self, metrics: Metrics, most: float) -> Reply:
        """Asks the engine; most: the seconds that it may take."""
        self._asked = Asked(self._served.engine, self._served.tokenizer, [self._query], metrics, most, continues=False)
        close = self._asked.close
        return events(self._pieces, close) if self._body.stream else whole(self._whole, close)

    async def _pieces(self) -> AsyncIterator[Any]:
        """The chunks of a stream."""
        extra = {"usage": None} if self._usage else {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> Any:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return {**self._heading, "choices": [choice], **extra}

        for index in range(self._body.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        counts = [0] * self._body.n
        async for delta, content, calls in self._read():
            index = delta.sample
            said: dict[str, Any] = {"content": content} if content else {}
            if calls:
                said["tool_calls"] = [{"index": counts[index] + k, **call} for k, call in enumerate(calls)]
                counts[index] += len(calls)
            logprobs = self._logprobs(delta)
            if said or logprobs:
                yield chunk(index, said, logprobs)
            if delta.finish is not None:
                yield chunk(index, {}, None, _reason(delta, counts[index]))
        if self._usage:
            yield {**self._heading, "choices": [], "usage": self._counted.usage()}

    async def _whole(self) -> Any:
        """The object of a reply that is no stream."""
        contents, calls = [""] * self._body.n, [[] for _ in range(self._body.n)]  # type: list[str], list[list[Any]]
        scored: list[list[Any]] = [[] for _ in contents]
        reasons: list[str | None] = [None] * self._body.n
        async for delta, content, new in self._read():
            index = delta.sample
            contents[index] += content
            calls[index] += new
            scored[index] += (self._logprobs(delta) or {"content": []})["content"]
            reasons[index] = _reason(delta, len(calls[index]))
        choices = []
        for index, content in enumerate(contents):
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if calls[index]:
                message |= {"content": content or None, "tool_calls": calls[index]}
            logprobs = {"content": scored[index], "refusal": None} if self._body.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reasons[index]})
        return {**self._heading, "choices": choices, "usage": self._counted.usage()}

    async def _read(self) -> AsyncIterator[tuple[Delta, str, list[dict[str, Any]]]]:
        """What comes, with the text that is said and the calls that are made."""
        async for delta in self._asked.deltas():
            self._counted.add(delta)
            content, calls = self._readers[delta.sample].read(delta.text, delta.finish is not None)
            yield delta, content, calls

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not (self._body.logprobs and delta.tokens):
            return None
        return {"content": self._entries([scored for scored, _ in delta.tokens]), "refusal": None}

    def _entries(self, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        def entry(index: int, logprob: float | None) -> dict[str, Any]:
            spelled = list(self._spelling.spelled(index))
            return {"token": self._spelling.text(index), "logprob": logprob, "bytes": spelled}

        return [
            {**entry(scored.token, scored.logprob), "top_logprobs": [entry(*pair) for pair in scored.top]}
            for scored in tokens
        ]


def _reason(delta: Delta, num_calls: int) -> str | None:
    reason = finish_reason(delta.finish)
    return "tool_calls" if reason == "stop" and num_calls else reason
