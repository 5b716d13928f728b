"""Text files, compressed or not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO

from jaxlm.errors import UserError
from jaxlm.remote import Location, reading

# Endings of compressed files, as pyarrow calls what reads them.
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}


def inner_ending(file: Location) -> str:
    """The ending that tells the format: for data.jsonl.gz, .jsonl."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return inner.suffix.lower()


@contextlib.contextmanager
def open_text(file: Location, key: str, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file, compressed or not, as a stream.

    Args:
        file: the file.
        key: the key of the configuration that names it, for messages.
        newline: as for `open`.

    Raises:
        UserError: when it is not compressed as its ending says, or cut short.
    """
    kind = COMPRESSED.get(file.suffix.lower())
    if kind is None:
        with reading(file, key), file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
        return
    import lzma
    import zlib

    # What goes wrong on the way to the bytes is an OSError with a number, or one of the storage's own package; what is
    # wrong with the bytes is one of these, or an OSError without a number.
    broken = (EOFError, lzma.LZMAError, zlib.error, ValueError)
    try:
        with (
            reading(file, key),
            file.open("rb") as bare,
            _decompressed(bare, kind) as raw,
            io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as stream,
        ):
            try:
                yield stream
            except OSError as error:
                if error.errno is not None or isinstance(error, TimeoutError):
                    raise
                raise ValueError(str(error)) from None
    except (UnicodeDecodeError, UserError):
        raise
    except broken as error:
        why = str(error)
        is_short = isinstance(error, EOFError) or why.startswith("Truncated")
        problem = "it is cut short" if is_short else f"{why}; it is damaged, or its ending is another's"
        raise UserError(f"{key}: {file} cannot be decompressed as {kind}: {problem}; copy it again") from None


def _decompressed(bare: IO[bytes], kind: str) -> IO[bytes]:
    # The readers of compressed files are imported for the files that need them.
    if kind == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=bare, mode="rb")  # type: ignore[return-value]
    if kind == "bz2":
        import bz2

        return bz2.open(bare)
    if kind == "xz":
        import lzma

        return lzma.open(bare)
    import pyarrow

    # Python has its own reader from 3.14 on; pyarrow is here on all of them, and tells a file that is cut short.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(bare, mode="r"), kind))
