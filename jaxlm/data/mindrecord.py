"""MindRecord, MindSpore's format of training data, read and written without MindSpore.

A data set is one file or several shards, each with an SQLite file beside it (`NAME.db`). A file is

    uint64 LE: length of the header │ header, JSON │ zeros up to header_size │ pages, each page_size apart

Pages are of two kinds. A BLOB page holds rows one after the other: uint64 LE length of the rest, then each field that
is an array, in the order of names, as 8 bytes BE length and content; a lone field has no length of its own. Integers
are compressed: 4 bytes BE count, 2 bits each for the width (1, 2, 4 or 8 bytes; four to a byte, the first in the
highest bits), then the numbers in these widths, LE. Floats stand as they are, LE. A RAW page holds for each row uint64
LE length and MessagePack of the fields that are no arrays, here only {"id": 0}, the number of the schema. The table
INDEXES says where each row is in both. (MindSpore 2.10, version "3.0" of the format.)

What SciMind trains on are the fields `input_ids`, `labels` (-100: not trained) and `molecular_mask`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import UserError

VERSION = "3.0"
HEADER_SIZE = 1 << 24
PAGE_SIZE = 1 << 25
IGNORED = -100  # label of a token that is not trained
SCIMIND_FIELDS = {"input_ids": "int32", "labels": "int32", "molecular_mask": "float32"}

_TYPES = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
_RAW_ROW = (5).to_bytes(8, "little") + b"\x81\xa2id\x00"  # {"id": 0}
_NAME = re.compile(r"\.mindrecord\d*$")
_MAX_HEADER = 1 << 28  # bytes of a header: MindSpore allows 128 MiB
_TABLES = (
    "CREATE TABLE INDEXES(  ROW_ID               INT  NOT NULL, PAGE_ID_RAW          INT  NOT NULL, "
    "PAGE_OFFSET_RAW      INT  NOT NULL, PAGE_OFFSET_RAW_END  INT  NOT NULL, ROW_GROUP_ID         INT  NOT NULL, "
    "PAGE_ID_BLOB         INT  NOT NULL, PAGE_OFFSET_BLOB     INT  NOT NULL, PAGE_OFFSET_BLOB_END INT  NOT NULL, "
    "PRIMARY KEY(ROW_ID))",
    "CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)",
)
_COLUMNS = "ROW_ID, ROW_GROUP_ID, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END"


# Reading --------------------------------------------------------------------------------------------------------------


def shards_of(file: Path) -> list[Path]:
    """All files of the data set that one of its files belongs to, in their order.

    Raises:
        UserError: it is not MindRecord, it was renamed, or a shard is missing.
    """
    names = _Header.read(file).names
    shards = [file.with_name(name) for name in names]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise UserError(
            f"{file}: belongs to a data set of {len(shards)} files, of which {missing.name} is missing; copy it too"
        )
    return shards


def has_own_name(path: Path) -> bool:
    """Whether a name is one of MindRecord's: NAME.mindrecord, for several shards with their number behind."""
    return _NAME.search(path.name) is not None


def named_files(folder: Path) -> list[Path]:
    """The files of a folder that are MindRecord by their names, in order."""
    return sorted(path for path in folder.glob("*.mindrecord*") if has_own_name(path) and path.is_file())


def mindrecord_files(path: Path) -> list[Path]:
    """The files of a data set: those that belong to a file, or of all data sets in a folder, in order.

    Raises:
        UserError: as `shards_of`; a folder without any.
    """
    if not path.is_dir():
        return shards_of(path)
    files: dict[Path, None] = {}
    for file in named_files(path):
        files |= {} if file in files else dict.fromkeys(shards_of(file))
    if not files:
        raise UserError(f"{path}: holds no file NAME.mindrecord")
    return list(files)


def count_rows(file: Path) -> int:
    """The number of rows of one file."""
    return _Header.read(file).num_rows


def is_mindrecord(file: Path) -> bool:
    """Whether a file begins as MindRecord does."""
    with file.open("rb") as stream:
        begin = stream.read(64)
    size = int.from_bytes(begin[:8], "little")
    return 2 < size < _MAX_HEADER and begin[8:9] == b"{"


