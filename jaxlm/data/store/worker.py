"""A process that tokenises: `python -m jaxlm.data.store.worker DESCRIPTOR`, started by `jaxlm.data.store.pool`."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import signal
import sys
from typing import Any

from jaxlm.data.tokenise import Tokeniser
from jaxlm.errors import UserError


def main(descriptor: int) -> None:
    """Answers batches with chunks until the connection closes, which it does when the other process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process ends the others
    with multiprocessing.connection.Connection(descriptor) as connection, contextlib.suppress(EOFError, OSError):
        tokeniser: Tokeniser = connection.recv()
        while True:
            batch = connection.recv()
            try:
                answer: tuple[str, Any] = "chunk", tokeniser.chunk(batch)
            except UserError as error:
                answer = "refused", str(error)
            connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
