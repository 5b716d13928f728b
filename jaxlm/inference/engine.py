"""From prompts (token ids) to answers (token ids): shapes, batches, and the loop around the loop on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import Decoding
from jaxlm.devices.mesh import rows_axis_size, use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.beam import Beams, BeamState, advance, new_beams, search
from jaxlm.inference.decode import State, decode, new_state, write
from jaxlm.inference.model import Caches, Decoder, Weights, extend, grow, prefill, repeat_rows
from jaxlm.inference.options import check_decoding
from jaxlm.inference.sampling import Method, Settings, row_keys
from jaxlm.sharding import ROW_AXES

# Tokens written between two looks at the device.
FLUSH = 32
# Slots that a cache has at first behind the longest prompt; it grows as answers do.
FIRST_SLOTS = 128


def bucket(length: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, so few programs, and at most a third is padding."""
    size = least
    while size < length:
        half = size + size // 2
        if half >= length:
            return half
        size *= 2
    return size


def _fetch(tree: Any, mesh: Mesh) -> Any:
    """Arrays as NumPy ones. Of several processes each gets all rows: every one decides alike when all have ended."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.device_get(tree)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was written for a prompt.

    Args:
        ids: without the stop id.
        finish: 'stop' for a stop id or text, 'length' for max_new_tokens, 'context' for the end of the model's context.
        complete: nothing more will be written.
    """

    ids: tuple[int, ...]
    finish: str
    complete: bool


@dataclasses.dataclass
class Memory:
    """What a conversation keeps of its last turn, so that only the new part of the next prompt is read.

    Args:
        tokens: those whose keys and values the caches hold.
        caches: of one row; used up when it is handed to a batch.
    """

    tokens: list[int]
    caches: Caches


