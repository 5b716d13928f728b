"""A model on its devices, ready to generate, and the sessions that answer a fixed set of prompts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.config import Decoding
from jaxlm.devices.mesh import use_mesh
from jaxlm.inference.beam import Beams, advance, new_beams, search
from jaxlm.inference.engine import FLUSH, Answer, Engine, Request, Slot, answer_of
from jaxlm.inference.options import check_decoding
from jaxlm.inference.rows import CacheRows, DeviceModel, bucket, divisible, fetch
from jaxlm.inference.sampling import Method, Settings


class Generator(DeviceModel):
    """A model that answers prompts."""

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        numbers: Sequence[int] | None = None,
        flush: int = FLUSH,
        rows: int | None = None,
        engine: Engine | None = None,
    ) -> Session:
        """A session that answers prompts together.

        Args:
            prompts: token ids.
            options: how to answer all of them.
            numbers: of each prompt, which with the seed decide what is drawn for it; default 0, 1, ...
            flush: tokens between two looks.
            rows: compute at least this many prompts, so that batches of different sizes share their programs.
            engine: the rows to use, e.g. of a conversation; None: rows for this session alone. A beam search reorders
                its rows and always has its own.
        """
        check_decoding(options)
        for prompt in prompts:
            self.check_prompt(prompt)
        numbers = range(len(prompts)) if numbers is None else numbers
        requests = [Request(list(p), options, number) for p, number in zip(prompts, numbers, strict=True)]
        count = max(rows or 0, len(prompts))
        if options.num_beams > 1:
            return BeamSession(self, requests, options, flush, count)
        return EngineSession(self, requests, flush, count, engine)

    def generate(
        self, prompts: Sequence[Sequence[int]], options: Decoding, numbers: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """The answers (options.samples of them) to each prompt."""
        session = self.start(prompts, options, numbers)
        for _ in session.steps():
            pass
        return session.answers()


class Session(ABC):
    """A generation session: prompts that are answered together with the same options."""

    def __init__(self, model: DeviceModel, requests: list[Request], flush: int) -> None:
        self._model, self._requests, self._flush = model, requests, flush

    @property
    def beginnings(self) -> list[list[int]]:
        """The text that each answer continues: the prompt, unless an encoder has read it."""
        return [self._model.beginning(request.prompt) for request in self._requests]

    @abstractmethod
    def steps(self) -> Iterator[None]:
        """Runs to the end; yields after the first token and then every `flush` tokens."""

    @abstractmethod
    def answers(self) -> list[list[Answer]]:
        """What has been generated so far: for each prompt its samples. A beam search has answers once it is over."""

    @abstractmethod
    def stop(self, prompt: int, sample: int = 0) -> None:
        """Ends an answer, e.g. because its text holds a stop text."""


class EngineSession(Session):
    """Greedy or sampled answers: all prompts are admitted at once, and their rows are released when all have ended."""

    def __init__(
        self, model: DeviceModel, requests: list[Request], flush: int, count: int, engine: Engine | None
    ) -> None:
        super().__init__(model, requests, flush)
        self._count, self._engine = count, engine
        self._slots: list[list[Slot]] = []

    def steps(self) -> Iterator[None]:
        engine = self._engine
        if engine is None:
            rows = divisible(self._count, self._model.mesh) * self._requests[0].options.samples
            engine = Engine(self._model, rows)
        self._engine = engine
        self._slots = engine.admit(self._requests, fill=self._count)
        yield
        while not engine.idle:
            engine.step(self._flush)
            yield
        for slot in (slot for slots in self._slots for slot in slots):
            engine.release(slot)

    def answers(self) -> list[list[Answer]]:
        return [[slot.answer for slot in slots] for slots in self._slots]

    def stop(self, prompt: int, sample: int = 0) -> None:
        assert self._engine is not None, "stop comes after the first step"
        self._engine.stop(self._slots[prompt][sample])


class BeamSession(Session):
    """A beam search: each prompt has as many rows as beams, which go on with one another's texts."""

    def __init__(self, model: DeviceModel, requests: list[Request], options: Decoding, flush: int, count: int) -> None:
        super().__init__(model, requests, flush)
        self._options = options
        self._stop_ids = frozenset((*model.stop_ids, *options.stop_ids))
        rows = divisible(count, model.mesh) * options.num_beams
        self._cache = CacheRows(model, rows)
        self._host: Any = None

    def steps(self) -> Iterator[None]:
        inner = self._search()
        while True:
            with use_mesh(self._model.mesh):  # not around the yield: what the caller does is not ours
                if next(inner, False) is False:
                    return
            yield

    def _search(self) -> Iterator[None]:
        model, options, cache = self._model, self._options, self._cache
        vocab_size, beams = model.decoder.spec.vocab_size, options.num_beams
        fill: list[list[int]] = [[]] * (cache.rows // beams - len(self._requests))
        prompts, read = self.beginnings + fill, [list(request.prompt) for request in self._requests] + fill
        limits = [min(max(1, len(prompt)) + options.max_new_tokens, model.max_length) for prompt in prompts]
        method = Method.of(options, vocab_size)
        static: dict[str, Any] = dict(method=method, beams=Beams(beams, options.early_stopping, len(self._stop_ids)))
        stops, penalty = jnp.asarray(sorted(self._stop_ids), jnp.int32), jnp.float32(options.length_penalty)
        settings = Settings.of(options, cache.rows, vocab_size)
        state = new_beams(prompts, limits, bucket(max(limits)), beams, vocab_size, method)
        logits, caches = cache.read(read, limits)
        cache.place(caches, beams)
        state, _ = advance(jnp.repeat(logits, beams, axis=0), state, settings, stops, penalty, **static)
        while True:
            self._host = host = fetch(dataclasses.replace(state, seen=None), model.mesh)
            if np.all(host.finished):
                return
            yield
            # Searches that have ended do not count: one may stand at the end of its context while others go far.
            lengths, most = host.lengths[~host.finished], host.limits[~host.finished]
            places = ((int(row), beam) for row in np.flatnonzero(~host.finished) for beam in range(beams))
            texts = {row * beams + beam: host.tokens[row, beam, : host.lengths[row]] for row, beam in places}
            at_once = cache.read_again({row: len(text) for row, text in texts.items()}, texts.__getitem__, max(limits))
            steps = min(self._flush, at_once, int((most - lengths).max()))
            steps = cache.make_room(int(lengths.max()), steps, max(limits))
            cache.caches, state = search(
                model.decoder, model.weights, cache.caches, state, settings, stops, penalty, np.int32(steps), **static
            )

    def answers(self) -> list[list[Answer]]:
        host = self._host
        return [
            [
                answer_of(
                    host.done_tokens[row, rank, len(beginning) : int(host.done_lengths[row, rank])].tolist(),
                    self._options,
                    self._stop_ids,
                    complete=True,
                )
                for rank in range(self._options.samples)
            ]
            for row, beginning in enumerate(self.beginnings)
        ]

    def stop(self, prompt: int, sample: int = 0) -> None:
        """Does nothing: the texts of a search are known at its end."""
