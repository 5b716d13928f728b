"""Sums of files, made here only: which algorithms there are by their names in files, and what each is for.

A manifest tells whether files are still what was written: on the way something may have been cut, flipped or mixed up,
and nobody means harm (who changes a file on purpose can change the sum beside it too). XXH3 with 128 bits (Collet,
xxHash 0.8) finds that as surely as a cryptographic hash, at the speed of the memory instead of the disk's.
Sums that stand for an identity elsewhere, in runs, stores and formats, stay SHA-256, as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import xxhash


class Sum(Protocol):
    """A sum that is being formed, as hashlib's and xxhash's objects do; both let other threads run meanwhile."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


SHA256, FAST = "sha256", "xxh3_128"
ALGORITHMS: dict[str, Callable[[], Sum]] = {SHA256: hashlib.sha256, FAST: xxhash.xxh3_128}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, SHA256).hexdigest()
