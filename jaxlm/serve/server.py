"""The server's process: sockets with patience for nobody, and an end that answers what was begun."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxlm.errors import UserError

HEADER_SECONDS = 10.0
WRITE_SECONDS = 30.0
MOST_CONNECTIONS = 1024


class Patient(H11Protocol):
    """HTTP with an end to waiting: for a request's headers, and for a client that does not read its answer."""

    _headers: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def _watch_headers(self) -> None:
        """Counts the seconds until a request has come, also behind a reply to one whose body nobody read."""
        is_idle = self.cycle is None or self.cycle.response_complete
        waits = is_idle and not self.transport.is_closing()
        if waits and self._headers is None:
            self._headers = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not waits and self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write is None:
            self._write = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write is not None:
            self._write.cancel()
            self._write = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers, self._write):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Uvicorn's server, which ends in order at SIGTERM: nothing more is taken, what was begun is answered."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # as in tests, which set `should_exit`
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def make_server(app: ASGIApp, host: str, port: int, drain_s: float) -> Server:
    """A server that has not begun.

    Args:
        drain_s: how long answers may go on when it ends.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Patient,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(drain_s),
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=16 << 10,
    )
    return Server(config)


def serve(server: Server, drain: Callable[[], None], started: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, then until everything is answered; a second Ctrl-C ends at once.

    Args:
        drain: ends the engine.
        started: is given the server's address once it listens.

    Raises:
        UserError: it cannot listen there.
    """
    config = server.config
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        where = f"port: cannot listen at {config.host}:{config.port} ({error.strerror or error})"
        raise UserError(f"{where}; choose another --port, or --port 0 for any") from None
    host = f"[{config.host}]" if family == socket.AF_INET6 else config.host
    started(f"http://{host}:{listener.getsockname()[1]}")
    server.run([listener])
    if not server.force_exit:
        drain()
