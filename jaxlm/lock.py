"""One writer at a time: a file that says which process has a directory or file, and whether it is still alive.

A lock is a small JSON file, put in place whole and in one operation, so that of two that come at once one gets it. What
a killed process left behind is told from what a living one holds: on this machine by process number and time of start;
elsewhere by a sign of life, because the operating system's own locks do not reach from host to host on every shared
file system. The holder touches its file every few seconds, and whoever comes from another host watches for that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxlm.errors import UserError, write_line

BEAT_SECONDS = 5.0  # between the signs of life of a holder
SILENT_SECONDS = 45.0  # without one a holder on another host counts as gone; network file systems show it late

_mine: set[str] = set()  # tokens of the locks that this process holds


class InUse(UserError):
    """Another process has the lock, and is alive."""


class Lock:
    """Holds a lock file as a context; `acquire` and `release` do the same.

    Args:
        path: the file; its folder is made, and removed again if nothing else was put into it.
        what: what is locked, as messages name it, e.g. 'output_dir: /data/run'.
        way_out: what else the user can do, e.g. 'choose another output_dir'.
        say: called when a holder on another host is watched for a sign of life.
    """

    def __init__(self, path: Path, what: str, way_out: str, say: Callable[[str], None] | None = None) -> None:
        self.path = path.absolute()
        self._what, self._way_out = what, way_out
        self._say = say or write_line
        self._token = uuid.uuid4().hex
        self._made: list[Path] = []
        self._done = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UserError: another process has it: which, where, and since when.
            OSError: the file cannot be written.
        """
        try:
            self._make_folders()
            while not self._put():
                self._look_at_holder()
        except BaseException:
            self._remove_folders()
            raise
        _mine.add(self._token)
        self._beating = threading.Thread(target=self._beat, name=f"lock of {self.path.parent.name}", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Gives it back, if it is held; may be called from any thread, and more than once."""
        if self._token not in _mine:
            return
        _mine.discard(self._token)
        self._done.set()
        if (_read(self.path) or {}).get("token") == self._token:
            self.path.unlink(missing_ok=True)
        self._remove_folders()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    # Taking it ----------------------------------------------------------------------------------

    def _make_folders(self) -> None:
        """Makes the folder of the file; NotADirectoryError names what is in the way."""
        for folder in reversed([self.path.parent, *self.path.parent.parents]):
            if folder.is_dir():
                continue
            try:
                folder.mkdir()
                self._made.append(folder)
            except FileExistsError:
                if folder.is_dir():
                    continue  # another process has just made it
                what = "it is a file" if folder.exists() else f"it is a link to {folder.readlink()}, which is not there"
                raise NotADirectoryError(errno.ENOTDIR, what, str(folder)) from None

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # something lies there by now
                folder.rmdir()

    def _put(self) -> bool:
        """Puts the file in place with its whole content; False when there is one."""
        content = json.dumps({"token": self._token, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), **_identity()})
        temporary = self.path.with_name(f"{self.path.name}.{self._token}")
        try:
            temporary.write_text(content + "\n", encoding="utf-8")
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError:  # no second names here, as on FAT and mounted buckets
                return self._create(content)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _create(self, content: str) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(content + "\n")
        except FileExistsError:
            return False
        return True

    def _look_at_holder(self) -> None:
        """Returns when the lock may be had, so that it is worth another try.

        Raises:
            UserError: its holder is alive.
        """
        holder = _read(self.path)
        if holder is None:
            return  # it has just been given back
        if _is_here(holder):
            if _alive(holder):
                raise InUse(self._refusal(holder, "this host"))
        elif not self._silent(holder):
            return
        self._clear(holder)

    def _silent(self, holder: dict[str, Any]) -> bool:
        """Whether a holder on another host gives no sign of life; False when the lock is another's by now.

        Raises:
            UserError: it gives one.
        """
        where = f"host {holder['host']}" if holder.get("host") else "an unknown host"
        first = _beat_of(self.path)
        deadline = time.monotonic() + SILENT_SECONDS
        self._say(
            f"{self._what}: pid {holder.get('pid', '?')} on {where} has it since {holder.get('started', '?')}; "
            f"watching {SILENT_SECONDS:g} s for a sign of life from it"
        )
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            beat = _beat_of(self.path)
            if beat is None or (_read(self.path) or {}).get("token") != holder.get("token"):
                return False
            if beat != first:
                raise InUse(self._refusal(holder, where))
        self._say(f"{self._what}: no sign of life; taking over what pid {holder.get('pid', '?')} on {where} left")
        return True

    def _clear(self, holder: dict[str, Any]) -> None:
        """Removes the lock of a holder that is gone, and no other."""
        aside = self.path.with_name(f"{self.path.name}.{self._token}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        try:
            if (_read(aside) or {}).get("token") != holder.get("token"):  # somebody was quicker: it is theirs
                try:
                    os.link(aside, self.path)
                except FileExistsError:
                    pass
                except OSError:
                    aside.rename(self.path)
        finally:
            aside.unlink(missing_ok=True)

    def _refusal(self, holder: dict[str, Any], where: str) -> str:
        pid = holder.get("pid", "?")
        stop = f"kill {pid}" if where == "this host" else f"there: kill {pid}"
        return (
            f"{self._what} is in use: by pid {pid} on {where}, since {holder.get('started', '?')}. Wait until it has "
            f"ended, stop it ({stop}), or {self._way_out}"
        )

    # Holding it ---------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            holder = _read(self.path)
            if holder is not None and holder.get("token") != self._token and self._token in _mine:
                # This process was stopped for so long that it counted as gone. Two must not write.
                write_line(
                    f"error: {self._what} was taken over by pid {holder.get('pid')} on host {holder.get('host')}, as "
                    "this process had given no sign of life; it ends, and writes nothing more"
                )
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(self.path)


def is_held(path: Path) -> bool:
    """Whether a living process has the lock file; elsewhere than on this host a recent sign of life tells it."""
    holder = _read(path)
    if holder is None:
        return False
    if _is_here(holder):
        # Which tokens are of this very process does not matter to one that only looks.
        return holder.get("pid") == os.getpid() or _alive(holder)
    beat = _beat_of(path)
    return beat is not None and time.time() - beat / 1e9 < 2 * SILENT_SECONDS


def _identity() -> dict[str, Any]:
    """Which process this is: host, boot and process numbers' namespace, number, and when it was started."""
    return {**_machine(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _machine() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace()}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _start_of(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; '' for a dead one, None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _is_here(holder: dict[str, Any]) -> bool:
    return all(holder.get(key) == value for key, value in _machine().items())


def _alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    if pid == os.getpid():
        return holder.get("token") in _mine
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # there is one, of another user
    start = _start_of(pid)
    return start is None or start == holder.get("start")


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock file says; {} for one that says nothing, None when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _beat_of(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opened, so that a network file system asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
