"""`/v1/completions`: texts that go on."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

from jaxlm.errors import UserError
from jaxlm.inference.best_of import Judge
from jaxlm.inference.paged.requests import Finish, Query, TokenLogprob
from jaxlm.inference.text import TextStream
from jaxlm.serve.answers import Asked, Delta
from jaxlm.serve.asking import MOST_LOGPROBS, MOST_SAMPLES, decoding, in_range, make_query, plain_prompts
from jaxlm.serve.bodies import CompletionBody, Sampling
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.problems import Problem, of_user_error
from jaxlm.serve.replies import Reply, events, whole
from jaxlm.serve.served import Served
from jaxlm.serve.tokens import Spelling

_REASONS: dict[Finish, str] = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


def finish_reason(finish: Finish | None) -> str | None:
    """OpenAI's word for the end of an answer."""
    return None if finish is None else _REASONS[finish]


class Counted:
    """Tokens of a request's prompts and answers."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self._prompts = sum(len(query.prompt) for query in queries)
        self._answers: dict[tuple[int, int], int] = {}
        self._cached: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        self._answers[delta.query, delta.sample] = delta.num_tokens
        self._cached[delta.query] = max(delta.cached, self._cached.get(delta.query, 0))

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        written = sum(self._answers.values())
        return {
            "prompt_tokens": self._prompts,
            "completion_tokens": written,
            "total_tokens": self._prompts + written,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def heading(kind: str, prefix: str, served: Served, body: Sampling) -> dict[str, Any]:
    """What every object of a reply begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model or served.name,
    }


def wants_usage(body: Sampling) -> bool:
    """Whether a stream ends with the number of tokens.

    Raises:
        Problem: options of a stream for a reply that is none.
    """
    if body.stream_options is not None and not body.stream:
        raise Problem("stream_options: it goes with stream: true", param="stream_options")
    return body.stream_options is not None and body.stream_options.include_usage


def _judge(body: CompletionBody, served: Served) -> Judge | None:
    """What chooses among a body's answers; None where it asks for no choice.

    Raises:
        Problem: it asks for one that cannot be made.
    """
    best_of = body.best_of
    if best_of is None or best_of == body.n:
        return None

    def refuse(text: str) -> NoReturn:
        raise Problem(f"best_of: {text}", param="best_of")

    if served.judge is None:
        refuse(f"{best_of} must be n ({body.n}), or left out: this server has no reward model (--reward_model)")
    in_range("best_of", best_of, body.n, MOST_SAMPLES)
    if body.stream:
        refuse(f"{best_of} with stream: true: the best answer is known at the end; leave one of them out")
    if body.temperature == 0 or body.num_beams > 1:
        refuse(f"{best_of} answers are drawn, so temperature must be above 0, and num_beams 1")
    if body.max_tokens == 0:
        refuse(f"{best_of} with max_tokens 0: there is no answer to choose")
    return served.judge


