"""manifest.json: sums of every file in a directory, made while the files are written.

Files are hashed in pieces of 64 MiB by several threads, each piece as soon as it stands in the file, so that the pages
are still in memory. The manifest names its algorithm; those of version 1 have SHA-256, and are checked by it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsonfields import check_format
from jaxlm.jsontext import read_object
from jaxlm.sums import ALGORITHMS, FAST, SHA256

MANIFEST = "manifest.json"
PIECE_BYTES = 64 << 20
FORMAT, VERSION = "jaxlm-manifest", 2
# Read at a time.
_READ_BYTES = 1 << 20


def _num_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _piece_digest(path: Path, piece: int, piece_bytes: int, sync: bool, algorithm: str = FAST) -> str:
    """The sum of one piece of a file, the last one may be shorter, as hexadecimal digits."""
    digest = ALGORITHMS[algorithm]()
    buffer = bytearray(min(_READ_BYTES, piece_bytes))
    view = memoryview(buffer)
    left = piece_bytes
    with path.open("rb", buffering=0) as handle:
        handle.seek(piece * piece_bytes)
        while left and (got := handle.readinto(view[: min(left, len(view))])):
            digest.update(view[:got])
            left -= got
        if sync:
            # Here rather than at the end: the disk works while other threads compute.
            os.fsync(handle.fileno())
    return digest.hexdigest()


class Hasher:
    """Hashes the files of a directory while they are written, and writes the manifest at the end.

    Use it as a context manager, around the writing; the threads end with the block.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(_num_threads(), thread_name_prefix="hash")
        self._pieces: dict[Path, list[Future[str]]] = {}
        self._sizes: dict[Path, int] = {}  # of the files that are complete

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def final(self, path: Path, end: int | None) -> None:
        """Tells that the first `end` bytes of a file will not change any more; None: that it is complete."""
        pieces = self._pieces.setdefault(path, [])
        size = path.stat().st_size if end is None else end
        while (len(pieces) + 1) * PIECE_BYTES <= size:
            pieces.append(self._pool.submit(_piece_digest, path, len(pieces), PIECE_BYTES, True))
        if end is None:
            if len(pieces) * PIECE_BYTES < size or not pieces:
                pieces.append(self._pool.submit(_piece_digest, path, len(pieces), PIECE_BYTES, True))
            self._sizes[path] = size

    def finish(self) -> dict[str, int]:
        """Hashes what is left and writes manifest.json. Returns the bytes of every file but that, by relative name."""
        files = _files(self._directory)
        for path in files:
            if path not in self._sizes:
                self.final(path, None)
        names = {path: path.relative_to(self._directory).as_posix() for path in files}
        entries = {
            names[path]: {"bytes": self._sizes[path], "sums": [piece.result() for piece in self._pieces[path]]}
            for path in files
        }
        head = {"format": FORMAT, "version": VERSION, "algorithm": FAST, "piece_bytes": PIECE_BYTES}
        content = head | {"files": entries}
        (self._directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return {names[path]: self._sizes[path] for path in files}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of manifest.json, checked, and as version 2 has it.

    Raises:
        UserError: it is missing, is not a manifest, names an unknown algorithm or a file outside the directory.
    """
    where = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not where.is_file():
        raise UserError(
            f"{directory}: has no {MANIFEST}, so its files cannot be checked; jaxlm leaves one in what it writes. "
            "To compare two models: convert verify A B"
        )
    content = read_object(where)
    piece_bytes, files = content.get("piece_bytes"), content.get("files")
    check_format(content, FORMAT, VERSION, where)
    if type(piece_bytes) is not int or piece_bytes < 1 or not isinstance(files, dict):
        raise UserError(f"{where}: 'piece_bytes' or 'files' is missing; copy the file again")
    if content.get("version") == 1:
        content["algorithm"] = SHA256
    if content.get("algorithm") not in list(ALGORITHMS):
        raise UserError(
            f"{where}: 'algorithm' is {content.get('algorithm')!r}; known are {', '.join(ALGORITHMS)}: use a newer "
            "jaxlm, or copy the file again"
        )
    for name, entry in files.items():
        if content.get("version") == 1 and isinstance(entry, dict):
            entry["sums"] = entry.pop(SHA256, None)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in ("", "."):
            raise UserError(f"{where}: names {name!r}, which lies outside {directory}")
        digests = entry.get("sums") if isinstance(entry, dict) else None
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if type(size) is not int or not isinstance(digests, list) or len(digests) != max(1, -(-size // piece_bytes)):
            raise UserError(f"{where}: the entry of {name!r} has not one digest for each piece; copy the file again")
    return content


def check_manifest(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Compares every file with the manifest.

    Yields:
        name, what is wrong with it: changed bytes, another length, missing (None: nothing).

    Raises:
        UserError: as `read_manifest`.
    """
    content = read_manifest(directory)
    piece_bytes: int = content["piece_bytes"]
    algorithm: str = content["algorithm"]
    pool = ThreadPoolExecutor(_num_threads())
    try:
        for name, entry in content["files"].items():
            path = directory / name
            if not path.is_file():
                yield name, "is missing"
                continue
            size = path.stat().st_size
            if size != entry["bytes"]:
                yield name, f"has {size} bytes, {entry['bytes']} were written"
                continue
            found = [
                pool.submit(_piece_digest, path, piece, piece_bytes, False, algorithm)
                for piece in range(len(entry["sums"]))
            ]
            bad = [piece for piece, digest in enumerate(found) if digest.result() != entry["sums"][piece]]
            yield name, _describe_pieces(bad, piece_bytes, size) if bad else None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def files_not_listed(directory: Path) -> list[str]:
    """Files that the manifest does not name: they were added later."""
    listed = read_manifest(directory)["files"]
    names = [path.relative_to(directory).as_posix() for path in _files(directory)]
    return [name for name in names if name not in listed]


def _describe_pieces(bad: list[int], piece_bytes: int, size: int) -> str:
    first = bad[0]
    places = f"bytes {first * piece_bytes} to {min(size, (first + 1) * piece_bytes)}"
    return f"has changed ({places}{f' and {len(bad) - 1} more pieces' if len(bad) > 1 else ''})"