def read_rows(file: Path, fields: Sequence[str] | None = None) -> Iterator[dict[str, NDArray[Any]]]:
    """The rows of one file in order, each field a [n] array.

    Args:
        file: one shard, with its index, `NAME.db`, beside it.
        fields: those that are wanted; None: all that are arrays of numbers.

    Raises:
        UserError: it is not MindRecord, it is damaged or cut short, its index is another file's or tells otherwise, or
            it has no such field.
    """
    header = _Header.read(file)
    wanted = tuple(header.numbers) if fields is None else tuple(fields)
    for name in wanted:
        if name not in header.numbers:
            raise UserError(
                f"{file}: has no array of numbers {name!r} of any length; it has {', '.join(header.numbers) or 'none'}"
            )
    size = file.stat().st_size
    with file.open("rb") as stream, contextlib.closing(_open_index(file)) as index:
        try:
            if size < header.end:
                raise _Damaged(f"it is cut short: {size:,} bytes of {header.end:,}")
            count, names = index.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0], _shard_names(index)
            if names != [file.name]:
                raise _Damaged(f"its index is that of {', '.join(map(str, names)) or 'no file'}")
            if count != header.num_rows:
                raise _Damaged(f"its index has {count:,} rows, the file {header.num_rows:,}")
            rows = iter(index.execute(f"SELECT {_COLUMNS} FROM INDEXES ORDER BY ROW_ID"))
            number = 0
            for page in header.pages:
                stream.seek(header.header_size + page.number * header.page_size)
                at = 0
                for _ in range(page.num_rows):
                    place = next(rows)
                    if place[:4] != (number, page.group, page.number, at) or type(place[4]) is not int:
                        raise _Damaged(f"its index has row {number:,} elsewhere than the file")
                    if not at < place[4] <= page.size:
                        raise _Damaged(f"row {number:,} is said to end outside of its page")
                    yield _read_row(stream.read(place[4] - at), header, wanted, number)
                    at, number = place[4], number + 1
                if at != page.size:
                    raise _Damaged(f"page {page.number} holds more than its {page.num_rows:,} rows")
        except _Damaged as error:
            raise UserError(f"{file}: {error}; copy {file.name} and {file.name}.db again") from None
        except (sqlite3.Error, UnicodeDecodeError) as error:  # names in a damaged index are no UTF-8
            raise UserError(f"{file}.db: is not an index of MindRecord ({error}); copy it again") from None


def read_scimind(file: Path, pad_id: int | None = None) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """The rows of one file as SciMind trains on them: input_ids [n], and loss_mask [n], trained where the label is one.

    A token's label is the token itself, since the model shifts them. What is not trained behind the last trained token,
    and is padding, is left off. Without `labels` everything is trained (SciMind's data set type "wiki").

    Args:
        file: one shard.
        pad_id: the tokenizer's padding beside 0, which is SciMind's.

    Raises:
        UserError: as `read_rows`; a row's labels are not its tokens, or an id is negative.
    """
    header = _Header.read(file)
    fields = [name for name in ("input_ids", "labels") if name == "input_ids" or name in header.fields]
    for number, row in enumerate(read_rows(file, fields), 1):
        ids, labels = row["input_ids"], row.get("labels")
        where = f"{file}:{number}"
        if ids.dtype.kind != "i" or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31):
            raise UserError(f"{where}: input_ids are not token ids")
        mask = np.ones(len(ids), np.bool_)
        if labels is not None:
            if len(labels) != len(ids):
                raise UserError(f"{where}: {len(ids)} input_ids, but {len(labels)} labels; it needs a label for each")
            mask = labels != IGNORED
            if not np.array_equal(labels[mask], ids[mask]):
                raise UserError(f"{where}: a label is neither its token nor {IGNORED}, as SciMind writes them")
            trained = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
            is_padding = np.isin(ids[trained:], [0] if pad_id is None else [0, pad_id])
            end = len(ids) - int(np.argmin(is_padding[::-1]) if not is_padding.all() else len(is_padding))
            ids, mask = ids[:end], mask[:end]
        mask[:1] = False  # nothing predicts it
        yield ids.astype(np.int32), mask


class _Damaged(Exception):
    """What is wrong with a file."""


