"""The rows of each pass over the data, made ahead of time in a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import (
    PackedPlan,
    Rows,
    Shuffled,
    epoch_order,
    group_texts,
    group_texts_rows,
    index_dtype,
    plan_rows,
)
from jaxlm.data.patterns import num_rows, pack
from jaxlm.data.tokens import Tokens

# How first_fit fills rows. 1: one document after the other, 64 rows open; the number of rows depends on the order.
# 2: by lengths (patterns.py).
PACKING_VERSION = 2


def packing_version(mode: str, has_encoder: bool) -> int:
    """The newest version for a packing mode: there is but one of group_texts, of none, and of rows for an encoder."""
    return PACKING_VERSION if mode == "first_fit" and not has_encoder else 1


class Documents:
    """What planning needs to know of examples; sent to another process, it is as small as they are.

    Args:
        examples: tokens are not touched.
        capacity: tokens of a row.
    """

    def __init__(self, examples: Tokens, capacity: int) -> None:
        self.examples = examples
        self.capacity = capacity

    def __reduce__(self) -> tuple[type[Documents], tuple[Tokens, int]]:
        return Documents, (self.examples, self.capacity)

    @cached_property
    def source(self) -> NDArray[np.int32]:
        """The source of each document, rising."""
        source = self.examples.source
        assert not np.any(source[1:] < source[:-1]), "examples stand in the order of their sources"
        return source

    @cached_property
    def lengths(self) -> NDArray[np.integer]:
        """Tokens of each document: uint16 where a row has so few, which sorts seven times as fast."""
        lengths = np.diff(self.examples.offsets)
        return lengths.astype(np.uint16 if len(lengths) == 0 or int(lengths.max()) < 2**16 else np.int64)

    def tokens(self, num_sources: int) -> NDArray[np.int64]:
        """Tokens of each source."""
        # bincount adds in float64, which is exact up to 2^53.
        return np.bincount(self.examples.source, self.lengths, num_sources).astype(np.int64)


@dataclass(frozen=True)
class Planner:
    """Plans passes over documents; a class and not a closure, so that it can be sent to worker processes.

    Args:
        documents: all of them.
        weights: how often each source is seen in a pass.
        mode: first_fit, group_texts or none.
        encoder_length: S, tokens of an encoder's row.
        seed: rows are a function of seed and pass.
        version: see `PACKING_VERSION`.
        most: how often each source may be seen in all passes together; empty: without end.
    """

    documents: Documents
    weights: tuple[float, ...]
    mode: str
    encoder_length: int
    seed: int
    version: int
    most: tuple[float, ...] = ()

    def weights_of(self, number: int) -> tuple[float, ...]:
        """How often each source is seen in this pass."""
        if not self.most:
            return self.weights
        left = (most - number * weight for weight, most in zip(self.weights, self.most, strict=True))
        return tuple(max(0.0, min(weight, rest)) for weight, rest in zip(self.weights, left, strict=True))

    @cached_property
    def constant_size(self) -> int | None:
        """The number of rows of every pass; None where passes differ in it."""
        return None if self.most or not self._same_size(self.weights) else self.size(0)

    def size(self, number: int) -> int:
        """The number of rows of a pass."""
        weights = self.weights_of(number)
        if not self._by_counts:
            return len(self(number))
        if not self._same_size(weights):
            return self._count(weights, number)
        if weights not in self._sizes:
            self._sizes[weights] = self._count(weights, number)
        return self._sizes[weights]

    def __call__(self, number: int) -> Rows:
        """The rows of a pass."""
        weights, offsets, capacity = self.weights_of(number), self.documents.examples.offsets, self.documents.capacity
        order = epoch_order(self.documents.source, weights, self.seed, number)
        encoder_offsets = self.documents.examples.encoder_offsets
        if encoder_offsets is not None or not self._by_counts:
            encoder = None if encoder_offsets is None else (encoder_offsets, self.encoder_length)
            return plan_rows(self.mode, offsets, order, capacity, self.seed, number, encoder)
        random = np.random.default_rng([self.seed, number, 0])
        if self.mode == "first_fit":
            rows = self._sizes.get(weights)
            return pack(order, self.documents.lengths, offsets, capacity, random, rows)
        if self.mode == "group_texts":
            plan = group_texts(offsets, order, capacity)
            return Shuffled(plan, random.permutation(len(plan)))
        order = random.permutation(order)
        return PackedPlan(order, np.arange(len(order) + 1, dtype=index_dtype(len(order))), offsets)

    @property
    def _by_counts(self) -> bool:
        """Whether the number of rows follows from the numbers of documents by length, and not from their order."""
        return self.mode != "first_fit" or (self.version > 1 and self.documents.examples.encoder_offsets is None)

    def _same_size(self, weights: tuple[float, ...]) -> bool:
        """Whether all passes with these weights have the same number of rows."""
        whole = all(weight == int(weight) for weight in weights)
        return self.mode == "none" or (whole and self._by_counts)

    def _count(self, weights: tuple[float, ...], number: int) -> int:
        order = epoch_order(self.documents.source, weights, self.seed, number)
        if self.mode == "none":
            return len(order)
        lengths = self.documents.lengths[order]
        if self.mode == "group_texts":
            return group_texts_rows(lengths, self.documents.capacity)
        return num_rows(np.bincount(lengths, minlength=1), self.documents.capacity)

    @cached_property
    def _sizes(self) -> dict[tuple[float, ...], int]:
        return {}


class Plans:
    """The plans of a planner, kept while they are in use; the next one is made ahead, in a thread.

    A thread is enough: planning is numpy's work, nearly all of it outside of Python's lock (benchmarks/data_packing.py
    has what a training step loses by it).
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "plans")
        self._plans: dict[int, Future[Rows]] = {}

    def __reduce__(self) -> tuple[type[Plans], tuple[Planner]]:
        return Plans, (self._planner,)  # a process that is sent them makes its own

    def get(self, number: int, then_next: bool) -> Rows:
        """The rows of a pass.

        Args:
            number: the pass.
            then_next: whether the one after it will be needed.
        """
        with self._lock:
            # A batch has rows of at most two neighbouring passes.
            self._plans = {key: plan for key, plan in self._plans.items() if abs(key - number) <= 1}
            for key in (number, number + 1) if then_next else (number,):
                if key not in self._plans:
                    self._plans[key] = self._thread.submit(self._planner, key)
            plan = self._plans[number]
        return plan.result()


def mix_seed(seed: int, source: int) -> int:
    """The seed of a source that is planned alone: two sources of the same lengths are not shuffled alike."""
    return int(np.random.SeedSequence([seed, source, 3]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def planners_of_sources(planner: Planner, num_sources: int) -> Sequence[Planner]:
    """A planner for each source alone, every pass once through it."""
    return [
        Planner(
            planner.documents,
            tuple(float(number == source) for number in range(num_sources)),
            planner.mode,
            planner.encoder_length,
            mix_seed(planner.seed, source),
            planner.version,
        )
        for source in range(num_sources)
    ]
