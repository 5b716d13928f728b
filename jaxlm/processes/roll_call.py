"""The roll call at the start of a run: all processes connect to process 0, before JAX's own start-up.

JAX ends a process that waits in vain at start-up with a message that does not say who is missing, nor why an address
cannot be reached. So every process first makes a TCP connection to process 0, on the coordinator's port before JAX
opens it, and process 0 says who has come. Messages are lines of JSON. The connections stay open: `control_channel.py`
learns from them that a process has died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.errors import UserError

GRACE_SECONDS = 5.0  # for a greeting or an answer to arrive


@dataclasses.dataclass(frozen=True)
class Process:
    """This process of a run.

    Attributes:
        coordinator: host:port of process 0, as every process reaches it.
        count: number of processes.
        index: number of this process, from 0.
    """

    coordinator: str
    count: int
    index: int

    def address(self) -> tuple[str, int]:
        """Host and port; UserError unless it is both."""
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise UserError(f"distributed.coordinator: {self.coordinator!r} must be HOST:PORT, e.g. 10.0.0.1:8476")
        return host.strip("[]"), int(port)


class Connection:
    """A socket that carries one JSON object a line.

    Attributes:
        done: the other side has said that it ends as it should.
    """

    def __init__(self, connection: socket.socket, heartbeat: float) -> None:
        self.socket = connection
        self.done = False
        self._read = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that lost power closes nothing: the kernel gives the connection up shortly before JAX's heartbeats do.
        for name, value in (("KEEPIDLE", heartbeat / 2), ("KEEPINTVL", heartbeat / 8), ("KEEPCNT", 3)):
            if hasattr(socket, f"TCP_{name}"):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), max(1, int(value)))

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends; a failure is ignored, because reading notices that the other side is gone."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(GRACE_SECONDS)
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> list[dict[str, Any]] | None:
        """Messages that have arrived, maybe none; None once the other side is gone."""
        try:
            self.socket.settimeout(max(seconds, 0.001))
            received = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not received:
            return None
        *lines, self._read = (self._read + received).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # not a process of this run
        if len(self._read) >= 65536 or not all(isinstance(message, dict) for message in messages):
            return None
        self.done = self.done or any(message.get("kind") == "done" for message in messages)
        return messages


@dataclasses.dataclass(frozen=True)
class Roll:
    """All processes have come.

    Attributes:
        process: this one.
        connections: by number of the process at the other end: all others on process 0, process 0 on the others.
        hosts: host name of each process.
    """

    process: Process
    connections: Mapping[int, Connection]
    hosts: list[str]

    def say_done(self) -> None:
        """Tells the other ends that this process closes its connections as it should."""
        for connection in self.connections.values():
            connection.send({"kind": "done"})
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)


def call_roll(process: Process, timeout: float, heartbeat: float, say: Callable[[str], None]) -> Roll:
    """Waits until all processes have come, and connects them.

    Args:
        process: this process.
        timeout: seconds to wait.
        heartbeat: seconds after which a host that does not answer counts as dead.
        say: called with a line that names the processes that process 0 is waiting for.

    Raises:
        UserError: on every process that has come: who is missing, or why the coordinator cannot be reached.
    """
    hello = {"process": process.index, "processes": process.count, "host": socket.gethostname(), "pid": os.getpid()}
    if process.index == 0:
        return _gather(process, timeout, heartbeat, hello, say)
    return _join(process, timeout, heartbeat, hello)


def _gather(
    process: Process, timeout: float, heartbeat: float, hello: dict[str, Any], say: Callable[[str], None]
) -> Roll:
    port = process.address()[1]
    connections: dict[int, Connection] = {}
    greetings = {0: hello}
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"distributed.coordinator: process 0 cannot listen on port {port} ({error.strerror}); "
            "choose another port, or end the run that still has it"
        ) from None

    def refuse(why: str) -> UserError:
        for other in connections.values():
            other.send({"kind": "refused", "why": why})
        return UserError(why)

    with server:
        deadline, next_notice = time.monotonic() + timeout, time.monotonic() + 10
        while missing := [number for number in range(process.count) if number not in greetings]:
            now = time.monotonic()
            if now > deadline:
                raise refuse(
                    f"{_numbers(missing)} of {process.count} did not come to {process.coordinator} within {timeout:g} "
                    f"s; see why in their own output, or start as many processes as num_processes says"
                )
            if now > next_notice:
                say(f"waiting at {process.coordinator} for {_numbers(missing)} of {process.count}")
                next_notice = now + 30
            server.settimeout(min(1.0, deadline - now + 0.01))
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                continue
            caller = Connection(accepted, heartbeat)
            greeting = (caller.receive(GRACE_SECONDS) or [{}])[0]
            number = greeting.get("process")
            if greeting.keys() != hello.keys() or not isinstance(number, int):
                accepted.close()  # not a process of this run
                continue
            if greeting["processes"] != process.count or not 0 < number < process.count:
                connections[number] = caller
                raise refuse(
                    f"distributed: {greeting['host']} came as process {number} of {greeting['processes']}, process 0 "
                    f"is one of {process.count}; give all the same num_processes"
                )
            if number in connections:
                connections[-1] = caller
                hosts = f"{greetings[number]['host']} and {greeting['host']}"
                raise refuse(f"distributed.process_id: {number} came twice, from {hosts}; give each its own")
            connections[number], greetings[number] = caller, greeting
    names = [str(greetings[number]["host"]) for number in range(process.count)]
    for other in connections.values():
        other.send({"kind": "go", "hosts": names})
    return Roll(process, connections, names)


def _join(process: Process, timeout: float, heartbeat: float, hello: dict[str, Any]) -> Roll:
    address, deadline, why = process.address(), time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=min(5.0, left))
        except socket.gaierror:
            why = f"the name {address[0]!r} is not known here"
        except ConnectionRefusedError:
            why = "refused: nothing listens there"
        except TimeoutError:
            why = "no answer: wrong address, or a firewall in between"
        except OSError as error:
            why = error.strerror or str(error)
        else:
            greeted = Connection(connection, heartbeat)
            greeted.send(hello)
            why = "process 0 was there and did not answer"
            while (left := deadline - time.monotonic() + 2 * GRACE_SECONDS) > 0:  # process 0 says who is missing
                messages = greeted.receive(left)
                if messages is None:
                    why = "process 0 was there and left"
                    connection.close()
                    break
                for message in messages:
                    if message["kind"] == "refused":
                        raise UserError(message["why"])
                    return Roll(process, {0: greeted}, message["hosts"])
        time.sleep(0.3)
    raise UserError(
        f"distributed.coordinator: process {process.index} of {process.count} could not reach {process.coordinator} "
        f"within {timeout:g} s ({why}); check that process 0 runs on that host, that the port is open between the "
        f"hosts, and that all were given the same address"
    )


def _numbers(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"
