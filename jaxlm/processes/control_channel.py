"""What the processes of a run tell each other beside their computation: a stop, a failure, a death.

A stop and a failure go through JAX's coordination service. A death cannot: the service notices it when heartbeats have
been missed for `distributed.heartbeat` seconds, and then ends the other processes with a message that names a task and
not a host. So the TCP connections of the roll call (`roll_call.py`) stay open: the kernel closes them the moment a
process dies. All that they carry is a last message of a process that ends as it should.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.processes.coordination import Coordination
from jaxlm.processes.roll_call import Roll

GRACE_SECONDS = 5.0  # for others to read why they end, before process 0 takes JAX's service away
STOP, ENDED = "jaxlm/stop", "jaxlm/ended"  # keys of the coordination service
# Process 0 waits so long for the others to end before it does, as JAX aborts what is left.
LEAVE_SECONDS = 30.0


class ControlChannel:
    """Stops all processes at the same step, and ends them when one fails or dies.

    To stop at the same step after a signal on one process, every process stores the number of its calls of `due` and
    stays there; then all go on to one more than the largest number.

    Args:
        roll: this process, and its connections to others.
        coordination: the service that all processes share.
        timeout: seconds to wait for the others at a stop.

    Attributes:
        stopped_by: e.g. 'SIGTERM on process 1 (host)', once all have agreed to stop.
        end_status: exit status of this process when another has told why it ends.
    """

    def __init__(self, roll: Roll, coordination: Coordination, timeout: float) -> None:
        self._roll, self._coordination, self._timeout = roll, coordination, timeout
        self._process = roll.process
        self.stopped_by: str | None = None
        self.end_status = 1
        self._on_end: Callable[[str], None] | None = None
        self._changed = threading.Condition()
        self._calls, self._held = 0, False
        self._last: int | None = None
        self._leaving = False
        self._threads = [
            threading.Thread(target=self._until_released, args=(work,), name=f"control: {name}", daemon=True)
            for name, work in (("stop", self._follow_stop), ("end", self._follow_end))
        ]
        self._connections = threading.Thread(target=self._follow_connections, name="control: deaths", daemon=True)

    def watch(self, on_end: Callable[[str], None]) -> None:
        """From now on `on_end` is called, in a thread, with the reason when another process fails or dies."""
        self._on_end = on_end
        for thread in (*self._threads, self._connections):
            thread.start()

    def name(self, process: int) -> str:
        """'process 1 (host)'."""
        return f"process {process} ({self._roll.hosts[process]})"

    def ask_stop(self, signal_name: str) -> None:
        """Asks all to stop at the same call of `due`; of several requests the first counts."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended: so does the run
            self._coordination.put(STOP, f"{signal_name} on {self.name(self._process.index)}")

    def due(self) -> bool:
        """True once all are to stop: at the same call on every process, and ever after."""
        with self._changed:
            while self._held:
                self._changed.wait()
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def fail(self, error: str, status: int = 1) -> None:
        """Tells the others why this process ends, which it is to do at once. Process 0 waits until they have gone.

        Args:
            status: exit status of the others.
        """
        self._leaving = True  # before the others hear of it: their end is a consequence
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # without the service, the connections tell
            self._end_all(self._process.index, f"failed: {error}", status)
        self._await_the_others()

    def leave(self) -> None:
        """As `fail`, when the others know why."""
        self._leaving = True
        self._roll.say_done()
        self._await_the_others()

    def close(self) -> None:
        """Ends the channel after the last barrier: all processes do so."""
        self.leave()
        for key in (STOP, ENDED):  # releases the threads that wait for them
            self._coordination.put(key, "")
        for thread in (*self._threads, self._connections):
            thread.join(GRACE_SECONDS)

    def _await_the_others(self) -> None:
        # JAX ends the other processes at once when process 0, its coordinator, goes.
        if self._process.index == 0 and threading.current_thread() is not self._connections:
            self._connections.join(LEAVE_SECONDS)

    def _end_all(self, process: int, text: str, status: int = 1) -> None:
        self._coordination.put(ENDED, json.dumps({"process": process, "text": text, "status": status}))

    # Threads ------------------------------------------------------------------------------------

    def _until_released(self, work: Callable[[], None]) -> None:
        # The service has gone with process 0; its connection tells so.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            work()

    def _follow_stop(self) -> None:
        why = self._coordination.wait(STOP)
        if not why:
            return
        with self._changed:
            self._held = True
            self._coordination.put(f"{STOP}/calls/{self._process.index}", str(self._calls))
        if not self._coordination.barrier(f"{STOP}/counted", self._timeout):
            self._end(f"not all processes answered to {why} within {self._timeout:g} s")
            return
        calls = self._coordination.values(f"{STOP}/calls")
        with self._changed:
            self._held, self._last, self.stopped_by = False, max(map(int, calls.values())) + 1, why
            self._changed.notify_all()

    def _follow_end(self) -> None:
        text = self._coordination.wait(ENDED)
        if not text:
            return
        end: dict[str, Any] = json.loads(text)
        if end["process"] != self._process.index and not self._leaving:
            self.end_status = int(end["status"])
            self._end(f"{self.name(end['process'])} {end['text']}")

    def _follow_connections(self) -> None:
        """Notices deaths: process 0 those of all others, and tells; the others that of process 0."""
        with selectors.DefaultSelector() as selector:
            for number, connection in self._roll.connections.items():
                selector.register(connection.socket, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    connection = self._roll.connections[key.data]
                    if connection.receive(1.0) is not None:
                        continue
                    selector.unregister(connection.socket)
                    if self._process.index == 0:
                        connection.socket.close()
                    # Else it stays open until this process ends, which is what process 0 waits for.
                    if connection.done or self._leaving:
                        continue
                    if self._process.index == 0:
                        with contextlib.suppress(jax.errors.JaxRuntimeError):
                            self._end_all(key.data, "died")
                    else:
                        self._end(f"{self.name(key.data)} died")

    def _end(self, why: str) -> None:
        self._await_the_others()
        self._leaving = True  # what follows is the others' leaving
        assert self._on_end is not None
        self._on_end(why)
