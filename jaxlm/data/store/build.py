"""Sources to a store: tokenised in parts, which outlive a kill, and joined.

A part is a stretch of the sources whose borders follow from the sources alone. So parts may be made by any number of
processes and hosts, in any order, and the store is the same to the byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.records import is_token_source
from jaxlm.data.report import SourceReport
from jaxlm.data.store.columns import Columns, Digests, Part, PartWriter, total_reports
from jaxlm.data.store.manifest import Manifest, values_of
from jaxlm.data.store.megatron import token_dtype
from jaxlm.data.store.pool import Pool
from jaxlm.data.store.source import read_chunks, tokenizer_digest
from jaxlm.data.store.stored import write_store
from jaxlm.data.tokenise import Batch, Tokeniser, read_batches
from jaxlm.data.tokens import Chunk
from jaxlm.tokenizer import Tokenizer

PART_CHARACTERS = 1 << 24  # of a part, about: some 4 M tokens, and seconds of one core's work

# Called with characters read and tokens made so far.
Counter = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a store is made of.

    Args:
        sources: in their order.
        config: the data section, with add_bos and add_eos decided.
        tokenizer: the tokenizer.
        start_id: for an encoder and a decoder: the token that the decoder begins with; None: a decoder alone.
        part_characters: characters of a part, about.
    """

    sources: tuple[SourceConfig, ...]
    config: DataConfig
    tokenizer: Tokenizer
    start_id: int | None = None
    part_characters: int = PART_CHARACTERS

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the tokens on disk."""
        return token_dtype(self.tokenizer.vocab_size)


@dataclasses.dataclass(frozen=True)
class _Label:
    part: int
    source: int
    characters: int


def make_parts(
    work: Work,
    directory: Path,
    processes: int = 1,
    share: tuple[int, int] = (0, 1),
    count: Counter | None = None,
    owned: Callable[[], None] = lambda: None,
) -> int:
    """Makes those parts of a share that are not there yet; returns the number of all parts.

    Args:
        work: what to do.
        directory: of the parts.
        processes: that tokenise.
        share: (i, n): the parts i, i + n, …; another host makes the others.
        count: called now and then, with all that was read, skipped parts too.
        owned: called now and then; raises when this process should stop.

    Raises:
        UserError: a record that cannot be used; what is finished stays.
    """
    tokeniser = Tokeniser([source.columns for source in work.sources], work.config, work.tokenizer, work.start_id)
    parts = _Parts(work, directory, share)
    writer: PartWriter | None = None
    current, tokens, characters = -1, 0, 0
    try:
        with Pool(tokeniser, processes) as pool:
            for label, chunk in _ordered(pool, parts):
                if label.part != current:
                    if writer is not None:
                        writer.finish()
                    writer = PartWriter(_name(directory, label.part), work.dtype, work.start_id is not None)
                    current = label.part
                assert writer is not None
                writer.add(label.source, chunk)
                tokens += len(chunk.input_ids)
                characters = label.characters
                owned()
                if count is not None:
                    count(characters, tokens)
        if writer is not None:
            writer.finish()
            writer = None
    finally:
        if writer is not None:
            writer.abandon()
    return parts.number + 1


def _name(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06}"


class _Parts:
    """Batches and ready chunks of the parts of a share, with their labels."""

    def __init__(self, work: Work, directory: Path, share: tuple[int, int]) -> None:
        self._work, self._directory, self._share = work, directory, share
        self.number = -1

    def __iter__(self) -> Iterator[tuple[_Label, Batch | Chunk]]:
        work = self._work
        total, border, wanted = 0, 0, False
        for number, source in enumerate(work.sources):
            items: Iterator[Batch | Chunk]
            if is_token_source(source):
                items = read_chunks(source, work.config, work.tokenizer, work.start_id)
            else:
                items = read_batches(number, source, work.tokenizer)
            for item in items:
                if total >= border:
                    self.number += 1
                    border = total + work.part_characters
                    mine = self.number % self._share[1] == self._share[0]
                    wanted = mine and not _name(self._directory, self.number).exists()
                total += item.characters if isinstance(item, Batch) else 4 * len(item.input_ids)
                if wanted:
                    yield _Label(self.number, number, total), item


def _ordered(pool: Pool, parts: _Parts) -> Iterator[tuple[_Label, Chunk]]:
    """All chunks in order: batches go through the pool, runs of ready chunks do not."""
    waiting: list[tuple[_Label, Chunk]] = []

    items = iter(parts)

    def run() -> Iterator[tuple[_Label, Batch]]:
        for label, item in items:
            if isinstance(item, Chunk):
                waiting.append((label, item))
                return
            yield label, item

    while True:
        yield from pool.map(run())
        if not waiting:
            return
        yield waiting.pop()


def open_parts(directory: Path, number: int) -> list[Part] | None:
    """The first `number` parts; None when not all are there yet.

    Raises:
        UserError: one is damaged.
    """
    names = [_name(directory, each) for each in range(number)]
    return [Part(name) for name in names] if all(name.is_dir() for name in names) else None


def join(
    work: Work,
    directory: Path,
    parts: Sequence[Columns],
    reports: Sequence[SourceReport],
    settings: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the store of all parts.

    Args:
        work: what they are made of.
        directory: of the store.
        parts: in order.
        reports: of the sources.
        settings: what else the tokens depend on.
        progress: called with tokens and masks written.
    """
    tokenizer = work.tokenizer
    encoder = sum(int(block.sum()) for part in parts if part.with_encoder for block in part.column("encoder_lengths"))

    def manifest(sums: Digests, first: NDArray[Any]) -> Manifest:
        return Manifest(
            dtype=work.dtype.name,
            examples=sum(part.examples for part in parts),
            documents=sums.documents,
            tokens=sums.tokens,
            trained_tokens=sums.trained,
            encoder_tokens=encoder if work.start_id is not None else None,
            largest_id=sums.largest,
            digest=sums.contents.hexdigest(),
            digest_as_source=sums.as_source,
            tokenizer=tokenizer_digest(tokenizer),
            tokenizer_path=str(tokenizer.path),
            vocab_size=tokenizer.vocab_size,
            sources=tuple(values_of(report) for report in reports),
            settings=settings,
            first=tokenizer.decode(first.tolist(), skip_special=False)[:1000],
        )

    write_store(directory, parts, work.dtype, manifest, progress)


def reports_of(parts: Sequence[Part]) -> tuple[SourceReport, ...]:
    """What became of each source."""
    return total_reports([part.reports for part in parts])
