"""An engine that writes what it is told, token by token, in a thread: for tests of what stands around an engine."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.errors import UserError
from jaxlm.inference.paged.requests import (
    Constraint,
    Deliver,
    EngineStats,
    Finish,
    Piece,
    Query,
    QueueFull,
    TokenLogprob,
)

# What is written for a query and the number of its sample.
Script = Callable[[Query, int], Sequence[int]]


@dataclasses.dataclass
class _Row:
    ticket: int
    sample: int
    query: Query
    deliver: Deliver
    script: list[int]
    constraint: Constraint | None
    at: int = 0
    cancelled: bool = False


class FakeEngine:
    """Implements `EngineThread`.

    Args:
        script: what is written.
        vocab_size: V.
        stop_id: ends answers whose script is at its end.
        step: seconds between two tokens.
        chunk: tokens of a step.
        rows, queue: answers that are written together, and queries that may wait.
    """

    def __init__(
        self,
        script: Script,
        vocab_size: int,
        stop_id: int,
        context: int = 512,
        step: float = 0.0,
        chunk: int = 1,
        rows: int = 8,
        queue: int = 64,
    ) -> None:
        self.script, self.vocab_size, self.stop_id, self.context = script, vocab_size, stop_id, context
        self.step, self.chunk, self.rows, self.queue = step, chunk, rows, queue
        self.programs = (3, 3)
        self.error: Exception | None = None
        self.submitted: list[Query] = []
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._more = threading.Condition()
        self._next, self._ended = 0, False
        self._tokens = [0, 0]
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def submit(self, query: Query, deliver: Deliver) -> int:
        if query.adapter not in (None, "rock"):
            raise UserError(f"adapter: {query.adapter} is not loaded")
        with self._more:
            if len({row.ticket for row in self._waiting}) >= self.queue or self._ended:
                raise QueueFull
            self._next += 1
            self.submitted.append(query)
            for sample in range(query.options.samples):
                constraint = query.constraint() if query.constraint else None
                script = list(self.script(query, sample))
                self._waiting.append(_Row(self._next, sample, query, deliver, script, constraint))
            self._tokens[0] += len(query.prompt)
            self._more.notify()
            return self._next

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        with self._more:
            for row in [*self._waiting, *self._running]:
                if row.ticket == ticket and sample in (None, row.sample):
                    row.cancelled = True

    def stats(self) -> EngineStats:
        with self._more:
            waiting = len({row.ticket for row in self._waiting})
            running = len({row.ticket for row in self._running})
            return EngineStats(running, waiting, 64, 64 - len(self._running), 0, 0, 0, *self._tokens, 0, 0, 0)

    def ready(self) -> tuple[int, int]:
        return self.programs

    def drain(self) -> None:
        with self._more:
            self._ended = True
            self._more.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._more:
                while not (self._waiting or self._running or self._ended):
                    self._more.wait()
                if self._ended and not (self._waiting or self._running):
                    return
                room = self.rows - len(self._running)
                self._running += self._waiting[:room]
                del self._waiting[:room]
                rows = list(self._running)
            if self.step:
                time.sleep(self.step)
            done = [row for row in rows if self._write(row)]
            with self._more:
                self._running = [row for row in self._running if row not in done]

    def _write(self, row: _Row) -> bool:
        """One step of an answer; whether it is its last."""
        query, options = row.query, row.query.options
        if self.error is not None:
            row.deliver(self.error)
            return True
        finish: Finish | None = "cancelled" if row.cancelled else None
        prompt = None
        if row.at == 0 and row.sample == 0 and query.prompt_logprobs is not None:
            scored = [
                self._scored(query.prompt[:k], token, query.prompt_logprobs) for k, token in enumerate(query.prompt)
            ]
            prompt = (TokenLogprob(scored[0].token, None), *scored[1:])
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        for _ in range(0 if finish else self.chunk):
            token = row.script[row.at] if row.at < len(row.script) else self.stop_id
            if row.constraint is not None:
                try:
                    token = self._allowed(row.constraint, token)
                    row.constraint.accept(token)
                except UserError as error:
                    row.deliver(error)
                    return True
            if query.logprobs is not None:
                written = (*query.prompt, *row.script[: row.at])
                logprobs.append(self._scored(written, token, query.logprobs))
            row.at += 1
            if token == self.stop_id and not query.ignore_stop_ids:
                finish = "stop"
                break
            ids.append(token)
            self._tokens[1] += 1
            if row.at == options.max_new_tokens:
                finish = "length"
            elif len(query.prompt) + row.at == self.context:
                finish = "context"
            if finish:
                break
        row.deliver(Piece(row.sample, tuple(ids), tuple(logprobs), prompt, 0, finish))
        return finish is not None

    def _allowed(self, constraint: Constraint, token: int) -> int:
        mask = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
        if mask[token]:
            return token
        choices = np.flatnonzero(mask)
        return self.stop_id if mask[self.stop_id] else int(choices[(7 * len(choices)) // 9])

    def _scored(self, before: Sequence[int], token: int, top: int) -> TokenLogprob:
        """Numbers that follow from what stands before; the best token is the same as the written one at even places."""
        best = token if len(before) % 2 == 0 else (token + 1) % self.vocab_size
        others = [(best + 7 * k) % self.vocab_size for k in range(1, 21)]
        scores = {index: -0.1 - k - math.sqrt(len(before)) / 10 for k, index in enumerate([best, *others])}
        return TokenLogprob(token, scores.get(token, -20.0), tuple(list(scores.items())[:top]))
