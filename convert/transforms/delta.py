"""Weight deltas: what a fine-tuned model differs by from its base, published instead of the model.

A delta is tuned - base, tensor by tensor; base + delta gives the tuned model back. The published ones differ in the
dtype of the arithmetic, in what an added token's row is subtracted from, and in where the tokenizer is:

    k2           K2's and GeoLLaMA's apply_delta.py, from FastChat: float16
    vicuna-v1.1  FastChat from 0.2 on: float16
    vicuna-v0    FastChat up to 0.1.10: float16; the row of the added [PAD] is subtracted from zeros
    alpaca       stanford_alpaca's weight_diff.py: float32; the row of [PAD] from the mean of the base's rows
    knowlm       KnowLM's weight_diff.py: float32, or all in float16

Both models are rounded to the dtype first and then added in it, as these scripts do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.transforms.vocab import grow, vocabulary_leaves
from jaxlm.errors import UserError
from jaxlm.models.families import load_shape
from jaxlm.spec import DecoderSpec, differences
from jaxlm.tokenizer import find_tokenizer_files
from jaxlm.weights.arithmetic import combine
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.leaves import CastSource, DerivedSource, Index, ParamSource, check_leaves, stored_blocks
from jaxlm.weights.names import Entry, Shape, leaf_shapes
from jaxlm.weights.partition import order_name
from jaxlm.weights.reproducible import ExactSum

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Family:
    """How a family of published deltas is calculated.

    Args:
        dtype: what is calculated and written in.
        new_row: what the base's row of an added token is, 'zero' or 'mean'; None where no token is added.
        side: whether tokenizer and configuration come with the 'base' or with the 'delta'.
        shape: name of the shape of the published model.
        total: sum of all its numbers, as its authors give it.
    """

    dtype: str
    new_row: str | None
    side: str
    shape: str | None = None
    total: float | None = None


FAMILIES = {
    "k2": Family("float16", None, "base"),
    "vicuna-v1.1": Family("float16", None, "delta"),
    "vicuna-v0": Family("float16", "zero", "delta"),
    "alpaca": Family("float32", "mean", "delta", "llama-7b", 50637.1836),
    "knowlm": Family("float32", None, "delta", "llama-13b", 94052.2891),
}


class DeltaSource(DerivedSource):
    """base + other, or other - base, tensor by tensor.

    Args:
        base: has the same shapes and dtypes as `other`.
        other: the delta to add, or the tuned model to take the difference of.
        side: the one of the two that configuration and tokenizer come from.
    """

    def __init__(self, base: ParamSource, other: ParamSource, subtract: bool, side: ParamSource) -> None:
        super().__init__(side)
        self._base = base
        self._other = other
        self._subtract = subtract
        self.path = other.path
        self.prompt_files = other.prompt_files or base.prompt_files
        self.config = dataclasses.replace(side.config, vocab_size=other.config.vocab_size)
        self.leaves = other.leaves

    def read(self, path: str, index: Index) -> np.ndarray:
        return combine(self._other.read(path, index), self._base.read(path, index), self._subtract, path)

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        for base, other in zip(stored_blocks(self._base, entry), stored_blocks(self._other, entry), strict=True):
            yield combine(other, base, self._subtract, entry.name)


class SummedSource(DerivedSource):
    """A model that adds up the numbers that are read from it. Read every number once, then look at `total`."""

    def __init__(self, source: ParamSource) -> None:
        super().__init__(source)
        self._sum = ExactSum()

    @property
    def total(self) -> float:
        """The sum of what was read so far."""
        return self._sum.total

    def read(self, path: str, index: Index) -> np.ndarray:
        values = self._source.read(path, index)
        self._sum.add(values)
        return values

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        for block in stored_blocks(self._source, entry):
            self._sum.add(block)
            yield block


def sum_of(blocks: Iterable[np.ndarray]) -> float:
    """Sum of all numbers, the same in whatever blocks they come."""
    total = ExactSum()
    for block in blocks:
        total.add(block)
    return total.total


def inv_freq_sum(config: DecoderSpec) -> float:
    """Sum of the rotary frequencies that transformers before 4.31 kept in the state dict of every layer.

    The published sums include them: 238.7185 for a 7B model, 298.3982 for a 13B one.
    """
    half = config.attention.head_dim // 2
    return config.num_layers * math.fsum(config.attention.rotary.rope_theta ** (-i / half) for i in range(half))


def sum_matches(total: float, expected: float, config: DecoderSpec) -> bool:
    """Whether a model's sum is a published one, which may or may not include the rotary frequencies.

    The published sums were added up in float32, whose own error at that size is larger than the 0.01 they ask for.
    """
    tolerance = 0.01 + 1e-5 * abs(expected)
    return any(abs(total + extra - expected) <= tolerance for extra in (0.0, inv_freq_sum(config)))


def published_sum(family: str, config: DecoderSpec) -> float | None:
    """The sum that the authors of a family give for a model of this shape in float32; None when they give none."""
    published = FAMILIES[family]
    if published.shape is None:
        return None
    shape = dataclasses.replace(load_shape(published.shape), vocab_size=config.vocab_size)
    return published.total if leaf_shapes(shape) == leaf_shapes(config) else None


def match_rows(base: ParamSource, other: ParamSource, family: str | None, new_row: str | None) -> ParamSource:
    """The base with as many rows in embedding and head as the other model.

    Args:
        new_row: 'mean' or 'zero', before what the family says.

    Raises:
        UserError: when the numbers of rows differ in a way that the family does not have, or that is ambiguous.
    """
    old, new = base.config.vocab_size, other.config.vocab_size
    counts = f"{base.path} has {old} rows in its embedding, {other.path} has {new}"
    if family is not None and new_row is None:
        new_row = FAMILIES[family].new_row
        if new_row is None and new > old:
            growing = ", ".join(name for name, item in FAMILIES.items() if item.new_row)
            raise UserError(f"{counts}, but family {family} adds no tokens; those that add one: {growing}")
        if new_row is not None and new == old:
            raise UserError(
                f"{counts}, but family {family} adds one token: the base is not the original one, or the delta is of "
                "another family; to add them as they are, leave --family out"
            )
    if new < old:
        raise UserError(f"{counts}: the models do not belong together (is the base a model with added tokens?)")
    if new == old:
        return base
    if new_row is None:
        raise UserError(
            f"{counts}: what the base's {new - old} new rows are depends on the family of the delta. "
            "Say --family alpaca or --new-row mean (their mean), or --family vicuna-v0 or --new-row zero (zeros)"
        )
    return grow(base, new, new_row)


class WithTokenizer(DerivedSource):
    """A model that carries other tokenizer files; its generation_config.json stays."""

    def __init__(self, source: ParamSource, files: list[Path]) -> None:
        super().__init__(source)
        own = [file for file in source.tokenizer_files if file.name == _GENERATION]
        self.tokenizer_files = [file for file in files if file.name != _GENERATION] + own
        self.tokenizer_dir = files[0].parent if files else source.tokenizer_dir


def find_tokenizer(choice: str | None, base: ParamSource, other: ParamSource, side: ParamSource) -> list[Path]:
    """The tokenizer files to write.

    Args:
        choice: 'base', 'delta' or 'tuned' (the other model), the path of a directory, or None: from `side` or, where
            it has none, from the other one.

    Raises:
        UserError: the place that was asked for has no tokenizer.
    """

    def of(source: ParamSource) -> list[Path]:
        return [file for file in source.tokenizer_files if file.name != _GENERATION]

    if choice is None:
        return of(side) or of(base if side is other else other)
    if choice in ("base", "delta", "tuned"):
        source = base if choice == "base" else other
        where, files = source.path, of(source)
    else:
        where = Path(choice)
        files = [file for file in find_tokenizer_files(where) if file.name != _GENERATION] if where.is_dir() else []
    if not files:
        raise UserError(f"--tokenizer {choice}: {where} holds no tokenizer files")
    return files


def delta_source(
    base: ParamSource, other: ParamSource, subtract: bool, family: str | None, new_row: str | None, dtype: str | None
) -> tuple[DeltaSource, ParamSource]:
    """base + other or other - base by the rules of a family, and the side that configuration and tokenizer come from.

    Args:
        family: a key of FAMILIES; None when nothing but the shapes is known.
        dtype: before what the family says.

    Raises:
        UserError: when the two models do not fit each other or the family.
    """
    # A new delta keeps what belongs to the tuned model.
    side = base if family is not None and FAMILIES[family].side == "base" and not subtract else other
    if family is not None and dtype is None:
        dtype = FAMILIES[family].dtype
    check_shapes(base, other)
    dtypes: dict[str, np.dtype[Any]] = {}
    for path, leaf in base.leaves.items():
        dtypes[path] = WEIGHT_DTYPES[dtype] if dtype else _wider(leaf.dtype, other.leaves[path].dtype)
    # Before rows are added: their mean is that of the base in the dtype of the arithmetic.
    grown = match_rows(CastSource(base, dtypes), other, family, new_row)
    return DeltaSource(grown, CastSource(other, dtypes), subtract, side), side


_SIZES = ("hidden_size", "size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def check_shapes(base: ParamSource, other: ParamSource) -> None:
    """Refuses a pair of models that differ in more than the rows of embedding and head."""

    shapes = {path: leaf.shape for path, leaf in other.leaves.items()}
    expected: dict[str, Shape] = {path: leaf.shape for path, leaf in base.leaves.items()}
    for path in vocabulary_leaves(base) & shapes.keys():
        expected[path] = (shapes[path][0], *expected[path][1:])
    try:
        check_leaves(other.path, shapes, expected)
    except UserError as error:
        sizes = [
            f"{name} is {value}, of the base {own}"
            for name, value, own in differences(other.config, base.config)
            if name.rpartition(".")[2] in _SIZES
        ]
        words = f" (its {'; '.join(sizes)})" if sizes else ""
        raise UserError(f"{error}; it belongs to another base than {base.path}{words}") from None
    orders = order_name(base.partition), order_name(other.partition)
    if orders[0] != orders[1]:
        raise UserError(
            f"{other.path}: the neurons of its feed-forward layers stand in another order ({orders[1]}) than those of "
            f"{base.path} ({orders[0]}); make a model of experts dense first: convert demoefy MODEL DENSE"
        )


def _wider(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    # As torch promotes: neither of float16 and bfloat16 holds the other's numbers.
    return first if first == second else np.dtype(np.float32)
