"""What one task reads: a file, or a block of its lines, as documents."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxlm.config import SourceConfig
from jaxlm.config.prepare import DocumentsConfig
from jaxlm.data.compressed import COMPRESSED
from jaxlm.data.entries import Entry, read_entries
from jaxlm.data.records import Record, is_token_source, read_records, record_files, source_root, token_index
from jaxlm.errors import UserError
from jaxlm.jsontext import parse
from jaxlm.remote import Location, file_status, open_location, reading

KEY = "sources"  # as messages name what is read


@dataclasses.dataclass(frozen=True)
class Document:
    """A text on its way.

    Args:
        id: "file:number" of the record it came from, or "file@byte" in a file that is worked on in blocks.
        source: the name of its source.
        text: the text.
        language: the rule by which it is split into sentences: see `DocumentsConfig`.
    """

    id: str
    source: str
    text: str
    language: str = "auto"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file, or a block of its lines; a task of every stage.

    Args:
        path: the file; for kind 'hf' the directory.
        kind: json, jsonl, csv, parquet, text, hf; 'part' for documents that an earlier step wrote, 'samples' for what
            split wrote, 'tokens' for a store.
        source, text, language, documents, split, template, columns: as `DocumentsConfig` has them, `source` being its
            name.
        tokens: of kind 'tokens', the store's format.
        begin, end: bytes of the block: the lines that begin in it; end None: to the end.
        nbytes: the file's size when the work was planned; None where nothing is watched.
        mtime_ns: its time of change; behind an address, the storage's own mark of this version.
    """

    path: str
    kind: str
    source: str
    text: str = "text"
    language: str = "auto"
    documents: str = "line"
    split: str | None = None
    template: str = "text"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokens: str = "auto"
    begin: int = 0
    end: int | None = None
    nbytes: int | None = None
    mtime_ns: int | None = None

    def check_unchanged(self) -> None:
        """UserError when the file is not the one that the work was planned for."""
        if self.nbytes is None:
            return
        try:
            status = file_status(open_location(self.path, KEY), KEY)
        except FileNotFoundError:
            raise UserError(
                f"{KEY}: {self.path} has vanished since the work was planned; put it back, or begin anew in another "
                "output_dir"
            ) from None
        if status != (self.nbytes, self.mtime_ns):
            raise UserError(
                f"{KEY}: {self.path} has changed since the work was planned ({self.nbytes:,} bytes then, "
                f"{status.size:,} now); what is done would not fit to the rest. Wait until it is complete, then "
                "begin anew in another output_dir"
            )


