"""Clusters, roll call, control channel, barriers and agreement: threads and small processes, no model."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import DistributedConfig
from jaxlm.errors import UserError
from jaxlm.processes.cluster import find_cluster, find_process
from jaxlm.processes.control_channel import ControlChannel
from jaxlm.processes.distributed import Hosts
from jaxlm.processes.roll_call import Process, Roll, call_roll

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# Which process is this -------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc,w-2.svc", "TPU_WORKER_ID": "2"}


@pytest.mark.parametrize(
    ("environ", "tpu", "cluster"),
    [
        ({}, False, None),
        (SLURM, False, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, False, None),  # the batch script, not srun
        (MPI, False, "Open MPI"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        (GKE, True, "TPU on GKE"),
        (GKE, False, None),  # libtpu is told of hosts, but there is no chip
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True, "TPU on GKE"),
        ({}, True, "TPU pod"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),  # a notebook
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False, "Kubernetes job"),
    ],
)
def test_clusters(environ: dict[str, str], tpu: bool, cluster: str | None) -> None:
    assert find_cluster(environ, tpu) == cluster


def test_which_process_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given = DistributedConfig(coordinator="a:1", num_processes=2, process_id=1)
    assert find_process(given, {}) == Process("a:1", 2, 1)
    variables = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
    assert find_process(DistributedConfig(), variables) == Process("b:2", 3, 0)
    assert find_process(given, variables) == Process("a:1", 2, 1)
    assert find_process(DistributedConfig(), {}) is None
    assert find_process(DistributedConfig(num_processes=1), {}) is None
    assert find_process(DistributedConfig(coordinator="a:1"), MPI) == Process("a:1", 2, 1)
    for name, value in SLURM.items():  # JAX itself reads Slurm's variables, from the environment
        monkeypatch.setenv(name, value)
    assert find_process(DistributedConfig(), SLURM) == Process(f"gpu07:{4100 % 4096 + 65535 - 4095}", 4, 3)


@pytest.mark.parametrize(
    ("config", "environ", "words"),
    [
        (dict(coordinator="a:1"), {}, r"--num_processes, --process_id missing \(no cluster that sets it"),
        (dict(num_processes=2, process_id=0), {}, r"--coordinator missing"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), {}, r"process_id: 2 of 2 processes; .* from 0 to 1"),
        (dict(coordinator="a:1", num_processes=2, process_id=-1), {}, r"process_id: -1"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, r"JAX_NUM_PROCESSES: 'two' in the environment is not a whole number"),
        ({}, MPI, r"Open MPI.*--coordinator"),
    ],
)
def test_numbers_that_do_not_fit(config: dict[str, Any], environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_process(DistributedConfig(**config), environ)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http", "host:99999"])
def test_address(address: str) -> None:
    with pytest.raises(UserError, match=r"must be HOST:PORT"):
        Process(address, 2, 0).address()


# Roll call and control channel: threads stand for processes -------------------------------------


class Memory:
    """The coordination service as a dict, for threads."""

    def __init__(self, count: int) -> None:
        self.stored: dict[str, str] = {}
        self.changed = threading.Condition()
        self.barriers: collections.defaultdict[str, threading.Barrier] = collections.defaultdict(
            lambda: threading.Barrier(count)
        )

    def put(self, key: str, value: str) -> bool:
        with self.changed:
            new = self.stored.setdefault(key, value) is value
            self.changed.notify_all()
            return new

    def wait(self, key: str) -> str:
        with self.changed:
            self.changed.wait_for(lambda: key in self.stored)
            return self.stored[key]

    def forget(self, key: str) -> None:
        with self.changed:
            self.stored.pop(key, None)

    def values(self, key: str) -> dict[int, str]:
        with self.changed:
            found = {k.rpartition("/"): text for k, text in self.stored.items()}
            return {int(number): text for (parent, _, number), text in found.items() if parent == key}

    def barrier(self, name: str, seconds: float) -> bool:
        with self.changed:
            barrier = self.barriers[name]
        try:
            barrier.wait(seconds)
        except threading.BrokenBarrierError:
            return False
        return True


def together(port: int, ids: list[int], count: int, timeout: float = 20) -> dict[int, Roll | UserError]:
    results: dict[int, Roll | UserError] = {}

    def call(at: int, index: int) -> None:
        try:
            results[at] = call_roll(Process(f"localhost:{port}", count, index), timeout, 10, lambda text: None)
        except UserError as error:
            results[at] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def vanish(channel: ControlChannel) -> None:
    """Does what the kernel does when a process ends; its threads, which live on here, are to say nothing."""
    channel._leaving = True
    for connection in list(channel._roll.connections.values()):
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)


def connected(count: int, timeout: float = 20) -> tuple[list[ControlChannel], dict[int, str]]:
    """A channel for each process, and, once they end, why by process."""
    rolls, service = together(free_port(), list(range(count)), count), Memory(count)
    channels = [ControlChannel(roll, service, timeout) for _, roll in sorted(rolls.items()) if isinstance(roll, Roll)]
    assert len(channels) == count, rolls
    ends: dict[int, str] = {}
    for number, channel in enumerate(channels):
        channel.watch(lambda why, number=number: (ends.__setitem__(number, why), vanish(channels[number]))[0])
    return channels, ends


def test_all_stop_at_the_same_call_wherever_they_are() -> None:
    channels, ends = connected(4, timeout=3600)
    calls = [0] * 4

    def loop(number: int) -> None:
        while not channels[number].due():
            calls[number] += 1
            time.sleep(0.001 * (number + 1) ** 2)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    channels[2].ask_stop("SIGTERM")
    channels[1].ask_stop("SIGINT")  # a second one changes nothing
    # The slow ones come to the same call later, as they would when steps keep them together.
    for thread in threads:
        thread.join(20)
    assert len(set(calls)) == 1 and calls[0] > 5
    assert {channel.stopped_by for channel in channels} == {f"SIGTERM on process 2 ({socket.gethostname()})"}
    assert all(channel.due() for channel in channels)
    closing = [threading.Thread(target=channel.close) for channel in channels]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(60)
    assert not ends and not any(thread.is_alive() for thread in closing), "nobody waits for a time-out"
    assert not any(thread.is_alive() for channel in channels for thread in (*channel._threads, channel._connections))


def test_what_one_does_first_may_take_longer_than_any_barrier() -> None:
    rolls, service = together(free_port(), [0, 1, 2], 3), Memory(3)
    events: list[str] = []
    told: dict[int, str] = {}

    def act(number: int, fails: bool) -> None:
        events.append(f"{number} begins")
        time.sleep(0.8 if number == 0 else 0.0)
        events.append(f"{number} ends")
        if fails and number == 1:
            raise UserError("no room")

    def work(roll: Roll) -> None:
        hosts = Hosts(roll, service, timeout=0.4)
        hosts.first_then_all("downloads", lambda: act(hosts.process, fails=False))
        try:
            hosts.first_then_all("downloads", lambda: act(hosts.process, fails=True))
        except UserError as error:
            told[hosts.process] = str(error)

    threads = [threading.Thread(target=work, args=(roll,), daemon=True) for roll in rolls.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for turn in (events[:6], events[6:]):
        assert turn[:2] == ["0 begins", "0 ends"] and len(turn) == 6
    assert told.keys() == {0, 1, 2} and all("process 1" in text and "no room" in text for text in told.values())


def test_a_process_that_does_not_answer_to_a_stop_ends_the_others() -> None:
    channels, ends = connected(3, timeout=0.5)
    service = channels[0]._coordination
    assert isinstance(service, Memory)
    service.barriers["jaxlm/stop/counted"] = threading.Barrier(4)  # one never comes
    channels[0].ask_stop("SIGTERM")
    wait_for(lambda: len(ends) >= 2)
    expected = f"not all processes answered to SIGTERM on process 0 ({socket.gethostname()}) within 0.5 s"
    assert expected in ends.values()


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_is_told_to_all_others(failing: int) -> None:
    channels, ends = connected(3)
    channels[failing].fail("KeyError: 'granite'", status=7)
    vanish(channels[failing])
    wait_for(lambda: len(ends) == 2)
    host = socket.gethostname()
    assert ends == {n: f"process {failing} ({host}) failed: KeyError: 'granite'" for n in range(3) if n != failing}
    assert {channels[n].end_status for n in ends} == {7}


@pytest.mark.parametrize("dead", [0, 1])
def test_a_closed_connection_is_a_death(dead: int) -> None:
    channels, ends = connected(3)
    vanish(channels[dead])
    wait_for(lambda: len([n for n in ends if n != dead]) == 2)
    assert {ends[n] for n in range(3) if n != dead} == {f"process {dead} ({socket.gethostname()}) died"}


def test_who_is_missing() -> None:
    port = free_port()
    found = together(port, [0, 2], 4, timeout=1.5)
    assert all(isinstance(error, UserError) for error in found.values())
    words = rf"processes 1, 3 of 4 did not come to localhost:{port} within 1.5 s"
    assert all(re.search(words, str(error)) for error in found.values()), found


def test_wrong_numbers() -> None:
    found = together(free_port(), [0, 1, 1], 3)
    assert any("process_id: 1 came twice" in str(error) for error in found.values()), found
    port = free_port()
    with pytest.raises(UserError, match=r"came as process 1 of 3, process 0 is one of 2"):
        thread = threading.Thread(target=lambda: together(port, [1], 3, timeout=5))
        thread.start()
        call_roll(Process(f"localhost:{port}", 2, 0), 5, 10, lambda text: None)
    thread.join()


def test_strangers_at_the_port_do_not_matter() -> None:
    port = free_port()

    def stranger() -> None:
        time.sleep(0.3)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": 1}\n', b""):
            with socket.create_connection(("localhost", port)) as connection:
                connection.sendall(words)

    thread = threading.Thread(target=stranger)
    thread.start()
    said: list[str] = []
    with pytest.raises(UserError, match="process 1 of 2 did not come"):
        call_roll(Process(f"localhost:{port}", 2, 0), 1.5, 10, said.append)
    thread.join()


def test_coordinator_cannot_be_reached() -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"process 1 of 2 could not reach localhost:{port} within 1 s \(refused"):
        call_roll(Process(f"localhost:{port}", 2, 1), 1, 10, print)
    with pytest.raises(UserError, match=r"the name 'no.such.host.invalid' is not known here"):
        call_roll(Process("no.such.host.invalid:80", 2, 1), 1, 10, print)
    with socket.create_server(("", port)), pytest.raises(UserError, match=rf"cannot listen on port {port}"):
        call_roll(Process(f"localhost:{port}", 2, 0), 1, 10, print)


# Real processes with JAX's coordination service, but no model ----------------------------------


def run(count: int, body: str, timeout: int = 60) -> list[tuple[int, str]]:
    """(exit status, output) of each process; `body` sees `hosts` and `me`."""
    script = f"""
