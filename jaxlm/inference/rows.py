"""The key/value caches of a fixed number of rows: prompts are read into rows, and the rows' slots grow with the texts.

The engine and the beam search both sit on these. R rows, S slots (all rows share S), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import rows_axis_size
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.models.encoder_decoder import read_sources
from jaxlm.models.unrolled import Caches, LayerCache, Weights, extend, grow, prefill, repeat_rows
from jaxlm.nn.cross_attention import Source
from jaxlm.nn.linear import is_bank
from jaxlm.sharding import ROW_AXES

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


def power_of_two(number: int) -> int:
    """The next power of two: few shapes, so few programs."""
    return 1 << max(0, number - 1).bit_length()


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Arrays as NumPy ones. Each of several processes gets all rows: all decide alike whether a row has ended."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.device_get(tree)


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays, the same ones in all processes, on the devices; nothing is compiled or computed for it."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # `device_put` would compare the values of all processes first, by a collective.
    def put(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def divisible(rows: int, mesh: Mesh) -> int:
    """A number of rows, rounded up to what the mesh divides."""
    divisor = rows_axis_size(mesh)
    return -(-rows // divisor) * divisor


class DeviceModel:
    """A model on its devices, ready to generate.

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
        """Tokens that prompt and answer may have together; with an encoder, each of them."""
        return self.decoder.spec.max_length

    @property
    def base(self) -> DeviceModel:
        """The model without the adapters beside it, where there are any: each token would have to choose one."""
        lora = self.weights["lora"]
        if not any(map(is_bank, jax.tree.leaves(lora, is_leaf=is_bank))):
            return self
        return DeviceModel(self.decoder, {**self.weights, "lora": [{} for _ in lora]}, self.mesh, self.stop_ids)

    def beginning(self, prompt: Sequence[int]) -> list[int]:
        """What the text of the decoder begins with when it answers a prompt, which an encoder may have read apart."""
        encoder = self.decoder.spec.encoder
        return list(prompt) if encoder is None or not prompt else [encoder.start_token_id]

    def check_prompt(self, ids: Sequence[int], name: str = "the prompt") -> None:
        """Raises UserError for an empty prompt, one that fills the context, or an id that the model does not have."""
        if not ids:
            raise UserError(f"{name} is empty: there is nothing to continue")
        if len(ids) >= self.max_length:
            raise UserError(
                f"{name} has {len(ids)} tokens, the model's context is {self.max_length}, answer included; "
                "shorten it (nothing is cut off silently)"
            )
        last = self.decoder.spec.vocab_size - 1
        if not 0 <= min(ids) <= max(ids) <= last:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(
                f"{name} holds token id {wrong}, the model has 0 to {last}; the tokenizer belongs to another model"
            )


