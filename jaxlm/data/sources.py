"""Reading records: one dict per record, with a name for error messages.

Supported: JSON arrays, JSON lines, CSV, Parquet, text, all but Parquet also compressed (.gz, .zst, .bz2, .xz); folders
and globs of these, and directories written by Hugging Face `datasets` (save_to_disk). Everything but a JSON array is
streamed.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxlm.config import SourceConfig
from jaxlm.errors import UserError
from jaxlm.jsontext import parse, parse_at
from jaxlm.locate import at_home

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
# Endings of compressed files, as pyarrow calls what reads them.
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
# Lists of objects in one record, not of records.
RECORD_LISTS = ("messages", "conversations", "conversation", "tools", "history")


@dataclass(frozen=True)
class Record:
    """One record. `name` is "file:number", the number counting records from 1, or lines where records are lines."""

    name: str
    data: dict[str, Any]


def read_records(source: SourceConfig) -> Iterator[Record]:
    """The records of a source in order, at most `source.limit`.

    Raises:
        UserError: nothing found, an empty file, broken content (with the place), an unknown format.
    """
    if source.limit is not None and source.limit < 1:
        raise UserError(f"data: limit of {source.path} is {source.limit}; it must be at least 1")
    return itertools.islice(_all_records(source), None if source.limit is None else min(source.limit, sys.maxsize))


def check_source(source: SourceConfig) -> None:
    """What is wrong with a source and can be said without reading it.

    Raises:
        UserError: nothing is there, of an unknown kind, or not readable.
    """
    if source.limit is not None and source.limit < 1:
        raise UserError(f"data: limit of {source.path} is {source.limit}; it must be at least 1")
    root = at_home(source.path)
    if source.format == "hf" or (source.format == "auto" and _is_hf_directory(root)):
        if not _is_hf_directory(root):
            raise UserError(f"data: {source.path} is not a directory written by datasets' save_to_disk")
        return
    if source.split is not None:
        raise UserError(
            f"data: split is {source.split!r}, but {source.path} is not a directory written by datasets' save_to_disk"
        )
    for file in _files(root, source):
        _format(file, source)
        with file.open("rb"):  # OSError names it
            pass


def _all_records(source: SourceConfig) -> Iterator[Record]:
    root = at_home(source.path)
    if source.format == "hf" or (source.format == "auto" and _is_hf_directory(root)):
        yield from _read_hf(root, source)
        return
    if source.split is not None:
        raise UserError(
            f"data: split is {source.split!r}, but {source.path} is not a directory written by datasets' save_to_disk"
        )
    for file in _files(root, source):
        empty = True
        for record in _read_file(file, _format(file, source), source.documents):
            empty = False
            yield record
        if empty:
            raise UserError(f"data: {file} holds no records; remove it from the sources")


def _is_hf_directory(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _files(root: Path, source: SourceConfig) -> list[Path]:
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    else:
        found = sorted(p for name in glob.glob(str(root), recursive=True) if (p := Path(name)).is_file())  # noqa: PTH207 (absolute patterns)
        if not found:
            raise UserError(f"data: {source.path} does not exist (paths are relative to the working directory)")
        return found
    if source.format == "auto":
        found = [p for p in found if _ending(p) in FORMATS]
    if not found:
        raise UserError(f"data: the folder {source.path} holds no file of a known kind: {', '.join(sorted(FORMATS))}")
    return found


def _ending(file: Path) -> str:
    """The ending that tells the format: of data.jsonl.gz, .jsonl."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return inner.suffix.lower()