@dataclass(frozen=True)
class _Page:
    """A BLOB page: its number, bytes in use, number of rows, and row group (its number among the BLOB pages)."""

    number: int
    size: int
    num_rows: int
    group: int


@dataclass(frozen=True)
class _Header:
    """What the header of a file says.

    Args:
        fields: the names of all arrays, in the order in which rows have them.
        numbers: name -> type of those that hold numbers, any number of them.
        pages: the BLOB pages, in the order of their rows.
        end: bytes of a complete file.
        names: the files of the data set.
    """

    header_size: int
    page_size: int
    fields: tuple[str, ...]
    numbers: dict[str, str]
    pages: tuple[_Page, ...]
    end: int
    names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return sum(page.num_rows for page in self.pages)

    @staticmethod
    def read(file: Path) -> _Header:
        if not is_mindrecord(file):
            raise UserError(f"{file}: is not a MindRecord file, or is cut short")
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            text = stream.read(size)
        try:
            content = json.loads(text)
            if len(text) != size or not isinstance(content, dict):
                raise _Damaged("its header is cut short")
            return _Header._of(content, file)
        except _Damaged as error:
            raise UserError(f"{file}: {error}; copy it again") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{file}: its header is not that of a MindRecord file; copy it again") from None

    @staticmethod
    def _of(content: dict[str, Any], file: Path) -> _Header:
        if content["version"] != VERSION:
            raise _Damaged(f"is MindRecord of version {content['version']!r}, expected {VERSION}; write it anew")
        names = tuple(_text(name) for name in content["shard_addresses"])
        shard = _number(content["shard_id"])
        if any(not name or "/" in name or "\\" in name for name in names) or len(set(names)) != len(names):
            raise _Damaged("its header names files that cannot be beside it")
        if shard >= len(names) or names[shard] != file.name:
            raise _Damaged(f"its header is that of {names[shard] if shard < len(names) else 'another file'}")
        if len(content["schema"]) != 1:
            raise _Damaged(f"has {len(content['schema'])} schemas, expected one; write it anew")
        schema, fields = content["schema"][0]["schema"], tuple(map(_text, content["schema"][0]["blob_fields"]))
        in_blobs = [name for name, kind in schema.items() if "shape" in kind or kind["type"] == "bytes"]
        if sorted(fields) != sorted(in_blobs) or not fields:
            raise _Damaged("its schema does not describe its arrays")
        for name, kind in schema.items():
            shape = kind.get("shape", [-1])
            is_known = kind["type"] in (*_TYPES, "bytes", "string") and kind.keys() <= {"type", "shape"}
            if not is_known or not shape or any(type(dim) is not int or dim < -1 or dim == 0 for dim in shape):
                raise _Damaged(f"its schema has {name} of a kind {kind}")
        numbers = {name: schema[name]["type"] for name in fields if schema[name].get("shape") == [-1]}
        header_size, page_size = _number(content["header_size"]), _number(content["page_size"])
        pages: list[_Page] = []
        num_rows = end = 0
        for page in content["page"]:
            number, size, group = (_number(page[key]) for key in ("page_id", "page_size", "page_type_id"))
            end = max(end, header_size + number * page_size + size)
            if page["page_type"] == "BLOB_DATA":
                first, last = _number(page["start_row_id"]), _number(page["end_row_id"])
                if first != num_rows or last < first or size > page_size or group != len(pages):
                    raise _Damaged("its pages do not follow one another")
                num_rows = last
                pages.append(_Page(number, size, last - first, group))
            elif page["page_type"] != "RAW_DATA":
                raise _Damaged(f"has pages of a kind {page['page_type']!r}")
        return _Header(header_size, page_size, fields, numbers, tuple(pages), end, names)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise _Damaged("its header has no number where one belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Damaged("its header has no name where one belongs")
    return value


def _open_index(file: Path) -> sqlite3.Connection:
    path = file.with_name(f"{file.name}.db")
    if not path.is_file():
        raise UserError(f"{file}: its index, {path.name}, is not beside it; copy it too")
    # Read only, without a journal: the data may lie on storage that cannot be written.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _shard_names(index: sqlite3.Connection) -> list[Any]:
    return [name for (name,) in index.execute("SELECT NAME FROM SHARD_NAME")]


def _read_row(data: bytes, header: _Header, wanted: Sequence[str], number: int) -> dict[str, NDArray[Any]]:
    """The wanted fields of a row.

    Args:
        data: the row: its length and its content.
        number: for messages.
    """
    if len(data) < 8 or int.from_bytes(data[:8], "little") != len(data) - 8:
        raise _Damaged(f"row {number:,} does not have the length that the index says")
    row, at = {}, 8
    for name in header.fields:
        if len(header.fields) == 1:
            end = len(data)
        else:
            end = at + 8 + int.from_bytes(data[at : at + 8], "big")
            at += 8
            if end > len(data):
                raise _Damaged(f"row {number:,} ends within {name}")
        if name in wanted:
            try:
                row[name] = _decoded(data[at:end], header.numbers[name])
            except ValueError as error:
                raise _Damaged(f"{name} of row {number:,} {error}") from None
        at = end
    if at != len(data):
        raise _Damaged(f"row {number:,} is longer than its fields")
    return row


def _decoded(data: bytes, kind: str) -> NDArray[Any]:
    """An array as a row holds it.

    Raises:
        ValueError: it is not one of this type.
    """
    dtype = np.dtype(_TYPES[kind])
    if dtype.kind == "f":
        if len(data) % dtype.itemsize:
            raise ValueError("has a length that its type cannot have")
        return np.frombuffer(data, dtype)
    count = int.from_bytes(data[:4], "big")
    begin = 4 + (count + 3) // 4
    if len(data) < max(4, begin):
        raise ValueError("is cut short")
    packed = np.frombuffer(data, np.uint8, begin - 4, 4)
    codes = (packed[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(-1)
    widths = np.left_shift(1, codes[:count].astype(np.int64))
    ends = np.cumsum(widths)
    if codes[count:].any() or begin + (int(ends[-1]) if count else 0) != len(data):
        raise ValueError("does not have the length that its numbers' widths say")
    body, values = np.frombuffer(data, np.uint8, -1, begin), np.zeros(count, np.int64)
    for code in range(4):
        which = np.flatnonzero(codes[:count] == code)
        width = 1 << code
        places = (ends[which] - width)[:, None] + np.arange(width)
        values[which] = np.ascontiguousarray(body[places]).view(f"<i{width}").reshape(-1)
    if dtype.itemsize == 4 and count and not -(1 << 31) <= int(values.min()) <= int(values.max()) < 1 << 31:
        raise ValueError(f"holds a number that is not of its type, {kind}")
    return values.astype(dtype)


# Writing --------------------------------------------------------------------------------------------------------------


def scimind_row(
    input_ids: NDArray[Any],
    loss_mask: NDArray[np.bool_],
    length: int,
    first_modality_id: int = 32000,
    pad_id: int = 0,
) -> dict[str, NDArray[Any]]:
    """An example as SciMind's preprocessing writes it.

    Args:
        input_ids: at most `length` tokens, bos first.
        loss_mask: which of them are trained.
        length: SciMind's seq_length + 1; shorter ones are padded.
        first_modality_id: ids from this one on are molecules and the like.
        pad_id: SciMind's 0.

    Returns:
        input_ids and labels int32 [length], molecular_mask float32 [length - 1] of what the model reads.
    """
    count = len(input_ids)
    if count > length:
        raise ValueError(f"{count} tokens in a row of {length}")
    ids, labels = np.full(length, pad_id, np.int32), np.full(length, IGNORED, np.int32)
    ids[:count] = input_ids
    labels[:count] = np.where(loss_mask, input_ids, IGNORED)
    return {
        "input_ids": ids,
        "labels": labels,
        "molecular_mask": (ids[:-1] >= first_modality_id).astype(np.float32),
    }


class MindRecordWriter:
    """Writes rows as they come, as MindSpore's FileWriter writes them in one call; a context.

    The files appear under their names when the context ends without an error, and not at all otherwise. The rows of
    several shards are dealt out in turn.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, str],
        *,
        shards: int = 1,
        description: str = "jaxlm",
        page_size: int = PAGE_SIZE,
        header_size: int = HEADER_SIZE,
    ) -> None:
        """Opens the files.

        Args:
            path: the file; of several shards the beginning of their names, which end in their number.
            fields: name -> int32, int64, float32 or float64.
            shards: number of files.
            description: kept in the header.
            page_size: bytes; a row must fit into a page.
            header_size: bytes.

        Raises:
            UserError: a file of such a name exists.
        """
        digits = len(str(shards - 1))
        names = [path.name] if shards == 1 else [f"{path.name}{shard:0{digits}}" for shard in range(shards)]
        self._folder = path.parent
        for name in names:
            for final in (path.with_name(name), path.with_name(f"{name}.db")):
                if final.exists():
                    raise UserError(f"{final}: exists already; name another destination or remove it first")
        self._names = names
        self._temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        # MindSpore's is a map, whose keys are in order.
        self._kinds = {name: fields[name] for name in sorted(fields)}
        self._sizes = (header_size, page_size)
        self._description = description
        self._shards = [_Shard(self._temporary / name, header_size, page_size) for name in names]
        self._saved = self._num_rows = 0

    def write(self, row: Mapping[str, NDArray[Any]]) -> None:
        """Adds a row: a [n] array for every field.

        Raises:
            UserError: a field is missing, a number does not fit its type, or the row does not fit a page.
        """
        parts = []
        for name, kind in self._kinds.items():
            if name not in row or len(row) != len(self._kinds):
                raise UserError(f"row {self._num_rows:,}: fields {', '.join(row)}, expected {', '.join(self._kinds)}")
            part, saved = _encoded(row[name], kind, f"row {self._num_rows:,}: {name}")
            self._saved += saved
            parts.append(part if len(self._kinds) == 1 else len(part).to_bytes(8, "big") + part)
        data = b"".join(parts)
        self._shards[self._num_rows % len(self._shards)].add(len(data).to_bytes(8, "little") + data)
        self._num_rows += 1

    def __enter__(self) -> MindRecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for shard in self._shards:
                shard.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        header_size, page_size = self._sizes
        for number, shard in enumerate(self._shards):
            schema = {name: {"shape": [-1], "type": kind} for name, kind in self._kinds.items()}
            content = {
                "header_size": header_size,
                "index_fields": None,
                "page": shard.finish(number),
                "page_size": page_size,
                "compression_size": max(0, self._saved),
                "schema": [{"blob_fields": list(schema), "desc": self._description, "schema": schema}],
                "shard_addresses": self._names,
                "shard_id": number,
                "statistics": None,
                "version": VERSION,
            }
            shard.write_header(json.dumps(content, separators=(",", ":")).encode())
        for name in self._names:  # what lacks an index is not opened, so it comes first
            for file in (f"{name}.db", name):
                (self._temporary / file).rename(self._folder / file)


class _Shard:
    """One file, and its index."""

    def __init__(self, path: Path, header_size: int, page_size: int) -> None:
        self._path, self._header_size, self._page_size = path, header_size, page_size
        self._stream: BinaryIO = path.open("wb")
        self._index = sqlite3.connect(path.with_name(f"{path.name}.db"), isolation_level=None)
        for table in _TABLES:
            self._index.execute(table)
        self._index.execute("INSERT INTO SHARD_NAME VALUES (?)", (path.name,))
        self._index.execute("BEGIN")
        self._pages: list[list[int]] = []  # of each BLOB page its first row, the row behind its last, bytes in use
        self._num_rows = 0

    def add(self, data: bytes) -> None:
        if len(data) > self._page_size:
            raise UserError(f"a row of {len(data):,} bytes does not fit a page of {self._page_size:,}; divide it")
        # A row group's part of the RAW pages must fit a page too.
        most = self._page_size // len(_RAW_ROW)
        page = self._pages[-1] if self._pages else None
        if page is None or page[2] + len(data) > self._page_size or page[1] - page[0] >= most:
            page = [self._num_rows, self._num_rows, 0]
            self._pages.append(page)
            self._stream.seek(self._header_size + (len(self._pages) - 1) * self._page_size)
        self._stream.write(data)
        group = len(self._pages) - 1
        row = (self._num_rows, 0, 0, 0, group, group, page[2], page[2] + len(data))
        self._index.execute("INSERT INTO INDEXES VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        page[1] += 1
        page[2] += len(data)
        self._num_rows += 1

    def finish(self, shard: int) -> list[dict[str, Any]]:
        """Writes the RAW pages; returns the pages as the header has them."""
        described = [
            _page(number, "BLOB_DATA", number, size, [(0, 0)], shard, first, end)
            for number, (first, end, size) in enumerate(self._pages)
        ]
        raw: list[tuple[int, list[tuple[int, int]]]] = []  # of each RAW page its bytes, and its row groups with offsets
        for group, (first, end, _) in enumerate(self._pages):
            size = (end - first) * len(_RAW_ROW)
            if not raw or raw[-1][0] + size > self._page_size:
                raw.append((0, []))
            used, groups = raw[-1]
            raw[-1] = (used + size, [*groups, (group, used)])
            number = len(self._pages) + len(raw) - 1
            self._stream.seek(self._header_size + number * self._page_size + used)
            self._stream.write(_RAW_ROW * (end - first))
            self._index.execute(
                "UPDATE INDEXES SET PAGE_ID_RAW = ?, PAGE_OFFSET_RAW = ? + (ROW_ID - ?) * ?, "
                "PAGE_OFFSET_RAW_END = ? + (ROW_ID - ? + 1) * ? WHERE ROW_GROUP_ID = ?",
                (number, used, first, len(_RAW_ROW), used, first, len(_RAW_ROW), group),
            )
        for place, (size, groups) in enumerate(raw):
            number = len(self._pages) + place
            described.append(_page(number, "RAW_DATA", number if place else 0, size, groups, shard, 0, 0))
        self._index.execute("COMMIT")
        return described

    def write_header(self, header: bytes) -> None:
        if 8 + len(header) > self._header_size:
            raise UserError(
                f"{self._path.name}: {self._num_rows:,} rows take {len(self._pages):,} pages, more than a header of "
                f"{self._header_size:,} bytes can name; write more shards"
            )
        self._stream.seek(0)
        self._stream.write(len(header).to_bytes(8, "little") + header)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()
        self._index.close()


def _page(
    number: int,
    kind: str,
    kind_number: int,
    size: int,
    groups: Sequence[tuple[int, int]],
    shard: int,
    first: int,
    end: int,
) -> dict[str, Any]:
    return {
        "end_row_id": end,
        "page_id": number,
        "page_size": size,
        "page_type": kind,
        "page_type_id": kind_number,
        "row_group_ids": [{"id": group, "offset": offset} for group, offset in groups],
        "shard_id": shard,
        "start_row_id": first,
    }


def _encoded(array: NDArray[Any], kind: str, what: str) -> tuple[bytes, int]:
    """An array as a row holds it, and the bytes that its compression saves."""
    dtype = np.dtype(_TYPES[kind])
    values = np.asarray(array)
    if values.ndim != 1 or (dtype.kind == "i" and values.dtype.kind not in "iu" and values.size):
        raise UserError(f"{what}: expected a row of {kind}, found {values.dtype} {list(values.shape)}")
    if dtype.kind == "f":
        return values.astype(dtype).tobytes(), 0
    limits = np.iinfo(dtype)
    if values.size and not limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
        raise UserError(f"{what}: holds a number that does not fit {kind}")
    wide = values.astype(np.int64)
    codes = np.zeros(len(wide), np.uint8)
    for code, bits in enumerate((8, 16, 32)):
        codes[(wide < -(1 << (bits - 1))) | (wide >= 1 << (bits - 1))] = code + 1
    padded = np.concatenate([codes, np.zeros(-len(codes) % 4, np.uint8)]).reshape(-1, 4)
    packed = np.bitwise_or.reduce(padded << np.array([6, 4, 2, 0], np.uint8), axis=1, dtype=np.uint8)
    used = np.arange(8) < (1 << codes.astype(np.int64))[:, None]
    body = wide.astype("<i8").view(np.uint8).reshape(-1, 8)[used]
    data = len(wide).to_bytes(4, "big") + packed.tobytes() + body.tobytes()
    return data, len(wide) * dtype.itemsize - len(data)