def plan_shards(sources: Iterable[DocumentsConfig], block_bytes: int) -> list[Shard]:
    """All pieces of all sources, in order; a function of the files alone.

    Args:
        sources: the sources.
        block_bytes: about so many bytes of lines are a piece.

    Raises:
        UserError: nothing is there, or of an unknown kind.
    """
    shards: list[Shard] = []
    for source in sources:
        config = SourceConfig(path=source.path, format=source.format, split=source.split, documents=source.documents)
        common: dict[str, Any] = {
            "source": source.name or source.path,
            "text": source.text,
            "language": source.language,
            "documents": source.documents,
            "split": source.split,
            "template": source.template,
            "columns": source.columns,
        }
        if is_token_source(config):
            status = file_status(token_index(config), KEY)
            watched = {**common, "nbytes": status.size, "mtime_ns": status.version}
            shards.append(Shard(str(token_index(config)), "tokens", tokens=source.format, **watched))
            continue
        files = record_files(config)
        if files is None:
            shards.append(Shard(source_root(config), "hf", **common))
            continue
        for file, kind in files:
            status = file_status(file, KEY)
            watched = {**common, "nbytes": status.size, "mtime_ns": status.version}
            in_lines = kind == "jsonl" or (kind == "text" and source.documents == "line")
            num_blocks = max(1, round(status.size / block_bytes)) if in_lines and not _is_compressed(file) else 1
            cuts = [status.size * block // num_blocks for block in range(num_blocks)]
            ends: list[int | None] = [*cuts[1:], None]
            shards += [
                Shard(str(file), kind, **watched, begin=begin, end=end) for begin, end in zip(cuts, ends, strict=True)
            ]
    return shards


def _is_compressed(file: Location) -> bool:
    return file.suffix.lower() in COMPRESSED


class Bad:
    """Counts broken records.

    Args:
        most: how many are let pass.

    Attributes:
        count: the number so far.
        first: the first ones, in words.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str, problem: str) -> None:
        """One more; UserError when they are too many."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(f"{name}: {problem}")
        refuse_bad(self.count, self.most, self.first)


def refuse_bad(count: int, most: int, first: list[str]) -> None:
    """UserError when `count` broken records are more than `most`."""
    if count > most:
        rule = "none is let pass" if most == 0 else f"max_bad: {most:,} are let pass"
        raise UserError(
            f"{KEY}: {first[0]} ({rule}; mend the file, or leave such records out with --max_bad {max(count, 10)})"
        )


def read_shard(shard: Shard, bad: Bad) -> Iterator[Record]:
    """The records of a shard in order.

    Raises:
        UserError: more broken records than are let pass, a file broken as a whole, or one that changes meanwhile.
    """
    shard.check_unchanged()
    for entry in _entries(shard):
        problem = entry.problem
        if problem is None and not isinstance(entry.value, Mapping):
            problem = f"a record must be an object with named fields, found {type(entry.value).__name__}"
        if problem is None:
            yield Record(entry.name, dict(entry.value))
        else:
            bad.add(entry.name, problem)
    shard.check_unchanged()


def read_documents(shard: Shard, bad: Bad) -> Iterator[Document]:
    """The documents of a shard in order; records without text (empty or white space) too.

    Raises:
        UserError: as `read_shard`; what has no text column is broken too.
    """
    render = _renderer(shard.text)
    for record in read_shard(shard, bad):
        text = render(record.data)
        if isinstance(text, str):
            own = record.data if shard.kind == "part" else {}
            language = own.get("language", shard.language)
            yield Document(own.get("id", record.name), own.get("source", shard.source), text, language)
        else:
            bad.add(record.name, text.words)


def _entries(shard: Shard) -> Iterator[Entry]:
    file = open_location(shard.path, KEY)
    if shard.kind == "hf":
        source = SourceConfig(path=shard.path, format="hf", split=shard.split)
        return (Entry(record.name, record.data) for record in read_records(source))
    if shard.kind in ("jsonl", "part", "text") and shard.documents == "line" and not _is_compressed(file):
        return _lines(file, shard)
    kind = "jsonl" if shard.kind == "part" else shard.kind
    return read_entries(file, kind, key=KEY, documents=shard.documents)


def _lines(file: Location, shard: Shard) -> Iterator[Entry]:
    """The lines that begin in a block; a line that is not UTF-8 or not JSON is an entry with a problem."""
    with reading(file, KEY), file.open("rb") as stream:
        stream.seek(max(shard.begin - 1, 0))
        if shard.begin > 0:
            stream.readline()  # the rest of a line that began before; only "\n" when one begins here
        place = stream.tell()
        for number in itertools.count(1):
            if shard.end is not None and place >= shard.end:
                return
            line = stream.readline()
            if not line:
                return
            begin, place = place, place + len(line)
            name = f"{file}:{number}" if shard.begin == 0 else f"{file}@{begin}"
            try:
                text = line.decode("utf-8-sig" if begin == 0 else "utf-8")
                if not text.strip():
                    continue
                yield Entry(name, parse(text) if shard.kind != "text" else {"text": text.rstrip("\r\n")})
            except UnicodeDecodeError as error:
                yield Entry(_by_line(file, begin), problem=f"not UTF-8 ({error.reason}); convert it, e.g. with iconv")
            except ValueError as error:
                yield Entry(_by_line(file, begin), problem=f"broken JSON: {error}")


def _by_line(file: Location, place: int) -> str:
    """The line that begins at a byte, by its number in the file."""
    number, left = 1, place
    with reading(file, KEY), file.open("rb") as stream:
        while left > 0 and (piece := stream.read(min(left, 1 << 20))):
            number += piece.count(b"\n")
            left -= len(piece)
    return f"{file}:{number}"


@dataclasses.dataclass(frozen=True)
class _Problem:
    words: str


def _renderer(expression: str) -> Any:
    """A function from a record to its text, or to what is wrong with it.

    Args:
        expression: a column's name, or text with columns in braces.
    """
    parts = re.split(r"\{([^{}]+)\}", expression)

    def value_of(record: Mapping[str, Any], column: str) -> str | _Problem:
        if column not in record:
            return _Problem(f"no column {column!r} (there are {', '.join(map(str, record))}); set `text` of the source")
        value = record[column]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if value is None:
            return ""
        if not isinstance(value, (str, int, float)):
            return _Problem(f"column {column!r} holds {type(value).__name__}, not text; set `text` of the source")
        return str(value)

    def render(record: Mapping[str, Any]) -> str | _Problem:
        whole = ""
        columns = [expression] if len(parts) == 1 else parts
        for place, part in enumerate(columns):
            piece = value_of(record, part) if len(parts) == 1 or place % 2 else part
            if isinstance(piece, _Problem):
                return piece
            whole += piece
        if not whole.isascii():
            try:
                whole.encode()
            except UnicodeEncodeError:
                return _Problem("a character is cut in half (a lone surrogate, \\ud800 to \\udfff)")
        return whole

    return render