import os, sys, time
from pathlib import Path
from jaxlm.config import DistributedConfig
from jaxlm.processes.distributed import start
me = int(sys.argv[1])
config = DistributedConfig(coordinator="localhost:{free_port()}", num_processes={count}, process_id=me, timeout=3)
with start(config, print) as hosts:
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_barrier_names_who_is_missing() -> None:
    found = run(3, "hosts.barrier('first')\nif me == 1: time.sleep(20)\nelse: hosts.barrier('second')")
    for status, output in found:  # also the one that comes too late
        assert status in (1, 2), output
        assert re.search(r"error: .*barrier 'second': after 3 s not there: process 1 \(", output), output


def test_disagreement_names_process_key_and_values() -> None:
    body = """
    hosts.agree("versions", {"jax": "1"})
    hosts.agree("configuration", {"train.seed": 42 + (me == 2), "data": [me < 5], "lora.rank": 8} if me < 3 else {})
    print("went on")
    """
    for status, output in run(3, body):
        assert status == 2 and "went on" not in output, output
        assert re.search(
            r"error: the processes differ from process 0 \(.*\) in their configuration: on process 2 \(.*\) "
            r"train.seed is 43, not 42. Start all",
            output,
        ), output
        assert "on process 1" not in output and "lora" not in output


