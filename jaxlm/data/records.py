"""Reading the records of a source: one dict per record, with a name for error messages.

A source is a file, a folder or a pattern of files that `data.entries` reads, or a directory written by Hugging Face
`datasets` (save_to_disk).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import SourceConfig
from jaxlm.data.compressed import inner_ending
from jaxlm.data.entries import Entry, read_entries
from jaxlm.data.mindrecord import has_own_name, mindrecord_files, named_files
from jaxlm.errors import UserError
from jaxlm.hub import download_data, is_address, read_address
from jaxlm.locate import at_home, on_disk
from jaxlm.remote import Location, files_below, matches, open_location, reading, scheme_of

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

TOKEN_FORMATS = ("megatron", "knowlm", "mindrecord")
TOKENS = "tokens.idx"  # in the directory of a store


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
    _check_limit(source)
    return itertools.islice(_all_records(source), None if source.limit is None else min(source.limit, sys.maxsize))


def check_source(source: SourceConfig) -> None:
    """Checks what can be said of a source without reading it.

    Raises:
        UserError: nothing is there, of an unknown kind, or not readable.
    """
    _check_limit(source)
    if is_address(source.path):
        return  # of the hub: what it has is said when it is fetched
    for file in source_files(source):
        if not (is_token_source(source) or _is_hf(source)):
            _format(file, source)
        if scheme_of(str(file)) is None:  # behind an address, the listing has named it
            with file.open("rb"):  # OSError names it
                pass


def is_token_source(source: SourceConfig) -> bool:
    """Whether a source holds tokens, not records: a store (Megatron-Core's, KnowLM's, jaxlm's) or MindRecord."""
    if source.format in TOKEN_FORMATS:
        return True
    root = at_home(source.path)
    has_tokens = root.suffix == ".idx" or (root / TOKENS).is_file() or is_mindrecord_source(source)
    return source.format == "auto" and has_tokens


def is_mindrecord_source(source: SourceConfig) -> bool:
    """Whether a source is a file of MindRecord by its name, or a folder with such files."""
    if source.format in ("auto", "mindrecord") and scheme_of(source.path) is None:
        root = at_home(source.path)
        return source.format == "mindrecord" or has_own_name(root) or (root.is_dir() and bool(named_files(root)))
    return source.format == "mindrecord"


def token_index(source: SourceConfig) -> Path:
    """The index of a source of tokens: the path itself, or the one in the directory of a store.

    Raises:
        UserError: there is none, or the source has keys that mean something for records only.
    """
    for key, value in (("template", source.template), ("columns", source.columns), ("split", source.split)):
        if value and value not in ("auto", "text"):
            raise UserError(
                f"data: {key} of {source.path} is {value!r}, but a store holds tokens as they are; leave it out"
            )
    if scheme_of(source.path) is not None:
        raise UserError(
            f"data: {source.path} holds tokens, which are read in place by their files' offsets; copy it here and give "
            "the path"
        )
    root = at_home(source.path)
    if is_mindrecord_source(source):
        if not root.exists():
            raise UserError(f"data: {source.path} does not exist (paths are relative to the working directory)")
        return root
    index = root / TOKENS if root.is_dir() else root
    if not index.is_file() or index.suffix != ".idx":
        raise UserError(f"data: {source.path} is not the index of a store; give the .idx, or the directory of a store")
    return index


def source_files(source: SourceConfig) -> list[Location]:
    """All files that a source reads, in order.

    Raises:
        UserError: there are none.
    """
    if is_token_source(source):
        index = token_index(source)
        if is_mindrecord_source(source):
            files = mindrecord_files(index)
            return [*files, *(file.with_name(f"{file.name}.db") for file in files)]
        beside = (index.with_suffix(".bin"), index.with_name("mask.bin"))
        return [index, *(file for file in beside if file.is_file())]
    if _is_hf(source):
        if is_address(source.path):
            return [*download_data(read_address(source.path, "data"), "data")]
        return files_below(_root(source), "data")
    return list(_files(source))


def _check_limit(source: SourceConfig) -> None:
    if source.limit is not None and source.limit < 1:
        raise UserError(f"data: limit of {source.path} is {source.limit}; it must be at least 1")


def _all_records(source: SourceConfig) -> Iterator[Record]:
    if _is_hf(source):
        yield from _read_hf(source)
    for file in _files(source):
        is_empty = True
        kind = _format(file, source)
        for entry in read_entries(file, kind, key="data", documents=source.documents):
            is_empty = False
            yield _record(entry, is_binary=kind == "parquet")
        if is_empty:
            raise UserError(f"data: {file} holds no records; remove it from the sources")


def _record(entry: Entry, is_binary: bool) -> Record:
    if entry.problem is not None:
        raise UserError(f"data: {entry.name}: {entry.problem}")
    if not isinstance(entry.value, dict):
        kind = type(entry.value).__name__
        raise UserError(f"data: {entry.name}: a record must be an object with named fields, found {kind}")
    return _plain_record(entry.name, entry.value) if is_binary else Record(entry.name, entry.value)


def _plain_record(name: str, value: dict[str, Any]) -> Record:
    """A record of a binary format: bytes as the UTF-8 text that they are, NaN as null."""
    return Record(name, {column: _plain(name, column, inner) for column, inner in value.items()})


def _plain(name: str, column: str, value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise UserError(
                f"data: {name}: column {column!r} holds bytes that are not UTF-8 text; leave the column out, or write "
                "it as text"
            ) from None
    if isinstance(value, Mapping):
        return {key: _plain(name, column, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, column, inner) for inner in value]
    return value


def source_root(source: SourceConfig) -> str:
    """The path of a source on this machine, or its address."""
    return str(_root(source))


def _root(source: SourceConfig) -> Location:
    """What a source's path means on this machine, or behind its address."""
    path = source.path
    if is_address(path):
        return on_disk(path, "data", "data")
    return open_location(path, "data") if scheme_of(path) is not None else at_home(path)


def _is_hf(source: SourceConfig) -> bool:
    """Whether a source is a directory of `datasets`.

    Raises:
        UserError: it should be one by its format, and is not.
    """
    root = _root(source)
    with reading(root, "data"):
        is_there = any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if source.format == "hf" and not is_there:
        raise UserError(f"data: {source.path} is not a directory written by datasets' save_to_disk")
    return is_there and source.format in ("hf", "auto")


def _files(source: SourceConfig) -> Sequence[Location]:
    """The files of a source, in order; none for a directory of `datasets`."""
    if _is_hf(source):
        return []
    if source.split is not None:
        raise UserError(
            f"data: split is {source.split!r}, but {source.path} is not a directory written by datasets' save_to_disk"
        )
    if is_address(source.path):
        return _known(download_data(read_address(source.path, "data"), "data"), source)
    root = _root(source)
    with reading(root, "data"):
        is_file, is_dir = root.is_file(), root.is_dir()
    if is_file:
        return [root]
    if not is_dir:
        files = matches(root, "data")
        if not files:
            where = " (paths are relative to the working directory)" if scheme_of(source.path) is None else ""
            raise UserError(f"data: {source.path} does not exist{where}")
        return files
    return _known(files_below(root, "data"), source)


def _known(files: Sequence[Location], source: SourceConfig) -> Sequence[Location]:
    """Those of a folder's files that are of a known kind."""
    if source.format == "auto":
        files = [path for path in files if inner_ending(path) in FORMATS]
    if not files:
        raise UserError(f"data: the folder {source.path} holds no file of a known kind: {', '.join(sorted(FORMATS))}")
    return files


def _format(file: Location, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    ending = inner_ending(file)
    kind = FORMATS.get(ending)
    if ending in (".warc", ".wet", ".arc"):
        raise UserError(
            f"data: {file}: web archives are not read here; take their texts out with datatrove (its example "
            "process_common_crawl_dump.py: WarcReader, Trafilatura, JsonlWriter), and give the .jsonl.gz that it writes"
        )
    if kind is None:
        raise UserError(
            f"data: {file}: the ending {ending or file.suffix!r} is unknown; "
            "set format to one of json, jsonl, csv, parquet, text, hf, megatron, knowlm, mindrecord"
        )
    return kind


def record_files(source: SourceConfig) -> list[tuple[Location, str]] | None:
    """The files of a source in order, each with its kind as `entries.read_entries` takes it.

    None for a directory of `datasets`.

    Raises:
        UserError: nothing is there, or of an unknown kind.
    """
    if _is_hf(source):
        return None
    return [(file, _format(file, source)) for file in _files(source)]


def _read_hf(source: SourceConfig) -> Iterator[Record]:
    import datasets  # takes a second, and only these sources need it

    try:
        with reading(_root(source), "data"):
            loaded = datasets.load_from_disk(str(_root(source)))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"data: {source.path} cannot be read as a data set: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            given = "is missing" if source.split is None else f"is {source.split!r}"
            raise UserError(f"data: split of {source.path} {given}; it has {', '.join(sorted(loaded))}")
        loaded = loaded[source.split]
    elif source.split is not None:
        raise UserError(f"data: split is {source.split!r}, but {source.path} holds one data set without splits")
    if len(loaded) == 0:
        raise UserError(f"data: {source.path} holds no records; remove it from the sources")
    for number, value in enumerate(loaded, 1):
        yield _plain_record(f"{source.path}:{number}", dict(value))
