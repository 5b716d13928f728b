"""A model on its devices as the serving engine runs it: pages, rows, and the few programs that it ever runs.

All programs are compiled at the start, from a table of shapes; nothing is compiled inside a request.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import Decoding
from jaxlm.devices.mesh import rows_axis_size, use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.paged.constraints import everything
from jaxlm.inference.paged.layout import laid_out
from jaxlm.inference.paged.schedule import Shape
from jaxlm.inference.paged.step import Plan, RowSettings, begin, new_state, step, step_of_few
from jaxlm.inference.rows import DeviceModel
from jaxlm.inference.sampling import Settings
from jaxlm.models.unrolled import Caches, cache_bytes, padded_tokens
from jaxlm.nn.attention import kv_head_copies
from jaxlm.nn.paged_attention import least_tokens
from jaxlm.sharding import TENSOR
from jaxlm.spec import DecoderSpec

# What pages may take of the memory that a device has left, and of the memory that a host has, which all share.
DEVICE_SHARE, HOST_SHARE = 0.85, 0.25
# Tokens of a page: little is lost at a text's end, and little is read again of a beginning that is shared. A TPU's
# kernel fetches page by page, and small copies cost it more (docs/kernels.md, "Attention over pages").
SLOTS, TPU_SLOTS = 16, 128
# Tokens of prompts that a step reads beside the rows' own.
CHUNK = 256
# Several prompts at once share them.
SHARERS = 4
# On a CPU twice as many, in pieces, of which a prompt may have several: padding costs there what tokens cost.
CPU_PIECES = 2 * SHARERS
# What a step costs beside its prompts, in tokens of them: where memory brings the weights in the time of some hundred
# tokens' products, a step less is worth much padding; a CPU computes so slowly that padding costs more.
OVERHEAD, CPU_OVERHEAD = 512, 32
# Rows of the programs for few answers, and for a single one, at least.
FEW_ROWS, FEWEST_ROWS = 8, 2


def check_servable(spec: DecoderSpec) -> None:
    """Raises UserError for a model that cannot read texts of many lengths side by side."""
    spec.refuse_encoder("serve")
    if spec.prefix is not None:
        raise UserError(
            "serve: ChatGLM-6B reads a prompt as a whole, where each token sees those behind it; use generate"
        )
    if any(layer.attention.rope is not None and layer.attention.rope.rope_type == "dynamic" for layer in spec.period):
        raise UserError("serve: rope_type dynamic turns all keys anew as a text grows; use generate")


def check_served(model: DeviceModel) -> None:
    """Raises UserError for a model or a mesh that texts of many lengths, side by side, cannot be read with."""
    check_servable(model.decoder.spec)
    if rows_axis_size(model.mesh) > 1:
        raise UserError(
            f"mesh: {dict(model.mesh.shape)}: the engine divides heads over devices, not rows; set data, fsdp and "
            "expert to 1, and tensor higher"
        )


def longest_text(spec: DecoderSpec) -> int:
    """Tokens that prompt and answer may have together; with longrope, as far as one set of its factors goes."""
    switch = spec.switch_length
    return spec.max_length if switch is None else min(spec.max_length, switch)


def longest_served(spec: DecoderSpec, shape: Shape, context: int | None) -> int:
    """Tokens that prompt and answer may have together in an engine; `context` as in `choose_shape`."""
    limits = longest_text(spec), shape.pages * shape.slots
    return min(*limits, context or limits[0])


def choose_shape(
    model: DeviceModel,
    rows: int,
    slots: int | None,
    pages: int | None,
    chunk: int,
    context: int | None,
    guesses: int = 0,
) -> Shape:
    """The shapes of an engine.

    Args:
        rows: answers under way at once.
        slots: tokens of a page; None: what the device is good at.
        pages: None: as many as the device's memory has room for, up to twice those that all rows can fill.
        chunk: tokens of prompts that a step reads.
        context: most tokens of a text; None: the model's.
        guesses: most tokens that are guessed of a text in a step.

    Raises:
        UserError: there are not as many rows beside a text's own.
    """
    spec = model.decoder.spec
    platform = model.mesh.devices.flat[0].platform
    if slots is None:
        slots = TPU_SLOTS if platform == "tpu" else SLOTS
    longest = min(longest_text(spec), context or longest_text(spec))
    table = -(-longest // slots)
    rows = max(rows, 2)
    if not 0 <= guesses < rows:
        raise UserError(
            f"speculate: {guesses}: guesses stand in rows that no answer has, so it must be between 0 and {rows - 1} "
            "here; give more rows"
        )
    if pages is None:
        each = cache_bytes(spec, 1, slots, model.decoder.dtype)
        pages = max(table, min(2 * rows * table, _room(model) // each))
    table = min(table, pages)
    overhead = CPU_OVERHEAD if platform == "cpu" else OVERHEAD
    return Shape(rows, pages, slots, table, chunk_shapes(chunk, slots, platform == "cpu"), overhead, guesses)


def chunk_shapes(chunk: int, slots: int, on_cpu: bool) -> tuple[tuple[int, int], ...]:
    """(Q, C) of the programs that read prompts, for steps that read at most `chunk` tokens of them."""
    part = chunk // SHARERS
    if on_cpu and chunk > slots:
        short, piece = max(part // SHARERS, slots), max(chunk // CPU_PIECES, slots)
        return (max(1, part // short), short), (chunk // piece, piece)
    # Parts of less than a page are not worth programs of their own.
    return ((1, part), (SHARERS, part), (1, chunk)) if part >= slots else ((1, chunk),)


def few_rows(spec: DecoderSpec, rows: int) -> int:
    """The number of rows, of all or of a few, for which steps have programs of their own.

    A step costs what its rows cost, whether they are in use or not. Fewer would be summed in another order on a CPU
    (see `nn.paged_attention.least_tokens`).
    """
    few = max(FEW_ROWS, least_tokens(min(spec.hidden_size, spec.vocab_size)))
    return few if 2 * few <= rows else rows


def step_sizes(spec: DecoderSpec, rows: int, chunks: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The steps that have programs: chunks, tokens of each, rows.

    One short prompt is read beside few rows, too. A single answer has a program without prompts: its products are as
    fast as those of few rows, its attention is not to all of them.
    """
    few = few_rows(spec, rows)
    sizes = [(0, 1, rows), *((*chunk, rows) for chunk in chunks)]
    if few < rows:
        sizes += [(0, 1, few), (*chunks[0], few)]
    fewest = max(FEWEST_ROWS, least_tokens(spec.vocab_size))
    return [*sizes, (0, 1, fewest)] if 2 * fewest <= few else sizes


