"""Several processes as one run: start-up, barriers, agreement, and an end that all hear of.

`start` runs before any device is used. With one process it does nothing, and every method of `Hosts` is trivial.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from jaxlm.config import DistributedConfig, EvaluateConfig, GenerateConfig, RunConfig, flatten, to_dict
from jaxlm.errors import UserError, write_line
from jaxlm.lock import Lock
from jaxlm.processes.cluster import find_cluster, find_process, on_tpu_vm, only_cpu
from jaxlm.processes.control_channel import ControlChannel
from jaxlm.processes.coordination import Coordination, JaxCoordination
from jaxlm.processes.roll_call import Roll, call_roll

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain")
# Variables that make hosts compile different programs, which then wait for each other for ever.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
VERDICT_SECONDS = 10.0  # for a process whose collective failed, to hear which process died


class SharedError(UserError):
    """A mistake that every process has found at the same point, so that none tells the others."""


def start(config: DistributedConfig, say: Callable[[str], None]) -> Hosts:
    """Connects the processes of a run; before any device is touched. One process alone waits for nothing.

    Args:
        config: the `distributed` section.
        say: called, on process 0, with a line that names the processes that it waits for.

    Raises:
        UserError: for a process that is missing, an address that cannot be reached, numbers that do not fit.
    """
    on_tpu = on_tpu_vm()
    process = find_process(config, os.environ, on_tpu)
    if process is None:
        return Hosts()
    roll = call_roll(process, config.timeout, config.heartbeat, say)
    if only_cpu():
        _silence_gloo()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # CPUs compute what several threads dispatch at once, and not in the order of the dispatches as TPUs and GPUs do:
    # a process would answer a collective of one thread with that of another. Computed as dispatched, all agree.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Its handler would take SIGTERM away from the training loop; `Hosts.due` is the agreement.
    jax.config.update("jax_enable_preemption_service", False)
    # A cluster may say which GPUs belong to this process; Kubernetes shows a pod only its own.
    method = "deactivate" if find_cluster(os.environ, on_tpu) in (None, "Kubernetes job") else None
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            cluster_detection_method=method,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.timeout,
        )
    except RuntimeError as error:
        raise UserError(f"distributed: JAX could not start at {process.coordinator}: {error}") from error
    return Hosts(roll, JaxCoordination(), config.timeout)


def _silence_gloo() -> None:
    """Gives Python's `sys.stdout` a file descriptor of its own, and discards what C++ code prints on the old one.

    Gloo, which connects CPUs, reports its connections from several threads at once, in pieces that mix with other
    lines. The output of other libraries (NCCL_DEBUG) is useful, and stays.
    """
    sys.stdout.flush()
    own = os.dup(1)
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def versions() -> dict[str, str]:
    """What must be the same on all processes: this code, the packages it uses, and what changes compiled programs."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    versions = {"jaxlm's code": digest.hexdigest()[:12], "Python": ".".join(platform.python_version_tuple()[:2])}
    versions |= {name: _version(name) for name in PACKAGES}
    return versions | {name: os.environ.get(name, "") for name in VARIABLES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Hosts:
    """The processes of a run, seen from one of them; a context around everything they do together.

    An error that leaves the context is sent to the others, which then end too.

    Attributes:
        process: this process, from 0.
        processes: number of processes.
        log: writes output_dir/logs/process-NN.log; None for a single process.
        coordination: the service that the processes share; None for a single process.
    """

    def __init__(
        self, roll: Roll | None = None, coordination: Coordination | None = None, timeout: float = 300.0
    ) -> None:
        self.process, self.processes = 0, 1
        self.log: Console | None = None
        self._timeout = timeout
        self._channel: ControlChannel | None = None
        self.coordination = coordination
        if roll is not None and coordination is not None:
            self.process, self.processes = roll.process.index, roll.process.count
            self._coordination, self._coordinator = coordination, roll.process.coordinator
            self._channel = ControlChannel(roll, coordination, timeout)
        self._signal: str | None = None
        self._agreed: list[str] = []
        self._rounds: dict[str, int] = {}
        self._stderr = sys.stderr
        self._inside, self._at_end = False, list[Callable[[], None]]()

    # Output -------------------------------------------------------------------------------------

    def console(self, terminal: Console) -> Console:
        """The terminal on process 0, and what leads nowhere on the others."""
        return terminal if self.process == 0 else Console(file=io.StringIO(), width=120)

    def open_log(self, output_dir: Path) -> None:
        """From now on `log` writes below this run's output_dir."""
        if self._channel is None:
            return
        path = output_dir / "logs" / f"process-{self.process:02}.log"

        def open_it() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.log = Console(file=path.open("a", encoding="utf-8", buffering=1), width=160, no_color=True)

        self.check("output_dir", _os_problem("output_dir", open_it))
        assert self.log is not None
        if self.process:  # what libraries print there would stand between the lines of process 0
            sys.stdout.flush()
            os.dup2(self.log.file.fileno(), sys.stdout.fileno())
        name = self._channel.name(self.process)
        self.log.rule(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} of {self.processes}")
        self.log.print(f"pid {os.getpid()}, coordinator {self._coordinator}", highlight=False)
        self.log.print("\n".join(self._agreed), highlight=False)

    # Agreement ----------------------------------------------------------------------------------

    def barrier(self, name: str) -> None:
        """Waits until all processes have come here.

        Raises:
            UserError: after the time-out, naming the barrier and who has not come.
        """
        if self._channel is None:
            return
        key = self._key("barrier", name)
        self._coordination.put(f"{key}/{self.process}", "")
        if not self._coordination.barrier(key, self._timeout):
            arrived = self._coordination.values(key)
            missing = ", ".join(self._channel.name(n) for n in range(self.processes) if n not in arrived)
            raise UserError(
                f"barrier {name!r}: after {self._timeout:g} s not there: {missing or 'nobody, but too late'}; see its "
                "log for what it is doing, or raise distributed.timeout if that takes so long"
            )

    def _key(self, kind: str, name: str) -> str:
        """A key of its own for each round, because the key-value store keeps its values."""
        full = f"jaxlm/{kind}/{name}"
        self._rounds[full] = self._rounds.get(full, -1) + 1
        return f"{full}/{self._rounds[full]}"

    def exchange(self, name: str, value: str) -> list[str]:
        """One text from every process, in their order."""
        if self._channel is None:
            return [value]
        key = self._key("exchange", name)
        self._coordination.put(f"{key}/{self.process}", value)
        self.barrier(name)
        values = self._coordination.values(key)
        return [values[number] for number in range(self.processes)]

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Checks that all processes have the same values; hashes travel, the values only when these differ.

        Raises:
            UserError: on every process, naming the process, the keys and both values.
        """
        if self._channel is None:
            return
        texts = {key: json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}
        mine = json.dumps(texts, sort_keys=True)
        digests = self.exchange(what, hashlib.sha256(mine.encode()).hexdigest())
        if len(set(digests)) == 1:
            self._agreed.append(f"all {self.processes} processes have the same {what}: {digests[0][:12]}")
            if self.log is not None:
                self.log.print(self._agreed[-1], highlight=False)
            return
        everybody = [json.loads(text) for text in self.exchange(f"{what}, in full", mine)]
        first, differences = everybody[0], []
        for number, theirs in enumerate(everybody):
            keys = [key for key in sorted(first.keys() | theirs.keys()) if first.get(key) != theirs.get(key)]
            shown = [f"{key} is {theirs.get(key, 'absent')}, not {first.get(key, 'absent')}" for key in keys[:5]]
            if keys:
                more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
                differences.append(f"on {self._channel.name(number)} {'; '.join(shown)}{more}")
        more = f"; and on {len(differences) - 4} more" if len(differences) > 4 else ""
        raise SharedError(
            f"the processes differ from {self._channel.name(0)} in their {what}: {'; '.join(differences[:4])}{more}. "
            "Start all of them with the same"
        )

    def check(self, what: str, problem: str | None) -> None:
        """Fails everywhere if any process has a problem.

        Raises:
            UserError: on every process, naming those that have one.
        """
        if self._channel is None:
            if problem is not None:
                raise UserError(problem)
            return
        problems = self.exchange(what, problem or "")
        named = [f"{self._channel.name(n)}: {text}" for n, text in enumerate(problems) if text]
        if named:
            more = f"; and on {len(named) - 4} more" if len(named) > 4 else ""
            raise SharedError(f"{'; '.join(named[:4])}{more}")

    def first_then_all(self, what: str, action: Callable[[], None]) -> None:
        """Process 0 acts, then the others, which find what it put on shared storage; all wait, however long it takes.

        Raises:
            UserError: on every process, naming those whose action raised one.
        """
        if self._channel is None:
            action()
            return
        for is_first in (True, False):
            outcome: list[BaseException | None] = []
            worker = threading.Thread(target=lambda done=outcome: done.append(_raised(action)), daemon=True)
            if (self.process == 0) == is_first:
                worker.start()
            else:
                outcome.append(None)
            # No barrier may be as long as a download: whoever is busy says so more often than the time-out.
            while True:
                if not outcome:
                    worker.join(min(10.0, self._timeout / 4))
                if "busy" not in self.exchange(what, "" if outcome else "busy"):
                    break
            error = outcome[0]
            if error is not None and not isinstance(error, UserError):
                raise error
            self.check(what, None if error is None else str(error))

    def take(self, lock: Lock) -> None:
        """Holds a lock until the processes' work ends, in any way; outside of their context it does nothing.

        Raises:
            UserError: another process has it.
            OSError: it cannot be written.
        """
        if self._inside:
            lock.acquire()
            self._at_end.append(lock.release)

    def take_directory(self, output_dir: Path, say: Callable[[str], None]) -> None:
        """Locks a run directory: process 0 holds the lock for all.

        Raises:
            UserError: on every process, when another run has it: which.
        """
        way_out = "choose another output_dir"
        lock = Lock(output_dir / "run.lock", f"output_dir: {output_dir.absolute()}", way_out, say)
        problem = None
        if self.process == 0:
            try:
                problem = _os_problem("output_dir", lambda: self.take(lock))
            except UserError as error:
                problem = str(error)
        self.check("output_dir is free", problem)

    def _release(self) -> None:
        while self._at_end:
            self._at_end.pop()()

    def check_shared(self, directory: Path) -> None:
        """Checks that all processes see one and the same directory, and can write there.

        Raises:
            UserError: on every process, naming those that cannot.
        """

        def write() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            own = directory / f".write-test-{self.process}-{os.getpid()}"
            own.write_bytes(b"")
            own.unlink()

        self.check("output_dir", _os_problem("output_dir", write))
        if self._channel is None:
            return
        token = directory / f".seen-by-all-{self.exchange('token', os.urandom(8).hex())[0]}"
        if self.process == 0:
            token.write_bytes(b"")
        self.barrier("output_dir written")
        deadline = time.monotonic() + min(5.0, self._timeout / 2)  # network file systems show it late
        while not (seen := token.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        problem = None
        if not seen:
            problem = (
                f"output_dir: {directory.absolute()} here is not the directory that {self._channel.name(0)} writes to; "
                "it must lie on storage that all hosts share"
            )
        try:
            self.check("output_dir shared", problem)
        finally:
            if self.process == 0:
                token.unlink(missing_ok=True)

    # Stopping -----------------------------------------------------------------------------------

    def ask_stop(self, signal_name: str) -> None:
        """Asks all processes to stop; called by signal handlers."""
        self._signal = signal_name
        if self._channel is not None:
            self._channel.ask_stop(signal_name)

    def due(self) -> bool:
        """Whether all are to stop: the same answer on every process at the same call."""
        return self._signal is not None if self._channel is None else self._channel.due()

    def abandon(self, text: str, status: int) -> None:
        """Tells the others, which end too, and the log why this process ends; the caller is about to end it."""
        if self.log is not None:
            self.log.print(text, highlight=False, markup=False, soft_wrap=True)
        self._release()
        if self._channel is not None:
            self._channel.fail(text, status)

    @property
    def stopped_by(self) -> str | None:
        """What asked for the stop, once all have agreed to it, e.g. 'SIGTERM' or 'SIGTERM on process 1 (host)'."""
        return self._signal if self._channel is None else self._channel.stopped_by

    # The end ------------------------------------------------------------------------------------

    def __enter__(self) -> Hosts:
        self._inside = True
        if self._channel is not None:
            self._channel.watch(self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends together with the others; after an error this process ends at once, without JAX's own shutdown."""
        self._inside = False
        self._release()
        if self._channel is None:
            return
        if error is None:
            self.barrier("the end")
            self._channel.close()
            jax.distributed.shutdown()
            return
        if isinstance(error, SystemExit) and not error.code:
            return
        known = isinstance(error, (UserError, OSError))
        # When a process dies, a collective fails on those that wait for it: they are about to hear which it was.
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(VERDICT_SECONDS)
        self._say(f"error: {error}" if known else "".join(traceback.format_exception(kind, error, at)).rstrip())
        first_line = (str(error).splitlines() or [""])[0]
        if isinstance(error, SharedError):
            self._channel.leave()
        else:
            self._channel.fail(first_line if isinstance(error, UserError) else f"{type(error).__name__}: {first_line}")
        # Not through sys.exit: JAX would wait for the others, and other threads may hang in a collective for ever.
        os._exit(2 if known else 1)

    def _end(self, why: str) -> None:
        self._say(f"error: {why}; process {self.process} ends too. Start all of them again to go on")
        self._release()
        os._exit(1 if self._channel is None else self._channel.end_status)

    def _say(self, text: str) -> None:
        """Prints on the stderr of the start, and in the log."""
        if self.log is not None:
            self.log.print(text, highlight=False, markup=False, soft_wrap=True)
        with contextlib.suppress(OSError, ValueError):
            write_line(text, self._stderr)
            sys.stdout.flush()


def _raised(action: Callable[[], None]) -> BaseException | None:
    """What an action raises, so that a thread can hand it on."""
    try:
        action()
    except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
        return error
    return None


def _os_problem(key: str, action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{key}: {error.filename}: cannot write there ({error.strerror}); choose another"
    return None


def run_settings(config: RunConfig | GenerateConfig | EvaluateConfig) -> dict[str, Any]:
    """The keys that all processes must share: all but process_id."""
    values = flatten(_numbered(to_dict(config)))
    return {key: value for key, value in values.items() if key != "distributed.process_id"}


def _numbered(value: Any) -> Any:
    """Lists as {'0': …}, so that a difference names the entry."""
    if isinstance(value, list):
        value = {str(number): entry for number, entry in enumerate(value)}
    return {key: _numbered(entry) for key, entry in value.items()} if isinstance(value, dict) else value
