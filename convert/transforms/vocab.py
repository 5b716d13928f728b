"""More rows for the embedding and the head of a model: the rows of added tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxlm.config import ModalityConfig, TokenizerConfig
from jaxlm.config.files import read_section
from jaxlm.errors import UserError
from jaxlm.modalities import PRESETS
from jaxlm.tokenizer import Tokenizer
from jaxlm.weights.arithmetic import all_finite
from jaxlm.weights.leaves import (
    BLOCK_ELEMENTS,
    DerivedSource,
    Index,
    LeafInfo,
    ParamSource,
    cast,
    full_index,
    row_blocks,
    stored_blocks,
)
from jaxlm.weights.names import Entry

EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
# Rows kept while others are averaged: the same few (bytes, characters) make up most new pieces.
CACHED_ROWS = 4096


class GrownSource(DerivedSource):
    """A model with other rows in its embedding and head from some row on.

    Args:
        first: the first row that is replaced or added.
        rows: leaf ('embed_tokens/embedding', 'lm_head/kernel') -> its new rows [N, D]. Rows of the model beyond them
            stay.
    """

    def __init__(self, source: ParamSource, first: int, rows: Mapping[str, np.ndarray]) -> None:
        super().__init__(source)
        self._first = first
        self._rows = {path: cast(array, source.leaves[path].dtype, path) for path, array in rows.items()}
        assert rows.keys() == vocabulary_leaves(source), rows.keys()
        old = source.config.vocab_size
        assert first <= old, (first, old)
        self._last = first + len(rows[EMBEDDING])
        size = max(old, self._last)
        self.config = dataclasses.replace(source.config, vocab_size=size)
        self.leaves = {
            path: LeafInfo((size, *leaf.shape[1:]), leaf.dtype) if path in rows else leaf
            for path, leaf in source.leaves.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        if path not in self._rows:
            return self._source.read(path, index)
        wanted, columns = full_index(self.leaves[path].shape, index)
        parts = []
        for number, (begin, end) in enumerate(((0, self._first), (self._first, self._last), (self._last, None))):
            # The part of the wanted rows in [begin, end), in the steps that were asked for.
            skipped = max(0, -(-(begin - wanted.start) // wanted.step))
            start = wanted.start + skipped * wanted.step
            stop = wanted.stop if end is None else min(wanted.stop, end)
            if start >= stop:
                continue
            if number == 1:
                new = slice(start - self._first, stop - self._first, wanted.step)
                parts.append(self._rows[path][new, columns])
            else:
                parts.append(self._source.read(path, (slice(start, stop, wanted.step), columns)))
        return np.concatenate(parts) if parts else self._rows[path][:0, columns]

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        if entry.path not in self._rows:
            yield from stored_blocks(self._source, entry)
            return
        for start, stop in row_blocks(entry.layout):
            yield np.ascontiguousarray(self.read(entry.path, (slice(start, stop),)))


def vocabulary_leaves(source: ParamSource) -> set[str]:
    """The leaves with a row for each token: the embedding and, unless it is tied, the head."""
    return {path for path in (EMBEDDING, HEAD) if path in source.leaves}


def mean_row(source: ParamSource, path: str, rows: int) -> np.ndarray:
    """Mean of the first rows of a leaf [V, D] in float32: shape [D].

    Added up in the order in which torch adds on a CPU (four levels of partial sums), so that the mean is the same bit
    by bit: the published Alpaca difference was taken against it. Torch adds columns beyond the last multiple of 64 (in
    each thread's share of them) in another order; there the two may differ in the last bits.

    Raises:
        UserError: the mean is not finite.
    """
    width = source.leaves[path].shape[1]
    power = max(4, (rows - 1).bit_length() // 4)
    step = 1 << power
    levels = np.zeros((4, width), np.float32)
    done = 0
    for row in _float32_rows(source, path, rows):
        levels[0] += row
        done += 1
        if done % step:
            continue
        for level in range(1, 4):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if done & ((step - 1) << (level * power)):
                break
    for level in range(1, 4):
        levels[0] += levels[level]
    mean = levels[0] / np.float32(rows)
    if not all_finite(mean):
        raise UserError(
            f"{source.path}: {path} holds infinities or NaNs, which the mean of its rows would give to new tokens: "
            "the file is damaged, or of a run that diverged"
        )
    return mean


def _float32_rows(source: ParamSource, path: str, rows: int) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_ELEMENTS // source.leaves[path].shape[1])
    for start in range(0, rows, step):
        yield from source.read(path, (slice(start, min(start + step, rows)),)).astype(np.float32)


def grow(source: ParamSource, vocab_size: int, new_row: str) -> ParamSource:
    """The model with embedding and head of `vocab_size` rows.

    Args:
        new_row: what the rows beyond the model's own are: 'mean' of its rows, or 'zero'.

    Raises:
        UserError: when the model has more rows already.
    """
    old = source.config.vocab_size
    if vocab_size < old:
        raise UserError(f"{source.path}: has {old} rows in its embedding, more than the {vocab_size} wanted")
    rows = {}
    for path in vocabulary_leaves(source):
        width = source.leaves[path].shape[1]
        row = np.zeros(width, np.float32) if new_row == "zero" else mean_row(source, path, old)
        rows[path] = np.broadcast_to(row, (vocab_size - old, width))
    return GrownSource(source, old, rows)


def padded(vocab_size: int, multiple: int | None) -> int:
    """The next multiple, e.g. 32003 -> 32064 for 64."""
    if multiple is None:
        return vocab_size
    if multiple < 1:
        raise UserError(f"--pad-to {multiple}: expected a number of rows of at least 1")
    return -(-vocab_size // multiple) * multiple


def extend(
    source: ParamSource, tokenizer: Tokenizer, splits: Sequence[Sequence[int]], init: str, pad_to: int | None = None
) -> ParamSource:
    """The model with a row for each new token, behind the tokens that the tokenizer has.

    Where the model has spare rows behind the tokenizer's last token, these are taken first.

    Args:
        tokenizer: the model's, without the new tokens.
        splits: for each new token the ids that it was split into so far.
        init: 'mean' of the rows of the tokenizer's tokens, 'zero', or 'pieces': the mean of the rows of `splits`.
        pad_to: the number of rows becomes a multiple of it; rows without a token are means too, or zero with 'zero'.

    Raises:
        UserError: when the tokenizer has more tokens than the model has rows.
    """
    first, old, new = tokenizer.vocab_size, source.config.vocab_size, len(splits)
    if first > old:
        raise UserError(
            f"{source.path}: its tokenizer has {first} tokens, but its embedding only {old} rows; "
            "this is not the tokenizer that the model was trained with"
        )
    size = padded(max(old, first + new), pad_to)
    rows, spare = {}, {}
    for path in vocabulary_leaves(source):
        width = source.leaves[path].shape[1]
        row = np.zeros(width, np.float32) if init == "zero" else mean_row(source, path, first)
        rows[path] = _pieces_rows(source, path, splits) if init == "pieces" else np.broadcast_to(row, (new, width))
        spare[path] = np.broadcast_to(row, (size - max(old, first + new), width))
    grown = GrownSource(source, first, rows)
    return GrownSource(grown, grown.config.vocab_size, spare)


def split_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[list[int]]:
    """The ids that a tokenizer splits each of the tokens into, without the space that it puts in front of a text.

    Raises:
        UserError: it makes nothing of one of them.
    """
    splits = []
    for token in tokens:
        ids = tokenizer.encode(token).ids
        if not ids:
            raise UserError(f"--init pieces: the tokenizer makes nothing of {token!r}; use --init mean")
        if len(ids) > 1 and tokenizer.token(ids[0]) == "▁" and not token.startswith((" ", "▁")):
            del ids[0]
        splits.append(ids)
    return splits


def _pieces_rows(source: ParamSource, path: str, splits: Sequence[Sequence[int]]) -> np.ndarray:
    """For each split the mean of its rows: float32 [N, D]."""

    @functools.lru_cache(maxsize=CACHED_ROWS)
    def row(index: int) -> np.ndarray:
        return source.read(path, (slice(index, index + 1),))[0].astype(np.float32)

    means = np.zeros((len(splits), source.leaves[path].shape[1]), np.float32)
    for mean, ids in zip(means, splits, strict=True):
        for index in ids:  # one after the other: numpy's own mean adds in an order that depends on the shape
            mean += row(index)
        mean /= np.float32(len(ids))
    return means


def read_tokens(argument: str) -> list[str]:
    """New tokens: the lines of a UTF-8 file, or a list with commas.

    Raises:
        UserError: the list is empty, names a token twice, or looks like a file that is missing.
    """
    path = Path(argument)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a list too long for a name
        is_file = is_folder = False
    if is_file:
        try:
            # Nothing but \n ends a line: a token may hold other separators, which splitlines would cut at.
            lines = path.read_bytes().decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"--tokens {argument}: is not UTF-8 text ({error})") from None
        tokens = [line for line in (line.strip("\r") for line in lines) if line.strip()]
    elif "," not in argument and ("/" in argument or argument.endswith((".txt", ".json")) or is_folder):
        raise UserError(
            f"--tokens {argument}: no such file; a list of tokens needs a comma, also behind a single token: "
            f"'{argument},'"
        )
    else:
        tokens = [token for token in argument.split(",") if token.strip()]
    if not tokens:
        raise UserError(f"--tokens {argument}: names no token; expected a file with a token on each line, or a,b,c")
    twice = next((token for number, token in enumerate(tokens) if token in tokens[:number]), None)
    if twice is not None:
        raise UserError(f"--tokens {argument}: {twice!r} is there twice")
    return tokens


def read_modalities(arguments: Sequence[str]) -> list[ModalityConfig]:
    """Modalities by preset, or from YAML or JSON files with a list `modalities`, as in a run's section tokenizer.

    Raises:
        UserError: for an unknown preset, or a file that is not such a list.
    """
    entries: list[ModalityConfig] = []
    for argument in arguments:
        if Path(argument).suffix in (".yaml", ".yml", ".json"):
            listed = read_section(argument, TokenizerConfig).modalities
            if not listed:
                raise UserError(f"--modality {argument}: has no list `modalities`")
            entries += listed
        elif argument in PRESETS:
            entries.append(ModalityConfig(preset=argument))
        else:
            raise UserError(
                f"--modality {argument}: is neither a preset ({', '.join(PRESETS)}) nor a .yaml or .json file"
            )
    return entries
