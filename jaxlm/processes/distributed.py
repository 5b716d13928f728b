"""Several processes as one run: start-up, barriers, agreement, and an end that all hear of.

`start` comes before any device is touched. With one process it does nothing, and every method of `Hosts` is trivial.
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
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from jaxlm.config import DistributedConfig, GenerateConfig, RunConfig, flatten, to_dict
from jaxlm.errors import UserError
from jaxlm.lock import Lock
from jaxlm.processes.links import Links, Place, call_roll

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain")
# What compiles other programs on one host than on another, which then wait for each other for ever.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
VERDICT_SECONDS = 10.0  # how long a process whose collective failed waits to hear who died


class SharedError(UserError):
    """A mistake that every process has found at the same point: nobody needs to be told."""


def find_cluster(environ: Mapping[str, str], on_tpu_vm: bool) -> str | None:
    """The kind of cluster that has started several processes, by the variables it sets; None for a single process.

    Args:
        environ: the environment.
        on_tpu_vm: whether JAX found TPU chips on this machine.
    """

    def count(name: str) -> int:
        return int(environ[name]) if environ.get(name, "").isdigit() else 1

    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    # SLURM_STEP_NODELIST: started by srun, and not the batch script around it.
    if count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environ:
        return "Slurm"
    if on_tpu_vm and ("," in workers or count("MEGASCALE_NUM_SLICES") > 1):
        return "TPU on GKE"
    if on_tpu_vm and not workers and "TPU_SKIP_MDS_QUERY" not in environ:
        return "TPU pod"
    if not on_tpu_vm and "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes job"
    return None


def find_place(config: DistributedConfig, environ: Mapping[str, str], on_tpu_vm: bool = False) -> Place | None:
    """Where this process stands: by the configuration, else JAX_* variables, else what the cluster tells.

    Returns:
        None for a single process.

    Raises:
        UserError: for numbers that do not fit, naming what is missing.
    """
    coordinator = config.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(config.num_processes, environ, "JAX_NUM_PROCESSES")
    process = _number(config.process_id, environ, "JAX_PROCESS_ID")
    cluster = find_cluster(environ, on_tpu_vm)
    if cluster == "Open MPI":  # which tells no address that every version of it agrees on
        processes = int(environ["OMPI_COMM_WORLD_SIZE"]) if processes is None else processes
        process = int(environ["OMPI_COMM_WORLD_RANK"]) if process is None else process
    if cluster is not None and None in (coordinator, processes, process):
        coordinator, processes, process = _ask_cluster(cluster, config.timeout, coordinator, processes, process)
    if (coordinator, processes, process) == (None, None, None) or processes == 1:
        return None
    found = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in found.items() if value is None]
    if missing or coordinator is None or processes is None or process is None:
        where = f"{cluster} does not tell it" if cluster else "no cluster found that tells it"
        raise UserError(
            f"distributed: {', '.join(missing)} missing ({where}); give --coordinator HOST:PORT, "
            "--num_processes N and --process_id I"
        )
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"distributed.process_id: {process} of {processes} processes; it must be from 0 to {max(processes, 1) - 1}"
        )
    return Place(coordinator, processes, process)


def _number(given: int | None, environ: Mapping[str, str], name: str) -> int | None:
    if given is not None or name not in environ:
        return given
    if not environ[name].isdigit():
        raise UserError(f"{name}: {environ[name]!r} in the environment is not a whole number")
    return int(environ[name])


def _ask_cluster(
    cluster: str, timeout: int, coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str | None, int | None, int | None]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it has no public name

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, process, None, None, timeout)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"distributed: this is a process of {cluster}, whose other processes could not be found "
            f"({type(error).__name__}: {error}); give --coordinator HOST:PORT, --num_processes N and --process_id I"
        ) from error
    return found[:3]


def start(config: DistributedConfig, say: Callable[[str], None]) -> Hosts:
    """Connects the processes of a run; before any device is touched. One process alone waits for nothing.

    Args:
        config: the `distributed` section.
        say: told, on process 0, whom it is waiting for.

    Raises:
        UserError: for a process that is missing, an address that cannot be reached, numbers that do not fit.
    """
    from jax._src import cloud_tpu_init

    on_tpu_vm = cloud_tpu_init.running_in_cloud_tpu_vm and not _only_cpu()
    place = find_place(config, os.environ, on_tpu_vm)
    if place is None:
        return Hosts()
    links = call_roll(place, config.timeout, config.heartbeat, say)
    if _only_cpu():
        _silence_gloo()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM away from the training loop; `Hosts.due` is the agreement.
    jax.config.update("jax_enable_preemption_service", False)
    # A cluster may tell which GPUs are mine; Kubernetes gives a pod what is its own.
    method = "deactivate" if find_cluster(os.environ, on_tpu_vm) in (None, "Kubernetes job") else None
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            cluster_detection_method=method,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.timeout,
        )
    except RuntimeError as error:
        raise UserError(f"distributed: JAX could not start at {place.coordinator}: {error}") from error
    return Hosts(links, config.timeout)


def _silence_gloo() -> None:
    """Gives Python's `sys.stdout` a way out of its own, and what C++ prints there nowhere to go.

    Gloo, which connects CPUs, tells of its connections from several threads at once, in pieces that break into lines.
    Others have more to say (NCCL_DEBUG), and are let be.
    """
    sys.stdout.flush()
    own = os.dup(1)
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _only_cpu() -> bool:
    return (getattr(jax.config, "jax_platforms", None) or "").split(",")[0] == "cpu"


def versions() -> dict[str, str]:
    """What must be the same everywhere: this code, the packages below it, and what changes compiled programs."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"jaxlm's code": digest.hexdigest()[:12], "Python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: _version(name) for name in PACKAGES}
    return found | {name: os.environ.get(name, "") for name in VARIABLES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Hosts:
    """The processes of a run, seen from one of them; a context around everything they do together.

    An error that leaves the context is told to the others, which then end too.

    Attributes:
        process: this process, from 0.
        processes: how many there are.
        log: writes output_dir/logs/process-NN.log; None for a single process.
    """

    def __init__(self, links: Links | None = None, timeout: float = 300.0) -> None:
        self.process = 0 if links is None else links.place.process
        self.processes = 1 if links is None else links.place.processes
        self.log: Console | None = None
        self._links, self._timeout = links, timeout
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
        if self._links is None:
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
        links = self._links
        self.log.rule(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {links.name(self.process)} of {self.processes}")
        self.log.print(f"pid {os.getpid()}, coordinator {links.place.coordinator}", highlight=False)
        self.log.print("\n".join(self._agreed), highlight=False)

    # Agreement ----------------------------------------------------------------------------------

    def barrier(self, name: str) -> None:
        """Waits until all processes are here.

        Raises:
            UserError: after the time-out, naming the barrier and who has not come.
        """
        if self._links is None:
            return
        key = self._key("barrier", name)
        client = _client()
        client.key_value_set(f"{key}/{self.process}", "")
        try:
            client.wait_at_barrier(key, int(self._timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            came = {int(found.rpartition("/")[2]) for found, _ in client.key_value_dir_get(f"{key}/")}
            missing = ", ".join(self._links.name(n) for n in range(self.processes) if n not in came)
            raise UserError(
                f"barrier {name!r}: after {self._timeout:g} s not there: {missing or 'nobody, but too late'}; see its "
                "log for what it is doing, or raise distributed.timeout if that takes so long"
            ) from None

    def _key(self, kind: str, name: str) -> str:
        """A name of its own for each round: the key-value store forgets nothing."""
        full = f"jaxlm/{kind}/{name}"
        self._rounds[full] = self._rounds.get(full, -1) + 1
        return f"{full}/{self._rounds[full]}"

    def exchange(self, name: str, value: str) -> list[str]:
        """One text from every process, in their order."""
        if self._links is None:
            return [value]
        key = self._key("exchange", name)
        client = _client()
        client.key_value_set(f"{key}/{self.process}", value)
        self.barrier(name)
        found = {int(path.rpartition("/")[2]): text for path, text in client.key_value_dir_get(f"{key}/")}
        return [found[number] for number in range(self.processes)]

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Checks that all processes have the same values; hashes travel, the values only when these differ.

        Raises:
            UserError: on every process, naming the process, the keys and both values.
        """
        if self._links is None:
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
        first, found = everybody[0], []
        for number, theirs in enumerate(everybody):
            keys = [key for key in sorted(first.keys() | theirs.keys()) if first.get(key) != theirs.get(key)]
            shown = [f"{key} is {theirs.get(key, 'absent')}, not {first.get(key, 'absent')}" for key in keys[:5]]
            if keys:
                more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
                found.append(f"on {self._links.name(number)} {'; '.join(shown)}{more}")
        more = f"; and on {len(found) - 4} more" if len(found) > 4 else ""
        raise SharedError(
            f"the processes differ from {self._links.name(0)} in their {what}: {'; '.join(found[:4])}{more}. "
            "Start all of them with the same"
        )

    def check(self, what: str, problem: str | None) -> None:
        """Fails everywhere if any process has a problem.

        Raises:
            UserError: on every process, naming those that have one.
        """
        if self._links is None:
            if problem is not None:
                raise UserError(problem)
            return
        problems = self.exchange(what, problem or "")
        found = [f"{self._links.name(n)}: {text}" for n, text in enumerate(problems) if text]
        if found:
            more = f"; and on {len(found) - 4} more" if len(found) > 4 else ""
            raise SharedError(f"{'; '.join(found[:4])}{more}")

    def take(self, lock: Lock) -> None:
        """Holds a lock until the processes' work is over, however it ends; outside of their context nothing is taken.

        Raises:
            UserError: another process has it.
            OSError: it cannot be written.
        """
        if self._inside:
            lock.acquire()
            self._at_end.append(lock.release)

    def take_directory(self, output_dir: Path, say: Callable[[str], None]) -> None:
        """Has a run directory to itself: process 0 holds its lock for all.

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
        if self._links is None:
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
                f"output_dir: {directory.absolute()} here is not the directory that {self._links.name(0)} writes to; "
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
        if self._links is not None:
            self._links.ask_stop(signal_name)

    def due(self) -> bool:
        """Whether all are to stop: the same answer on every process at the same call."""
        return self._signal is not None if self._links is None else self._links.due()

    def abandon(self, text: str, status: int) -> None:
        """Tells the others, and the log, why this process ends, and they with it; the caller is about to end it."""
        if self.log is not None:
            self.log.print(text, highlight=False, markup=False, soft_wrap=True)
        self._release()
        if self._links is not None:
            self._links.fail(text, status)

    @property
    def stopped_by(self) -> str | None:
        """What asked for the stop, once it is agreed upon, e.g. 'SIGTERM' or 'SIGTERM on process 1 (host)'."""
        return self._signal if self._links is None else self._links.stopped_by

    # The end ------------------------------------------------------------------------------------

    def __enter__(self) -> Hosts:
        self._inside = True
        if self._links is not None:
            self._links.watch(self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends together with the others; after an error this process ends here, without waiting for JAX's own end."""
        self._inside = False
        self._release()
        if self._links is None:
            return
        if error is None:
            self.barrier("the end")
            self._links.close()
            jax.distributed.shutdown()
            return
        if isinstance(error, SystemExit) and not error.code:
            return
        known = isinstance(error, (UserError, OSError))
        # A collective fails on those that wait for the one that died: who that is they are about to hear.
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(VERDICT_SECONDS)
        self._say(f"error: {error}" if known else "".join(traceback.format_exception(kind, error, at)).rstrip())
        first_line = (str(error).splitlines() or [""])[0]
        if isinstance(error, SharedError):
            self._links.leave()
        else:
            self._links.fail(first_line if isinstance(error, UserError) else f"{type(error).__name__}: {first_line}")
        # Not through sys.exit: JAX would wait for the others, and other threads may hang in a collective for ever.
        os._exit(2 if known else 1)

    def _end(self, why: str) -> None:
        self._say(f"error: {why}; process {self.process} ends too. Start all of them again to go on")
        self._release()
        os._exit(1 if self._links is None else self._links.end_status)

    def _say(self, text: str) -> None:
        """On stderr, whatever stands there by now, and in the log."""
        if self.log is not None:
            self.log.print(text, highlight=False, markup=False, soft_wrap=True)
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self._stderr, flush=True)
            sys.stdout.flush()


def _os_problem(key: str, action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{key}: {error.filename}: cannot write there ({error.strerror}); choose another"
    return None


def _client() -> Any:
    from jax._src import distributed  # the coordination service's client has no public name

    return distributed.global_state.client


def run_settings(config: RunConfig | GenerateConfig) -> dict[str, Any]:
    """The keys that all processes must share: all but which process this is."""
    values = flatten(_numbered(to_dict(config)))
    return {key: value for key, value in values.items() if key != "distributed.process_id"}


def _numbered(value: Any) -> Any:
    """Lists as {'0': …}, so that a difference names the item."""
    if isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    return {key: _numbered(item) for key, item in value.items()} if isinstance(value, dict) else value
