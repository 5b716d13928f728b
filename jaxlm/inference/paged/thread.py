"""The serving engine in a thread of its own: queries from any thread, answers by call, step by step.

    engine = PagedEngine(model, rows=16)
    ticket = engine.submit(query, deliver)    # deliver(Piece) in the engine's thread, until one has a `finish`
    engine.cancel(ticket)
    engine.drain()

Step k is dispatched before step k - 1 is read, so that the host's work is hidden behind the device's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm.devices.mesh import use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.options import check_decoding, check_stop_ids
from jaxlm.inference.paged.adapters import Adapters
from jaxlm.inference.paged.beams import BeamSearches, check_beams
from jaxlm.inference.paged.constraints import Both, NoRepeat
from jaxlm.inference.paged.followers import LeadingPrograms, Orders
from jaxlm.inference.paged.lookup import Lookup
from jaxlm.inference.paged.programs import CHUNK, Programs, check_served, choose_shape, longest_served, row_settings
from jaxlm.inference.paged.requests import Constraint, Deliver, EngineStats, Query, QueueFull
from jaxlm.inference.paged.schedule import Scheduler, Step, Text
from jaxlm.inference.paged.step import TOP
from jaxlm.inference.rows import DeviceModel
from jaxlm.inference.sampling import row_keys


class PagedEngine:
    """See the module, and `requests.EngineThread`.

    Args:
        model: weights on their devices; they are laid out anew on a CPU, so nothing else should use it.
        rows: answers under way at once, at least.
        pages: number of pages; None: by the device's memory.
        slots: tokens of a page; None: what the device is good at.
        chunk: tokens of prompts that a step reads.
        context: most tokens of a text; None: the model's.
        queue: answers that may wait.
        adapters: those that queries may name; they were made with this model.
        speculate: most tokens that are guessed of an answer in a step (see `lookup`), in rows that no answer has; an
            answer with penalties, a bias or a constraint is not guessed.
        orders: to the other processes, which follow (see `followers`); None: there are none.

    Raises:
        UserError: the model cannot be served.
    """

    def __init__(
        self,
        model: DeviceModel,
        rows: int,
        *,
        pages: int | None = None,
        slots: int | None = None,
        chunk: int = CHUNK,
        context: int | None = None,
        queue: int = 256,
        adapters: Adapters | None = None,
        speculate: int = 0,
        orders: Orders | None = None,
    ) -> None:
        check_served(model)
        self._model, self._spec, self._queue, self._adapters = model, model.decoder.spec, queue, adapters
        shape = choose_shape(model, rows, slots, pages, chunk, context, speculate)
        self.max_length = longest_served(self._spec, shape, context)
        self._guesses = speculate > 0
        self._programs = Programs(model, shape) if orders is None else LeadingPrograms(model, shape, orders)
        self._scheduler = Scheduler(shape, self._spec.vocab_size, self._take_row, self._release)
        self._beams = BeamSearches(model, orders)
        self._lock = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._waiting = self._tickets = 0
        self._ends = False
        self._error: Exception | None = None
        self._stats = self._count()
        self._thread = threading.Thread(target=self._run, name="jaxlm-engine", daemon=True)
        self._thread.start()

    # --- called from any thread ---------------------------------------------------------------------------------------

    def submit(self, query: Query, deliver: Deliver) -> int:
        """See `EngineThread.submit`."""
        self.check(query)
        options = query.options
        stop_ids = frozenset(() if query.ignore_stop_ids else (*self._model.stop_ids, *options.stop_ids))
        asked = len(query.prompt) + options.max_new_tokens
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._ends:
                raise QueueFull("the engine takes no more queries: it is about to end")
            waiting = self._waiting + self._beams.waiting
            if waiting + options.samples > self._queue:
                raise QueueFull(f"{waiting} answers wait already, {self._queue} may")
            if options.num_beams > 1:
                self._tickets += 1
                self._beams.submit(self._tickets, query, deliver)
                return self._tickets
            held = [self._acquire(query.adapter) for _ in range(options.samples)]
            self._tickets += 1
            ticket, leader = self._tickets, None
            for sample, adapter in enumerate(held):
                text = Text(
                    ticket, sample, query, deliver, ticket * self._queue + sample, adapter,
                    min(asked, self.max_length), asked > self.max_length, stop_ids, leader, self._constraint(query),
                )  # fmt: skip
                leader = leader or text
                self._commands.append(partial(self._scheduler.add, text))
            self._waiting += options.samples
            self._lock.notify()
        return ticket

    def check(self, query: Query) -> None:
        """Raises UserError for a query that the model cannot answer."""
        options, vocab_size = query.options, self._spec.vocab_size
        check_decoding(options)
        check_stop_ids(options, vocab_size)
        if options.num_beams > 1:
            check_beams(query)
        if query.adapter is not None and self._adapters is None:
            raise UserError(f"adapter: {query.adapter!r} is not loaded; there are none")
        if options.samples > self._queue:
            raise UserError(f"samples: {options.samples}: at most {self._queue} answers may wait")
        if len(query.prompt) >= self.max_length:
            raise UserError(
                f"the prompt has {len(query.prompt)} tokens, the context here is {self.max_length}, answer included; "
                "shorten it (nothing is cut off silently)"
            )
        self._model.check_prompt(query.prompt)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(query, name)
            if count is not None and not 0 <= count <= TOP:
                raise UserError(f"{name}: {count} must be between 0 and {TOP}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(query, name)):
                raise UserError(f"{name}: {getattr(query, name)} must be finite")
        for token, added in query.logit_bias:
            if not (0 <= token < vocab_size and math.isfinite(added)):
                raise UserError(f"logit_bias: {token}: {added}: tokens are 0 to {vocab_size - 1}, numbers finite")

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """See `EngineThread.cancel`; a beam search ends as a whole."""
        self._beams.cancel(ticket)
        with self._lock:
            self._commands.append(lambda: self._scheduler.cancel(ticket, sample))
            self._lock.notify()

    def stats(self) -> EngineStats:
        """See `EngineThread.stats`; as of the last step."""
        running, waiting = self._beams.running, self._beams.waiting
        return dataclasses.replace(
            self._stats, running=self._stats.running + running, waiting=self._stats.waiting + waiting
        )

    def ready(self) -> tuple[int, int]:
        """See `EngineThread.ready`."""
        return self._programs.ready()

    def wait(self) -> None:
        """Returns when all programs are compiled; raises CancelledError where the engine ends before."""
        self._programs.wait()

    def drain(self) -> None:
        """See `EngineThread.drain`."""
        with self._lock:
            self._ends = True
            self._lock.notify()
            if not self._waiting + self._beams.waiting:
                self._programs.cancel()  # a start that nobody waits for does not hold up the end
        self._beams.drain()
        self._thread.join()
        self._programs.end()  # when nothing beside the engine's steps is under way either

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(self._report)
            stack.enter_context(use_mesh(self._model.mesh))
            self._programs.start()
            self._serve()

    def _report(self, _: Any, error: BaseException | None, traceback: Any) -> bool:
        """Tells those who wait of what ended the engine: nobody else sees an error of this thread."""
        if not isinstance(error, Exception):
            return False
        with self._lock:
            self._error = error
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        for text in self._scheduler.texts():
            text.deliver(error)
        return True

    def _serve(self) -> None:
        scheduler = self._scheduler
        last: tuple[Step, tuple[jax.Array, Any, Any]] | None = None
        while True:
            with self._lock:
                while not (self._commands or last or scheduler.waiting or scheduler.running):
                    if self._ends:
                        return
                    self._lock.wait()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            step = scheduler.plan()
            now = None if step is None else (step, self._programs.step(step.plan))
            if last is not None:
                scheduler.read(last[0], *self._fetch(*last))
            last = now
            self._stats = self._count()
            with self._lock:
                self._waiting = len(scheduler.waiting) + len(self._commands)

    def _fetch(self, step: Step, out: tuple[jax.Array, Any, Any]) -> tuple[np.ndarray, Any, Any]:
        tokens, best, behind = out
        wants_best = any(text.query.logprobs is not None for text in step.given)
        return jax.device_get((tokens, best if wants_best else None, behind if step.plan.wants_prompt else None))

    def _take_row(self, text: Text) -> None:
        query = text.query
        key = row_keys(query.options.seed, [0], text.sample + 1)[text.sample]
        logprobs, has_bias = query.logprobs is not None, bool(query.logit_bias)
        penalties = query.frequency_penalty, query.presence_penalty
        settings = row_settings(query.options, 1, self._spec.vocab_size, key, *penalties, has_bias, logprobs)
        begins = None
        if self._guesses and text.lookup is None and text.constraint is None and not settings.adjusted[0]:
            text.lookup = Lookup(text.tokens)
        if settings.adjusted[0]:
            bias = np.zeros(self._spec.vocab_size, np.float32)
            for token, added in query.logit_bias:
                bias[token] += added
            begins = np.array(text.tokens, np.int32), text.start, bias
        self._programs.take_row(text.row, settings, begins)

    def _acquire(self, adapter: str | None) -> tuple[int, int]:
        return (0, 0) if self._adapters is None else self._adapters.acquire(adapter)

    def _release(self, text: Text) -> None:
        if self._adapters is not None:
            self._adapters.release(text.adapter[1])

    def _constraint(self, query: Query) -> Constraint | None:
        own = None if query.constraint is None else query.constraint()
        size = query.options.no_repeat_ngram_size
        if not size:
            return own
        ngrams = NoRepeat(size, query.prompt, self._spec.vocab_size)
        return ngrams if own is None else Both(ngrams, own)

    def _count(self) -> EngineStats:
        scheduler, counts = self._scheduler, self._scheduler.counts
        pages = scheduler.pages
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=pages.count,
            pages_free=pages.free,
            pages_cached=pages.cached,
            **{f"{name}_total": count for name, count in counts.items()},
        )
