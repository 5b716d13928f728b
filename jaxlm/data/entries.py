"""The entries of a file, whatever they are: records, prompts, texts.

JSON arrays, JSON lines, CSV, Parquet and text, all but Parquet also compressed (.gz, .zst, .bz2, .xz). Everything but a
JSON array is streamed. Whoever reads decides what becomes of an entry that is broken.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxlm.data.compressed import open_text
from jaxlm.errors import UserError
from jaxlm.jsontext import parse, parse_at

# Lists of objects in one record, not of records.
RECORD_LISTS = ("messages", "conversations", "conversation", "tools", "history")
_SHAPES = "the file must be an array of records, or one record a line"


class Entry(NamedTuple):
    """One entry of a file.

    Args:
        name: "file:number", the number counting entries from 1, or lines where entries are lines.
        value: a row of a table as a dict, a line of text as {"text": …}, else whatever JSON has there.
        problem: what is wrong with it, in place of a value.
    """

    name: str
    value: Any = None
    problem: str | None = None


def read_entries(
    file: Path, kind: str, *, key: str, documents: str = "line", delimiter: str | None = None, strict: bool = True
) -> Iterator[Entry]:
    """The entries of one file, in order.

    Args:
        file: the file.
        kind: json, jsonl, csv, parquet or text.
        key: the key of the configuration that names the file, for messages.
        documents: for text: "line", or "file" for all of it as one entry.
        delimiter: what divides the columns of a CSV file; None: what its header says.
        strict: for CSV: quotation marks must stand around whole fields.

    Raises:
        UserError: for a file that is broken as a whole, or that cannot be read.
    """
    try:
        if kind == "parquet":
            yield from _read_parquet(file, key)
            return
        with open_text(file, key, newline="" if kind == "csv" else None) as stream:
            if kind == "json":
                yield from _read_json(file, stream, key)
            elif kind == "jsonl":
                yield from _json_lines(file, stream)
            elif kind == "csv":
                yield from _read_csv(file, stream, key, delimiter, strict)
            elif documents == "file":
                text = stream.read()
                if text.strip():
                    yield Entry(f"{file}:1", {"text": text})
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield Entry(f"{file}:{number}", {"text": line.rstrip("\r\n")})
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not UTF-8 ({error}); convert it, e.g. with iconv") from None


def refuse_twins(file: Path, names: Sequence[str], key: str) -> None:
    """Raises UserError when two columns have one name."""
    twice = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if twice is not None:
        raise UserError(f"{key}: {file} has two columns of the name {twice!r}; rename or remove one")


def _read_json(file: Path, stream: IO[str], key: str) -> Iterator[Entry]:
    blank, first = _first_line(stream)
    if first.lstrip().startswith("{") and (value := _value(first)) is not None:
        # JSON lines under the ending .json are common; they are streamed.
        more, second = _first_line(stream)
        if second:
            yield from _json_lines(file, itertools.chain(["\n"] * blank, [first], ["\n"] * more, [second], stream))
            return
        values: Any = value
    else:
        text = "\n" * blank + first + stream.read()
        if not text.strip():
            return
        try:
            values = parse(text)
        except ValueError as error:
            raise _broken(file, text, error, key) from None
    if isinstance(values, dict):
        values = _records_within(file, values, key)
    if not isinstance(values, list):
        raise UserError(f"{key}: {file} must hold an array of records, found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield Entry(f"{file}:{number}", value)


def _first_line(stream: IO[str]) -> tuple[int, str]:
    """The number of blank lines that come, and the line behind them; empty at the end."""
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


def _explained(error: ValueError) -> str:
    """What the parser says; more about a comma too many, the most common fault of files written by hand."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before, behind = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg == "Extra data" and behind.startswith(","):
        return "a comma stands behind the record; take it away"
    if before.endswith(",") and behind[:1] in ("]", "}"):
        return f"nothing stands between a comma and {behind[0]!r}; take the comma away"
    return error.msg


def _broken(file: Path, text: str, error: ValueError, key: str) -> UserError:
    """What is wrong with a JSON file, and in which of its records."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{key}: {file}:{error.lineno}: broken JSON: {_explained(error)} ({_SHAPES})")
    begin, gap = text.find("["), re.compile(r"[\s,]*")
    if begin >= 0 and not text[:begin].strip():
        at = begin + 1
        for number in itertools.count(1):
            at = gap.match(text, at).end()  # type: ignore[union-attr]
            try:
                _, at = parse_at(text, at)
            except ValueError as inner:
                return UserError(f"{key}: {file}:{number}: JSON that cannot be read: {inner}")
    return UserError(f"{key}: {file}: JSON that cannot be read: {error}")


def _records_within(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    """The records of {"data": [record, ...]}, or the object itself as the only record."""
    if any(name in content for name in RECORD_LISTS):
        return [content]
    lists = {name: v for name, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(lists) == 1:
        return list(next(iter(lists.values())))
    if lists:
        name = next(iter(lists))
        raise UserError(
            f"{key}: {file} holds several lists of records ({', '.join(lists)}); write the one that is meant to a file "
            f"of its own, e.g. jq '.{name}' {file.name} > {name}.json"
        )
    columns = [name for name, value in content.items() if isinstance(value, (list, dict))]
    if columns and len(columns) == len(content):
        raise UserError(
            f"{key}: {file} holds one object ({', '.join(columns[:5])}{', …' if len(columns) > 5 else ''}), not a list "
            'of records; write [{"instruction": …}, …], with pandas to_json(FILE, orient="records")'
        )
    return [content]


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield Entry(f"{file}:{number}", parse(line))
        except ValueError as error:
            yield Entry(f"{file}:{number}", problem=f"broken JSON: {_explained(error)} ({_SHAPES})")


def _read_csv(file: Path, stream: IO[str], key: str, delimiter: str | None, strict: bool) -> Iterator[Entry]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    header, lead = stream.readline(), 0
    if named := re.fullmatch(r"sep=(.)\s*", header):  # Excel's own first line
        header, lead, delimiter = stream.readline(), 1, named.group(1)
    delimiter = delimiter or _delimiter(header)
    rows = csv.DictReader(itertools.chain([header], stream), strict=strict, delimiter=delimiter)
    try:
        names = list(rows.fieldnames or ())
        refuse_twins(file, names, key)
        for number, row in enumerate(rows, 1):
            name = f"{file}:{number}"
            if None in row or None in row.values():
                problem = (
                    f"the record ending at line {rows.line_num + lead} does not have the header's {len(names)} "
                    f"columns; is a quotation mark or {delimiter!r} missing?"
                )
                yield Entry(name, problem=problem)
            else:
                yield Entry(name, dict(row))
    except csv.Error as error:
        # DictReader keeps the number of the last good line, its reader that of this one.
        raise UserError(f"{key}: {file}: line {rows.reader.line_num + lead}: broken CSV: {error}") from None


def _delimiter(header: str) -> str:
    """What divides the columns: a comma; where the header has none, a tab or semicolon, as spreadsheets write them."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((sign for sign in (",", "\t", ";") if sign in bare), ",")


def _read_parquet(file: Path, key: str) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            refuse_twins(file, table.schema_arrow.names, key)
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Entry(f"{file}:{number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"{key}: {file} is not a readable Parquet file: {error}") from None
