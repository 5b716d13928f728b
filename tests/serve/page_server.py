"""A server that looks to the page like `jaxlm serve`, and fails in every way that the page has words for.

What is asked decides: !429, !400, !500 are refused; !broken ends in the middle of an answer; !slow is long.
`python -m tests.serve.page_server PORT` serves the page for looking at it.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.config import Decoding
from jaxlm.serve.guard import HEADERS
from jaxlm.serve.page import routes
from jaxlm.serve.problems import Problem

ANSWER = """Zircon takes up **uranium** while it grows, but hardly any lead.

### How the clock runs
1. Uranium decays to lead at a known rate.
2. The *ratio* of both tells the age:

```python
age = math.log(1 + lead / uranium) / 1.55e-10
```

| isotope | half-life |
|---|---|
| ²³⁸U | 4.47 Ga |
| ²³⁵U | 0.70 Ga |

> The oldest zircons, from [Jack Hills](https://example.org/jack), are 4.4 Ga old."""
RELATIONS = {
    "located in": [
        {"subject": "Mount Etna", "object": "Sicily"},
        {"subject": "Sicily", "object": "Italy"},
    ],
    "consists of": [{"subject": "lavas", "object": "basalt"}],
    "contains": [{"subject": "basalt", "object": "plagioclase"}, {"subject": "basalt", "object": "olivine"}],
}
RELATIONS_ZH = {
    "位于": [{"subject": "埃特纳火山", "object": "西西里岛"}, {"subject": "西西里岛", "object": "意大利"}],
    "组成": [{"subject": "熔岩", "object": "玄武岩"}],
    "含有": [{"subject": "玄武岩", "object": "斜长石"}, {"subject": "玄武岩", "object": "橄榄石"}],
}
ENTITIES = {"mineral": ["olivine", "plagioclase"], "rock": ["basalt"], "place": ["Sicily", "Italy"]}
EVENTS = {"eruption": [{"trigger": "erupted", "arguments": {"volcano": ["Mount Etna"], "date": ["1669"]}}]}


MODELS = ["geo-7b", "geo-7b:chem", "geo-7b:lora"]


def answer(text: str) -> str:
    """What the model says."""
    if '"schema"' in text:
        if "event_type" in text:
            return json.dumps(EVENTS)
        if '"mineral"' in text:
            return json.dumps(ENTITIES)
        return json.dumps(RELATIONS_ZH if "位于" in text else RELATIONS, ensure_ascii=False)
    if "SMILES chemical formula" in text:
        return "<smiles>CC(=O)Oc1ccccc1C(=O)O</smiles>"
    if "<smiles>" in text:
        return "The molecule is an acetylated salicylic acid with a carboxylic acid and an ester group."
    if "锆石" in text:
        return "锆石结晶时吸收**铀**而几乎不含铅，因此：\n\n1. 铀以已知速率衰变为铅；\n2. 由两者的*比值*即可得到年龄。"
    if "!slow" in text:
        return " ".join(f"word{n}" for n in range(3000))
    return ANSWER


def scored(token: str, at: int) -> tuple[float, list[tuple[str, float]]]:
    """Log-probability of a token, and of the five best in its place; as probable as its number says."""
    chance = (0.97, 0.62, 0.99, 0.3, 0.88)[at % 5]
    rest = [(f" {word}", math.log((1 - chance) / 2**n)) for n, word in enumerate(("rock", "age", "lead", "old"), 1)]
    return math.log(chance), sorted([(token, math.log(chance)), *rest], key=lambda pair: -pair[1])


class State:
    """What a test changes while the server runs."""

    def __init__(self) -> None:
        self.programs_compiled, self.programs = 12, 12
        self.key = ""
        self.delay = 0.004
        self.cut: list[str] = []
        self.bodies: list[dict[str, Any]] = []


def application(state: State) -> Starlette:
    """The routes that the page asks."""
    prompters = {
        None: SimpleNamespace(name="chat", takes_turns=True),
        "lora": SimpleNamespace(name="alpaca", takes_turns=False),
    }
    served: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(modalities=[SimpleNamespace(name="smiles")]),
        models=MODELS,
        adapter={"geo-7b": None, "geo-7b:chem": None, "geo-7b:lora": "lora"}.get,
        prompter=prompters.get,
        context=2048,
    )
    recipe = Decoding(temperature=0.4, top_p=0.75, top_k=40, repetition_penalty=1.3)

    def refusal(status: int, message: str) -> Response:
        return Problem(message, status, headers={"Retry-After": "3"} if status == 429 else None).response()

    async def refused(request: Request, error: Any) -> Response:
        return refusal(error.status, error.message)

    async def health(request: Request) -> Response:
        is_ready = state.programs_compiled == state.programs
        counts = {"programs_compiled": state.programs_compiled, "programs": state.programs}
        return JSONResponse(counts, 200 if is_ready else 503)

    async def models(request: Request) -> Response:
        if state.key and request.headers.get("Authorization") != f"Bearer {state.key}":
            return refusal(401, "the key is wrong")
        return JSONResponse({"object": "list", "data": [{"id": model} for model in MODELS]})

    async def answered(request: Request) -> Response:
        body = await request.json()
        state.bodies.append(body)
        if state.key and request.headers.get("Authorization") != f"Bearer {state.key}":
            return refusal(401, "the key is wrong")
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        for status, message in ((429, "full"), (400, "temperature: 7 is above 2"), (500, "out of memory")):
            if f"!{status}" in text:
                return refusal(status, message)
        return StreamingResponse(pieces(body, text), media_type="text/event-stream")

    async def pieces(body: dict[str, Any], text: str) -> AsyncIterator[str]:
        full, count = answer(text), 0
        tokens = [full[at : at + 4] for at in range(0, len(full), 4)]
        try:
            for at, token in enumerate(tokens):
                await asyncio.sleep(state.delay)
                chance, top = scored(token, at)
                if "messages" in body:
                    entry = {"token": token, "logprob": chance, "bytes": list(token.encode())}
                    entry["top_logprobs"] = [{"token": other, "logprob": value} for other, value in top]
                    choice: dict[str, Any] = {"delta": {"content": token}, "logprobs": {"content": [entry]}}
                else:
                    logprobs = {"tokens": [token], "token_logprobs": [chance], "top_logprobs": [dict(top)]}
                    choice = {"text": token, "logprobs": logprobs}
                yield f"data: {json.dumps({'choices': [{'index': 0, **choice, 'finish_reason': None}]})}\n\n"
                count += 1
                if "!broken" in text and at == 9:
                    return
            last = {"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}
            yield f"data: {json.dumps({'choices': [last]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': count}})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            state.cut.append(text)
            raise

    async def policy(request: Request, go_on: Any) -> Response:
        response: Response = await go_on(request)
        response.headers.update(HEADERS)
        return response

    posts = [Route(f"/v1/{name}", answered, methods=["POST"]) for name in ("completions", "chat/completions")]
    return Starlette(
        routes=[Route("/health", health), Route("/v1/models", models), *posts, *routes(served, recipe)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=policy)],
        exception_handlers={Problem: refused},
    )


if __name__ == "__main__":
    uvicorn.run(application(State()), port=int(sys.argv[1]), log_level="warning")
