"""A store on disk: written from columns in one pass, opened memory-mapped.

    tokens.bin, tokens.idx     Megatron-Core's indexed dataset: a sequence is an example, a document a record
    mask.bin                   u8 [tokens]: 1 where the token is a target
    source.bin                 i32 [examples]: which source each came from
    offsets.bin                i64 [examples + 1]: the lengths of the index summed up, so that nobody has to
    encoder.bin, encoder.idx, encoder_offsets.bin      what an encoder reads, where there is one
    manifest.json              counts, reports, tokenizer, checksums

Modality ids are no part of it: they follow from the ids (`BatchSource`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.encoding import Example
from jaxlm.data.store.columns import BLOCK, Columns, Digests, read_blocks
from jaxlm.data.store.manifest import MANIFEST, FileInfo, Manifest, read_manifest, write_manifest
from jaxlm.data.store.megatron import read_index, write_index
from jaxlm.errors import UserError

AGAIN = "copy the store again, or remove it and have it made anew"


class StoredTokens:
    """The examples of a store; attributes as `jaxlm.data.examples.Examples`. Pickled, it is its path.

    Args:
        directory: the store.
        as_source: all of it is one source, whatever sources it was made of.

    Raises:
        UserError: files that are missing, cut short, or do not belong together.
    """

    def __init__(self, directory: Path, as_source: bool = False) -> None:
        self.directory, self._as_source = directory, as_source
        self.manifest = manifest = read_manifest(directory)
        self._maps: list[mmap.mmap] = []
        for name, info in manifest.files.items():
            file = directory / name
            if not file.is_file():
                raise UserError(f"{file}: is missing; {AGAIN}")
            if file.stat().st_size != info.bytes:
                raise UserError(f"{file}: {file.stat().st_size:,} bytes, its manifest says {info.bytes:,}; {AGAIN}")
        dtype = np.dtype(manifest.dtype)
        self.input_ids = self._mapped("tokens.bin", dtype)
        self.loss_mask: NDArray[np.bool_] = self._mapped("mask.bin", np.bool_)
        self.source: NDArray[np.int32] = self._mapped("source.bin", "<i4")
        self.offsets: NDArray[np.int64] = self._mapped("offsets.bin", "<i8")
        self._documents = self._checked("tokens", self.offsets, manifest.tokens)
        self.encoder_ids: NDArray[Any] | None = None
        self.encoder_offsets: NDArray[np.int64] | None = None
        if manifest.encoder_tokens is not None:
            self.encoder_ids = self._mapped("encoder.bin", dtype)
            self.encoder_offsets = self._mapped("encoder_offsets.bin", "<i8")
            self._checked("encoder", self.encoder_offsets, manifest.encoder_tokens)
        if len(self.loss_mask) != manifest.tokens or len(self.source) != manifest.examples:
            raise UserError(f"{directory}: mask.bin or source.bin is of another store; {AGAIN}")
        if as_source:
            self.source = np.broadcast_to(np.int32(0), len(self.source))
        self.release()

    def _mapped(self, name: str, dtype: Any) -> NDArray[Any]:
        path = self.directory / name
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return np.zeros(0, dtype)
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype)

    def _checked(self, name: str, offsets: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """The documents of an index that agrees with its offsets."""
        index = read_index(self.directory / f"{name}.idx")
        if index.dtype != np.dtype(self.manifest.dtype) or len(offsets) != len(index.lengths) + 1:
            raise UserError(f"{self.directory / name}.idx: is of another store; {AGAIN}")
        for first in range(0, len(index.lengths), BLOCK):
            stop = min(first + BLOCK, len(index.lengths))
            if (np.diff(offsets[first : stop + 1]) != index.lengths[first:stop]).any():
                raise UserError(f"{self.directory / name}.idx and its offsets differ; {AGAIN}")
        if len(index.lengths) != self.manifest.examples or index.tokens != tokens or int(offsets[0]) != 0:
            raise UserError(
                f"{self.directory / name}.idx: {index.tokens:,} tokens in {len(index.lengths):,} examples, the "
                f"manifest says {tokens:,} in {self.manifest.examples:,}; {AGAIN}"
            )
        return index.documents

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTokens, (self.directory, self._as_source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        part = slice(self.offsets[index], self.offsets[index + 1])
        source = None
        if self.encoder_ids is not None and self.encoder_offsets is not None:
            source = self.encoder_ids[self.encoder_offsets[index] : self.encoder_offsets[index + 1]].astype(np.int32)
        return Example(self.input_ids[part].astype(np.int32), self.loss_mask[part], encoder_ids=source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def record(self) -> NDArray[np.int64]:
        """int64 [examples], which record each belongs to; made anew, as only a split asks for it."""
        return np.repeat(np.arange(len(self._documents) - 1), np.diff(self._documents))

    def digest(self) -> str:
        """SHA-256 of the contents, as it was when they were written."""
        return self.manifest.digest_as_source if self._as_source else self.manifest.digest

    def release(self) -> None:
        """Gives the pages that were read back to the system, so that a store never fills a process's memory."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Reads everything and compares the checksums.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, info in self.manifest.files.items():
            digest = hashlib.sha256()
            for block in read_blocks(self.directory / name, np.dtype(np.uint8)):
                digest.update(block.data)
            if digest.hexdigest() != info.sha256:
                raise UserError(f"{self.directory / name}: differs from what was written; {AGAIN}")


