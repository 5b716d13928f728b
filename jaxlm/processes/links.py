"""Connections between the processes of a run, beside JAX's own: who is there, who died, who asks for the end.

Every process holds one TCP connection to process 0, made on the coordinator's port before JAX opens it. JAX itself
ends a process without a word that a user can mend when somebody is missing at start-up; and the kernel closes a
connection the moment its process dies, long before heartbeats are missed. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.errors import UserError

GRACE_SECONDS = 5.0  # for messages to arrive before a process ends that others hang on


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run.

    Attributes:
        coordinator: host:port of process 0, as every process reaches it.
        processes: how many there are.
        process: which this is, from 0.
    """

    coordinator: str
    processes: int
    process: int

    def address(self) -> tuple[str, int]:
        """Host and port; UserError unless it is both."""
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise UserError(f"distributed.coordinator: {self.coordinator!r} must be HOST:PORT, e.g. 10.0.0.1:8476")
        return host.strip("[]"), int(port)


class _Line:
    """A socket that carries one JSON object a line."""

    def __init__(self, connection: socket.socket, heartbeat: float) -> None:
        self.socket = connection
        self.done = False  # the other side has said that it ends as it should
        self._read = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that lost power closes nothing: the kernel gives the connection up shortly before JAX's heartbeats do.
        for name, value in (("KEEPIDLE", heartbeat / 2), ("KEEPINTVL", heartbeat / 8), ("KEEPCNT", 3)):
            if hasattr(socket, f"TCP_{name}"):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), max(1, int(value)))

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends, or lets it be: that the other side is gone is noticed when reading."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(GRACE_SECONDS)
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> list[dict[str, Any]] | None:
        """Messages that have come, perhaps none; None once the other side is gone."""
        try:
            self.socket.settimeout(max(seconds, 0.001))
            found = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not found:
            return None
        *lines, self._read = (self._read + found).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # not one of us
        return messages if all(isinstance(message, dict) for message in messages) and len(self._read) < 65536 else None


def call_roll(place: Place, timeout: float, heartbeat: float, say: Callable[[str], None]) -> Links:
    """Waits until all processes are there, and connects them.

    Args:
        place: this process.
        timeout: seconds to wait.
        heartbeat: seconds after which a host that does not answer counts as dead.
        say: told whom process 0 is waiting for.

    Raises:
        UserError: on every process that is there: who is missing, or why the coordinator cannot be reached.
    """
    hello = {"process": place.process, "processes": place.processes, "host": socket.gethostname(), "pid": os.getpid()}
    if place.process == 0:
        return _gather(place, timeout, heartbeat, hello, say)
    return _join(place, timeout, heartbeat, hello)