class Generator:
    """A model on its devices, ready to write.

    Args:
        decoder: shape and dtypes.
        weights: see `load_weights`.
        mesh: where they are.
        stop_ids: ids that end an answer of this model.
    """

    def __init__(self, decoder: Decoder, weights: Weights, mesh: Mesh, stop_ids: Sequence[int]) -> None:
        self.decoder, self.weights, self.mesh = decoder, weights, mesh
        self.stop_ids = tuple(sorted(set(stop_ids)))

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.decoder.config.max_length

    def check_prompt(self, ids: Sequence[int], name: str = "the prompt") -> None:
        """Raises UserError for an empty prompt, one that fills the context, or an id that the model does not have."""
        if not ids:
            raise UserError(f"{name} is empty: there is nothing to continue")
        if len(ids) >= self.max_length:
            raise UserError(
                f"{name} has {len(ids)} tokens, the model's context is {self.max_length}, answer included; "
                "shorten it (nothing is cut off silently)"
            )
        if max(ids) >= self.decoder.config.vocab_size:
            raise UserError(
                f"{name} holds token id {max(ids)}, the model has {self.decoder.config.vocab_size}; "
                "the tokenizer belongs to another model"
            )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        numbers: Sequence[int] | None = None,
        memory: Memory | None = None,
        flush: int = FLUSH,
        rows: int | None = None,
    ) -> Writing:
        """A batch of prompts to be answered together.

        Args:
            prompts: token ids.
            options: checked again here.
            numbers: of each prompt, which with the seed decide what is drawn for it; default 0, 1, ...
            memory: of the conversation that the only prompt goes on with.
            flush: tokens between two looks.
            rows: fill up the batch to so many prompts, so that batches share their programs.
        """
        check_decoding(options)
        for prompt in prompts:
            self.check_prompt(prompt)
        return Writing(self, [list(p) for p in prompts], options, numbers, memory, flush, rows)

    def generate(
        self, prompts: Sequence[Sequence[int]], options: Decoding, numbers: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """The answers (options.samples of them) to each prompt."""
        writing = self.start(prompts, options, numbers)
        for _ in writing.steps():
            pass
        return writing.answers()


class Writing:
    """A batch under way; see `Generator.start`."""

    def __init__(
        self,
        generator: Generator,
        prompts: list[list[int]],
        options: Decoding,
        numbers: Sequence[int] | None,
        memory: Memory | None,
        flush: int,
        rows: int | None,
    ) -> None:
        self._generator, self._options, self._flush, self._memory = generator, options, flush, memory
        self.prompts = prompts
        self._stops = (*generator.stop_ids, *options.stop_ids)
        divisor = rows_axis_size(generator.mesh)
        count = max(rows or 0, len(prompts))
        self._rows = [*prompts, *[[] for _ in range(-(-count // divisor) * divisor - len(prompts))]]
        self._limits = [
            min(max(1, len(prompt)) + options.max_new_tokens, generator.max_length) for prompt in self._rows
        ]
        numbers = list(range(len(prompts)) if numbers is None else numbers)
        self._numbers = numbers + [0] * (len(self._rows) - len(numbers))
        self._copies = options.num_beams if options.num_beams > 1 else options.samples
        self._method = Method.of(options, generator.decoder.config.vocab_size)
        self._beams = Beams(options.num_beams, options.early_stopping, len(set(self._stops)))
        self._host: Any = None
        self._stopped: set[tuple[int, int]] = set()
        self._caches: Caches = []

    def steps(self) -> Iterator[None]:
        """Runs to the end; yields after the first token and then every `flush` tokens."""
        inner = self._search() if self._options.num_beams > 1 else self._decode()
        while True:
            with use_mesh(self._generator.mesh):  # not around the yield: what the caller does is not ours
                if next(inner, False) is False:
                    return
            yield

    def _settings(self) -> tuple[Settings, jax.Array]:
        rows = len(self._rows) * self._copies
        return Settings.of(self._options, rows), jnp.asarray(sorted(set(self._stops)), jnp.int32)

    def _read_prompts(self) -> tuple[jax.Array, Caches, int]:
        """Logits after the prompts, caches, and the slots these have."""
        decoder, weights = self._generator.decoder, self._generator.weights
        longest = max(len(prompt) for prompt in self._rows)
        slots = min(bucket(max(self._limits)), bucket(longest + FIRST_SLOTS))
        known = self._known()
        if known:
            assert self._memory is not None
            caches, new = self._memory.caches, self._rows[0][known:]
            self._memory.caches = []  # given up below
            width = bucket(len(new))
            slots = max(bucket(known + width), caches[0][0].shape[2])
            if caches[0][0].shape[2] < slots:
                caches = grow(caches, slots)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(new)] = new
            starts, added = jnp.array([known], jnp.int32), jnp.array([len(new)], jnp.int32)
            return *extend(decoder, weights, caches, jnp.asarray(tokens), starts, added), slots
        width = bucket(longest)
        slots = max(slots, width)
        tokens = np.zeros((len(self._rows), width), np.int32)
        for row, prompt in enumerate(self._rows):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([max(1, len(prompt)) for prompt in self._rows], np.int32)
        sharding = NamedSharding(self._generator.mesh, P(ROW_AXES))
        logits, caches = prefill(
            decoder, weights, jax.device_put(tokens, sharding), jax.device_put(lengths, sharding), slots
        )
        if self._copies > 1:
            logits, caches = jnp.repeat(logits, self._copies, axis=0), repeat_rows(caches, self._copies)
        return logits, caches, slots

    def _known(self) -> int:
        """How many tokens of the only prompt the memory holds; the last one is always read again."""
        if self._memory is None or not self._memory.caches or len(self._rows) != 1 or self._copies != 1:
            return 0
        prompt, shared = self._rows[0], 0
        for mine, theirs in zip(prompt[:-1], self._memory.tokens, strict=False):
            if mine != theirs:
                break
            shared += 1
        return shared

    def _room(self, caches: Caches, slots: int, state: State | BeamState) -> tuple[Caches, int, int]:
        """Room for a flush of tokens: caches, their slots, and how many tokens to write. `state` is on the host."""
        # Rows that have ended do not count: one may stand at the end of its context while others have far to go.
        lengths, limits = state.lengths[~state.finished], state.limits[~state.finished]
        longest, steps = int(lengths.max()), min(self._flush, int((limits - lengths).max()))
        if longest + steps > slots:
            slots = min(bucket(max(self._limits)), bucket(slots + 1))
            caches = grow(caches, slots)
        return caches, slots, min(steps, slots - longest)

    def _decode(self) -> Iterator[None]:
        generator, copies = self._generator, self._copies
        settings, stops = self._settings()
        keys = row_keys(self._options.seed, self._numbers, copies)
        prompts = [prompt for prompt in self._rows for _ in range(copies)]
        limits = [limit for limit in self._limits for _ in range(copies)]
        room = bucket(max(limits))
        state = new_state(prompts, limits, room, keys, generator.decoder.config.vocab_size, self._method)
        logits, caches, slots = self._read_prompts()
        state = write(logits, state, settings, stops, method=self._method)
        self._look(state)
        yield
        while not self._over():
            state = self._with_stopped(state)
            if self._over():
                break
            caches, slots, steps = self._room(caches, slots, self._host)
            caches, state = decode(
                generator.decoder,
                generator.weights,
                caches,
                state,
                settings,
                stops,
                np.int32(steps),
                method=self._method,
            )
            self._look(state)
            yield
        self._caches = caches

    def _look(self, state: State) -> None:
        self._host = _fetch(dataclasses.replace(state, seen=None, keys=None), self._generator.mesh)

    def _over(self) -> bool:
        return bool(np.all(self._host.finished))

    def _stopped_rows(self) -> np.ndarray:
        rows = np.zeros(len(self._rows) * self._copies, bool)
        for prompt, sample in self._stopped:
            rows[prompt * self._copies + sample] = True
        return rows

    def _with_stopped(self, state: State) -> State:
        if self._stopped:
            finished = self._host.finished | self._stopped_rows()
            self._host = dataclasses.replace(self._host, finished=finished)
            state = dataclasses.replace(state, finished=finished)
        return state

    def stop(self, prompt: int, sample: int = 0) -> None:
        """Ends an answer, e.g. because its text holds a stop text."""
        self._stopped.add((prompt, sample))

    def _search(self) -> Iterator[None]:
        generator, copies = self._generator, self._copies
        settings, stops = self._settings()
        penalty = jnp.float32(self._options.length_penalty)
        how: dict[str, Any] = dict(method=self._method, beams=self._beams)
        room = bucket(max(self._limits))
        vocab_size = generator.decoder.config.vocab_size
        state = new_beams(self._rows, self._limits, room, copies, vocab_size, self._method)
        logits, caches, slots = self._read_prompts()
        state, _ = advance(logits, state, settings, stops, penalty, **how)
        while True:
            self._host = _fetch(dataclasses.replace(state, seen=None), self._generator.mesh)
            if self._over():
                return
            yield
            caches, slots, steps = self._room(caches, slots, self._host)
            caches, state = search(
                generator.decoder, generator.weights, caches, state, settings, stops, penalty, np.int32(steps), **how
            )

    def answers(self) -> list[list[Answer]]:
        """What has been written so far: for each prompt its samples. Of a beam search, once it is over."""
        result = []
        for row, prompt in enumerate(self.prompts):
            result.append([self._answer(row, sample, len(prompt)) for sample in range(self._options.samples)])
        return result

    def _answer(self, row: int, sample: int, start: int) -> Answer:
        if isinstance(self._host, BeamState):
            length = int(self._host.done_lengths[row, sample])
            ids, complete = self._host.done_tokens[row, sample, start:length].tolist(), True
        else:
            place = row * self._copies + sample
            ids = self._host.tokens[place, start : int(self._host.lengths[place])].tolist()
            complete = bool(self._host.finished[place]) or (row, sample) in self._stopped
        finish = "length" if len(ids) >= self._options.max_new_tokens else "context"
        if (ids and ids[-1] in self._stops) or (row, sample) in self._stopped:
            finish = "stop"
        if ids and ids[-1] in self._stops:
            ids.pop()
        return Answer(tuple(ids), finish, complete)

    def memory(self) -> Memory | None:
        """For the next turn of a conversation, once `steps` has ended; None when it cannot be gone on with.

        That is for a batch of several rows, and for dynamic RoPE, where a longer text turns all of its keys anew.
        """
        dynamic = self._generator.decoder.config.attention.rope.rope_type == "dynamic"
        if len(self._rows) != 1 or self._copies != 1 or dynamic or not isinstance(self._host, State):
            return None
        caches, self._caches = self._caches, []
        # The last token has been written, but not read.
        return Memory(self._host.tokens[0, : int(self._host.lengths[0]) - 1].tolist(), caches)
