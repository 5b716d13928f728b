"""The serving engine over several processes: process 0 plans, all compute.

Process 0 has the queue and the pages' tables. What it asks of its programs, it tells the others first, and they ask
the same of theirs, in the same order, so that collectives meet. What is beside the engine (beam searches, embeddings,
rewards, adapters that come) takes turns with its steps. Orders go through the coordination service and not through the
devices: a device would have to finish a step before the next one could be dispatched.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.inference.paged.programs import Programs
from jaxlm.inference.paged.schedule import Shape
from jaxlm.inference.paged.step import Plan, RowSettings
from jaxlm.inference.rows import DeviceModel, placed
from jaxlm.processes.coordination import Coordination

# Orders are forgotten by so many at once, when all have read them.
BLOCK = 64
KEY = "jaxlm/serve"
MASK = [field.name for field in dataclasses.fields(Plan)].index("allowed")
Result = TypeVar("Result")


class Orders:
    """Orders of process 0 to the others, read by each in their order.

    Args:
        coordination: the service that all processes share.
        process, processes: this process, and their number.
    """

    def __init__(self, coordination: Coordination, process: int, processes: int) -> None:
        self._coordination, self._process, self._processes = coordination, process, processes
        self._number = 0
        self._turn, self._has_ended = threading.RLock(), False

    def lead(self, name: str, arrays: Sequence[np.ndarray], act: Callable[[], Result]) -> Result:
        """Process 0: tells all others, and does its own part before anything else is told.

        Whichever threads ask: all processes must dispatch the programs that they share in one order.
        """
        with self._turn:
            if self._has_ended:
                raise UserError("the server is about to end")
            self.send(name, arrays)
            return act()

    def end(self) -> None:
        """Process 0: lets the others go."""
        with self._turn:
            self._has_ended = True
            self.send("end")

    def ask(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Process 0: tells all others, and waits until each has answered.

        Raises:
            UserError: one of them answers with a problem.
        """
        self.lead(name, arrays, lambda: None)
        keys = [f"{KEY}/answer/{name}/{process}" for process in range(1, self._processes)]
        problems = [self._coordination.wait(key) for key in keys]
        for key in keys:
            self._coordination.forget(key)
        for process, problem in enumerate(problems, 1):
            if problem:
                raise UserError(f"process {process}: {problem}")

    def answer(self, name: str, problem: str = "") -> None:
        """The others: what came of an order that process 0 asked; one at a time of a name."""
        self._coordination.put(f"{KEY}/answer/{name}/{self._process}", problem)

    def send(self, name: str, arrays: Sequence[np.ndarray] = ()) -> None:
        """Process 0: tells all others. Waits when one of them is more than two blocks behind."""
        block, place = divmod(self._number, BLOCK)
        if place == 0 and block >= 2:
            for process in range(1, self._processes):
                self._coordination.wait(f"{KEY}/read/{block - 2}/{process}")
                self._coordination.forget(f"{KEY}/read/{block - 2}/{process}")
            for number in range((block - 2) * BLOCK, (block - 1) * BLOCK):
                self._coordination.forget(f"{KEY}/order/{number}")
        self._coordination.put(f"{KEY}/order/{self._number}", f"{name} {_text(arrays)}")
        self._number += 1

    def receive(self) -> tuple[str, list[np.ndarray]]:
        """The others: the next order, as soon as there is one."""
        name, _, text = self._coordination.wait(f"{KEY}/order/{self._number}").partition(" ")
        self._number += 1
        block, place = divmod(self._number, BLOCK)
        if place == 0:
            self._coordination.put(f"{KEY}/read/{block - 1}/{self._process}", "")
        return name, _arrays(text)


def together(orders: Orders | None, name: str, act: Callable[..., Result]) -> Callable[..., Result]:
    """An act of arrays, by all processes: process 0 tells the others the arguments first. None: the act itself."""
    if orders is None:
        return act
    return lambda *arrays: orders.lead(name, arrays, partial(act, *arrays))


def packed(value: Any) -> np.ndarray:
    """A value of JSON as an array for an order."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpacked(content: np.ndarray) -> Any:
    """What `packed` was given."""
    return json.loads(content.tobytes())


def _text(arrays: Sequence[np.ndarray]) -> str:
    out = io.BytesIO()
    np.savez(out, *arrays)
    return base64.b64encode(out.getvalue()).decode()


def _arrays(text: str) -> list[np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as content:
        return [content[f"arr_{number}"] for number in range(len(content.files))]


class SharedPrograms(Programs):
    """The programs of one of several processes."""

    def _put(self, tree: Any) -> Any:
        def put(leaf: Any) -> jax.Array:
            return leaf if isinstance(leaf, jax.Array) else placed(np.asarray(leaf), self._whole)

        return jax.tree.map(put, tree)


class LeadingPrograms(SharedPrograms):
    """The programs of process 0, which tells the others what it asks of them."""

    def __init__(self, model: DeviceModel, shape: Shape, orders: Orders) -> None:
        self._orders = orders
        orders.send("shape", [packed(dataclasses.asdict(shape))])
        super().__init__(model, shape)

    def step(self, plan: Plan) -> tuple[jax.Array, Any, Any]:
        # Without a grammar its mask says nothing, and is large.
        constrained = bool(plan.constrained.any())
        told = plan if constrained else plan.replace(allowed=None)  # type: ignore[attr-defined]
        arrays = [np.array(constrained), *jax.tree.leaves(told)]
        return self._orders.lead("step", arrays, partial(super().step, plan))

    def take_row(self, row: int, settings: RowSettings, begins: tuple[np.ndarray, int, np.ndarray] | None) -> None:
        begin = () if begins is None else (begins[0], np.array(begins[1]), begins[2])
        arrays = [np.array(row), *jax.tree.leaves(settings), *begin]
        self._orders.lead("row", arrays, partial(super().take_row, row, settings, begins))

    def end(self) -> None:
        super().end()
        self._orders.end()


def follow(
    model: DeviceModel,
    orders: Orders,
    acts_beside: Callable[[Shape], Mapping[str, Callable[..., Any]]] = lambda shape: {},
) -> None:
    """What all processes but the first do, until that one ends.

    Args:
        acts_beside: makes what is done beside the engine's steps, by the orders' names, once its programs are there.
    """
    name, (content,) = orders.receive()
    assert name == "shape"
    values = unpacked(content)
    shape = Shape(**{**values, "chunks": tuple(map(tuple, values["chunks"]))})
    programs = SharedPrograms(model, shape)
    acts = acts_beside(shape)
    programs.start()
    leaves, settings = jax.tree.flatten(programs.rows)
    count = len(leaves)
    while True:
        name, arrays = orders.receive()
        if name == "end":
            return
        if name in acts:
            acts[name](*arrays)
        elif name == "row":
            row, *leaves = arrays
            begins = (leaves[count], int(leaves[count + 1]), leaves[count + 2]) if len(leaves) > count else None
            programs.take_row(int(row), jax.tree.unflatten(settings, leaves[:count]), begins)
        else:
            constrained, *leaves = arrays
            if not constrained:  # nobody looks at the mask
                leaves.insert(MASK, np.zeros(0, np.uint32))
            programs.step(Plan(*leaves))
