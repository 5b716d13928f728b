"""`python launch/local.py --processes 2 --devices 4 -- --config FILE [--key value ...]`: a run of several hosts, dry.

Starts processes of `jaxlm.train` on this machine, each with CPU devices of its own, connected as
hosts would be. What is said after `--` goes to each of them; their lines come out whole, with [number] in front. When
one fails, all end.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

GLOO = re.compile(r"\[Gloo\] Rank| ?is connected to| ?peer ranks\.|Expected number of connected peer ranks is ?:")
GRACE_SECONDS = 30  # what the others get to say why they end, before they are killed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the first process that failed (128 + its number for one ended by a signal), or 0."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many 'hosts' (default 2)")
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="CPU devices of each (default 2)")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator (default: a free one)")
    parser.add_argument("--module", default="jaxlm.train", help="the command (default jaxlm.train)")
    parser.add_argument("words", nargs="*", metavar="-- WORDS", help="the words of the command")
    given = parser.parse_args(argv)
    for name in ("processes", "devices"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}: {getattr(given, name)} must be at least 1")
    if not given.words:
        parser.error("nothing to start; give the command's words after --, e.g. -- --config configs/quickstart.yaml")
    return _run(given.processes, given.devices, given.port or _free_port(), given.module, given.words)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(processes: int, devices: int, port: int, module: str, words: Sequence[str]) -> int:
    # Cluster variables of the shell this is started from would send the processes elsewhere.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    started: list[subprocess.Popen[str]] = []
    readers = []
    for number in range(processes):
        place = ["--coordinator", f"localhost:{port}", "--num_processes", str(processes), "--process_id", str(number)]
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words, *place],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C comes here, and is passed on once
        )
        started.append(process)
        assert process.stdout is not None
        readers.append(threading.Thread(target=_copy, args=(process.stdout, number), daemon=True))
        readers[-1].start()

    def pass_on(received: int, frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(received)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = _wait(started)
    for reader in readers:
        reader.join(5)
    return status


def _copy(stream: IO[str], number: int) -> None:
    for line in without_gloo(stream):
        # In one write: lines of several processes come at the same time.
        sys.stdout.write(f"[{number}] {line}\n")
        sys.stdout.flush()


def without_gloo(lines: Iterable[str]) -> Iterator[str]:
    """Whole lines, without what Gloo says of its connections: from several threads, in pieces between each other.

    "[Gloo] Rank 0[Gloo] Rank 0 is connected to 1 peer ranks. ..." is one of its own, and the end of the second may be a
    line of a few digits.
    """
    after_gloo = False
    for line in lines:
        text = line.rstrip("\r\n")
        rest = GLOO.sub(" ", text)
        of_gloo = rest != text
        if (of_gloo or after_gloo) and not rest.strip(" 0123456789"):
            after_gloo = True
            continue
        after_gloo = of_gloo
        yield re.sub(r"^[\d ]*", "", rest).rstrip() if of_gloo else text


def _wait(started: Sequence[subprocess.Popen[str]]) -> int:
    """Until all have ended; those that outlive a failed one too long are killed."""
    status, deadline = 0, None
    while True:
        codes = [process.poll() for process in started]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed and not status:
            number, code = failed[0]
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            print(f"process {number} ended by {how}; all end", file=sys.stderr, flush=True)
            status, deadline = 128 - code if code < 0 else code, time.monotonic() + GRACE_SECONDS
        if None not in codes:
            return status
        if deadline is not None and time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
