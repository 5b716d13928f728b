"""What stands in front of the routes: keys, hosts, sizes, headers."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlm.serve.loopback import is_loopback
from jaxlm.serve.page import CONTENT_POLICY
from jaxlm.serve.problems import Problem

MOST_BYTES = 1 << 20
BODY_SECONDS = 30.0
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": CONTENT_POLICY,
}


class Guard:
    """An application behind its checks.

    Args:
        api_key: what requests must bring; None: nothing.
        host: what the server listens at. At loopback, requests that name another host are refused: a page of the web
            could have made its own name mean this machine (DNS rebinding).
        origins: web pages from elsewhere that may send requests; see also CORS in `app`.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, host: str, origins: Sequence[str]) -> None:
        self._app, self._key = app, None if api_key is None else api_key.encode()
        self._only_loopback, self._origins = is_loopback(host), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive) if scope["method"] not in ("GET", "HEAD", "OPTIONS") else b""
        except Problem as problem:
            await problem.response()(scope, receive, with_headers)
            return
        given = False

        async def receive_read() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_read, with_headers)

    def _check(self, scope: Scope) -> None:
        """Refuses what is seen from the headers."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._only_loopback and self._key is None and not is_loopback(name):
            raise Problem(f"the host {host[:80]!r} is not this server's; it listens at loopback only", 403)
        origin = headers.get("origin")
        own = origin is not None and origin.partition("://")[2] == host
        if scope["method"] == "POST" and not (origin is None or own or origin in self._origins):
            raise Problem(f"the origin {origin[:80]!r} may not ask here; see --cors_origin", 403)
        # Whoever opens the page has no key yet, and whoever watches the server needs none.
        is_page = scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))
        is_open = scope["method"] == "OPTIONS" or path == "/health" or is_page
        if self._key is not None and not is_open:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key)
            if kind.lower() != "bearer" or not right:
                wanted = {"WWW-Authenticate": "Bearer"}
                text = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
                raise Problem(text, 401, code="invalid_api_key", headers=wanted)
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            found = headers.get("content-type", "none")[:80]
            raise Problem(f"the Content-Type must be application/json, found {found!r}", 415)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Problem: it is larger than 1 MiB, or does not come in time.
        """
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            raise _too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem("the client has gone", 400)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > MOST_BYTES:
                        raise _too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body did not come within {BODY_SECONDS:g} s"
            raise Problem(text, 408, headers={"Connection": "close"}) from None


def _too_large() -> Problem:
    return Problem(f"the body is larger than {MOST_BYTES} bytes", 413, headers={"Connection": "close"})
