"""Checks, before data are read, that a run fits its devices, compiler, earlier checkpoints and disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import RunConfig
from jaxlm.devices.mesh import check_mesh
from jaxlm.errors import UserError
from jaxlm.processes.distributed import Hosts
from jaxlm.spec import DecoderSpec
from jaxlm.training.resume import check_settings
from jaxlm.training.setup import compile_with, set_up
from jaxlm.training.state import TrainState
from jaxlm.training.stop import newest_step
from jaxlm.units import memory_size
from jaxlm.weights.native.layout import CHECKPOINTS, FINGERPRINTS, RUN_YAML, SMALL_FILES


def check_without_model(configs: Sequence[RunConfig]) -> None:
    """Checks meshes and compiler options against the devices, and settings against checkpoints; needs no model.

    Args:
        configs: all stages.

    Raises:
        UserError: the first thing that does not fit.
    """
    for config in configs:
        check_mesh(config.mesh)
        if config.train.compiler_options:
            # A program of one addition: the compiler reads its options first.
            lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.float32))
            compile_with(lowered, config.train.compiler_options)
        out = Path(config.output_dir)
        step = newest_step(out)
        if step is None:
            continue
        if not config.train.resume:
            raise UserError(
                f"output_dir: {out} holds checkpoints and train.resume is false; choose another output_dir or delete it"
            )
        folder = out / CHECKPOINTS / str(step)
        files = {
            name: path.read_bytes()
            for name in (RUN_YAML, FINGERPRINTS)
            if (path := folder / SMALL_FILES / name).is_file()
        }
        if len(files) == 2:  # else Orbax says what is wrong with it
            check_settings(files, config, folder)


def check_with_model(config: RunConfig, model: DecoderSpec, hosts: Hosts, say: Any) -> None:
    """Checks what depends on the shape of the model: mesh, batch, attention, adapters and room on the disk.

    Args:
        model: the shape, experts resolved.
        say: called with a warning, on process 0, when the disk will fill up later.

    Raises:
        UserError: the first thing that does not fit.
    """
    setup = set_up(config, model)
    initializer = setup.initializer(setup.schedule(1))
    problem = None
    if hosts.process == 0:
        try:
            check_space(Path(config.output_dir), initializer.abstract_state(), config.train.keep, say)
        except UserError as error:
            problem = str(error)
    hosts.check("disk space", problem)


def check_space(output_dir: Path, state: TrainState, keep: int, say: Any) -> None:
    """Compares the size of a run's checkpoints with the free space of its disk.

    Args:
        state: shapes and dtypes of what a checkpoint holds.
        keep: number of newest checkpoints that stay. The best stays too, and a new one is complete before an old one is
            deleted.

    Raises:
        UserError: when a single checkpoint does not fit. Room for fewer than all is a warning: they may be smaller when
            compressed.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(output_dir).free
    used = sum(path.stat().st_size for path in (output_dir / CHECKPOINTS).rglob("*") if path.is_file())
    needed = (keep + 2) * size - used
    if free < size:
        raise UserError(
            f"output_dir: {output_dir}: a checkpoint of this run takes {memory_size(size)}, and the disk has "
            f"{memory_size(free)} free; free space, or choose another output_dir"
        )
    if free < needed:
        say(
            f"warning: checkpoints take {memory_size(size)} each, {memory_size((keep + 2) * size)} for train.keep "
            f"{keep}, the best and the one being written; {output_dir} has {memory_size(free)} free, and may fill up"
        )
