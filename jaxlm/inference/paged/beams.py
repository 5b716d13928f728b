"""Beam searches beside the engine: one after the other, in a thread and with caches of their own.

A search reorders its rows at every token, so it does not share the engine's pages; its answers come whole, at its end.
The programs of a number of beams are compiled when they are first asked for.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.engine import FLUSH, Request
from jaxlm.inference.generator import BeamSession
from jaxlm.inference.paged.followers import Orders, packed, together, unpacked
from jaxlm.inference.paged.requests import AnswerFailed, Deliver, Piece, Query
from jaxlm.inference.rows import DeviceModel


def check_beams(query: Query) -> None:
    """Raises UserError for what a beam search does not do."""
    options = query.options
    others = {
        "adapter": query.adapter is not None,
        "logprobs": query.logprobs is not None or query.prompt_logprobs is not None,
        "frequency_penalty": query.frequency_penalty != 0,
        "presence_penalty": query.presence_penalty != 0,
        "logit_bias": bool(query.logit_bias),
        "response_format": query.constraint is not None,
        "ignore_eos": query.ignore_stop_ids,
    }
    asked = [name for name, is_asked in others.items() if is_asked]
    if asked:
        raise UserError(
            f"num_beams: {options.num_beams}: a beam search has no {', '.join(asked)}; leave one of them out"
        )


class Search:
    """One search after the other, as each process computes it."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._session: BeamSession | None = None
        self._steps: Any = None

    def acts(self) -> dict[str, Callable[..., Any]]:
        """`begin`, `go_on` and `end` by the names of their orders."""
        return {"search": self.begin, "search/on": self.go_on, "search/end": self.end}

    def begin(self, prompt: np.ndarray, options: np.ndarray) -> None:
        """Begins a search.

        Args:
            prompt: int [T].
            options: `packed` fields of `Decoding`.
        """
        read = unpacked(options).items()
        fields: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in read}
        decoding = Decoding(**fields)
        self._session = BeamSession(self._model.base, [Request(prompt.tolist(), decoding)], decoding, FLUSH, 1)
        self._steps = self._session.steps()

    def go_on(self) -> bool:
        """Computes a few tokens; False: the search had ended."""
        return next(self._steps, False) is not False

    def pieces(self) -> list[Piece]:
        """The answers of a search that has ended."""
        assert self._session is not None
        (answers,) = self._session.answers()
        return [Piece(sample, answer.ids, finish=answer.finish) for sample, answer in enumerate(answers)]

    def end(self) -> None:
        """Frees what the search holds."""
        self._session = self._steps = None


class BeamSearches:
    """A thread that answers queries with several beams.

    Args:
        model: weights on their devices; the engine may use them at the same time.
        orders: to the other processes; None: there are none.
    """

    def __init__(self, model: DeviceModel, orders: Orders | None = None) -> None:
        self._search = Search(model)
        acts = (together(orders, name, act) for name, act in self._search.acts().items())
        self._begin, self._go_on, self._end_search = acts
        self._lock = threading.Condition()
        self._queue: deque[tuple[int, Query, Deliver]] = deque()
        self._at_hand: int | None = None
        self._gone: set[int] = set()
        self._ends = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of answers that have not begun."""
        return sum(query.options.samples for _, query, _ in self._queue)

    @property
    def running(self) -> int:
        """1 while a search is under way."""
        return int(self._at_hand is not None)

    def submit(self, ticket: int, query: Query, deliver: Deliver) -> None:
        """Queues a query that `check_beams` lets pass; `deliver` is called in the thread."""
        with self._lock:
            self._queue.append((ticket, query, deliver))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="jaxlm-beams", daemon=True)
                self._thread.start()
            self._lock.notify()

    def cancel(self, ticket: int) -> None:
        """Ends a search, at its next look at the device if it is under way."""
        with self._lock:
            if ticket == self._at_hand or any(ticket == waiting for waiting, *_ in self._queue):
                self._gone.add(ticket)

    def drain(self) -> None:
        """Answers what is queued, and ends."""
        with self._lock:
            self._ends = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._ends)
                if not self._queue:
                    return
                ticket, query, deliver = self._queue.popleft()
                self._at_hand = ticket
            try:
                pieces: list[Piece | Exception] = [*self._pieces(ticket, query)]
            except UserError as error:
                pieces = [error]
            except Exception as error:  # noqa: BLE001  (who asked is told; the next search is another's)
                failed = AnswerFailed("the beam search")
                failed.__cause__ = error
                pieces = [failed]
            with self._lock:
                self._at_hand = None  # who is told of the end sees an idle engine
                self._gone.discard(ticket)  # by who gave up as it ended
            for piece in pieces:
                deliver(piece)

    def _pieces(self, ticket: int, query: Query) -> list[Piece]:
        self._begin(np.array(query.prompt, np.int32), packed(dataclasses.asdict(query.options)))
        try:
            while True:
                with self._lock:
                    if ticket in self._gone:
                        self._gone.discard(ticket)
                        return [Piece(sample, finish="cancelled") for sample in range(query.options.samples)]
                if not self._go_on():
                    return self._search.pieces()
        finally:
            self._end_search()
