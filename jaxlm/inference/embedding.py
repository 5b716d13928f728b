"""Embeddings for a server: by programs for a few padded lengths, which are compiled beforehand and not in a request.

R texts of T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import use_mesh
from jaxlm.inference.paged.followers import Orders, together
from jaxlm.inference.rows import DeviceModel, placed
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import Weights, hidden_states, last_layer

# The shortest padded length, and how many times as long the next one is.
SHORTEST, FACTOR = 64, 4
# Tokens that a program reads, at least: shorter texts are read together.
TOKENS = 256


def padded_lengths(longest: int) -> list[int]:
    """The lengths that have programs, ascending."""
    lengths, length = [], SHORTEST
    while length < longest:
        lengths.append(length)
        length *= FACTOR
    return [*lengths, longest]


class Embedder:
    """Means of the last hidden states behind the final norm, over all tokens of a text.

    Args:
        model: its weights are those that it has now; its mesh does not divide rows.
        longest: most tokens of a text.
        begin: called in the compiling thread first, e.g. to wait for what is more urgent.
        orders: to the other processes, which do the same by `acts`; None: there are none.
    """

    def __init__(
        self,
        model: DeviceModel,
        longest: int,
        begin: Callable[[], None] = lambda: None,
        orders: Orders | None = None,
    ) -> None:
        self._model, self._longest = model.base, longest
        ((name, act),) = self.acts().items()
        self._means = together(orders, name, act)
        self._whole = NamedSharding(model.mesh, P())
        self._pool = pool = ThreadPoolExecutor(1, "jaxlm-embeddings")
        pool.submit(begin)
        self._programs: dict[int, Future[Any]] = {
            length: pool.submit(self._compile, length) for length in padded_lengths(longest)
        }
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Returns when all programs are compiled."""
        for program in self._programs.values():
            program.result()

    def cancel(self) -> None:
        """Compiles no more programs; nobody asks for embeddings any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """[number of texts, D] float32 of texts of 1 to `longest` tokens."""
        assert all(0 < len(ids) <= self._longest for ids in texts)
        result = np.zeros((len(texts), self._model.decoder.spec.hidden_size), np.float32)
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(texts):
            length = next(length for length in self._programs if length >= len(ids))
            by_length.setdefault(length, []).append(number)
        for length, numbers in by_length.items():
            rows = rows_of(length)
            self._programs[length].result()  # while the others wait for it, they would do nothing else
            for start in range(0, len(numbers), rows):
                part = numbers[start : start + rows]
                tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
                for row, number in enumerate(part):
                    tokens[row, : len(texts[number])] = texts[number]
                    lengths[row] = len(texts[number])
                result[part] = self._means(tokens, lengths)[: len(part)]
        return result

    def acts(self) -> dict[str, Callable[..., Any]]:
        """What computes embeddings, by the name of its order."""
        return {"embed": self._compute}

    def _compute(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
        """[R, D] of padded texts [R, T]."""
        program = self._programs[tokens.shape[1]].result()
        return jax.device_get(program(self._model.weights, *placed((tokens, lengths), self._whole)))

    def _compile(self, length: int) -> Any:
        rows, decoder = rows_of(length), self._model.decoder
        shapes = (jax.ShapeDtypeStruct(dims, np.int32, sharding=self._whole) for dims in ((rows, length), (rows,)))
        with use_mesh(self._model.mesh):
            jitted = jax.jit(partial(_means, decoder), out_shardings=self._whole)
            return jitted.lower(self._model.weights, *shapes).compile()


def rows_of(length: int) -> int:
    """Texts that the program of a length reads together."""
    return max(1, TOKENS // length)


def _means(decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    hidden = hidden_states(decoder, weights, last_layer(decoder, weights, tokens, lengths)).astype(jnp.float32)
    is_text = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.sum(jnp.where(is_text[..., None], hidden, 0), axis=1) / lengths[:, None]