def programs_in_words(spec: DecoderSpec, rows: int, chunks: Sequence[tuple[int, int]]) -> str:
    """How many programs an engine compiles at its start, and which.

    Args:
        rows, chunks: as in `Shape`.
    """
    sizes = step_sizes(spec, rows, chunks)
    of_rows = sorted({size for number, _, size in sizes if not number})
    prompts = ", ".join(
        f"{number} x {length}{' (few answers)' if size < rows else ''}" for number, length, size in sizes if number
    )
    return (
        f"{1 + len(sizes)}: an answer's beginning, a step of {' or '.join(map(str, of_rows))} answers, "
        f"and steps that also read {prompts} tokens of prompts"
    )


def usual_programs(spec: DecoderSpec, rows: int, platform: str) -> str:
    """`programs_in_words` of `jaxlm serve` with its defaults, without devices."""
    chunks = chunk_shapes(CHUNK, TPU_SLOTS if platform == "tpu" else SLOTS, platform == "cpu")
    return programs_in_words(spec, max(rows, 2), chunks)


def _room(model: DeviceModel) -> int:
    """Bytes that pages may take over all devices of the model."""
    devices = model.mesh.devices.ravel()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        left = stats["bytes_limit"] - stats["bytes_in_use"]
        return int(DEVICE_SHARE * left) * len(devices)
    return int(HOST_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class Programs:
    """See the module.

    Args:
        model: its weights are laid out anew on a CPU, so it should not be used otherwise.
    """

    def __init__(self, model: DeviceModel, shape: Shape) -> None:
        check_served(model)
        self.model, self.shape = model, shape
        self._whole = NamedSharding(model.mesh, P())
        self._heads = NamedSharding(model.mesh, P(None, TENSOR, None, None))
        if model.mesh.devices.flat[0].platform == "cpu" and model.decoder.experts == "dense":
            with use_mesh(model.mesh):
                model.weights = laid_out(model.decoder, model.weights, *self._products())
        vocab_size = model.decoder.spec.vocab_size
        self.state = jax.device_put(new_state(shape.rows, vocab_size), self._whole)
        self.rows = self._settings_of_free_rows()
        self._placed_rows = jax.device_put(self.rows, self._whole)
        self.everything = jax.device_put(everything(shape.rows, vocab_size), self._whole)
        self._programs: dict[tuple[int, int, int], Future[Any]] = {}
        self._begin: Future[Any]
        self._pool = pool = ThreadPoolExecutor(os.cpu_count(), "jaxlm-compile")
        # Beside the programs: on a CPU, gigabytes of zeros take seconds.
        self._made = pool.submit(self._new_pages)
        self.pages: Caches = []
        self._begin = pool.submit(self._compile_begin)
        for sizes in step_sizes(model.decoder.spec, shape.rows, shape.chunks):
            self._programs[sizes] = pool.submit(self._compile_step, *sizes)
        pool.shutdown(wait=False)

    def _products(self) -> tuple[set[int], set[int]]:
        """The numbers of rows that programs multiply in layers, and by the output matrix."""
        spec = self.model.decoder.spec
        sizes = step_sizes(spec, self.shape.rows, self.shape.chunks)
        # A step without chunks has one token for each row.
        tokens = {padded_tokens(spec, rows + number * length) for number, length, rows in sizes}
        return tokens, {padded_tokens(spec, rows) for *_, rows in sizes}

    def end(self) -> None:
        """Nothing more is asked of them."""

    def cancel(self) -> None:
        """Compiles no more programs than those that are being compiled; nobody will ask for any of them."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> tuple[int, int]:
        """(programs compiled, programs in all)."""
        futures = [self._begin, *self._programs.values()]
        return sum(future.done() for future in futures), len(futures)

    def wait(self) -> None:
        """Returns when all programs are compiled.

        Raises:
            CancelledError: they will not be.
        """
        for future in (self._begin, *self._programs.values()):
            future.result()

    def start(self) -> None:
        """`wait`, also for the pages; before the first step."""
        self.wait()
        self.pages = self._made.result()

    def step(self, plan: Plan) -> tuple[jax.Array, Any, Any]:
        """Dispatches a step: tokens [R], their scores, scores of the targets (see `step.step`)."""
        if not plan.constrained.any():
            plan = plan.replace(allowed=self.everything)  # type: ignore[attr-defined]
        number, length = plan.chunks.shape
        rows = self._rows_of(plan)
        program = self._programs[number, length, rows].result()
        self.pages, self.state, *out = program(
            self.model.weights, self.pages, self.state, self._placed_rows, self._put(plan)
        )
        return cast(tuple[jax.Array, Any, Any], tuple(out))

    def _rows_of(self, plan: Plan) -> int:
        """Rows of the smallest program that has all that a plan serves."""
        in_use = np.flatnonzero((plan.places >= 0) | (plan.picks >= 0))
        last = max((*in_use[-1:], *plan.chunk_rows[plan.chunk_lengths > 0]), default=0)
        sizes = (rows for *chunks, rows in self._programs if (*chunks,) == plan.chunks.shape)
        return min(rows for rows in sizes if rows > last)

    def take_row(self, row: int, settings: RowSettings, begins: tuple[np.ndarray, int, np.ndarray] | None) -> None:
        """Sets how a row is decoded.

        Args:
            settings: of one row.
            begins: for a row with penalties or a bias: its text, the tokens of the prompt, the bias [V].
        """

        def put(all_rows: np.ndarray, new: np.ndarray) -> None:
            all_rows[row] = new[0]

        jax.tree.map(put, self.rows, settings)
        # A copy: a step that was dispatched may still read the one before.
        self._placed_rows = self._put(jax.tree.map(np.copy, self.rows))
        if begins is not None:
            text, start, bias = begins
            padded = np.full(self._text_room, self.model.decoder.spec.vocab_size, np.int32)
            padded[: len(text)] = text
            arguments = self._put((np.int32(row), padded, np.int32(start), bias))
            self.state = self._begin.result()(self.state, *arguments)

    @property
    def _text_room(self) -> int:
        return self.shape.table * self.shape.slots

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._whole)

    def _new_pages(self) -> Caches:
        shapes = self._abstract_pages()

        def zeros() -> Caches:
            return cast(Caches, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

        return cast(Caches, jax.block_until_ready(jax.jit(zeros, out_shardings=self._heads)()))

    def _abstract_pages(self) -> Caches:
        spec, shape, dtype = self.model.decoder.spec, self.shape, self.model.decoder.dtype
        copies = self.model.mesh.shape.get(TENSOR, 1)
        pages = []
        for layer in spec.layers():
            attention = layer.attention
            heads = attention.num_kv_heads * kv_head_copies(attention.num_kv_heads, copies)
            dims = shape.pages, heads, shape.slots, attention.head_dim
            leaf = jax.ShapeDtypeStruct(dims, dtype, sharding=self._heads)
            pages.append((leaf, leaf))
        return cast(Caches, pages)

    def _settings_of_free_rows(self) -> RowSettings:
        rows, vocab_size = self.shape.rows, self.model.decoder.spec.vocab_size
        return jax.tree.map(np.array, row_settings(Decoding(), rows, vocab_size))

    def _compile_step(self, number: int, length: int, rows: int) -> Any:
        whole, decoder = self._whole, self.model.decoder
        taken = partial(step, decoder) if rows == self.shape.rows else partial(step_of_few, decoder, rows)
        jitted = jax.jit(taken, donate_argnums=(1, 2), out_shardings=(self._heads, *[whole] * 4))
        arguments = (
            self.model.weights,
            self._abstract_pages(),
            self.state,
            self._placed_rows,
            self._put(self._no_plan(number, length)),
        )
        with use_mesh(self.model.mesh):
            return jitted.lower(*arguments).compile()

    def _compile_begin(self) -> Any:
        text, bias = np.zeros(self._text_room, np.int32), np.zeros(self.model.decoder.spec.vocab_size, np.float32)
        arguments = self._put((np.int32(0), text, np.int32(0), bias))
        with use_mesh(self.model.mesh):
            jitted = jax.jit(begin, donate_argnums=0, out_shardings=self._whole)
            return jitted.lower(self.state, *arguments).compile()

    def _no_plan(self, number: int, length: int) -> Plan:
        shape = self.shape

        def zeros(*dims: int) -> np.ndarray:
            return np.zeros(dims, np.int32)

        rows, chunks = shape.rows, (number, length)
        return Plan(
            tables=zeros(rows, shape.table),
            places=zeros(rows) - 1,
            picks=zeros(rows) - 1,
            numbers=zeros(rows),
            chunks=zeros(*chunks),
            chunk_rows=zeros(number),
            chunk_starts=zeros(number),
            chunk_lengths=zeros(number),
            targets=zeros(*chunks),
            wants_prompt=np.bool_(False),
            constrained=np.zeros(rows, bool),
            allowed=self.everything,
            adapters=zeros(rows),
            given=zeros(rows) - 1 if shape.guesses else None,
            owners=zeros(rows) if shape.guesses else None,
        )


def row_settings(
    options: Decoding,
    rows: int,
    vocab_size: int,
    key: np.ndarray | None = None,
    frequency: float = 0.0,
    presence: float = 0.0,
    has_bias: bool = False,
    logprobs: bool = False,
) -> RowSettings:
    """The same settings for each of `rows` rows, in NumPy arrays; `key` is [2] uint32."""
    settings = Settings.of(options, rows, vocab_size)
    few = min(64, vocab_size)
    draw = np.where(settings.draw > few, vocab_size, settings.draw)
    adjusted = has_bias or frequency != 0 or presence != 0 or options.repetition_penalty != 1
    return RowSettings(
        settings=settings.replace(draw=draw.astype(np.int32)),  # type: ignore[attr-defined]
        keys=np.tile(np.zeros(2, np.uint32) if key is None else key, (rows, 1)),
        frequency=np.full(rows, frequency, np.float32),
        presence=np.full(rows, presence, np.float32),
        adjusted=np.full(rows, adjusted),
        logprobs=np.full(rows, logprobs),
    )
