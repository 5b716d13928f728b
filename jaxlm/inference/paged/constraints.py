"""Which tokens may come next, as bits: for grammars, and for n-grams that must not repeat."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxlm.inference.paged.requests import Constraint

BITS = 32


@functools.cache
def everything(rows: int, vocab_size: int) -> np.ndarray:
    """[rows, ceil(V / 32)] uint32 that allow all; not to be written to."""
    words = np.full((rows, -(-vocab_size // BITS)), 0xFFFFFFFF, np.uint32)
    if vocab_size % BITS:
        words[:, -1] = (1 << vocab_size % BITS) - 1
    words.flags.writeable = False
    return words


class NoRepeat:
    """No n-gram of a size occurs twice in prompt and answer (transformers' no_repeat_ngram_size)."""

    def __init__(self, size: int, prompt: Sequence[int], vocab_size: int) -> None:
        self._size, self._vocab_size, self._tokens = size, vocab_size, list[int]()
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token in prompt:
            self.accept(token)

    def allowed(self) -> np.ndarray:
        words = everything(1, self._vocab_size)[0].copy()
        if len(self._tokens) >= self._size - 1:
            for token in self._followers.get(self._last(), ()):
                words[token // BITS] &= ~np.uint32(1 << token % BITS)
        return words

    def accept(self, token: int) -> None:
        if len(self._tokens) >= self._size - 1:
            self._followers[self._last()].append(token)
        self._tokens.append(token)

    def _last(self) -> tuple[int, ...]:
        return tuple(self._tokens[len(self._tokens) - self._size + 1 :])


class Both:
    """What two constraints allow."""

    def __init__(self, first: Constraint, second: Constraint) -> None:
        self._parts = first, second

    def allowed(self) -> np.ndarray:
        first, second = (part.allowed() for part in self._parts)
        return first & second

    def accept(self, token: int) -> None:
        for part in self._parts:
            part.accept(token)
