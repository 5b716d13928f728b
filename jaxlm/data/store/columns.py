"""What a store is written from: columns in blocks, of chunks in memory, finished parts or other stores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.report import SourceReport
from jaxlm.data.store.manifest import report_of, values_of
from jaxlm.data.tokens import Chunk, add_report
from jaxlm.errors import UserError

BLOCK = 1 << 20  # elements of a column that are in memory at a time
# Columns of numbers; `tokens` and `encoder` have the store's own type.
TYPES: dict[str, Any] = {"mask": np.uint8, "lengths": "<i4", "begins": np.uint8, "source": "<i4"}
ENCODER_TYPES: dict[str, Any] = {"encoder_lengths": "<i4"}
PART = "part.json"


class Columns(Protocol):
    """Examples as columns: tokens, mask [tokens]; lengths, begins, source [examples]; encoder, encoder_lengths."""

    @property
    def examples(self) -> int: ...
    @property
    def with_encoder(self) -> bool: ...
    def column(self, name: str) -> Iterator[NDArray[Any]]: ...


class PartWriter:
    """Writes a part of a store: a directory with one file a column, put in place whole by `finish`.

    Args:
        directory: where it will be.
        dtype: of the tokens.
        with_encoder: whether the examples have something for an encoder.
    """

    def __init__(self, directory: Path, dtype: np.dtype[Any], with_encoder: bool) -> None:
        self.directory = directory
        self._temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._dtype = dtype
        self.types = {"tokens": dtype, **TYPES}
        if with_encoder:
            self.types |= {"encoder": dtype, **ENCODER_TYPES}
        self._files: dict[str, IO[bytes]] = {
            name: (self._temporary / name).open("wb", buffering=1 << 18) for name in self.types
        }
        self.examples = self.tokens = 0
        self._reports: dict[int, SourceReport] = {}

    def add(self, source: int, chunk: Chunk) -> None:
        """Appends the examples of a chunk.

        Raises:
            UserError: an id does not fit the store's type.
        """
        limit = np.iinfo(self._dtype).max
        for ids in (chunk.input_ids, chunk.encoder_ids):
            if ids is not None and len(ids) and int(ids.max()) > limit:
                raise UserError(
                    f"data: {chunk.report.path}: token id {int(ids.max()):,} does not fit the store, which holds ids "
                    f"of a vocabulary up to {limit:,}; use the tokenizer that made the ids"
                )
        values: dict[str, Any] = {
            "tokens": chunk.input_ids,
            "mask": chunk.loss_mask,
            "lengths": chunk.lengths,
            "begins": chunk.begins,
            "source": np.full(len(chunk), source),
            "encoder": chunk.encoder_ids,
            "encoder_lengths": chunk.encoder_lengths,
        }
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(values[name], self.types[name]).data)
        self.examples += len(chunk)
        self.tokens += len(chunk.input_ids)
        reports = [self._reports[source]] if source in self._reports else []
        add_report(reports, 0, chunk.report)
        self._reports[source] = reports[0]

    def finish(self) -> None:
        """Puts the part in place."""
        for file in self._files.values():
            file.close()
        about = {
            "examples": self.examples,
            "tokens": self.tokens,
            "sizes": {name: (self._temporary / name).stat().st_size for name in self._files},
            "dtype": self._dtype.name,
            "reports": [[number, values_of(report)] for number, report in self._reports.items()],
        }
        (self._temporary / PART).write_text(json.dumps(about), encoding="utf-8")
        if self.directory.exists():  # another host was quicker with the same
            shutil.rmtree(self._temporary)
            return
        self._temporary.rename(self.directory)

    def abandon(self) -> None:
        """Removes what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


class Part:
    """A finished part, as columns.

    Raises:
        UserError: a file of it is missing or cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        about = json.loads((directory / PART).read_text(encoding="utf-8"))
        self.examples, self.tokens = int(about["examples"]), int(about["tokens"])
        self.types: dict[str, Any] = {"tokens": np.dtype(about["dtype"]), **TYPES}
        self.with_encoder = "encoder" in about["sizes"]
        if self.with_encoder:
            self.types |= {"encoder": np.dtype(about["dtype"]), **ENCODER_TYPES}
        self.reports = {int(number): report_of(values) for number, values in about["reports"]}
        for name, size in about["sizes"].items():
            file = directory / name
            actual = file.stat().st_size if file.is_file() else 0
            if actual != size:
                raise UserError(f"{file}: {actual:,} bytes, expected {size:,}; remove {directory} and start again")

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        yield from read_blocks(self.directory / name, np.dtype(self.types[name]))


def read_blocks(path: Path, dtype: np.dtype[Any], start: int = 0, stop: int | None = None) -> Iterator[NDArray[Any]]:
    """The elements [start, stop) of a file, in blocks; read and not mapped, so that nothing of it stays in memory."""
    with path.open("rb", buffering=0) as file:
        file.seek(start * dtype.itemsize)
        left = (path.stat().st_size // dtype.itemsize if stop is None else stop) - start
        while left:
            block = np.fromfile(file, dtype, min(left, BLOCK))
            if not len(block):
                raise UserError(f"{path}: was cut short while it was read; copy it again")
            yield block
            left -= len(block)


class InMemory:
    """Chunks in memory, with the number of the source of each, as columns."""

    def __init__(self, chunks: Sequence[tuple[int, Chunk]], with_encoder: bool = False) -> None:
        self._chunks, self.with_encoder = chunks, with_encoder
        self.examples = sum(len(chunk) for _, chunk in chunks)

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        fields = {"tokens": "input_ids", "mask": "loss_mask", "encoder": "encoder_ids"}
        for number, chunk in self._chunks:
            if name == "source":
                yield np.full(len(chunk), number, np.int32)
            else:
                yield getattr(chunk, fields.get(name, name))


class Digests:
    """Counts and sums over all columns, formed while they are written."""

    def __init__(self) -> None:
        self.contents = hashlib.sha256()  # as Examples.digest has it
        self._as_source: Any = None
        self.largest, self.trained, self.tokens, self.documents = -1, 0, 0, 0

    def see(self, name: str, block: NDArray[Any]) -> None:
        """One block of a column; the columns come in the order of `Examples.digest`."""
        if name in ("tokens", "encoder"):
            self.largest = max(self.largest, int(block.max())) if len(block) else self.largest
            self.tokens += len(block) if name == "tokens" else 0
            block = block.astype(np.int32, copy=False)
        elif name == "mask":
            self.trained += int(np.count_nonzero(block))
        elif name == "begins":
            self.documents += int(np.count_nonzero(block))
            return
        elif name in ("lengths", "encoder_lengths"):
            return  # their offsets are part of the digest
        self.update(np.ascontiguousarray(block).data, other=bytes(block.nbytes) if name == "source" else None)

    def update(self, data: Any, other: bytes | None = None) -> None:
        """Adds to the digest; `other`: what a run sees instead to which all of it is one source, number 0."""
        if other is not None and self._as_source is None:
            self._as_source = self.contents.copy()
        self.contents.update(data)
        if self._as_source is not None:
            self._as_source.update(data if other is None else other)

    @property
    def as_source(self) -> str:
        """The digest for a run to which all of it is one source."""
        return (self.contents if self._as_source is None else self._as_source).hexdigest()


def total_reports(parts: Sequence[Mapping[int, SourceReport]]) -> tuple[SourceReport, ...]:
    """The reports of all parts, added up by source."""
    reports: list[SourceReport] = []
    for part in parts:
        for number, report in sorted(part.items()):
            add_report(reports, number, report)
    return tuple(reports)
