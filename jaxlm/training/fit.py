"""Whether a run fits what is here: its devices, its compiler, what it goes on from, the disk. Before data are read."""

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
from jaxlm.training.build import build, compile_with
from jaxlm.training.report import human_bytes
from jaxlm.training.resume import PRINTS, RUN, check_settings
from jaxlm.training.state import TrainState
from jaxlm.training.stop import newest_step


def check_without_model(configs: Sequence[RunConfig]) -> None:
    """What no model is needed for: meshes and the compiler's options against the devices, settings against checkpoints.

    Args:
        configs: all stages.

    Raises:
        UserError: the first thing that does not fit.
    """
    for config in configs:
        check_mesh(config.mesh)
        if config.train.compiler_options:
            # A program of one addition: the compiler looks at its options first.
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
        folder = out / "checkpoints" / str(step)
        files = {name: path.read_bytes() for name in (RUN, PRINTS) if (path := folder / "jaxlm" / name).is_file()}
        if len(files) == 2:  # else Orbax says what is wrong with it
            check_settings(files, config, folder)


def check_with_model(config: RunConfig, model: DecoderSpec, hosts: Hosts, say: Any) -> None:
    """What the shape of the model decides: mesh, batch, attention, adapters, and whether the disk has room.

    Args:
        model: the shape, experts resolved.
        say: told, on process 0, when the disk will fill up later.

    Raises:
        UserError: for what does not fit.
    """
    built = build(config, model)
    setup = built.initializer(built.optimizer(1)[0])
    problem = None
    if hosts.process == 0:
        try:
            check_space(Path(config.output_dir), setup.abstract_state(), config.train.keep, say)
        except UserError as error:
            problem = str(error)
    hosts.check("disk space", problem)


def check_space(output_dir: Path, state: TrainState, keep: int, say: Any) -> None:
    """Reckons the checkpoints of a run against the free space of its disk.

    Args:
        state: shapes and dtypes of what a checkpoint holds.
        keep: newest checkpoints that stay; the best one stays besides, and a new one is whole before an old one goes.

    Raises:
        UserError: when not even one fits. Less room than for all is only said: what is small when it is packed may fit.
    """
    one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(output_dir).free
    there = sum(path.stat().st_size for path in (output_dir / "checkpoints").rglob("*") if path.is_file())
    wanted = (keep + 2) * one - there
    if free < one:
        raise UserError(
            f"output_dir: {output_dir}: a checkpoint of this run takes {human_bytes(one)}, and the disk has "
            f"{human_bytes(free)} free; free space, or choose another output_dir"
        )
    if free < wanted:
        say(
            f"warning: checkpoints take {human_bytes(one)} each, {human_bytes((keep + 2) * one)} for train.keep "
            f"{keep}, the best one and one being written; {output_dir} has {human_bytes(free)} free, and may fill up"
        )