def _gather(place: Place, timeout: float, heartbeat: float, hello: dict[str, Any], say: Callable[[str], None]) -> Links:
    port = place.address()[1]
    lines: dict[int, _Line] = {}
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
        for line in lines.values():
            line.send({"kind": "refused", "why": why})
        return UserError(why)

    with server:
        deadline, told = time.monotonic() + timeout, time.monotonic() + 10
        while missing := [number for number in range(place.processes) if number not in greetings]:
            now = time.monotonic()
            if now > deadline:
                raise refuse(
                    f"{_numbers(missing)} of {place.processes} did not come to {place.coordinator} within {timeout:g} "
                    f"s; see why in their own output, or start as many processes as num_processes says"
                )
            if now > told:
                say(f"waiting at {place.coordinator} for {_numbers(missing)} of {place.processes}")
                told = now + 30
            server.settimeout(min(1.0, deadline - now + 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            line = _Line(connection, heartbeat)
            greeting = (line.receive(GRACE_SECONDS) or [{}])[0]
            number = greeting.get("process")
            if greeting.keys() != hello.keys() or not isinstance(number, int):
                connection.close()  # somebody else's call
                continue
            if greeting["processes"] != place.processes or not 0 < number < place.processes:
                lines[number] = line
                raise refuse(
                    f"distributed: {greeting['host']} came as process {number} of {greeting['processes']}, process 0 "
                    f"is one of {place.processes}; give all the same num_processes"
                )
            if number in lines:
                lines[-1] = line
                hosts = f"{greetings[number]['host']} and {greeting['host']}"
                raise refuse(f"distributed.process_id: {number} came twice, from {hosts}; give each its own")
            lines[number], greetings[number] = line, greeting
    names = [str(greetings[number]["host"]) for number in range(place.processes)]
    for line in lines.values():
        line.send({"kind": "go", "hosts": names})
    return Links(place, lines, names)


def _join(place: Place, timeout: float, heartbeat: float, hello: dict[str, Any]) -> Links:
    address, deadline, why = place.address(), time.monotonic() + timeout, "no answer"
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
            line = _Line(connection, heartbeat)
            line.send(hello)
            why = "process 0 was there and did not answer"
            while (left := deadline - time.monotonic() + 2 * GRACE_SECONDS) > 0:  # process 0 says who is missing
                messages = line.receive(left)
                if messages is None:
                    why = "process 0 was there and left"
                    connection.close()
                    break
                for message in messages:
                    if message["kind"] == "refused":
                        raise UserError(message["why"])
                    return Links(place, {0: line}, message["hosts"])
        time.sleep(0.3)
    raise UserError(
        f"distributed.coordinator: process {place.process} of {place.processes} could not reach {place.coordinator} "
        f"within {timeout:g} s ({why}); check that process 0 runs on that host, that the port is open between the "
        f"hosts, and that all were given the same address"
    )


def _numbers(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


class Links:
    """The connections of a run that has begun. Process 0 is the hub: it passes on what it hears.

    To end all at the same step after a signal on one: the hub asks every process how often it has come to `due`, each
    answers and stays there, and all go on to one more than the largest number.

    Attributes:
        place: this process.
        hosts: host name of each process.
    """

    def __init__(self, place: Place, lines: dict[int, _Line], hosts: list[str]) -> None:
        self.place, self.hosts = place, hosts
        self._lines = lines
        self._on_end: Callable[[str], None] | None = None
        self._changed = threading.Condition()
        self._calls, self._held = 0, False
        self._last: int | None = None
        self.stopped_by: str | None = None  # e.g. 'SIGTERM on process 1 (host)', once all have agreed to stop
        self.end_status = 1  # of this process, when another has told why it ends
        self._counts: dict[int, int] | None = None
        self._why = ""
        self._outbox: list[dict[str, Any]] = []  # only appended to and popped: a signal handler may do so
        self._awake, self._wake = os.pipe()
        self._closing, self._orderly = False, False
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def watch(self, on_end: Callable[[str], None]) -> None:
        """From now on `on_end` is called, in a thread, with the reason when another process fails or dies."""
        self._on_end = on_end
        self._thread.start()

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"

    def ask_stop(self, signal_name: str) -> None:
        """Asks all to stop at the same call of `due`; safe in a signal handler."""
        self._post({"kind": "stop", "why": f"{signal_name} on {self.name(self.place.process)}"})

    def due(self) -> bool:
        """True once all are to stop: at the same call on every process, and ever after."""
        with self._changed:
            while self._held:
                self._changed.wait()
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def fail(self, error: str, status: int = 1) -> None:
        """Tells the others why this process ends, which it is to do at once. Process 0 outlives the others here.

        Args:
            status: with which exit status they are to end.
        """
        self._closing = True  # before the others hear of it: that they end then is no news
        self._post({"kind": "failed", "process": self.place.process, "error": error, "status": status})
        self._leave()

    def leave(self) -> None:
        """As `fail`, when the others know why."""
        self._post({"kind": "done"})
        self._leave()

    def close(self) -> None:
        """Ends the connections as it should be: all processes do so."""
        self._orderly = True
        self.leave()

    def _leave(self) -> None:
        self._closing = True
        os.write(self._wake, b".")
        self._thread.join(2 * GRACE_SECONDS)

    def _post(self, message: dict[str, Any]) -> None:
        self._outbox.append(message)
        os.write(self._wake, b".")

    # In the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._awake, selectors.EVENT_READ)
            for number, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, number)
            deadline: float | None = None
            while self._lines and (deadline is None or time.monotonic() < deadline):
                for key, _ in selector.select(None if deadline is None else 0.2):
                    if key.data is None:
                        os.read(self._awake, 4096)
                        while self._outbox:
                            self._hear(self.place.process, self._outbox.pop(0))
                        if self._closing and deadline is None:
                            deadline = time.monotonic() + GRACE_SECONDS
                            if self.place.process and not self._orderly:
                                return  # the end of the process closes the connection: process 0 waits for that
                        continue
                    line = self._lines[key.data]
                    messages = line.receive(1.0)
                    for message in messages or ():
                        self._hear(key.data, message)
                    if messages is None:
                        selector.unregister(line.socket)
                        line.socket.close()
                        del self._lines[key.data]
                        if not line.done and not self._closing:
                            self._tell({"kind": "dead", "process": key.data})
                            self._end(f"{self.name(key.data)} died")
                if self.place.process and self._orderly and all(line.done for line in self._lines.values()):
                    break
            for line in self._lines.values():
                line.socket.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def _hear(self, sender: int, message: dict[str, Any]) -> None:
        kind, mine, hub = message["kind"], sender == self.place.process, self.place.process == 0
        if mine and not hub:
            self._tell(message)
        elif kind == "done":
            if mine:
                self._tell(message)
            else:
                self._lines[sender].done = True
        elif kind in ("failed", "dead"):
            if hub:
                self._tell(message)
            if not mine and message["process"] != self.place.process and not self._closing:
                name = self.name(message["process"])
                self.end_status = int(message.get("status", 1))
                self._end(f"{name} died" if kind == "dead" else f"{name} failed: {message['error']}")
        elif kind == "stop" and hub and self._counts is None:
            self._why, self._counts = message["why"], {0: self._hold()}
            self._tell({"kind": "count?"})
        elif kind == "count?":
            self._lines[0].send({"kind": "count", "calls": self._hold()})
        elif kind == "count" and hub and self._counts is not None:
            self._counts[sender] = message["calls"]
            if len(self._counts) == self.place.processes:
                last = max(self._counts.values()) + 1
                self._tell({"kind": "stop at", "calls": last, "why": self._why})
                self._release(last, self._why)
        elif kind == "stop at":
            self._release(message["calls"], message["why"])

    def _hold(self) -> int:
        with self._changed:
            self._held = True
            return self._calls

    def _release(self, last: int, why: str) -> None:
        with self._changed:
            self._held, self._last, self.stopped_by = False, last, why
            self._changed.notify_all()

    def _end(self, why: str) -> None:
        # JAX ends the others at once when process 0, its coordinator, goes: they are to read this first.
        deadline = time.monotonic() + GRACE_SECONDS
        for line in self._lines.values() if self.place.process == 0 else ():
            while time.monotonic() < deadline and line.receive(0.2) is not None:
                pass
        self._closing = True  # what follows is the others' leaving
        assert self._on_end is not None
        self._on_end(why)
