"""Emergency checkpoints: each host keeps on its own disk what it needs to go on.

Shared storage is slow and expensive, so that a pod saves there seldom. A crash that leaves the machines intact (another
host died, the network, a bug) need not cost all steps since the last save. Every process writes the shards of its own
devices in the background and keeps the newest two copies: when a process dies while it writes, all have the copy
before. A restart uses the copies when every process has the same step, complete, for the same devices; otherwise, e.g.
with a new machine or another mesh, it uses the checkpoint on shared storage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.lock import Lock
from jaxlm.processes.distributed import Hosts
from jaxlm.training.state import TrainState

KEEP = 2
INDEX, DATA = "index.json", "shards.bin"
VERSION = 1  # of the index and the order of the shards
NAME = "local_checkpoints.txt"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One shard: the path of its leaf, and its position in the leaf."""

    path: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class LocalCheckpoints:
    """The emergency checkpoints of one process.

    Args:
        directory: a folder on this host's own disk.
        output_dir: the run directory. A name for the run is written into it, so that runs that share a disk do not mix,
            and a run whose output_dir was deleted begins anew.
        hosts: the processes.
        abstract: shapes and shardings of the state.
    """

    def __init__(self, directory: Path, output_dir: Path, hosts: Hosts, abstract: TrainState) -> None:
        self._folder = directory / _name_of_run(output_dir, hosts) / f"process-{hosts.process:02}"
        self._hosts, self._abstract = hosts, abstract
        self._parts = list(_parts(abstract))
        layout = [[hosts.process, hosts.processes], [dataclasses.astuple(part) for part in self._parts]]
        self._layout = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        self._writer: threading.Thread | None = None
        self._error: OSError | None = None
        # output_dir belongs to this run alone; a copy of it has the same name of the run, and leads to this folder too.
        lock = Lock(
            self._folder.with_name(f"{self._folder.name}.lock"),
            f"train.local_checkpoints: {self._folder}",
            f"delete {output_dir / NAME} if output_dir was copied from another run's",
        )
        problem: str | None = None
        try:
            hosts.take(lock)
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob("*.tmp"):
                shutil.rmtree(left)
            problem = self._too_small()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = self._refused(error)
        hosts.check("train.local_checkpoints", problem)

    def _refused(self, error: OSError) -> str:
        return (
            f"train.local_checkpoints: {self._folder} cannot be written ({error.strerror or error}); choose a folder "
            "on each host's own disk, or null"
        )

    def _too_small(self) -> str | None:
        """Says why the disk has no room for the first copy; None if it has. Earlier copies count as free."""
        needed = sum(part.size for part in self._parts)
        used = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self._folder).free
        if free + used >= needed:
            return None
        return (
            f"train.local_checkpoints: a copy of this process takes {needed / 1e9:.1f} GB, and the disk of "
            f"{self._folder} has {free / 1e9:.1f} GB free; choose a folder on another disk, or null"
        )

    def newest(self, after: int) -> int | None:
        """The newest complete step of every process; None without one after `after`."""
        mine = [step for step in self._steps() if step > after and self._is_complete(step)]
        everywhere = [set(json.loads(text)) for text in self._hosts.exchange("local checkpoints", json.dumps(mine))]
        return max(set.intersection(*everywhere), default=None)

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def _index(self, step: int) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((self.path(step) / INDEX).read_text(encoding="utf-8"))
        return index

    def _is_complete(self, step: int) -> bool:
        try:
            index = self._index(step)
            if index.get("version", 1) != VERSION or index["layout"] != self._layout:
                return False
            checksum = 0
            with (self.path(step) / DATA).open("rb") as file:
                while piece := file.read(1 << 24):
                    checksum = zlib.crc32(piece, checksum)
        except (OSError, ValueError, KeyError):  # cut off in the middle, or damaged
            return False
        return bool(checksum == index["checksum"])

    def files(self, step: int) -> dict[str, bytes]:
        """The small files that record the settings and data of the run."""
        return {name: text.encode() for name, text in self._index(step)["files"].items()}

    def save(self, state: TrainState, data_state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Copies this process's shards to main memory, then writes them in the background.

        Raises:
            UserError: when the save before could not be written.
        """
        self.wait()
        shards = {(part.path, part.start): data for part, data in _shards(state)}
        index = {
            "version": VERSION,
            "layout": self._layout,
            "data": data_state,
            "files": {name: files[name].decode() for name in ("run.yaml", "fingerprints.json")},
        }
        step = int(state.step)
        self._writer = threading.Thread(target=self._write, args=(step, shards, index), name="local checkpoint")
        self._writer.start()

    def _write(self, step: int, shards: Mapping[Any, np.ndarray], index: dict[str, Any]) -> None:
        partial, final = self._folder / f"{step}.tmp", self._folder / str(step)
        try:
            for old in (partial, final):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            checksum = 0
            with (partial / DATA).open("wb") as file:
                for part in self._parts:
                    piece = np.ascontiguousarray(shards[part.path, part.start]).view(np.uint8).data
                    checksum = zlib.crc32(piece, checksum)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            (partial / INDEX).write_text(json.dumps(index | {"checksum": checksum}), encoding="utf-8")
            partial.rename(final)
            for old_step in self._steps()[:-KEEP]:
                shutil.rmtree(self._folder / str(old_step))
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """Until the save in progress is done; UserError if the disk refused it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            raise UserError(self._refused(self._error))

    def restore(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and data-iterator state of a step that `newest` returned."""
        data = np.memmap(self.path(step) / DATA, dtype=np.uint8, mode="r")
        offsets, at = {}, 0
        for part in self._parts:
            offsets[part.path, part.start] = (at, part)
            at += part.size

        def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path)

            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                begin, part = offsets[name, _start(index or ())]
                return np.array(data[begin : begin + part.size]).view(part.dtype).reshape(part.shape)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

        state = jax.tree_util.tree_map_with_path(load, self._abstract)
        return state, self._index(step)["data"]

    def clear(self) -> None:
        """Removes all copies; the run is complete on shared storage."""
        self.wait()
        shutil.rmtree(self._folder)


def _name_of_run(output_dir: Path, hosts: Hosts) -> str:
    file, name = output_dir / NAME, ""
    if hosts.process == 0:
        if not file.exists():
            file.write_text(f"{output_dir.absolute().name}-{uuid.uuid4().hex[:12]}\n", encoding="utf-8")
        name = file.read_text(encoding="utf-8").strip()
    return hosts.exchange("name of the run", name)[0]


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(dim.start or 0 for dim in index)


def _parts(abstract: Any) -> Iterator[_Part]:
    """The shards of this process's devices, each once, also where several devices hold it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        shape = leaf.sharding.shard_shape(leaf.shape)
        for start in sorted({_start(index or ()) for index in indices}):
            yield _Part(jax.tree_util.keystr(path), start, shape, leaf.dtype.name)


def _shards(state: Any) -> Iterator[tuple[_Part, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        seen = set()
        for shard in leaf.addressable_shards:
            start = _start(shard.index)
            if start not in seen:
                seen.add(start)
                # A copy, because the next step writes over its arguments.
                data = np.array(shard.data)
                yield _Part(jax.tree_util.keystr(path), start, data.shape, leaf.dtype.name), data