class CacheRows:
    """The caches of R rows on their devices.

    Args:
        model: whose keys and values they hold.
        rows: the least number of rows; it is rounded up to what the mesh divides.

    Attributes:
        rows: R.
        caches: of each layer; empty before the first prompts.
    """

    def __init__(self, model: DeviceModel, rows: int) -> None:
        self._model = model
        self.rows = divisible(rows, model.mesh)
        self.caches: Caches = []

    @property
    def slots(self) -> int:
        """S: tokens that each row has room for."""
        return self.caches[0][0].shape[2] if self.caches else 0

    def read(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> tuple[jax.Array, Caches]:
        """Reads prompts together, apart from the rows.

        Args:
            prompts: an empty one only fills up the batch; their number is divisible.
            limits: most tokens of the decoder's text, its beginning and the answer, of each.

        Returns:
            Logits [n, V] after each prompt, and the caches of n rows.
        """
        width = bucket(max(len(prompt) for prompt in prompts))
        longest = max(len(self._model.beginning(prompt)) for prompt in prompts)
        slots = max(min(bucket(max(limits)), bucket(longest + FIRST_SLOTS)), bucket(longest))
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([max(1, len(prompt)) for prompt in prompts], np.int32)
        sharding = NamedSharding(self._model.mesh, P(ROW_AXES))
        placed = jax.device_put(tokens, sharding), jax.device_put(lengths, sharding)
        read = prefill if self._model.decoder.spec.encoder is None else read_sources
        return read(self._model.decoder, self._model.weights, *placed, slots)

    def place(self, caches: Caches, copies: int, rows: Sequence[int] | None = None) -> None:
        """Puts caches into rows, each `copies` times.

        Args:
            caches: of n rows, from `read`.
            rows: n * copies numbers, those of one prompt side by side; R or more: leave out. None: the caches become
                those of all R rows, with as many slots as they have.
        """
        if rows is None:
            self.caches = repeat_rows(caches, copies)
            return
        slots = max(self.slots, caches[0][0].shape[2])
        if not self.caches:
            self.caches = [_empty(kv, self.rows) for kv in caches]
        elif self.slots < slots:
            self.caches = grow(self.caches, slots)
        numbers = jnp.asarray(rows, jnp.int32)
        pairs = zip(self.caches, caches, strict=True)
        self.caches = [
            (*_put(old[:2], new[:2], copies, numbers), *_put_sources(old[2:], new[2:], copies, numbers, self.rows))
            for old, new in pairs
        ]

    def read_on(self, row: int, known: int, tokens: Sequence[int]) -> jax.Array:
        """Reads more tokens into one row, whose first `known` ones the caches hold; logits [1, V] after them."""
        width = bucket(len(tokens))
        self.reserve(bucket(known + width))
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        starts, added = jnp.array([known], jnp.int32), jnp.array([len(tokens)], jnp.int32)
        alone = self.rows == 1
        caches = self.caches if alone else [_take(kv[:2], np.int32(row)) for kv in self.caches]
        logits, caches = extend(self._model.decoder, self._model.weights, caches, jnp.asarray(padded), starts, added)
        self.place(caches, 1, None if alone else [row])
        return logits

    def read_again(self, lengths: Mapping[int, int], text: Callable[[int], Sequence[int]], limit: int) -> int:
        """Reads rows again whose text has outgrown what its keys are turned for (see `RopeSpec.switch_length`).

        A longer text is turned by other factors from its first token on, as transformers' Phi-3 does.

        Args:
            lengths: of the texts that are not finished, by row; the caches hold all of a text but its last token.
            text: the tokens of a row.
            limit: most tokens that any text will have.

        Returns:
            How many tokens may come before this is to be called again.
        """
        switch = self._model.decoder.spec.switch_length
        if switch is None:
            return limit
        rows = [row for row, length in lengths.items() if length == switch + 1]
        if rows:
            count = divisible(power_of_two(len(rows)), self._model.mesh)
            texts = [*map(text, rows), *[[]] * (count - len(rows))]
            _, caches = self.read(texts, [limit])
            # The last token is read too, and once more with the next one: it stands in the same slot.
            self.place(caches, 1, rows + [self.rows] * (count - len(rows)))
        return min((switch + 1 - length for length in lengths.values() if length <= switch), default=limit)

    def reserve(self, slots: int) -> None:
        """Grows the caches to at least this number of slots."""
        if self.slots < slots:
            self.caches = grow(self.caches, slots)

    def make_room(self, longest: int, steps: int, limit: int) -> int:
        """Grows the caches when `steps` more tokens would not fit; how many tokens fit then.

        Args:
            longest: tokens of the longest text that is not finished.
            limit: most tokens that any text will have.
        """
        if longest + steps > self.slots:
            self.reserve(min(bucket(limit), bucket(self.slots + 1)))
        return min(steps, self.slots - longest)


def _in_rows(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    dims = ("batch", "kv_heads", None, None)
    return nn.with_logical_constraint(k, dims), nn.with_logical_constraint(v, dims)


@partial(jax.jit, static_argnums=1)
def _empty(kv: LayerCache, rows: int) -> LayerCache:
    k, v, *source = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), kv)
    return (*_in_rows(k, v), *map(_source_in_rows, source))


def _source_in_rows(source: Source) -> Source:
    assert source.k is not None and source.v is not None
    k, v = _in_rows(source.k, source.v)
    rows = nn.with_logical_constraint(source.segment_ids, ("batch", None))
    return source.replace(segment_ids=rows, k=k, v=v)  # type: ignore[attr-defined]


@partial(jax.jit, static_argnums=(2, 4))
def _put_sources(
    old: tuple[Source, ...], new: tuple[Source, ...], copies: int, rows: jax.Array, count: int
) -> tuple[Source, ...]:
    """The sources of `count` rows, each with its own, with those of `new`, each `copies` times, in `rows`."""
    if not old:
        return ()
    (mine,), (theirs,) = old, new
    length = max(mine.segment_ids.shape[1], theirs.segment_ids.shape[1])

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        axis = old.ndim // 2  # of the length, in [R, S] and [R, K, S, h]
        old, new = (
            jnp.pad(x, [(0, length - x.shape[axis]) if dim == axis else (0, 0) for dim in range(x.ndim)])
            for x in (old, new)
        )
        old = jnp.repeat(old, count // old.shape[0], axis=0)
        return old.at[rows].set(jnp.repeat(new, copies, axis=0), mode="drop")

    return (_source_in_rows(jax.tree.map(put, mine, theirs)),)


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def _put(
    old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], copies: int, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    slots = new[0].shape[2]
    # Slots behind keep the text before: nothing looks at a slot until its own token is there.
    k, v = (
        mine.at[rows, :, :slots].set(jnp.repeat(theirs, copies, axis=0), mode="drop")
        for mine, theirs in zip(old, new, strict=True)
    )
    return _in_rows(k, v)


@jax.jit
def _take(kv: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, v = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in kv)
    return k, v
