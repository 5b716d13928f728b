"""The generation engine: a fixed number of rows on the devices, which take up prompts and are given tokens together.

    engine = Engine(model, rows=8)
    slots = engine.admit([Request(ids, options)])   # while other rows are in the middle of their answers
    for slot, tokens in engine.step(): ...          # new tokens of every row that has some
    engine.release(slot)                            # its row is free

Every row has settings of its own, and what it is given does not depend on the other rows. Files of prompts and
conversations use the engine; a beam search reorders its rows and so has a loop of its own (see `jaxlm.inference.beam`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.config import Decoding
from jaxlm.devices.mesh import use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.decode import State, admit, append, new_state, step
from jaxlm.inference.options import check_decoding, check_stop_ids
from jaxlm.inference.rows import CacheRows, DeviceModel, bucket, divisible, fetch, power_of_two
from jaxlm.inference.sampling import Method, Settings, row_keys

# Tokens that are generated between two looks at the device.
FLUSH = 32


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text that a model continues a prompt with.

    Args:
        ids: without the stop id.
        finish: 'stop' for a stop id or text, 'length' for max_new_tokens, 'context' for the end of the model's context.
        complete: nothing more will come.
    """

    ids: tuple[int, ...]
    finish: Literal["stop", "length", "context"]
    complete: bool


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Args:
        prompt: token ids.
        options: how; `options.samples` answers are given, each in a row of its own.
        number: decides, with `options.seed`, what is drawn.
    """

    prompt: Sequence[int]
    options: Decoding
    number: int = 0


@dataclasses.dataclass(eq=False)
class Slot:
    """A row that is occupied by one answer to a request.

    Attributes:
        row: its number.
        sample: which of the request's answers.
        ids: the new tokens so far, a stop id included.
        log_probs: of these, where the engine was asked for them.
        complete: no more will come.
    """

    row: int
    request: Request
    sample: int
    stop_ids: frozenset[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    complete: bool = False
    stopped: bool = False
    reported: int = 0

    @property
    def answer(self) -> Answer:
        return answer_of(self.ids, self.request.options, self.stop_ids, self.complete, self.stopped)


def answer_of(
    ids: Sequence[int], options: Decoding, stop_ids: frozenset[int], complete: bool, stopped: bool = False
) -> Answer:
    """The answer that tokens make, with the reason for its end. `stopped`: from outside."""
    by_id = bool(ids) and ids[-1] in stop_ids
    behind: Literal["length", "context"] = "length" if len(ids) >= options.max_new_tokens else "context"
    return Answer(tuple(ids[: len(ids) - by_id]), "stop" if by_id or stopped else behind, complete)


class Engine:
    """See the module.

    Args:
        model: weights on their devices.
        rows: how many answers can be under way at once; rounded up to what the mesh divides.
        keep: a released row keeps its text as long as it is free, and a prompt that begins with it reads only the rest.
            Rows over several groups of devices, dynamic RoPE, where a longer text turns all of its keys anew, and
            encoders, whose states all see the whole prompt, keep nothing; with longrope a text serves those on the same
            side of `RopeSpec.switch_length`.
        log_probs: note the log-probability of each new token, by the logits before any penalty, temperature or filter.
    """

    def __init__(self, model: DeviceModel, rows: int, keep: bool = False, log_probs: bool = False) -> None:
        self._log_probs = log_probs
        self._model, self._spec = model, model.decoder.spec
        self._cache = CacheRows(model, rows)
        self.rows = self._cache.rows
        alone = divisible(1, model.mesh) == 1
        ropes = (layer.attention.rope for layer in self._spec.period)
        readable_on = self._spec.encoder is None and all(rope is None or rope.rope_type != "dynamic" for rope in ropes)
        self._keep = keep and alone and readable_on
        self._slots: dict[int, Slot] = {}
        self._kept: dict[int, list[int]] = {}  # the tokens whose keys and values a free row holds
        self._clear()

    def _clear(self) -> None:
        self._cache.caches, self._kept = [], {}
        self._method: Method | None = None
        self._settings: Settings | None = None
        self._state: Any = None
        self._host: Any = None  # the state without keys and seen, in NumPy arrays
        self._ended_here = False  # `finished` on the host is ahead of the device's

    @property
    def free(self) -> int:
        """Number of rows that are free."""
        return self.rows - len(self._slots)

    def admit(self, requests: Sequence[Request], fill: int = 0) -> list[list[Slot]]:
        """Reads prompts into free rows and gives each row its first token.

        Args:
            requests: prompts and how to answer them; those of one call are read together.
            fill: read at least this many prompts, empty ones included, so that batches of different sizes share one
                program.

        Returns:
            For each request the slots of its samples.

        Raises:
            UserError: for a prompt or a setting that the model cannot answer with.
            ValueError: fewer rows are free than the requests need.
        """
        for request in requests:
            check_decoding(request.options)
            check_stop_ids(request.options, self._spec.vocab_size)
            self._model.check_prompt(request.prompt)
            if request.options.num_beams > 1:
                raise UserError("num_beams: a beam search has rows of its own; use Generator.start")
        needed = sum(request.options.samples for request in requests)
        if needed > self.free:
            raise ValueError(f"{needed} rows are needed, {self.free} of {self.rows} are free: see Engine.free")
        if not self._slots:
            self._method = None
        slots: dict[int, list[Slot]] = {}
        with use_mesh(self._model.mesh):
            rest = []
            for index, request in enumerate(requests):
                row, known = self._longest_kept(request)
                if known:
                    slots[index] = self._read_on(row, known, request)
                else:
                    rest.append(index)
            for samples in sorted({requests[index].options.samples for index in rest}):
                group = [index for index in rest if requests[index].options.samples == samples]
                admitted = self._read([requests[index] for index in group], samples, fill)
                slots |= dict(zip(group, admitted, strict=True))
            self._look()
        return [slots[index] for index in range(len(requests))]

    def _longest_kept(self, request: Request) -> tuple[int, int]:
        """The free row that holds most of a prompt, and how many tokens; the prompt's last one is always read again."""
        best, known, switch = 0, 0, self._spec.switch_length
        if self._spec.prefix is not None:
            return best, known  # what a token is given depends on the whole prompt
        for row, tokens in self._kept.items() if request.options.samples == 1 else ():
            if switch is not None and (len(tokens) > switch) != (len(request.prompt) > switch):
                continue  # its keys are turned as those of a text of another length
            shared = 0
            for mine, theirs in zip(request.prompt[:-1], tokens, strict=False):
                if mine != theirs:
                    break
                shared += 1
            if shared > known:
                best, known = row, shared
        return best, known

    def _read_on(self, row: int, known: int, request: Request) -> list[Slot]:
        del self._kept[row]
        logits = self._cache.read_on(row, known, request.prompt[known:])
        return self._begin(logits, [request], 1, [row])[0]

    def _read(self, requests: list[Request], samples: int, fill: int) -> list[list[Slot]]:
        needed = len(requests) * samples
        # A row whose text is kept is taken last.
        rows = sorted(set(range(self.rows)) - set(self._slots), key=lambda row: (row in self._kept, row))[:needed]
        for row in rows:
            self._kept.pop(row, None)
        if not self._slots and not self._kept:
            self._clear()  # an engine that is empty takes the shape of its new prompts
        mesh, share = self._model.mesh, self.rows // samples
        count = divisible(max(fill, power_of_two(len(requests))), mesh)
        whole = (
            not self._cache.caches
            and count >= share
            and share * samples == self.rows
            and share == divisible(share, mesh)
        )
        count = share if whole else count
        prompts = [list(request.prompt) for request in requests] + [[]] * (count - len(requests))
        logits, caches = self._cache.read(prompts, [self._limit(request) for request in requests])
        rows += [self.rows] * (count * samples - needed)
        self._cache.place(caches, samples, None if whole else rows)
        if samples > 1:
            logits = jax.numpy.repeat(logits, samples, axis=0)
        return self._begin(logits, requests, samples, None if whole else rows)

    def _limit(self, request: Request) -> int:
        return min(len(self._model.beginning(request.prompt)) + request.options.max_new_tokens, self._model.max_length)

    def _begin(
        self, logits: jax.Array, requests: list[Request], samples: int, rows: list[int] | None
    ) -> list[list[Slot]]:
        """The first token after each prompt, and its row of the state; `rows` as `CacheRows.place` takes them."""
        vocab_size, count = self._spec.vocab_size, len(logits)
        method = self._method
        for request in requests:
            own = Method.of(request.options, vocab_size)
            method = own if method is None else method | own
        assert method is not None
        limits = [self._limit(request) for request in requests for _ in range(samples)]
        room = max(bucket(max(limits)), 0 if self._state is None else self._state.tokens.shape[1])
        empty = count - len(limits)
        prompts = [self._model.beginning(request.prompt) for request in requests for _ in range(samples)] + [[]] * empty
        keys = np.concatenate(
            [row_keys(request.options.seed, [request.number], samples) for request in requests]
            + [np.zeros((empty, 2), np.uint32)]
        )
        stop_ids = [frozenset((*self._model.stop_ids, *request.options.stop_ids)) for request in requests]
        parts = [
            Settings.of(request.options, samples, vocab_size, sorted(stops))
            for request, stops in zip(requests, stop_ids, strict=True)
        ]
        parts.append(Settings.of(Decoding(), empty, vocab_size))
        settings = _stacked(parts)
        state = new_state(prompts, limits + [1] * empty, room, keys, vocab_size, method, self._log_probs)
        state = append(logits, state, settings, method=method)
        if rows is None:
            rows, self._state, self._settings = list(range(count)), state, settings
        else:
            self._put(state, settings, rows, room, method)
        self._method = method
        slots = [
            Slot(rows[index], requests[index // samples], index % samples, stop_ids[index // samples])
            for index in range(len(limits))
        ]
        self._slots |= {slot.row: slot for slot in slots}
        return [slots[start : start + samples] for start in range(0, len(slots), samples)]

    def _put(self, new: State, settings: Settings, rows: list[int], room: int, method: Method) -> None:
        vocab_size = self._spec.vocab_size
        if self._state is None:
            keys = np.zeros((self.rows, 2), np.uint32)
            self._state = new_state([[]] * self.rows, [1] * self.rows, room, keys, vocab_size, method, self._log_probs)
            self._settings = Settings.of(Decoding(), self.rows, vocab_size)
        self._flush_ended()
        tokens, seen, log_probs = self._state.tokens, self._state.seen, self._state.log_probs
        if tokens.shape[1] < room:
            more = ((0, 0), (0, room - tokens.shape[1]))
            tokens = jax.numpy.pad(tokens, more)
            log_probs = None if log_probs is None else jax.numpy.pad(log_probs, more)
        if not method.penalty:
            seen = None
        elif seen is None:
            seen = np.zeros((self.rows, vocab_size), bool)  # rows from before have no penalty
        old = dataclasses.replace(self._state, tokens=tokens, seen=seen, log_probs=log_probs)
        self._state = admit(old, new, np.array(rows, np.int32))
        there = np.array([row for row in rows if row < self.rows], np.int32)
        assert self._settings is not None
        self._settings = _replaced(self._settings, settings, there)

    def step(self, tokens: int = FLUSH) -> list[tuple[Slot, list[int]]]:
        """Gives every row up to `tokens` more, until it ends.

        Returns:
            The slots that have something new since the last call, `admit` included, or that have ended, with it.
        """
        with use_mesh(self._model.mesh):
            if not self.idle:
                self._flush_ended()
                # Rows that have ended do not count: one may stand at the end of its context while others go far.
                lengths, limits = (x[~self._host.finished] for x in (self._host.lengths, self._host.limits))
                limit = max(self._limit(slot.request) for slot in self._slots.values())
                texts = {int(row): int(self._host.lengths[row]) for row in np.flatnonzero(~self._host.finished)}
                at_once = self._cache.read_again(texts, lambda row: self._host.tokens[row, : texts[row]], limit)
                steps = min(tokens, at_once, int((limits - lengths).max()))
                steps = self._cache.make_room(int(lengths.max()), steps, limit)
                assert self._method is not None and self._settings is not None
                self._cache.caches, self._state = step(
                    self._model.decoder,
                    self._model.weights,
                    self._cache.caches,
                    self._state,
                    self._settings,
                    np.int32(steps),
                    method=self._method,
                )
                self._look()
        updates = []
        for slot in self._slots.values():
            new, was = slot.ids[slot.reported :], slot.reported
            slot.reported = len(slot.ids) + slot.complete  # an end is told once, too
            if slot.reported > was:
                updates.append((slot, new))
        return updates

    @property
    def idle(self) -> bool:
        """Nothing is left to do: every row is free or has ended."""
        return self._host is None or bool(np.all(self._host.finished))

    def stop(self, slot: Slot) -> None:
        """Ends an answer, e.g. because its text holds a stop text; its row stays occupied."""
        slot.stopped, slot.complete = True, True
        self._end(slot)

    def release(self, slot: Slot) -> None:
        """Frees a row, whether its answer is complete or given up."""
        assert self._slots.get(slot.row) is slot, "a row is released once"
        self._end(slot)
        del self._slots[slot.row]
        if self._keep:
            # The last token has been generated, but perhaps not read.
            self._kept[slot.row] = [*slot.request.prompt, *slot.ids][:-1]

    def _end(self, slot: Slot) -> None:
        if not self._host.finished[slot.row]:
            self._host.finished[slot.row] = True
            self._ended_here = True

    def _flush_ended(self) -> None:
        if self._ended_here:
            self._state = dataclasses.replace(self._state, finished=self._host.finished.copy())
            self._ended_here = False

    def _look(self) -> None:
        """Brings what the device has generated to the slots."""
        self._flush_ended()
        host = fetch(dataclasses.replace(self._state, seen=None, keys=None), self._model.mesh)
        self._host = dataclasses.replace(host, finished=np.array(host.finished))
        for row, slot in self._slots.items():
            slot.ids = host.tokens[row, host.starts[row] : host.lengths[row]].tolist()
            if self._log_probs:
                slot.log_probs = host.log_probs[row, host.starts[row] : host.lengths[row]].tolist()
            slot.complete = slot.stopped or bool(host.finished[row])


def _stacked(parts: list[Settings]) -> Settings:
    """Settings of several texts, with as many places for stop ids as the longest list needs."""
    width = max(part.stop_ids.shape[1] for part in parts)
    wide = [dataclasses.replace(part, stop_ids=_widened(part.stop_ids, width)) for part in parts]
    stacked: Settings = jax.tree.map(lambda *leaves: np.concatenate(leaves), *wide)
    return stacked


def _widened(stop_ids: np.ndarray, width: int) -> np.ndarray:
    return np.pad(stop_ids, ((0, 0), (0, width - stop_ids.shape[1])), constant_values=-1)


def _replaced(settings: Settings, new: Settings, rows: np.ndarray) -> Settings:
    """The settings with the first len(rows) of `new` in `rows`."""
    width = max(settings.stop_ids.shape[1], new.stop_ids.shape[1])

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        old = old.copy()
        old[rows] = new[: len(rows)]
        return old

    wide = [dataclasses.replace(s, stop_ids=_widened(s.stop_ids, width)) for s in (settings, new)]
    replaced: Settings = jax.tree.map(put, *wide)
    return replaced
