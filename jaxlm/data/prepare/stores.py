"""What is done to whole stores: several into one, and one without some of its examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.report import SourceReport
from jaxlm.data.split import count_split
from jaxlm.data.store.columns import Columns, Digests
from jaxlm.data.store.manifest import Manifest, values_of
from jaxlm.data.store.stored import Selected, StoredTokens, write_store
from jaxlm.data.tokens import merged
from jaxlm.errors import UserError
from jaxlm.lock import Lock


class _Renumbered:
    """Columns whose sources have other numbers, and whose first example begins a record."""

    def __init__(self, columns: Columns, numbers: Sequence[int]) -> None:
        self._columns, self._numbers = columns, np.array(numbers, np.int32)
        self.examples, self.with_encoder = columns.examples, columns.with_encoder

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        for block in self._columns.column(name):
            yield self._numbers[block] if name == "source" else block


# Called with the number of tokens and masks written, and of all of them.
Progress = Callable[[int, int], None]


def merge_stores(destination: Path, stores: Sequence[Path], progress: Progress | None = None) -> StoredTokens:
    """Writes one store of several, in their order; sources of one path become one.

    Args:
        destination: a new directory.
        stores: directories of stores.
        progress: told how far it is.

    Raises:
        UserError: they do not go together, or the destination is there already.
    """
    with _new(destination):
        opened = [StoredTokens(path) for path in stores]
        first = opened[0].manifest
        for path, other in zip(stores, opened, strict=True):
            for key, what in (("tokenizer", "another tokenizer"), ("encoder_tokens", "another kind of model")):
                mine, theirs = getattr(first, key), getattr(other.manifest, key)
                if mine != theirs and (key == "tokenizer" or (mine is None) != (theirs is None)):
                    raise UserError(
                        f"{path}: was made for {what} than {stores[0]}"
                        + (f" ({other.manifest.tokenizer_path}, {first.tokenizer_path})" if key == "tokenizer" else "")
                        + "; tokenise its texts again"
                    )
        reports: dict[str, SourceReport] = {}
        parts: list[Columns] = []
        for other in opened:
            names = [report.path for report in other.manifest.reports()]
            for report in other.manifest.reports():
                reports[report.path] = merged(reports[report.path], report) if report.path in reports else report
            places = list(reports)
            every = Selected(other, np.ones(len(other), np.bool_))
            parts.append(_Renumbered(every, [places.index(name) for name in names]))
        dtype = max((np.dtype(other.manifest.dtype) for other in opened), key=lambda kind: kind.itemsize)
        settings = {"merged": [other.digest() for other in opened]}
        total = sum(other.manifest.tokens for other in opened)
        _write(destination, parts, dtype, first, tuple(reports.values()), settings, total, progress)
    return StoredTokens(destination)


def drop_examples(
    destination: Path, store: Path, gone: NDArray[np.bool_], why: str, progress: Progress | None = None
) -> StoredTokens:
    """Writes a store without some of its examples.

    Args:
        destination: a new directory.
        store: the directory of a store.
        gone: bool [examples].
        why: what is dropped, in words, for the manifest.
        progress: told how far it is.

    Raises:
        UserError: nothing would be left, nothing goes, or the destination is there already.
    """
    with _new(destination):
        tokens = StoredTokens(store)
        if not gone.any():
            raise UserError(f"{store}: nothing of it is dropped by {why}; nothing was written")
        if gone.all():
            raise UserError(f"{store}: all {len(tokens):,} examples would be dropped by {why}; nothing was written")
        reports = count_split(tokens.manifest.reports(), tokens, gone)[0]
        settings = {**tokens.manifest.settings, "dropped": why, "from": tokens.digest()}
        parts = [Selected(tokens, ~gone)]
        total, dtype = int(tokens.lengths[~gone].sum()), np.dtype(tokens.manifest.dtype)
        _write(destination, parts, dtype, tokens.manifest, reports, settings, total, progress)
    return StoredTokens(destination)


def examples_of_source(store: Path, name: str) -> NDArray[np.bool_]:
    """bool [examples]: those that come from a source.

    Raises:
        UserError: the store has no such source.
    """
    tokens = StoredTokens(store)
    names = [report.path for report in tokens.manifest.reports()]
    if name not in names:
        raise UserError(f"--source: {store} has no source {name!r}; it has {', '.join(names)}")
    return np.asarray(tokens.source) == names.index(name)


def examples_by_index(store: Path, words: str) -> NDArray[np.bool_]:
    """bool [examples]: those with these numbers, from 0.

    Args:
        store: the directory of a store.
        words: numbers and ranges (both ends within) with commas, 3,10-19; or a file of numbers, one a line.

    Raises:
        UserError: what is not a number, or beyond the store.
    """
    number_of = len(StoredTokens(store))
    gone = np.zeros(number_of, np.bool_)
    file = Path(words)
    parts = file.read_text(encoding="utf-8").split() if file.is_file() else words.split(",")
    for place, part in enumerate(parts, 1):
        first, _, last = part.strip().partition("-")
        where = f"{file}: entry {place}" if file.is_file() else "--indices"
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"{where}: {part!r} is not a number, nor a range as 10-19, nor a file that is there")
        begin, end = int(first), int(last or first)
        if not begin <= end < number_of:
            raise UserError(f"{where}: {part} is beyond {store}, whose examples are 0 to {number_of - 1:,}")
        gone[begin : end + 1] = True
    return gone


def _new(destination: Path) -> Lock:
    """A lock on a destination that is not there yet."""
    if destination.exists():
        raise UserError(f"{destination}: is there already; choose another name, or remove it")
    return Lock(destination.with_name(f".{destination.name}.lock"), f"{destination}", "choose another destination")


def _write(
    destination: Path,
    parts: Sequence[Columns],
    dtype: np.dtype[Any],
    like: Manifest,
    reports: Sequence[SourceReport],
    settings: dict[str, Any],
    total: int,
    progress: Progress | None,
) -> None:
    written = 0

    def count(number: int) -> None:
        nonlocal written
        written += number
        if progress is not None:
            progress(written, 2 * total)  # tokens, then their masks

    def manifest(sums: Digests, first: NDArray[Any]) -> Manifest:
        return dataclasses.replace(
            like,
            dtype=dtype.name,
            examples=sum(part.examples for part in parts),
            documents=sums.documents,
            tokens=sums.tokens,
            trained_tokens=sums.trained,
            encoder_tokens=None if like.encoder_tokens is None else _encoder_tokens(parts),
            largest_id=sums.largest,
            digest=sums.contents.hexdigest(),
            digest_as_source=sums.as_source,
            sources=tuple(values_of(report) for report in reports),
            settings=settings,
            files={},
        )

    write_store(destination, parts, dtype, manifest, count)


def _encoder_tokens(parts: Sequence[Columns]) -> int:
    return sum(int(block.sum()) for part in parts for block in part.column("encoder_lengths"))