def test_threads_that_dispatch_in_turn_meet_the_others_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the serving engine, its beams and its embeddings do; the other process has one thread for all."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device each
    body = """
    import threading
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    mesh, both = Mesh(np.array(jax.devices()), "x"), []
    for size in (1_000, 300_000):
        split = NamedSharding(mesh, P("x"))
        array = jax.make_array_from_callback((2, size), split, lambda index: np.ones((1, size), np.float32))
        added = jax.jit(lambda array: (array @ array.T @ array).sum(0), out_shardings=NamedSharding(mesh, P()))
        both.append((added.lower(array).compile(), array))

    turns, number = threading.Condition(), 0
    def work(own):
        global number
        program, array = both[own]
        for _ in range(100):
            with turns:
                turns.wait_for(lambda: number % 2 == own)
                found = program(array)
                number += 1
                turns.notify()
            assert np.asarray(found)[0] == 4 * array.shape[1]

    if me:
        for _ in range(100):
            found = [program(array) for program, array in both]
        jax.block_until_ready(found)
    else:
        threads = [threading.Thread(target=work, args=(own,)) for own in (0, 1)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
    print("went through", number)
    """
    (status, output), (other, other_output) = run(2, body)
    assert status == other == 0, output + other_output
    assert "went through 200" in output


def test_a_directory_that_is_not_shared(tmp_path: Path) -> None:
    body = f"""
    hosts.check_shared(Path({str(tmp_path)!r}) / "shared")
    Path({str(tmp_path)!r}, f"private{{me}}").mkdir(exist_ok=True)  # process 2 may have made private1
    print("went on")
    hosts.check_shared(Path({str(tmp_path)!r}) / f"private{{me and 1}}")
    """
    for status, output in run(3, body):
        assert status == 2 and "went on" in output, output
        assert re.search(
            r"error: process 1 \(.*\): output_dir: .*private1 here is not the directory that process 0 \(", output
        )
        assert re.search(r"; process 2 \(", output), output
    assert not list(tmp_path.rglob(".*"))


def test_a_directory_that_one_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    body = f"hosts.check_shared(Path({str(tmp_path)!r}, 'file' if me == 1 else 'folder'))"
    for status, output in run(2, body):
        assert status == 2, output
        assert re.search(r"error: process 1 \(.*\): output_dir: .*cannot write there", output), output


def test_an_exception_is_named_by_the_others() -> None:
    found = run(3, "hosts.barrier('on')\nif me == 1: raise KeyError('granite')\ntime.sleep(30)", timeout=25)
    assert "Traceback" in found[1][1] and found[1][0] == 1
    for status, output in (found[0], found[2]):
        assert status == 1
        assert re.search(r"error: process 1 \(.*\) failed: KeyError: 'granite'; process \d ends too", output), output
