"""The routes."""

from __future__ import annotations

import asyncio
import base64
import http
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from jaxlm.errors import UserError
from jaxlm.serve.answers import Asked
from jaxlm.serve.asking import chat_prompt, decoding, make_query, plain_ids, plain_prompts
from jaxlm.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    KnowLMBody,
    Sampling,
    TokenizeBody,
    read_body,
)
from jaxlm.serve.chats import Chat
from jaxlm.serve.completions import Completions
from jaxlm.serve.grammar import Grammars
from jaxlm.serve.guard import Guard
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.problems import Problem, of_user_error
from jaxlm.serve.replies import whole
from jaxlm.serve.served import Served
from jaxlm.serve.tokens import Spelling

Body = TypeVar("Body")
Made = TypeVar("Made")
MOST_TEXTS = 256


def make_app(
    served: Served,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    origins: Sequence[str] = (),
    timeout_s: float = 600.0,
    pages: Sequence[BaseRoute] = (),
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        host, api_key, origins: see `Guard`.
        timeout_s: the longest that an answer may take, waiting included.
        pages: further routes.
    """
    handlers: Any = {Problem: _problem, HTTPException: _problem, Exception: _problem}
    routes = [*_Routes(served, timeout_s).all(), *pages]
    app: ASGIApp = Guard(Starlette(routes=routes, exception_handlers=handlers), api_key, host, origins)
    if origins:
        headers = ["Authorization", "Content-Type"]
        app = CORSMiddleware(app, list(origins), allow_methods=["GET", "POST"], allow_headers=headers)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    if isinstance(error, Problem):
        return error.response()
    if isinstance(error, HTTPException):
        where = f"{request.method} {request.url.path[:80]}"
        return Problem(f"{where}: {http.HTTPStatus(error.status_code).phrase}", error.status_code).response()
    return Problem("the server has made a mistake; see its log", 500).response()


class _Routes:
    def __init__(self, served: Served, most: float) -> None:
        self._served, self._most = served, most
        self._metrics = Metrics(served.engine)
        self._spelling = Spelling(served.tokenizer)
        self._grammars = Grammars(served, self._spelling)
        self._embedding = threading.Lock()
        # Long texts take a while to be cut into tokens. One thread: tokenizers have settings that calls change.
        self._prompts = ThreadPoolExecutor(1, "jaxlm-prompts")

    def all(self) -> list[Route]:
        get, post = ["GET"], ["POST"]
        return [
            Route("/health", self.health, methods=get),
            Route("/metrics", self.metrics, methods=get),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{model:path}", self.model, methods=get),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chats, methods=post),
            Route("/v1/embeddings", self.embeddings, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/tokenizer_info", self.tokenizer_info, methods=get),
            Route("/generate", self.generate, methods=post),
        ]

    # What the server is ------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        compiled, programs = self._served.engine.ready()
        is_ready = compiled == programs and self._metrics.failed is None
        status = "failed" if self._metrics.failed else "ready" if is_ready else "compiling"
        content = {"status": status, "programs_compiled": compiled, "programs": programs}
        return JSONResponse(content, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._served.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._served.adapter(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._served.created, "owned_by": "jaxlm"}
        parent = None if name == self._served.name else self._served.name
        return {**card, "root": self._served.name, "parent": parent, "max_model_len": self._served.context}

    # Answers -----------------------------------------------------------------------------------

    async def _body(self, request: Request, cls: type[Body]) -> Body:
        body = read_body(await request.body(), cls)
        compiled, programs = self._served.engine.ready()
        if compiled != programs:
            wait = {"Retry-After": "5"}
            raise Problem(
                f"not ready: {compiled} of {programs} programs are compiled", 503, code="not_ready", headers=wait
            )
        return body

    async def _aside(self, make: Callable[..., Made], *arguments: Any) -> Made:
        """What is made of a body, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._prompts, make, *arguments)

    async def completions(self, request: Request) -> Any:
        body = await self._body(request, CompletionBody)
        asked = await self._aside(Completions, body, self._served, self._spelling)
        return asked.reply(self._metrics, self._most)

    async def chats(self, request: Request) -> Any:
        body = await self._body(request, ChatBody)
        chat = await self._aside(Chat, body, self._served, self._spelling, self._grammars)
        return chat.reply(self._metrics, self._most)

    async def generate(self, request: Request) -> Any:
        """KnowLM's server: an instruction in the model's template."""
        body = await self._body(request, KnowLMBody)
        served, given = self._served, body.parameters
        settings = Sampling(
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=given.seed,
        )
        asks = served.prompter(None).question
        try:
            ids = await self._aside(asks, body.instruction, body.input or None, "instruction")
        except UserError as error:
            raise of_user_error(error, "instruction") from None
        prompt = served.checked(ids, "instruction")
        query = make_query(prompt, settings, decoding(settings, given.max_tokens, served), served)
        asked = Asked(served.engine, served.tokenizer, [query], self._metrics, self._most, continues=False)

        async def answer() -> Any:
            text, count = "", 0
            async for delta in asked.deltas():
                text, count = text + delta.text, delta.num_tokens
            return {"generated_text": text, "num_output_tokens_cf": count, "error": None}

        return whole(answer, asked.close)

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request, EmbeddingsBody)
        served = self._served
        if served.embed is None or served.adapter(body.model) is not None:
            raise Problem(f"model: {body.model or served.name} has no embeddings; ask {served.name}", param="model")
        texts = await self._aside(plain_prompts, body.input, served, "input")
        if len(texts) > MOST_TEXTS:
            raise Problem(f"input: {len(texts)} texts; at most {MOST_TEXTS} at a time", param="input")
        vectors = await asyncio.to_thread(self._embed, texts)
        encode = (lambda row: row.tolist()) if body.encoding_format == "float" else _base64
        data = [{"object": "embedding", "index": k, "embedding": encode(row)} for k, row in enumerate(vectors)]
        count = sum(map(len, texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": body.model or served.name, "usage": usage})

    def _embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        assert self._served.embed is not None
        with self._embedding:  # one at a time: the device has answers to write too
            return self._served.embed(texts)

    # Tokens ------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = read_body(await request.body(), TokenizeBody)
        served = self._served
        if (body.prompt is None) == (not body.messages):
            raise Problem("prompt: give either prompt or messages", param="prompt")
        adapter = served.adapter(body.model)
        if body.prompt is None:
            ids = await self._aside(chat_prompt, body.messages, (), served.prompter(adapter), served)
        else:
            ids = await self._aside(plain_ids, served.tokenizer, body.prompt, body.add_special_tokens)
        pieces = [self._spelling.text(index) for index in ids]
        return JSONResponse({"tokens": ids, "token_strs": pieces, "count": len(ids), "max_model_len": served.context})

    async def detokenize(self, request: Request) -> Response:
        body = read_body(await request.body(), DetokenizeBody)
        self._served.adapter(body.model)
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < self._served.vocab_size:
            most = self._served.vocab_size - 1
            raise Problem(f"tokens: the model has the token ids 0 to {most}", param="tokens")
        return JSONResponse({"prompt": self._served.tokenizer.decode(body.tokens, skip_special=False)})

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._served.tokenizer
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
        tokens = {f"{role}_token": None if index is None else tokenizer.token(index) for role, index in roles.items()}
        return JSONResponse({**tokens, "chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size})


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
