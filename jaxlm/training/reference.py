"""Log-probabilities of the model before its first step, computed once and kept beside the run."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from jaxlm.data.loader import Data
from jaxlm.data.tokens import Tokens
from jaxlm.devices.mesh import local_rows, put_batch, replicated, use_mesh
from jaxlm.errors import UserError
from jaxlm.processes.distributed import Hosts
from jaxlm.screen import Bars
from jaxlm.training.job import Job
from jaxlm.training.objectives.preference import REFERENCE, Preference
from jaxlm.training.objectives.sequences import apart
from jaxlm.training.resume import base_fingerprint
from jaxlm.training.setup import TrainSetup
from jaxlm.training.start import Start
from jaxlm.units import memory_size

FILE = "reference.npy"  # float32 [tokens of training, then of validation examples], 0 where nothing is trained
PRINTS = "reference.json"  # what it was computed from; written last


def reference_columns(
    job: Job, hosts: Hosts, setup: TrainSetup, start: Start, data: Data, console: Console | None
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The column `REFERENCE` of training and validation examples: read, or computed and kept.

    Args:
        job: the run.
        hosts: the processes; the first of them writes.
        setup: what it computes with.
        start: where it begins; at step 0 its state is the reference.
        data: the examples.
        console: shows how far it is; None on other processes than the first.

    Raises:
        UserError: the run goes on from a checkpoint, and the file is gone or belongs to other data.
    """
    out = Path(job.config.output_dir)
    sizes = [0 if each is None else int(each.offsets[-1]) for each in (data.train, data.validation)]
    prints = {"version": 1, "tokens": sizes, "data": data.fingerprint}
    kept = _kept(out)
    if start.step:
        if kept is None or {**kept, "weights": ""} != {**prints, "weights": ""}:
            state = "is missing" if kept is None else "belongs to other data"
            raise UserError(
                f"{out / FILE}: {state}; it holds what the model was before its first step, which cannot be computed "
                "from a checkpoint. Bring it back, or choose another output_dir"
            )
    else:
        prints["weights"] = _weights(job)
        if kept != prints:
            values = _computed(setup, start, data, sizes, console)
            hosts.check("reference", _written(out, values, prints) if hosts.process == 0 else None)
    array = np.load(out / FILE, mmap_mode="r", allow_pickle=False)
    train, validation = array[: sizes[0]], array[sizes[0] :]
    return {REFERENCE: train}, {REFERENCE: validation} if data.validation is not None else {}


def _kept(out: Path) -> dict[str, Any] | None:
    if (out / FILE).is_file() and (out / PRINTS).is_file():
        with contextlib.suppress(ValueError):
            content = json.loads((out / PRINTS).read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else None
    return None


def _weights(job: Job) -> str:
    """What tells the weights of a first step from others."""
    parts = [base_fingerprint(job.model, each) for each in (job.source, job.adapter) if each is not None]
    model, seed = job.config.model, [] if parts else [str(job.config.train.seed)]
    return " ".join([*parts, model.dtype, model.param_dtype, *seed])


def _written(out: Path, values: NDArray[np.float32], prints: dict[str, Any]) -> str | None:
    try:
        (out / PRINTS).unlink(missing_ok=True)
        temporary = out / f"{FILE}.tmp"
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        temporary.replace(out / FILE)
        temporary = out / f"{PRINTS}.tmp"
        temporary.write_text(json.dumps(prints), encoding="utf-8")
        temporary.replace(out / PRINTS)
    except OSError as error:
        return f"{out / FILE}: {error.strerror}; it takes {memory_size(values.nbytes)}"
    return None


def _computed(
    setup: TrainSetup, start: Start, data: Data, sizes: list[int], console: Console | None
) -> NDArray[np.float32]:
    """float32 [tokens]: of all examples, with dropout off."""
    objective = cast(Preference, setup.objective)
    rows = setup.eval_rows
    fields = [name for name in objective.fields if name != REFERENCE]

    def log_probs(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return objective.log_probs(trainable, frozen, apart({name: value[0] for name, value in batch.items()}))[0]

    with use_mesh(setup.mesh):
        program = jax.jit(log_probs, out_shardings=replicated(setup.mesh))
    values = np.zeros(sum(sizes), np.float32)
    mine = local_rows(setup.mesh, rows)
    started = time.perf_counter()
    sets: list[tuple[Tokens, int]] = [(data.train, 0)]
    sets += [] if data.validation is None else [(data.validation, sizes[0])]
    with Bars(console=console, disable=console is None, transient=True) as progress:
        for examples, first in sets:
            batches = data.every_row(examples, rows)
            for step in progress.track(range(len(batches)), description="reference"):
                batch, numbers = batches[step], batches.source.examples(step)
                local = {name: batch[name][None][:, mine] for name in fields}
                with use_mesh(setup.mesh):
                    given = put_batch(local, setup.mesh, rows)
                    found = jax.device_get(program(start.state.trainable, start.frozen, given))
                used = batch["segment_ids"] > 0
                document = np.take_along_axis(numbers, batch["segment_ids"], axis=1)[used]
                values[first + examples.offsets[document] + batch["positions"][used]] = found[used]
    if console is not None:
        seconds = time.perf_counter() - started
        console.print(f"reference: log-probabilities of {sum(sizes):,} tokens in {seconds:.1f} s", highlight=False)
    return values
