"""The entries of a file, whatever they are: records, prompts, texts.

JSON arrays, JSON lines, CSV, Parquet and text, all but Parquet also compressed (.gz, .zst, .bz2, .xz). All but an
object that holds a list of records is streamed. Whoever reads decides what becomes of an entry that is broken.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from jaxlm.data.compressed import open_text
from jaxlm.errors import UserError
from jaxlm.jsontext import parse, parse_at
from jaxlm.remote import Location, reading

# Lists of objects in one record, not of records.
RECORD_LISTS = ("messages", "conversations", "conversation", "tools", "history")
_SPACE = " \t\r\n"
_SPACES = re.compile(rf"[{_SPACE}]*")
_BLOCK = 1 << 20  # characters of a JSON array that are read at a time
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
    file: Location, kind: str, *, key: str, documents: str = "line", delimiter: str | None = None, strict: bool = True
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


def refuse_twins(file: Location, names: Sequence[str], key: str) -> None:
    """Raises UserError when two columns have one name."""
    twice = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if twice is not None:
        raise UserError(f"{key}: {file} has two columns of the name {twice!r}; rename or remove one")


def _read_json(file: Location, stream: IO[str], key: str) -> Iterator[Entry]:
    lead = ""
    while (sign := stream.read(1)) and sign in _SPACE:
        lead += sign
    if sign == "[":
        yield from _json_array(file, lead + sign, stream, key)
        return
    blank, first = lead.count("\n"), sign + stream.readline()
    if sign == "{" and (value := _value(first)) is not None:
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
        except json.JSONDecodeError as error:
            raise _broken(file, error.lineno, error, key) from None
        except ValueError as error:
            raise UserError(f"{key}: {file}: JSON that cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{key}: {file} must hold an array of records, found {type(values).__name__}")
    for number, value in enumerate(_records_within(file, values, key), 1):
        yield Entry(f"{file}:{number}", value)


def _json_array(file: Location, text: str, stream: IO[str], key: str) -> Iterator[Entry]:
    """The values of an array, read by blocks: only the values that begin in a block, and one more, are in memory.

    Args:
        text: what has been read of the file: up to and with the opening bracket.
        stream: the rest.
    """
    at, lines = len(text), 0  # the next character of `text`, and the line breaks that stood before `text`
    at_end = False

    def more() -> None:
        nonlocal text, at, lines, at_end
        lines += text.count("\n", 0, at)
        # A value longer than a block is parsed again for each; blocks that grow with it keep that linear.
        block = stream.read(max(_BLOCK, len(text) - at))
        text, at, at_end = text[at:] + block, 0, not block

    def skip_space() -> str:
        """The next character that is not white space; empty at the end."""
        nonlocal at
        while True:
            at = _SPACES.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or at_end:
                return text[at : at + 1]
            more()

    def broken(error: ValueError, number: int) -> UserError:
        if isinstance(error, json.JSONDecodeError):
            return _broken(file, lines + error.lineno, error, key)
        return UserError(f"{key}: {file}:{number}: JSON that cannot be read: {error}")

    sign = skip_space()
    for number in itertools.count(1):
        if sign == "]" and number == 1:
            break
        while True:
            try:
                value, end = parse_at(text, at)
            except ValueError as error:
                if at_end or not _may_be_cut(error, text):
                    raise broken(error, number) from None
            else:
                if end < len(text) or at_end:  # at the end of a block a number may go on
                    at = end
                    break
            more()
        yield Entry(f"{file}:{number}", value)
        sign = skip_space()
        if sign == "]":
            break
        if sign != ",":
            raise broken(json.JSONDecodeError("Expecting ',' delimiter", text, at), number)
        at += 1
        if not (sign := skip_space()) or sign == "]":
            end_of_text = json.JSONDecodeError("Expecting value", text, at)
            explained = "nothing stands between a comma and ']'; take the comma away" if sign else None
            raise _broken(file, lines + end_of_text.lineno, end_of_text, key, explained)
    at += 1
    if skip_space():
        raise broken(json.JSONDecodeError("Extra data", text, at), number)


def _may_be_cut(error: ValueError, text: str) -> bool:
    """Whether JSON is broken only because the rest of it has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # A string is said to be unterminated where it begins; all else where it fails, at most a \\uXXXX before the end.
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


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


def _broken(
    file: Location, line: int, error: json.JSONDecodeError, key: str, explained: str | None = None
) -> UserError:
    """What is wrong with a JSON file, and in which line."""
    return UserError(f"{key}: {file}:{line}: broken JSON: {explained or _explained(error)} ({_SHAPES})")


def _records_within(file: Location, content: dict[str, Any], key: str) -> list[Any]:
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


def _json_lines(file: Location, lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield Entry(f"{file}:{number}", parse(line))
        except ValueError as error:
            yield Entry(f"{file}:{number}", problem=f"broken JSON: {_explained(error)} ({_SHAPES})")


def _read_csv(file: Location, stream: IO[str], key: str, delimiter: str | None, strict: bool) -> Iterator[Entry]:
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


def _read_parquet(file: Location, key: str) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with reading(file, key), file.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as table:
            refuse_twins(file, table.schema_arrow.names, key)
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Entry(f"{file}:{number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"{key}: {file} is not a readable Parquet file: {error}") from None
