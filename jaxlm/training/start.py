"""What a run starts from: its checkpoints, those that each host keeps, the model's weights, or nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.devices.finite import check_finite
from jaxlm.errors import UserError
from jaxlm.processes.distributed import Hosts
from jaxlm.training.checkpoint import LOSS, Checkpoints
from jaxlm.training.job import Job
from jaxlm.training.local_checkpoint import LocalCheckpoints
from jaxlm.training.resume import Inputs, check_inputs, check_settings
from jaxlm.training.setup import TrainSetup
from jaxlm.training.state import Initializer, TrainState
from jaxlm.weights.fingerprint import base_fingerprint
from jaxlm.weights.native.layout import CHECKPOINTS, DATA_STATE
from jaxlm.weights.quantized import rounding_of

DAMAGED = "the file is damaged, or was saved by a run that had diverged; get it again, or take an earlier one"
PASS_OVER = (
    "to go on past this step, set train.on_nonfinite: skip; to train with other settings, choose another output_dir"
)


@dataclasses.dataclass(frozen=True)
class History:
    """The checkpoints that output_dir holds.

    Attributes:
        checkpoints: of this run, open.
        inputs: what this start computes from.
        step: the newest one's step; 0 where there is none.
        files: the newest one's small files, by name.
        data_state: position in the data that it was saved at.
    """

    checkpoints: Checkpoints
    inputs: Inputs
    step: int
    files: Mapping[str, bytes]
    data_state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the loop begins.

    Attributes:
        state: on the devices.
        frozen: the trees that the objective reads and nothing trains, by name.
        step: steps that are done.
        data_state: position in the data.
        files: small files of the checkpoint that the run goes on from; empty for none.
        local: the copies that this host keeps; None for a run without.
        from_local: the state is one of these copies.
    """

    state: TrainState
    frozen: dict[str, Any]
    step: int
    data_state: dict[str, Any]
    files: Mapping[str, bytes]
    local: LocalCheckpoints | None
    from_local: bool


def open_history(job: Job, hosts: Hosts) -> History:
    """Opens the run's checkpoints, and checks that this run may go on from the newest one.

    Raises:
        UserError: other settings or inputs made it, a process sees others, or the run was stopped there for good.
    """
    config = job.config
    if hosts.processes > 1:
        hosts.agree("data", _data_prints(job))
    checkpoints = Checkpoints(Path(config.output_dir) / CHECKPOINTS, config.train.keep, config.train.best or LOSS)
    steps = checkpoints.steps()
    hosts.agree("checkpoints", {"steps": steps})
    base, kind = None if config.lora is None else job.source, config.model.quantize
    rounding = None if kind is None or job.source is None else rounding_of(job.source, kind)
    inputs = Inputs(config, job.data, job.model, base, rounding)
    if not steps:
        return History(checkpoints, inputs, 0, {}, {"step": 0})
    newest = steps[-1]
    files, path = checkpoints.files(newest), checkpoints.path(newest)
    check_settings(files, config, path)
    data_state = json.loads(files[DATA_STATE])
    inputs = dataclasses.replace(inputs, data=job.data.with_packing(data_state.get("packing", 1)))
    check_inputs(files, inputs, path)
    if "stopped" in data_state and config.train.on_nonfinite == "stop":
        raise UserError(f"{path}: the run was stopped: {data_state['stopped']}; {PASS_OVER}")
    return History(checkpoints, inputs, newest, files, data_state)


def place_state(job: Job, hosts: Hosts, setup: TrainSetup, initializer: Initializer, history: History) -> Start:
    """Reads or makes the state, on the devices: the newest checkpoint, or else the model's weights.

    Raises:
        UserError: for weights that cannot be read or are not finite, or local copies that may not be gone on from.
    """
    config = job.config
    local = None
    local_step: int | None = None
    files = history.files
    if config.train.local_checkpoints is not None:
        folder, out = Path(config.train.local_checkpoints), Path(config.output_dir)
        local = LocalCheckpoints(folder, out, hosts, initializer.abstract_state())
        local_step = local.newest(after=history.step)
        if local_step is not None:
            files = {**files, **local.files(local_step)}
            check_settings(files, config, local.path(local_step))
            check_inputs(files, history.inputs, local.path(local_step))

    resumes = bool(history.step or local_step)
    base = None if resumes and not setup.objective.frozen else _base_parameters(job, setup, initializer)
    frozen = dict.fromkeys(setup.objective.frozen, base)
    if not resumes:
        state = initializer.new_state(_new_trainable(job, initializer, base, bool(frozen)), config.train.seed)
        if job.adapter is not None and config.lora is not None:
            check_finite(state.trainable, setup.mesh, f"lora.init_from: {config.lora.init_from}", DAMAGED)
        return Start(state, frozen, 0, history.data_state, files, local, from_local=False)

    if local is not None and local_step is not None:
        step, path = local_step, local.path(local_step)
        state, data_state = local.restore(local_step)
    else:
        step, path = history.step, history.checkpoints.path(history.step)
        state, data_state = history.checkpoints.restore(step, initializer.abstract_state(), initializer.averages)
    way_out = f"go back to the step before it: move {path} away, and run the same command again"
    check_finite(state.trainable, setup.mesh, str(path), way_out)
    return Start(state, frozen, step, data_state, files, local, from_local=local_step is not None)


def _data_prints(job: Job) -> dict[str, str]:
    """What tells whether two processes have read the same data and the same base."""
    prints = {"hash of all tokens": job.data.fingerprint[:16]}
    for kind, reports in (("train", job.data.report.train), ("validation", job.data.report.validation)):
        prints |= {f"data.{kind}[{number}]": report.line() for number, report in enumerate(reports)}
    if job.source is not None:
        prints["hash of the model's norms at model.path"] = base_fingerprint(job.model, job.source)[:16]
    return prints


def _base_parameters(job: Job, setup: TrainSetup, initializer: Initializer) -> Any:
    if job.source is None:
        return initializer.init_params(job.config.train.seed)
    base = initializer.load_params(job.source)
    check_finite(base, setup.mesh, f"model.path: {job.config.model.path}", DAMAGED, job.tensor_name)
    return base


def _new_trainable(job: Job, initializer: Initializer, base: Any, base_stays: bool) -> Any:
    if job.config.lora is None:
        # The state is donated to the first step: what stays is not a part of it.
        return {"params": jax.tree.map(jnp.copy, base) if base_stays else base}
    if job.adapter is not None:
        return {"lora": initializer.load_lora(job.adapter)}
    return {"lora": initializer.init_lora(base, job.config.train.seed + 1)}