class Completions:
    """A body's queries, and the reply.

    Raises:
        Problem: for what cannot be answered.
    """

    def __init__(self, body: CompletionBody, served: Served, spelling: Spelling) -> None:
        self._body, self._served, self._spelling = body, served, spelling
        self._usage = wants_usage(body)
        self._judge = _judge(body, served)
        self._drawn = body.n if self._judge is None or body.best_of is None else body.best_of
        if body.logprobs is not None:
            in_range("logprobs", body.logprobs, 0, MOST_LOGPROBS)
        self._only_scores = body.max_tokens == 0 and body.echo
        drawn = dataclasses.replace(body, n=self._drawn)
        options = decoding(drawn, 1 if self._only_scores else body.max_tokens, served)
        prompts = plain_prompts(body.prompt, served, "prompt", body.add_special_tokens)
        if len(prompts) * self._drawn > served.queue:
            text = f"prompt: {len(prompts) * self._drawn} answers are asked for; at most {served.queue} may wait"
            raise Problem(f"{text} (--max_queue): ask in several requests", param="prompt")
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        decode = served.tokenizer.decode
        self._texts = [
            text if isinstance(text, str) else decode(ids)
            for text, ids in zip(texts if isinstance(texts[0], (str, list)) else [texts], prompts, strict=True)
        ]
        echoed = body.logprobs if body.echo else None
        self._queries = [make_query(ids, body, options, served, body.logprobs, echoed) for ids in prompts]
        self._counted = Counted(self._queries)
        if self._judge is not None:
            for ids in prompts:
                try:
                    self._judge.check_prompt(len(ids), options, served.context, "best_of")
                except UserError as error:
                    raise of_user_error(error, "best_of") from None
        self._heading = heading("text_completion", "cmpl", served, body)
        self._echoed: dict[int, dict[str, list[Any]] | None] = {}
        self._begun: set[int] = set()

    def reply(self, metrics: Metrics, most: float) -> Reply:
        """Asks the engine; most: the seconds that it may take."""
        self._asked = Asked(self._served.engine, self._served.tokenizer, self._queries, metrics, most, continues=True)
        close = self._asked.close
        return events(self._pieces, close) if self._body.stream else whole(self._whole, close)

    async def _pieces(self) -> AsyncIterator[Any]:
        extra = {"usage": None} if self._usage else {}
        async for choice in self._choices():
            yield {**self._heading, "choices": [choice], **extra}
        if self._usage:
            yield {**self._heading, "choices": [], "usage": self._counted.usage()}

    async def _whole(self) -> Any:
        count = len(self._queries) * self._drawn
        scores = [None if self._body.logprobs is None else self._scores((), ()) for _ in range(count)]
        joined: list[dict[str, Any]] = [
            {"index": index, "text": "", "logprobs": scores[index], "finish_reason": None} for index in range(count)
        ]
        async for choice in self._choices():
            known = joined[choice["index"]]
            known["text"] += choice["text"]
            known["finish_reason"] = choice["finish_reason"]
            for key, values in (choice["logprobs"] or {}).items():
                known["logprobs"][key] += values
        if self._judge is not None:
            joined = await self._best(self._judge, joined)
        return {**self._heading, "choices": joined, "usage": self._counted.usage()}

    async def _best(self, judge: Judge, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The n choices of each prompt that the reward model prefers, the best first, each with its reward."""
        answers = [
            (query.prompt, self._asked.ids(number, sample), choices[number * self._drawn + sample])
            for number, query in enumerate(self._queries)
            for sample in range(self._drawn)
        ]
        judged = [(prompt, ids, choice["finish_reason"] == "stop") for prompt, ids, choice in answers]
        rewards = await asyncio.to_thread(judge.of_answers, judged)
        best: list[dict[str, Any]] = []
        for first in range(0, len(choices), self._drawn):
            places = sorted(range(first, first + self._drawn), key=lambda place: -rewards[place])
            for place in places[: self._body.n]:
                best.append({**choices[place], "index": len(best), "reward": float(rewards[place])})
        return best

    async def _choices(self) -> AsyncIterator[dict[str, Any]]:
        """Parts of the choices, as they come."""
        async for delta in self._asked.deltas():
            # A prompt that is only scored has one token drawn behind it, which nobody is given.
            self._counted.add(dataclasses.replace(delta, num_tokens=0) if self._only_scores else delta)
            choice = self._choice(delta)
            if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                yield choice

    def _choice(self, delta: Delta) -> dict[str, Any]:
        index = delta.query * self._drawn + delta.sample
        text, base = "", 0
        logprobs: dict[str, list[Any]] | None = None
        if self._body.echo:
            base = len(self._texts[delta.query])
            if delta.prompt is not None:
                self._echoed[delta.query] = self._of_prompt(delta.prompt)
            if index not in self._begun:
                text, logprobs = self._texts[delta.query], self._echoed.get(delta.query)
                logprobs = None if logprobs is None else {key: list(values) for key, values in logprobs.items()}
        self._begun.add(index)
        if not self._only_scores:
            text += delta.text
            if self._body.logprobs is not None and delta.tokens:
                places = [base + begin for _, begin in delta.tokens]
                new = self._scores([scored for scored, _ in delta.tokens], places)
                logprobs = new if logprobs is None else {key: logprobs[key] + new[key] for key in new}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(delta.finish)}

    def _of_prompt(self, prompt: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        stream = TextStream(self._served.tokenizer, (), ())
        stream.update([scored.token for scored in prompt], last=True)
        return self._scores(prompt, [0, *stream.ends[:-1]])

    def _scores(self, tokens: Sequence[TokenLogprob], places: Sequence[int]) -> dict[str, list[Any]]:
        """OpenAI's lists: one entry for each token."""
        keyed = self._spelling.keyed
        return {
            "tokens": [self._spelling.text(scored.token) for scored in tokens],
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [
                None if scored.logprob is None else keyed([*scored.top, (scored.token, scored.logprob)])
                for scored in tokens
            ],
            "text_offset": list(places),
        }
