"""The nearest settings that fit, and the fastest of them by the roofline."""

from __future__ import annotations

import dataclasses

from jaxlm.config import MeshConfig, RunConfig, flatten, to_dict
from jaxlm.devices.chips import Topology
from jaxlm.devices.mesh import rows_axis_size
from jaxlm.errors import UserError
from jaxlm.planning.cost import Time, estimate_cost, estimate_time
from jaxlm.planning.memory import estimate_memory, resident_bytes
from jaxlm.spec import DecoderSpec
from jaxlm.training.build import Build, batch_split, build

# What is recomputed, from least to most.
REMAT = ("none", "dots", "qkv_out", "qkv", "full")
# The estimate misses by up to a tenth.
MARGIN = 0.9


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Settings for the command line.

    Attributes:
        changes: key -> value, of those that differ.
        bytes: of a device, estimated.
        time: of a step; None where the chip's peak is not known.
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

    Changed are model.remat, train.micro_batch_size (the rows of a step stay), and the mesh's data, fsdp and tensor.

    Args:
        now: of the settings as they are.
        fits: whether they fit. If so, only faster ones are found, the fastest first; if not, those with fewest changes
            first, and of these the fastest.
    """
    found: list[Suggestion] = []
    room = MARGIN * topology.chip.memory
    for mesh in _meshes(config, shape, topology) if not fits else [config.mesh]:
        if found:
            break  # another mesh is a greater change, and each takes seconds to look at
        try:
            built = build(dataclasses.replace(config, mesh=mesh), shape, topology)
            setup = built.initializer(built.optimizer(1000)[0])
        except UserError:
            continue  # the mesh does not go with this model or batch
        if resident_bytes(setup) > room:
            continue
        for remat in REMAT:
            for rows in _rows(config.train.micro_batch_size):
                one = _changed(built, remat, rows)
                if one is None:
                    continue
                memory = estimate_memory(one, setup)
                time = estimate_time(estimate_cost(one, setup, memory, topology.slices), topology.chip, topology.count)
                changes = _changes(config, one.config)
                faster = time is not None and now is not None and time.longest < 0.98 * now.longest
                if changes and memory.peak <= room and (faster or not fits):
                    found.append(Suggestion(changes, memory.peak, time))
    # With a device of unknown speed, what is recomputed least.
    found.sort(key=lambda one: (0 if fits else len(one.changes), one.time.longest if one.time else one.bytes))
    return found[:most]


def _meshes(config: RunConfig, shape: DecoderSpec, topology: Topology) -> list[MeshConfig]:
    whole = dataclasses.replace(config.mesh, data=topology.slices, fsdp=-1)
    meshes = [config.mesh, whole]
    for tensor in (2, 4, 8):
        if topology.count % tensor == 0 and shape.experts is None and tensor != config.mesh.tensor:
            meshes.append(dataclasses.replace(whole, tensor=tensor))
    return meshes


def _rows(now: int) -> list[int]:
    return [rows for rows in (4 * now, 2 * now, now, now // 2, now // 4, 1) if rows >= 1]


def _changed(built: Build, remat: str, rows: int) -> Build | None:
    """Other settings on the same mesh; None where they come to something else than they say."""
    config = dataclasses.replace(
        built.config,
        model=dataclasses.replace(built.config.model, remat=remat),  # type: ignore[arg-type]
        train=dataclasses.replace(built.config.train, micro_batch_size=rows),
    )
    if config.train.loss_normalisation == "mean_of_means" and rows != built.config.train.micro_batch_size:
        return None  # the micro batch is part of the loss
    try:
        micro, accumulation = batch_split(config, rows_axis_size(built.mesh))
    except UserError:
        return None
    if micro != rows:
        return None
    model = built.model.clone(remat=remat)
    return dataclasses.replace(built, config=config, model=model, micro_batch=micro, accumulation=accumulation)


def _changes(old: RunConfig, new: RunConfig) -> dict[str, str]:
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return {key: str(value) for key, value in after.items() if before[key] != value}
