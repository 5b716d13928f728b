"""Output that is complete or absent: a temporary sibling directory, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxlm.errors import UserError
from jaxlm.lock import Lock
from jaxlm.remote import scheme_of
from jaxlm.units import disk_size

Advance = Callable[[int], None]
"""Called with a number of bytes that were written."""


@runtime_checkable
class Watcher(Protocol):
    """An `advance` that also follows which parts of files are finished, to hash them meanwhile."""

    def __call__(self, nbytes: int) -> None: ...

    def final(self, path: Path, end: int | None) -> None:
        """The first `end` bytes of the file will not change any more; None: it is complete."""


def tell_final(advance: Advance, path: Path, end: int | None) -> None:
    """Tells a Watcher; anything else does not want to know."""
    if isinstance(advance, Watcher):
        advance.final(path, end)


@contextlib.contextmanager
def output_directory(destination: str | Path, needed: int) -> Iterator[Path]:
    """A new directory to write into, which takes the name `destination` when all went well and vanishes otherwise.

    What killed runs to the same destination left behind is removed first.

    Args:
        destination: must not exist yet.
        needed: bytes that will be written, checked against the free space.

    Raises:
        UserError: when the destination exists, its parent cannot be written, or the disk is full.
    """
    if isinstance(destination, str) and (scheme := scheme_of(destination)) is not None:
        raise UserError(f"{destination}: nothing is written to {scheme}://; name a directory of this machine")
    final = Path(destination).absolute()
    if os.path.lexists(final):
        raise UserError(f"{final}: exists already; name another destination or remove it first")
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    lock = Lock(final.parent / f".{final.name}.lock", f"{final}: the destination", "name another destination")
    try:
        with lock:
            if os.path.lexists(final):  # the one that had the lock has written it
                raise UserError(f"{final}: exists already; name another destination or remove it first")
            _remove_leftovers(final)
            free = shutil.disk_usage(final.parent).free
            if free < needed:
                raise UserError(f"{final}: needs {disk_size(needed)}, but the disk has only {disk_size(free)} free")
            temporary.mkdir()
            try:
                with _locked(temporary):
                    yield temporary
                    _sync_tree(temporary)
                    temporary.rename(final)
                    _sync(final.parent)
            finally:
                _remove(temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{final}: the disk is full; nothing was left there. Free some space") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise UserError(f"{error.filename or final}: may not be written ({error.strerror})") from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            inside = error.filename not in (None, str(final))
            where = f"; {error.filename}: " if inside else " ("
            raise UserError(f"{final}: cannot be created{where}{error.strerror}{'' if inside else ')'}") from None
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a lock on a directory, which the system lets go when the process dies, however it dies."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: leftovers are not removed there
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(final: Path) -> None:
    prefix = f".{final.name}.tmp-"
    for path in final.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and path.is_dir() and _abandoned(path, int(pid)):
            print(f"removing what a killed run left: {path}", file=sys.stderr)
            _remove(path)


def _abandoned(directory: Path, pid: int) -> bool:
    """Whether the process that wrote there is gone: no such process, and nobody holds the lock.

    Both, because the number may be that of a process on another machine or in another container, and because the lock
    is taken a moment after the directory is made.
    """
    try:
        if pid != os.getpid():
            os.kill(pid, 0)
            return False
    except ProcessLookupError:
        pass
    except OSError:
        return False  # there is one, of another user
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _remove(directory: Path) -> None:
    # More than once: after an interruption, a write in another thread may put a file back into the directory.
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def parse_size(text: str) -> int:
    """Bytes of '5GB', '400MB', '512KB' (decimal) or a plain number; UserError otherwise."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UserError(f"--shard-size {text!r}: expected a size like 5GB or 400MB") from None
    if not 1 <= size < math.inf:
        raise UserError(f"--shard-size {text!r}: must be positive")
    return int(size)
