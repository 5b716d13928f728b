"""Reading records: one dict per record, with a name for error messages.

Supported: JSON arrays, JSON lines, CSV, Parquet, text, folders and globs of these, and directories written by
Hugging Face `datasets` (save_to_disk). Everything but a JSON array is streamed.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import SourceConfig
from jaxlm.errors import UserError

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


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
    return itertools.islice(_all_records(source), source.limit)


def check_source(source: SourceConfig) -> None:
    """What is wrong with a source and can be said without reading it.

    Raises:
        UserError: nothing is there, of an unknown kind, or not readable.
    """
    if source.limit is not None and source.limit < 1:
        raise UserError(f"data: limit of {source.path} is {source.limit}; it must be at least 1")
    root = Path(source.path).expanduser()
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
    root = Path(source.path).expanduser()
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
        found = [p for p in found if p.suffix.lower() in FORMATS]
    if not found:
        raise UserError(f"data: the folder {source.path} holds no file of a known kind: {', '.join(sorted(FORMATS))}")
    return found


def _format(file: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    kind = FORMATS.get(file.suffix.lower())
    if kind is None:
        raise UserError(
            f"data: {file}: the ending {file.suffix!r} is unknown; "
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


def _record(file: Path, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            f"data: {file}:{number}: a record must be an object with named fields, found {type(value).__name__}"
        )
    return Record(f"{file}:{number}", value)


def _read_json(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as stream:
        first = next((char for line in stream for char in line if not char.isspace()), "")
    if first == "{":  # JSON lines under the ending .json are common
        yield from _read_jsonl(file)
        return
    if first == "":
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"data: {file}:{error.lineno}: broken JSON: {error.msg}") from None
    if not isinstance(values, list):
        raise UserError(f"data: {file} must hold an array of records, found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _record(file, number, value)


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data: {file}:{number}: broken JSON: {error.msg} "
                    "(the file must be an array of records, or one record a line)"
                ) from None
            yield _record(file, number, value)


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    raise UserError(
                        f"data: {file}: the record ending at line {rows.line_num} does not have the header's {columns} "
                        "columns; is a quotation mark or comma missing?"
                    )
                yield Record(f"{file}:{number}", dict(row))
        except csv.Error as error:
            raise UserError(f"data: {file}: line {rows.line_num}: broken CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{file}:{number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is not a readable Parquet file: {error}") from None


def _read_text(file: Path, documents: str) -> Iterator[Record]:
    if documents == "file":
        text = file.read_text(encoding="utf-8-sig")
        if text.strip():
            yield Record(f"{file}:1", {"text": text})
        return
    with file.open(encoding="utf-8-sig") as stream:
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
        yield Record(f"{source.path}:{number}", dict(value))
