"""Processes that tokenise: batches of records in, chunks of tokens out, in order.

They are started as commands of their own and not by `multiprocessing`, which would run the user's main script again in
each, and end by themselves when the process that started them does, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from jaxlm.data.tokenise import Batch, Tokeniser
from jaxlm.data.tokens import Chunk
from jaxlm.errors import UserError

T = TypeVar("T")
_AHEAD = 2  # batches for each process that are under way


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """A context with processes, none when one process is asked for: then this one does the work.

    Args:
        tokeniser: what they do.
        processes: their number.
    """

    def __init__(self, tokeniser: Tokeniser, processes: int) -> None:
        self._tokeniser, self._count = tokeniser, processes if processes > 1 else 0
        self._workers: list[_Worker] = []
        self._free: deque[_Worker] = deque()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self._count:
            self._workers = [_Worker(self._tokeniser) for _ in range(self._count)]
            self._free = deque(self._workers)
            self._threads = ThreadPoolExecutor(self._count, "tokenising")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def map(self, batches: Iterable[tuple[T, Batch]]) -> Iterator[tuple[T, Chunk]]:
        """The chunk of each batch, in order, with what came along; a bounded number is under way.

        Raises:
            UserError: the first mistake in the order of the records, or a process that was killed.
        """
        if self._threads is None:
            for label, batch in batches:
                yield label, self._tokeniser.chunk(batch)
            return
        running: deque[tuple[T, Future[Chunk]]] = deque()
        for label, batch in batches:
            running.append((label, self._threads.submit(self._work, batch)))
            if len(running) > _AHEAD * self._count:
                first, future = running.popleft()
                yield first, future.result()
        for label, future in running:
            yield label, future.result()

    def _work(self, batch: Batch) -> Chunk:
        worker = self._free.pop()  # there are as many threads as processes
        try:
            return worker.chunk(batch)
        finally:
            self._free.append(worker)


class _Worker:
    def __init__(self, tokeniser: Tokeniser) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "jaxlm.data.store.worker", str(theirs.fileno())]
        path = os.pathsep.join([*(place for place in sys.path if place), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = multiprocessing.connection.Connection(ours.detach())
        self._connection.send(tokeniser)

    def chunk(self, batch: Batch) -> Chunk:
        try:
            self._connection.send(batch)
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise UserError(
                f"data: a process that tokenises ended with status {self._process.poll()} (out of memory?); start "
                "again, what is finished is kept"
            ) from None
        if kind == "refused":
            raise UserError(value)
        chunk: Chunk = value
        return chunk

    def close(self) -> None:
        """Ends the process, which may be in the middle of a batch."""
        self._process.terminate()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._connection.close()
