"""The nearest settings that fit, and the fastest of them by the roofline."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config import MeshConfig, RunConfig, flatten, to_dict
from jaxlm.devices.chips import Topology
from jaxlm.devices.mesh import rows_axis_size
from jaxlm.errors import UserError
from jaxlm.planning.cost import Time, estimate_cost, estimate_time
from jaxlm.planning.memory import estimate_memory, resident_bytes
from jaxlm.spec import DecoderSpec
from jaxlm.training.setup import TrainSetup, batch_split, set_up

# Policies from the least to the most recomputation.
REMAT = ("none", "dots", "qkv_out", "qkv", "full")
# The estimate misses by up to a tenth.
MARGIN = 0.9


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Settings for the command line.

    Attributes:
        changes: key -> value, of the keys that differ.
        bytes: estimated memory of a device.
        time: estimated time of a step; None where the chip's peak is not known.
    """

    changes: dict[str, str]
    bytes: int
    time: Time | None

    def __str__(self) -> str:
        return " ".join(f"--{key} {value}" for key, value in self.changes.items())


def suggest(
    config: RunConfig, shape: DecoderSpec, topology: Topology, now: Time | None, fits: bool, most: int = 3
) -> list[Suggestion]:
    """Settings near these that leave a tenth of the memory free.

    It changes model.remat, train.micro_batch_size (the rows of a step stay), model.quantize of an adapter's base, and
    the mesh's data, fsdp and tensor.

    Args:
        now: time of a step with the present settings.
        fits: whether the present settings fit. If so, only faster settings are returned, the fastest first; if not,
            those with fewest changes first, and of these the fastest.
    """
    suggestions: list[Suggestion] = []
    room = MARGIN * topology.chip.memory
    for near in _nearest(config, shape, topology) if not fits else [config]:
        if suggestions:
            break  # what comes later is a greater change, and each takes seconds to look at
        try:
            setup = set_up(near, shape, topology)
            initializer = setup.initializer(setup.schedule(1000))
        except UserError:
            continue  # the mesh does not go with this model or batch
        if resident_bytes(setup, initializer) > room:
            continue
        for remat in REMAT:
            for rows in _rows(config.train.micro_batch_size):
                changed = _changed(setup, remat, rows)
                if changed is None:
                    continue
                memory = estimate_memory(changed, initializer)
                time = estimate_time(
                    estimate_cost(changed, initializer, memory, topology.slices), topology.chip, topology.count
                )
                changes = _changes(config, changed.config)
                faster = time is not None and now is not None and time.longest < 0.98 * now.longest
                if changes and memory.peak <= room and (faster or not fits):
                    suggestions.append(Suggestion(changes, memory.peak, time))

    def rank(suggestion: Suggestion) -> tuple[float, float]:
        # On a device of unknown speed, the one that recomputes least comes first.
        cost = suggestion.time.longest if suggestion.time else suggestion.bytes
        return (0 if fits else len(suggestion.changes)), cost

    suggestions.sort(key=rank)
    return suggestions[:most]


def _nearest(config: RunConfig, shape: DecoderSpec, topology: Topology) -> list[RunConfig]:
    """These settings, those with a quantised base under an adapter, and other meshes."""
    first, *others = (dataclasses.replace(config, mesh=mesh) for mesh in _meshes(config, shape, topology))
    kinds: tuple[Literal["int8", "nf4"], ...] = ("int8", "nf4")
    if config.lora is None or config.model.quantize is not None:
        kinds = ()
    quantized = [dataclasses.replace(config, model=dataclasses.replace(config.model, quantize=kind)) for kind in kinds]
    return [first, *quantized, *others]


def _meshes(config: RunConfig, shape: DecoderSpec, topology: Topology) -> list[MeshConfig]:
    whole = dataclasses.replace(config.mesh, data=topology.slices, fsdp=-1)
    meshes = [config.mesh, whole]
    for tensor in (2, 4, 8):
        if topology.count % tensor == 0 and shape.experts is None and tensor != config.mesh.tensor:
            meshes.append(dataclasses.replace(whole, tensor=tensor))
    return meshes


def _rows(now: int) -> list[int]:
    return [rows for rows in (4 * now, 2 * now, now, now // 2, now // 4, 1) if rows >= 1]


def _changed(setup: TrainSetup, remat: str, rows: int) -> TrainSetup | None:
    """Other settings on the same mesh; None where the micro-batch that results is not the one asked for."""
    config = dataclasses.replace(
        setup.config,
        model=dataclasses.replace(setup.config.model, remat=remat),  # type: ignore[arg-type]
        train=dataclasses.replace(setup.config.train, micro_batch_size=rows),
    )
    if config.train.loss_normalisation == "mean_of_means" and rows != setup.config.train.micro_batch_size:
        return None  # the micro batch is part of the loss
    try:
        micro, accumulation = batch_split(config, rows_axis_size(setup.mesh))
    except UserError:
        return None
    if micro != rows:
        return None
    model = setup.model.clone(remat=remat)
    return dataclasses.replace(setup, config=config, model=model, micro_batch=micro, accumulation=accumulation)


def _changes(old: RunConfig, new: RunConfig) -> dict[str, str]:
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return {key: str(value) for key, value in after.items() if before[key] != value}
