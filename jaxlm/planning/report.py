"""The plan of a run as one object."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from rich.console import Console

from jaxlm.config import RunConfig
from jaxlm.devices.chips import Topology
from jaxlm.devices.mesh import axis_sizes
from jaxlm.errors import UserError
from jaxlm.planning.compiled import CompiledStep, compile_step
from jaxlm.planning.cost import Cost, Time, estimate_cost, estimate_time
from jaxlm.planning.memory import Memory, estimate_memory
from jaxlm.planning.suggest import Suggestion, suggest
from jaxlm.spec import DecoderSpec
from jaxlm.training.checks import check_offload, check_quantize
from jaxlm.training.setup import set_up
from jaxlm.training.state import count


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a run before it starts; the classes of the fields give the units.

    Attributes:
        devices: number of devices along each axis of the mesh.
        parameters, trained: number of parameters of the model, and of those that train.
        micro_batch, accumulation: rows of a device group at a time, and the number of micro-steps.
        attention: the attention backend, and why.
        fits: by the compiler if asked, else by the estimate; None: the devices' memory is not known.
    """

    topology: Topology
    devices: dict[str, int]
    parameters: int
    trained: int
    micro_batch: int
    accumulation: int
    attention: str
    memory: Memory
    cost: Cost
    time: Time | None
    compiled: CompiledStep | None
    fits: bool | None
    suggestions: list[Suggestion]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        chip = dataclasses.asdict(self.topology.chip)
        chip["memory"] = chip["memory"] if self.fits is not None else None
        return {
            **dataclasses.asdict(self),
            "topology": str(self.topology),
            "chip": chip,
            "memory": dataclasses.asdict(self.memory) | {"peak": self.memory.peak, "worst": self.memory.worst},
        }


def plan(
    config: RunConfig,
    topology: Topology,
    shape: DecoderSpec,
    *,
    compile: bool = False,
    console: Console | None = None,
) -> Plan:
    """Plans a run for a topology.

    Args:
        shape: of the model, experts resolved.
        compile: also compile its train step (see `planning.compiled`).
        console: where to show that something takes long.

    Raises:
        UserError: for settings that do not go together or with the devices; what `compile_step` raises.
    """
    check_quantize(config)
    check_offload(config)
    if config.data.sequence_length > shape.max_length:
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length} is more than the {shape.max_length} positions of the "
            "model"
        )
    setup = set_up(config, shape, topology)
    initializer = setup.initializer(setup.schedule(config.train.steps or 1000))
    memory = estimate_memory(setup, initializer)
    cost = estimate_cost(setup, initializer, memory, topology.slices)
    time = estimate_time(cost, topology.chip, topology.count)
    compiled = None
    if compile:
        status = contextlib.nullcontext() if console is None else console.status(f"compiling for {topology}")
        with status:
            compiled = compile_step(config, shape, topology)
    room = topology.chip.memory
    fits: bool | None = None
    if topology.chip.platform != "cpu":
        needed = memory.peak if compiled is None else compiled.memory
        fits = needed <= room and (compiled is None or compiled.refused is None)
    suggestions = [] if fits is None else suggest(config, shape, topology, time, fits)
    return Plan(
        topology=topology,
        devices=axis_sizes(setup.mesh),
        parameters=count(initializer.dense),
        trained=count(initializer.trainable),
        micro_batch=setup.micro_batch,
        accumulation=setup.accumulation,
        attention=setup.attention[1],
        memory=memory,
        cost=cost,
        time=time,
        compiled=compiled,
        fits=fits,
        suggestions=suggestions,
    )