def _format(file: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    kind = FORMATS.get(_ending(file))
    if kind is None:
        raise UserError(
            f"data: {file}: the ending {_ending(file) or file.suffix!r} is unknown; "
            "set format to one of json, jsonl, csv, parquet, text, hf"
        )
    return kind


def _read_file(file: Path, kind: str, documents: str) -> Iterator[Record]:
    try:
        if kind == "json":
            yield from _read_json(file)
        elif kind == "jsonl":
            yield from _read_jsonl(file)
        elif kind == "csv":
            yield from _read_csv(file)
        elif kind == "parquet":
            yield from _read_parquet(file)
        else:
            yield from _read_text(file, documents)
    except UnicodeDecodeError as error:
        raise UserError(f"data: {file} is not UTF-8 ({error}); convert it, e.g. with iconv") from None


@contextlib.contextmanager
def _open(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file, compressed or not.

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
    except UnicodeDecodeError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # it is missing, or may not be read
        raise UserError(
            f"data: {file} cannot be decompressed as {kind} ({error}); copy it again, or correct its ending"
        ) from None


def _decompressed(file: Path, kind: str) -> IO[bytes]:
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


def _record(file: Path, number: int, value: Any) -> Record:
    name = f"{file}:{number}"
    if not isinstance(value, dict):
        raise UserError(f"data: {name}: a record must be an object with named fields, found {type(value).__name__}")
    return Record(name, value)


def _clean(name: str, value: dict[str, Any]) -> Record:
    """A record of a binary format: bytes as the UTF-8 text that they are, NaN as null."""
    return Record(name, {column: _plain(name, column, item) for column, item in value.items()})


def _plain(name: str, column: str, value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise UserError(
                f"data: {name}: column {column!r} holds bytes that are no UTF-8 text; leave the column out, or write "
                "it as text"
            ) from None
    if isinstance(value, Mapping):
        return {key: _plain(name, column, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, column, item) for item in value]
    return value


def _read_json(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        blank, first = _first_line(stream)
        if first.lstrip().startswith("{") and (value := _value(first)) is not None:
            # JSON lines under the ending .json are common; they are streamed.
            more, second = _first_line(stream)
            if second:
                lines = itertools.chain(["\n"] * blank, [first], ["\n"] * more, [second], stream)
                yield from _json_lines(file, lines)
                return
            values: Any = value
        else:
            text = "\n" * blank + first + stream.read()
            if not text.strip():
                return
            try:
                values = parse(text)
            except ValueError as error:
                raise _broken(file, text, error) from None
    if isinstance(values, dict):
        values = records_within(file, values)
    if not isinstance(values, list):
        raise UserError(f"data: {file} must hold an array of records, found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _record(file, number, value)


def _first_line(stream: IO[str]) -> tuple[int, str]:
    """How many blank lines come, and the line behind them; empty at the end."""
    blank = 0
    for line in stream:
        if line.strip():
            return blank, line
        blank += 1
    return blank, ""


def _value(text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return None


def _said(error: ValueError) -> str:
    """What the parser says; more of a comma too many, the most common fault of files written by hand."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before, behind = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg == "Extra data" and behind.startswith(","):
        return "a comma stands behind the record; take it away"
    if before.endswith(",") and behind[:1] in ("]", "}"):
        return f"nothing stands between a comma and {behind[0]!r}; take the comma away"
    return error.msg


def _broken(file: Path, text: str, error: ValueError) -> UserError:
    """What is wrong with a JSON file, and in which of its records."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(
            f"data: {file}:{error.lineno}: broken JSON: {_said(error)} "
            "(the file must be an array of records, or one record a line)"
        )
    begin, gap = text.find("["), re.compile(r"[\s,]*")
    if begin >= 0 and not text[:begin].strip():
        at = begin + 1
        for number in itertools.count(1):
            at = gap.match(text, at).end()  # type: ignore[union-attr]
            try:
                _, at = parse_at(text, at)
            except ValueError as inner:
                return UserError(f"data: {file}:{number}: JSON that cannot be read: {inner}")
    return UserError(f"data: {file}: JSON that cannot be read: {error}")


def records_within(file: Path, content: dict[str, Any]) -> list[Any]:
    """The records of {"data": [record, ...]}, or the object itself as the only record."""
    if any(name in content for name in RECORD_LISTS):
        return [content]
    lists = {name: v for name, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(lists) == 1:
        return list(next(iter(lists.values())))
    if lists:
        name = next(iter(lists))
        raise UserError(
            f"data: {file} holds several lists of records ({', '.join(lists)}); write the one that is meant to a file "
            f"of its own, e.g. jq '.{name}' {file.name} > {name}.json"
        )
    columns = [name for name, value in content.items() if isinstance(value, (list, dict))]
    if columns and len(columns) == len(content):
        raise UserError(
            f"data: {file} holds one object ({', '.join(columns[:5])}{', …' if len(columns) > 5 else ''}), not a list "
            'of records; write [{"instruction": …}, …], with pandas to_json(FILE, orient="records")'
        )
    return [content]


def _read_jsonl(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        yield from _json_lines(file, stream)


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            raise UserError(
                f"data: {file}:{number}: broken JSON: {_said(error)} "
                "(the file must be an array of records, or one record a line)"
            ) from None
        yield _record(file, number, value)


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(file, newline="") as stream:
        header = stream.readline()
        lead, delimiter = 0, csv_delimiter(header)
        if named := re.fullmatch(r"sep=(.)\s*", header):  # Excel's own first line
            header, lead, delimiter = stream.readline(), 1, named.group(1)
        rows = csv.DictReader(itertools.chain([header], stream), strict=True, delimiter=delimiter)
        try:
            refuse_twins(file, rows.fieldnames or ())
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    raise UserError(
                        f"data: {file}: the record ending at line {rows.line_num + lead} does not have the header's "
                        f"{columns} columns; is a quotation mark or {delimiter!r} missing?"
                    )
                yield Record(f"{file}:{number}", dict(row))
        except csv.Error as error:
            raise UserError(f"data: {file}: line {rows.line_num + lead}: broken CSV: {error}") from None


def csv_delimiter(header: str) -> str:
    """What divides the columns: a comma; where the header has none, a tab or semicolon, as spreadsheets write them."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((sign for sign in (",", "\t", ";") if sign in bare), ",")


def refuse_twins(file: Path, names: Any) -> None:
    twice = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if twice is not None:
        raise UserError(f"data: {file} has two columns of the name {twice!r}; rename or remove one")


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            refuse_twins(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield _clean(f"{file}:{number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is not a readable Parquet file: {error}") from None


def _read_text(file: Path, documents: str) -> Iterator[Record]:
    with _open(file) as stream:
        if documents == "file":
            text = stream.read()
            if text.strip():
                yield Record(f"{file}:1", {"text": text})
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Record(f"{file}:{number}", {"text": line.rstrip("\r\n")})


def _read_hf(root: Path, source: SourceConfig) -> Iterator[Record]:
    if not _is_hf_directory(root):
        raise UserError(f"data: {source.path} is not a directory written by datasets' save_to_disk")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(root))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"data: {source.path} cannot be read as a data set: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            found = "is missing" if source.split is None else f"is {source.split!r}"
            raise UserError(f"data: split of {source.path} {found}; it has {', '.join(sorted(loaded))}")
        loaded = loaded[source.split]
    elif source.split is not None:
        raise UserError(f"data: split is {source.split!r}, but {source.path} holds one data set without splits")
    if len(loaded) == 0:
        raise UserError(f"data: {source.path} holds no records; remove it from the sources")
    for number, value in enumerate(loaded, 1):
        yield _clean(f"{source.path}:{number}", dict(value))
