"""A step's folder: its plan, its finished parts, and how each is made once, whoever makes it.

A task's outputs are written beside their place and renamed; last comes its mark, a small JSON file of what it found. A
task with a mark is done. Marks and outputs are functions of the input alone, so it does not matter which process, host
or engine did a task, nor whether two did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxlm.config.plain import flatten, plain, to_dict
from jaxlm.config.prepare import PrepareConfig
from jaxlm.config.reading import build
from jaxlm.data.prepare.shards import Document, Shard
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.sums import file_sha256

FORMAT, VERSION = "jaxlm-prepare", 1
Mark = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the work in its folder.

    Args:
        folder: where it writes.
        name: filter, dedup, …
        config: the whole configuration.
        shards: what its tasks read.
        digest: a hash of all that decides what it writes.
    """

    folder: Path
    name: str
    config: PrepareConfig
    shards: tuple[Shard, ...]
    digest: str

    def part(self, number: int) -> Path:
        """The documents that a task writes."""
        ending = ".zst" if self.config.compression == "zst" else ""
        return self.folder / f"part-{number:05d}.jsonl{ending}"

    def mark_path(self, phase: str, number: int) -> Path:
        """The mark of a task."""
        return self.folder / "marks" / f"{phase}-{number:05d}.json"

    def mark(self, phase: str, number: int) -> Mark:
        """What a finished task found."""
        return read_object(self.mark_path(phase, number))

    def marks(self, phase: str, num_tasks: int) -> Iterator[Mark]:
        """What the tasks of a phase found, in order."""
        return (self.mark(phase, number) for number in range(num_tasks))

    def missing(self, phase: str, num_tasks: int) -> list[int]:
        """The tasks of a phase that are not done."""
        with os.scandir(self.folder / "marks") as entries:
            names = {entry.name for entry in entries}
        return [number for number in range(num_tasks) if self.mark_path(phase, number).name not in names]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Tasks that may be done in any order.

    Args:
        name: what it is called in marks and messages.
        num_tasks: the number of tasks.
        run: does one, and returns its mark; a function of a module, so that other processes find it.
    """

    name: str
    num_tasks: int
    run: Callable[[Step, int], Mark]


def open_step(
    folder: Path, name: str, config: PrepareConfig, shards: Iterable[Shard], options: Mapping[str, Any]
) -> Step:
    """The step in `folder`, begun or gone on with.

    Args:
        folder: its folder; made.
        name: the step.
        config: the whole configuration.
        shards: what it reads.
        options: what else decides the result: the step's own keys, and the digest of what is read.

    Raises:
        UserError: the folder was begun with other options or other files.
    """
    (folder / "marks").mkdir(parents=True, exist_ok=True)
    shards = tuple(shards)
    decides = {"step": name, "options": plain(options), "shards": [_identity(shard) for shard in shards]}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    content = {
        "format": FORMAT,
        "version": VERSION,
        **decides,
        "digest": digest,
        "config": to_dict(config),
        "plan": [dataclasses.asdict(shard) for shard in shards],
    }
    path = folder / "plan.json"
    if not path.exists():
        write_json(path, content)
    old = read_object(path)
    if old.get("format") != FORMAT or old.get("version") != VERSION:
        raise UserError(
            f"{path}: is not a plan of this version of jaxlm prepare ({FORMAT} {VERSION}); choose another output_dir"
        )
    if old["digest"] != digest:
        raise UserError(
            f"{_difference(old, content, name)}; remove {folder} to begin anew, or choose another output_dir"
        )
    # Watched files are those that the work was planned for, not those of this start.
    if old["config"] != content["config"]:  # what does not decide the result, such as max_bad
        write_json(path, {**content, "plan": old["plan"]})
    return Step(folder, name, config, tuple(Shard(**shard) for shard in old["plan"]), digest)


def read_step(folder: str) -> Step:
    """The step in a folder, for a process that works on it."""
    path = Path(folder) / "plan.json"
    return _read_step(folder, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_step(folder: str, changed: int) -> Step:
    content = read_object(Path(folder) / "plan.json")
    shards = tuple(Shard(**shard) for shard in content["plan"])
    return Step(Path(folder), content["step"], build(content["config"], PrepareConfig), shards, content["digest"])


def perform(folder: str, phase: str, run: Callable[[Step, int], Mark], number: int) -> None:
    """Does one task, unless it is done; every engine calls this, in any process."""
    step = read_step(folder)
    path = step.mark_path(phase, number)
    if not path.exists():
        write_json(path, run(step, number))


def _identity(shard: Shard) -> dict[str, Any]:
    """What says which text a shard is; times of change do not, as a copy has others, nor where earlier steps wrote."""
    values = {key: value for key, value in dataclasses.asdict(shard).items() if key != "mtime_ns"}
    return {**values, "path": Path(shard.path).name} if shard.kind in ("part", "samples") else values


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> str:
    """What is not as it was, in words."""
    before, now = flatten(old["options"]), flatten(new["options"])
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return f"{key}: was {before.get(key)!r} when the step {name} was begun, and is {now.get(key)!r}"
    for first, second in zip(old["shards"], new["shards"], strict=False):
        if first != second:
            return (
                f"sources: {first['path']} ({first['nbytes']} bytes) was read when the step {name} was begun; now "
                f"there is {second['path']} ({second['nbytes']} bytes)"
            )
    return f"sources: {len(old['shards'])} pieces were planned when the step {name} was begun, now {len(new['shards'])}"


# Writing ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, beside `path`, which takes its place when the block ends well and is gone when not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk: the system names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_documents(path: Path, documents: Iterable[Document]) -> Mark:
    """Documents as JSON lines, compressed as the ending says.

    Returns:
        their number (`documents`), the file's `bytes` and its `sha256`.
    """
    count = 0
    with replacing(path) as temporary:
        with _opened(temporary, path.suffix == ".zst") as stream:
            for document in documents:
                record = {"text": document.text, "id": document.id, "source": document.source}
                if document.language != "auto":
                    record["language"] = document.language
                stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                count += 1
        return {"documents": count, "bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}


@contextlib.contextmanager
def _opened(path: Path, compressed: bool) -> Iterator[IO[bytes]]:
    if not compressed:
        with path.open("wb") as stream:
            yield stream
        return
    import pyarrow  # Python has its own writer of zst from 3.14 on

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as compressing:
        yield compressing
