"""How replies are sent: whole or as server-sent events, and only while the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from jaxlm.serve.problems import Problem

Work = Callable[[Scope, Receive, Send], Awaitable[None]]


class Reply:
    """Does the work of a request, and gives it up as soon as the client has gone.

    Args:
        close: called behind it, however it ended.
    """

    def __init__(self, work: Work, close: Callable[[], None]) -> None:
        self._work, self._close = work, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope, receive, send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            self._close()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def whole(make: Callable[[], Awaitable[Any]], close: Callable[[], None]) -> Reply:
    """A reply of one JSON object."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(await make())(scope, receive, send)

    return Reply(work, close)


def events(objects: Callable[[], AsyncIterator[Any]], close: Callable[[], None]) -> Reply:
    """A reply of server-sent events, each a JSON object, and [DONE]; a problem on the way is the last event."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            async for value in objects():
                await say(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
        except Problem as problem:
            await say(json.dumps(problem.body()), more=False)
        else:
            await say("[DONE]", more=False)

    return Reply(work, close)
