"""The cache that `train` fills: sources are tokenised once into a store, which every later start opens.

A store's name in the cache is a digest of what its tokens depend on: the files, the templates, the tokenizer, the
settings, and the version of the code's rules. Parts outlive a kill in `NAME.parts`, which is removed at the end.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.config import SourceConfig
from jaxlm.data.records import is_token_source, source_files
from jaxlm.data.report import SourceReport
from jaxlm.data.split import count_split, drawn_examples
from jaxlm.data.store.build import Work, join, make_parts, open_parts, reports_of
from jaxlm.data.store.manifest import MANIFEST
from jaxlm.data.store.pool import cores
from jaxlm.data.store.source import open_as_source, tokenizer_digest
from jaxlm.data.store.stored import Selected, StoredTokens
from jaxlm.data.templates import DIRECTORY
from jaxlm.data.tokenise import Tokeniser, chosen_template, read_batches
from jaxlm.errors import UserError
from jaxlm.locate import at_home
from jaxlm.lock import InUse, Lock
from jaxlm.remote import file_status, reading

RULES = 1  # raised when the same sources become other tokens than before
SMALL = 16 << 20  # bytes of sources below which `auto` tokenises into memory at each start: some seconds of one core
_SAMPLE = 1 << 16  # bytes that are read of a file for its digest, at three places
# Keys of a source that say how often its tokens are taken, not what they are.
_MIXING = ("weight", "tokens", "max_passes")
# Keys of the data section that leave the tokens as they are, or go in by themselves.
_NOT_IN_TOKENS = {"train", "validation", "mixing", "packing", "allow_no_end", "date", "workers", "cache"}
_SECONDS_SHOWN = 3.0  # in which another host sees a file that was written
_BYTES_A_PROCESS = 4 << 20  # of sources: with less, one more process gains nothing
_POLL = 0.5  # seconds between two looks at what other processes do
_LOOKED_AT = 4  # records of each source that are tokenised again when a store is opened


class Display(Protocol):
    """Shows how far a build is."""

    def reading(self, done: int, total: int, tokens: int) -> None:
        """`done` of about `total` bytes were read."""
        ...

    def joining(self, done: int, total: int) -> None:
        """`done` of `total` tokens and masks were written."""
        ...


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data of a run as stores: training, validation where it was split off, and what became of the sources."""

    train: StoredTokens
    validation: StoredTokens | None
    reports: tuple[SourceReport, ...]
    validation_reports: tuple[SourceReport, ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Processes that make one store: this one's place, their number, those on this host, a name of their meeting."""

    index: int
    size: int
    beside: int
    token: str


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where stores are kept, and with whom they are made.

    Args:
        directory: of all stores.
        always: also for small sources.
        exchange: (name, value) -> the values of all processes, in their order; see `Hosts.exchange`.
        process: this one's number.
        processes: of them.
        display: opens a display.
        say: prints a line.
    """

    directory: Path
    always: bool = False
    exchange: Callable[[str, str], list[str]] = lambda _, value: [value]
    process: int = 0
    processes: int = 1
    display: Callable[[], AbstractContextManager[Display | None]] = nullcontext
    say: Callable[[str], None] = lambda _: None

    def wants(self, sources: Sequence[SourceConfig]) -> bool:
        """Whether these sources are tokenised into the cache, and not into memory."""
        return self.always or source_bytes(sources) >= SMALL

    def open(self, work: Work, validation: int | float = 0, seed: int = 0) -> Opened:
        """The store of the sources, made first where there is none; split in training and validation if asked for.

        Args:
            work: what it is made of.
            validation: as `drawn_examples`; 0: no split.
            seed: of the split.

        Raises:
            UserError: whatever is wrong with the sources, or with the cache.
        """
        try:
            return self._open(work, validation, seed)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            raise UserError(
                f"data.cache: {error.strerror} in {error.filename or self.directory}; set data.cache to a directory "
                "that is writable and has room, or to none; what is finished is kept"
            ) from None

    def _open(self, work: Work, validation: int | float, seed: int) -> Opened:
        files = _describe(work.sources)
        name = _name(work, files)
        whole = self.directory / name
        group = self._group(name)
        first = work.sources[0]
        opened = None
        if len(work.sources) == 1 and is_token_source(first):
            opened = open_as_source(first, work.config, work.tokenizer, work.start_id)
        if opened is None:
            if not _is_finished(whole):
                make = partial(self._tokenise, work, whole, group, files)
                self._make(whole, group, make, make)
            stored = StoredTokens(whole)
            self._check_first(work, stored)
            reports = stored.manifest.reports()
        else:
            stored, report = opened
            reports = (report,)
        if not validation:
            return Opened(stored, None, reports, ())
        key = hashlib.sha256(json.dumps([validation, seed]).encode()).hexdigest()[:12]
        split = self.directory / f"{name}-{key}"
        if not _is_finished(split):
            self._make(split, group, partial(_split, work, stored, reports, split, validation, seed))
        train, held_out = StoredTokens(split / "train"), StoredTokens(split / "validation")
        return Opened(train, held_out, train.manifest.reports(), held_out.manifest.reports())

    def _group(self, name: str) -> _Group:
        """The processes that make the same store in the same directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        if self.processes == 1:
            return _Group(0, 1, 1, uuid.uuid4().hex)
        probe = self.directory / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        try:
            rows = [json.loads(text) for text in self.exchange("cache", json.dumps([probe.name, name, host]))]
            same = [number for number, row in enumerate(rows) if row[1] == name]
            deadline = time.monotonic() + _SECONDS_SHOWN  # network file systems show it late
            while time.monotonic() < deadline and not all((self.directory / rows[n][0]).exists() for n in same):
                time.sleep(0.1)
            members = [number for number in same if (self.directory / rows[number][0]).exists()]
            self.exchange("cache seen", "")  # nobody takes its own away before
        finally:
            probe.unlink(missing_ok=True)
        beside = sum(rows[number][2] == host for number in members)
        return _Group(members.index(self.process), len(members), beside, rows[members[0]][0])

    def _make(
        self, directory: Path, group: _Group, make: Callable[[], None], assist: Callable[[], None] | None = None
    ) -> None:
        """Has the first of the group make a directory; the others assist, and wait until it is there."""
        if group.index:
            if assist is not None:
                assist()
            _wait_for(lambda: _is_finished(directory))
            return
        lock = Lock(
            directory.with_name(f"{directory.name}.lock"),
            f"data.cache: {directory}",
            "set data.cache to another directory, or to none",
            self.say,
        )
        is_waiting = False
        while True:
            try:
                with lock:
                    if not _is_finished(directory):
                        make()
                return
            except InUse as error:
                if not is_waiting:
                    self.say(f"another run tokenises the same data; waiting for it. {error}")
                is_waiting = True
                time.sleep(_POLL)

    def _tokenise(self, work: Work, directory: Path, group: _Group, files: list[Any]) -> None:
        parts = directory.with_name(f"{directory.name}.parts")
        opened = parts / f"open-{group.token}"
        if group.index == 0:
            left = [*parts.glob("*.tmp"), *directory.parent.glob(f"{directory.name}.*.tmp")]
            for path in left:  # of a process that was killed
                shutil.rmtree(path, ignore_errors=True)
            parts.mkdir(parents=True, exist_ok=True)
            opened.write_bytes(b"")
        else:
            _wait_for(lambda: opened.exists() or _is_finished(directory))
            if _is_finished(directory):
                return
        total = source_bytes(work.sources)
        with self.display() as display:

            def count(done: int, tokens: int) -> None:
                if display is not None:
                    display.reading(done, total, tokens)

            # A process takes a second to start.
            processes = min(max(1, cores() // group.beside), 1 + total // _BYTES_A_PROCESS)
            number = make_parts(work, parts, processes, (group.index, group.size), count)
            if group.index:
                return
            while (ready := open_parts(parts, number)) is None:
                time.sleep(_POLL)  # those of other hosts
            now = _describe(work.sources)
            if now != files:
                shutil.rmtree(parts)
                names = sorted({row[1] for row in (*files, *now) if row not in files or row not in now})
                raise UserError(
                    f"data: changed while it was read: {', '.join(names[:3])}; start again when it is complete"
                )
            written, whole = 0, 2 * sum(part.tokens for part in ready)

            def progress(length: int) -> None:
                nonlocal written
                written += length
                if display is not None:
                    display.joining(written, whole)

            join(work, directory, ready, reports_of(ready), _settings(work), progress)
            shutil.rmtree(parts)

    def _check_first(self, work: Work, stored: StoredTokens) -> None:
        """Tokenises the first records again: the rules of this code must not have changed."""
        tokeniser = Tokeniser([source.columns for source in work.sources], work.config, work.tokenizer, work.start_id)
        for number, source in enumerate(work.sources):
            files = source_files(source)
            if is_token_source(source) or (
                files and files[0].suffix == ".json" and file_status(files[0], "data").size > SMALL
            ):
                continue  # a JSON array is read whole
            name, _ = chosen_template(source, work.tokenizer)
            few = dataclasses.replace(source, limit=min(source.limit or _LOOKED_AT, _LOOKED_AT), template=name)
            chunk = tokeniser.chunk(next(read_batches(number, few, work.tokenizer)))
            first = int(np.searchsorted(stored.source, number))
            begin, end = (int(stored.offsets[at]) for at in (first, first + len(chunk)))
            same = np.array_equal(stored.input_ids[begin:end], chunk.input_ids)
            if not (same and np.array_equal(stored.loss_mask[begin:end], chunk.loss_mask)):
                raise UserError(
                    f"data.cache: {stored.directory} holds other tokens than this version makes of {source.path}; "
                    "remove that directory, and the next start tokenises again"
                )


def cache_directory() -> Path:
    """The user's own: $JAXLM_CACHE_DIR, else jaxlm below $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("JAXLM_CACHE_DIR")
    if own:
        return at_home(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (at_home(base) if base else Path.home() / ".cache") / "jaxlm"


def source_bytes(sources: Sequence[SourceConfig]) -> int:
    """The size of all files of the sources."""
    return sum(file_status(file, "data").size for source in sources for file in source_files(source))


def _is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() or (directory / "validation" / MANIFEST).is_file()


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_POLL)


def _describe(sources: Sequence[SourceConfig]) -> list[Any]:
    """Each file of the sources: its name, size, time of change, and a hash of some of it."""
    files = [(source.path, file) for source in sources for file in source_files(source)]
    sample = _SAMPLE if len(files) <= 256 else _SAMPLE >> 4
    described = []
    for path, file in files:
        about = file_status(file, "data")
        digest = hashlib.sha256()
        with reading(file, "data"), file.open("rb") as stream:
            for place in (0, about.size // 2, max(0, about.size - sample)):
                stream.seek(place)
                digest.update(stream.read(sample))
        described.append([path, str(file), about.size, about.version, digest.hexdigest()])
    return described


def _settings(work: Work) -> dict[str, Any]:
    """What the tokens depend on besides files and tokenizer, by key."""
    config = work.config
    keys = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_IN_TOKENS]
    values: dict[str, Any] = {f"data.{key}": getattr(config, key) for key in keys}
    values["data.packing"] = "group_texts" if config.packing_mode == "group_texts" else "records"
    if config.records == "answers":
        del values["data.records"]  # stores from before there was such a key stay what they are
    values["start_id"] = work.start_id
    values["data.train"] = [
        {k: v for k, v in dataclasses.asdict(source).items() if k not in _MIXING} for source in work.sources
    ]
    return values


def _name(work: Work, files: list[Any]) -> str:
    """The name of a store: a digest of all that its tokens depend on."""
    tokenizer = work.tokenizer
    digest = hashlib.sha256()
    parts: list[Any] = [RULES, files, _settings(work), tokenizer_digest(tokenizer), tokenizer.chat_template]
    parts += [
        tokenizer.end_ids,
        tokenizer.opens_answers,
        str(tokenizer.date) if tokenizer.asks_for_date else None,
        work.part_characters,
    ]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for source in work.sources:
        for candidate in (DIRECTORY / f"{source.template}.json", at_home(source.template)):
            if candidate.is_file():
                digest.update(candidate.read_bytes())
    if any(source.template == "auto" for source in work.sources):
        for file in sorted(DIRECTORY.glob("*.json")):
            digest.update(file.read_bytes())
    return f"tokens-{digest.hexdigest()[:32]}"


def _split(
    work: Work,
    stored: StoredTokens,
    whole_reports: Sequence[SourceReport],
    directory: Path,
    validation: int | float,
    seed: int,
) -> None:
    """Writes the two stores of a split."""
    held_out = drawn_examples(stored, validation, seed)
    reports = count_split(whole_reports, stored, held_out)
    shutil.rmtree(directory, ignore_errors=True)
    settings = {**stored.manifest.settings, "data.validation": validation, "train.seed": seed}
    # The validation data come last: with them the split is complete.
    join(work, directory / "train", [Selected(stored, ~held_out)], reports[0], settings)
    join(work, directory / "validation", [Selected(stored, held_out)], reports[1], settings)
