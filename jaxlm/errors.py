"""The exception for mistakes that a user can mend, and how a command ends with one."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """Wrong input: the commands print the message without a traceback and exit with status 2.

    The message names the key or file, the value found, and the way out.
    """


MISTAKE = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT


def exit_status(command: Callable[[], int | None], *, prefix: str = "error", interrupted: str = "interrupted") -> int:
    """Runs a command and says what went wrong in one line on stderr.

    Args:
        command: the command; it returns its exit status, None for 0.
        prefix: what the line begins with.
        interrupted: the line after Ctrl-C.

    Returns:
        the command's own status; 2 after a mistake in the input, or a file that cannot be read or written; 130 after
        Ctrl-C. A reader that takes only the beginning of the output, as `| head` does, is not a mistake: 0.
    """
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        write_line(f"{prefix}: {error}")
        return MISTAKE
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 0
        way_out = "; free some space, or write elsewhere" if error.errno == errno.ENOSPC else ""
        where = error.filename or "input or output"
        write_line(f"{prefix}: {where}: {error.strerror or error}{way_out}")
        return MISTAKE
    except KeyboardInterrupt:
        write_line(interrupted)
        return INTERRUPTED


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Writes a line on stderr, or on `stream`, at once.

    `print` writes the end of the line by itself where Python does not buffer (PYTHONUNBUFFERED=1), and the lines of
    processes that share a terminal or a file run into each other.
    """
    stream = sys.stderr if stream is None else stream
    stream.write(f"{text}\n")
    stream.flush()


def show(text: str) -> None:
    """Prints a long text, of which a reader such as `head` may take only the beginning."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard_output()


def _is_output_closed() -> bool:
    """Whether it is our own output that nobody reads any more; then what is flushed at the end goes nowhere.

    The system is asked, because a write that failed may have left nothing to flush.
    """
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file of the system's: a notebook's, or a test's
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    _discard_output()
    return True


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
