"""SIGTERM and Ctrl-C during a run, in any phase: importing, compiling, stepping, saving.

Python runs its signal handlers between two instructions of the main thread, which spends minutes inside a compiler. The
number of a signal is written to a pipe at once, and a thread reads it there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from jaxlm.errors import write_line

AGAIN = "Run the same command again to"


class _Hosts(Protocol):
    def ask_stop(self, signal_name: str) -> None: ...

    def abandon(self, text: str, status: int) -> None: ...


class Stop:
    """Follows the signals of a run, as a context around all of it.

    Until `stepping` a signal ends the process: there is nothing to save. From then on the first one asks all processes
    to save and end (`Hosts.ask_stop`), and a second Ctrl-C ends this one at once. After `finished` nothing is left to
    save either.

    Attributes:
        exit_status: of a run that a signal ended before anything was saved; 0: 128 + the signal's number.
    """

    def __init__(self) -> None:
        self.exit_status = 0
        self._hosts: _Hosts | None = None
        self._output_dir: Path | None = None
        self._stepping, self._finished = False, False
        self._saving_asked, self._last = False, True
        self._before: dict[signal.Signals, Any] = {}

    # Phases of the run --------------------------------------------------------------------------

    def starting(self, output_dir: Path, hosts: _Hosts, last: bool = True) -> None:
        """A run into this directory begins; what it computes before its first step is lost when a signal ends it.

        Args:
            last: whether no other stage follows.
        """
        self._stepping, self._finished = False, False
        self._output_dir, self._hosts, self._last = output_dir, hosts, last

    def stepping(self) -> None:
        """From now on there is something to save."""
        self._stepping = True
        self._catch()  # again, as libraries have been loaded since

    def finished(self) -> None:
        """All steps are done and saved."""
        self._finished = True

    def kept(self) -> str:
        """A sentence that says from which step the next start goes on."""
        step = None if self._output_dir is None else newest_step(self._output_dir)
        if step is None:
            return f"nothing is saved yet. {AGAIN} begin"
        assert self._output_dir is not None
        checkpoint = self._output_dir / "checkpoints" / str(step)
        if self._finished:
            return f"step {step} in {checkpoint} is its last." + (
                "" if self._last else f" {AGAIN} go on with the next stage"
            )
        return f"step {step} in {checkpoint} is kept. {AGAIN} go on from there"

    def status(self, number: int) -> int:
        """Exit status of a run that this signal ended before anything was saved: never 0, which means done."""
        return self.exit_status or 128 + number

    # Signals ------------------------------------------------------------------------------------

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self  # where no signals can be followed
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._catch()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _catch(self) -> None:
        if not self._before:
            return
        for number in self._before:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] in self._before:
                self._receive(signal.Signals(received[0]))

    def _receive(self, number: signal.Signals) -> None:
        """Acts on a signal; runs in the thread that watches."""
        if self._finished:
            self._end(f"{number.name}: the run is complete; {self.kept()}", 0 if self._last else self.status(number))
        elif not self._stepping:
            self._end(f"{number.name} before a step was done: {self.kept()}", self.status(number))
        elif self._saving_asked and number == signal.SIGINT:
            self._end(f"{number.name} again, without waiting for the save: {self.kept()}", 128 + number)
        else:
            self._saving_asked = True
            assert self._hosts is not None
            self._hosts.ask_stop(number.name)

    def _end(self, text: str, status: int) -> None:
        """Ends the process from this thread: the main thread may be inside a compiler for minutes."""
        for child in multiprocessing.active_children():
            child.kill()
        if self._hosts is not None:
            self._hosts.abandon(text, status)
        say(text)
        os._exit(status)


class StopAtOnce(Stop):
    """For work that saves its results as it goes on and has nothing to do at its end: a signal ends it at once.

    Args:
        text: the message that is printed then.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def _receive(self, number: signal.Signals) -> None:
        self._end(self._text, self.status(number))


def newest_step(output_dir: Path) -> int | None:
    """The newest complete checkpoint of a run directory; one that is being written has another name."""
    steps = [int(path.name) for path in (output_dir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def say(text: str) -> None:
    """Prints on the terminal, whose cursor a progress bar may have hidden."""
    if sys.stderr.isatty():
        text = f"\x1b[?25h\n{text}"
    write_line(text)
    sys.stdout.flush()
