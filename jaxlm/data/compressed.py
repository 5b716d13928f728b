"""Text files, compressed or not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxlm.errors import UserError

# Endings of compressed files, as pyarrow calls what reads them.
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}


def inner_ending(file: Path) -> str:
    """The ending that tells the format: for data.jsonl.gz, .jsonl."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return inner.suffix.lower()


@contextlib.contextmanager
def open_text(file: Path, key: str, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file, compressed or not.

    Args:
        file: the file.
        key: the key of the configuration that names it, for messages.
        newline: as for `open`.

    Raises:
        UserError: when it is not compressed as its ending says, or cut short.
    """
    kind = COMPRESSED.get(file.suffix.lower())
    if kind is None:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
        return
    import lzma
    import zlib

    try:
        with _decompressed(file, kind) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as stream:
            yield stream
    except (UnicodeDecodeError, UserError):
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # it is missing, or may not be read
        raise UserError(
            f"{key}: {file} cannot be decompressed as {kind} ({error}); copy it again, or correct its ending"
        ) from None


def _decompressed(file: Path, kind: str) -> IO[bytes]:
    # The readers of compressed files are imported for the files that need them.
    if kind == "gzip":
        import gzip

        return gzip.open(file)  # type: ignore[return-value]
    if kind == "bz2":
        import bz2

        return bz2.open(file)
    if kind == "xz":
        import lzma

        return lzma.open(file)
    import pyarrow

    # Python has its own reader from 3.14 on; pyarrow is here on all of them.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), kind))