class Selected:
    """Some examples of tokens, as columns.

    Args:
        tokens: examples in memory or stored.
        keep: bool [examples].
    """

    def __init__(self, tokens: Any, keep: NDArray[np.bool_]) -> None:
        self._tokens, self._keep = tokens, keep
        self.examples = int(keep.sum())
        self.with_encoder = tokens.encoder_ids is not None

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        tokens = self._tokens
        if name in ("lengths", "encoder_lengths"):
            offsets = tokens.offsets if name == "lengths" else tokens.encoder_offsets
            yield np.diff(offsets)[self._keep].astype(np.int32)
        elif name == "source":
            yield tokens.source[self._keep]
        elif name == "begins":
            record = tokens.record[self._keep]
            yield np.append(np.ones(min(1, len(record)), np.bool_), np.diff(record) != 0)
        else:
            array = {"tokens": tokens.input_ids, "mask": tokens.loss_mask, "encoder": tokens.encoder_ids}[name]
            offsets = tokens.encoder_offsets if name == "encoder" else tokens.offsets
            borders = np.flatnonzero(np.diff(np.concatenate([[False], self._keep, [False]]).astype(np.int8)))
            for first, last in borders.reshape(-1, 2):
                begin, end = int(offsets[first]), int(offsets[last])
                for at in range(begin, end, BLOCK):
                    yield array[at : min(at + BLOCK, end)]
            tokens.release()


class _Output:
    """A file of a store, its checksum formed on the way."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self.name, self.size, self._digest = path.name, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Appends bytes."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        self._digest.update(view)
        self.size += view.nbytes
        written = view.nbytes
        while view.nbytes:
            view = view[self._file.write(view) :]
        return written

    def close(self) -> FileInfo:
        """Ends the file, on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        return FileInfo(self.size, self._digest.hexdigest())


def write_store(
    directory: Path,
    parts: Sequence[Columns],
    dtype: np.dtype[Any],
    manifest: Callable[[Digests, NDArray[Any]], Manifest],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a store from the columns of its parts, in their order, with memory that does not grow with them.

    Args:
        directory: a new directory, put in place whole.
        parts: what it is to hold.
        dtype: of its tokens.
        manifest: makes the manifest, of the sums over all columns and the first tokens; files are added here.
        progress: called with the number of tokens or masks written.

    Raises:
        UserError: a part is damaged.
        OSError: the disk is full, for example; nothing is left behind.
    """
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, parts, dtype, manifest, progress)
        if directory.exists():
            shutil.rmtree(directory)  # without a manifest: of another version, or damaged
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    directory: Path,
    parts: Sequence[Columns],
    dtype: np.dtype[Any],
    manifest: Callable[[Digests, NDArray[Any]], Manifest],
    progress: Callable[[int], None] | None,
) -> None:
    sums = Digests()
    files: dict[str, FileInfo] = {}
    first = np.zeros(0, dtype)

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        return itertools.chain.from_iterable(part.column(name) for part in parts)

    def write(name: str, file: str, kind: Any) -> None:
        nonlocal first
        output = _Output(directory / file)
        for block in blocks(name):
            sums.see(name, block)
            if name == "tokens" and len(first) < 512:
                first = np.concatenate([first, block[: 512 - len(first)].astype(dtype)])
            output.write(np.ascontiguousarray(block, kind).data)
            if progress is not None and name in ("tokens", "mask"):
                progress(len(block))
        files[file] = output.close()

    def write_offsets(name: str, file: str) -> None:
        output = _Output(directory / file)
        for block in _offsets(blocks(name)):
            sums.update(block.data)
            output.write(block.data)
        files[file] = output.close()

    def write_idx(lengths: str, documents: Iterator[NDArray[np.int64]], count: int, file: str) -> None:
        output: Any = _Output(directory / file)
        counts = sum(part.examples for part in parts), count
        write_index(output, dtype, counts, blocks(lengths), blocks(lengths), documents)
        files[file] = output.close()

    # The order is that of Examples.digest.
    write("tokens", "tokens.bin", dtype)
    write("mask", "mask.bin", np.uint8)
    write_offsets("lengths", "offsets.bin")
    write("source", "source.bin", "<i4")
    for block in blocks("begins"):
        sums.see("begins", block)
    write_idx("lengths", _first_of_documents(blocks("begins")), sums.documents, "tokens.idx")
    if parts and parts[0].with_encoder:
        write("encoder", "encoder.bin", dtype)
        write_offsets("encoder_lengths", "encoder_offsets.bin")
        number = sum(part.examples for part in parts)
        each = (np.arange(at, min(at + BLOCK, number)) for at in range(0, number, BLOCK))
        write_idx("encoder_lengths", each, number, "encoder.idx")
    write_manifest(directory, dataclasses.replace(manifest(sums, first), files=files))
    for path in (directory / MANIFEST, directory):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _offsets(lengths: Iterator[NDArray[Any]]) -> Iterator[NDArray[np.int64]]:
    end = 0
    yield np.zeros(1, np.int64)
    for block in lengths:
        ends = end + np.cumsum(block, dtype=np.int64)
        end = int(ends[-1]) if len(ends) else end
        yield ends


def _first_of_documents(begins: Iterator[NDArray[Any]]) -> Iterator[NDArray[np.int64]]:
    at = 0
    for block in begins:
        yield at + np.flatnonzero(block)
        at += len(block)
