"""A run with its inputs opened, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxlm.config import RunConfig
from jaxlm.data.loader import Data
from jaxlm.devices.finite import Namer, leaf_name
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec
from jaxlm.training.objectives.choice import objective_of
from jaxlm.training.objectives.objective import ObjectiveFactory
from jaxlm.weights.leaves import LeafReader, ParamSource


class TaskFigure(Protocol):
    """A figure of a task, as `jaxlm.evaluation.task.Figure` is one."""

    @property
    def value(self) -> float: ...

    @property
    def stderr(self) -> float | None: ...

    @property
    def higher_is_better(self) -> bool | None: ...


class TrainingTask(Protocol):
    """A task that is run on the model while it is trained.

    Attributes:
        name: before the names of its figures.
        every: steps between runs.
    """

    name: str
    every: int

    def __call__(self, model: Decoder, variables: Any, mesh: jax.sharding.Mesh) -> Mapping[str, TaskFigure]:
        """The figures of variables as `Decoder.apply` takes them; all processes call it together."""
        ...


class Rollouts(Protocol):
    """What turns prompts into a batch of a model's own answers.

    Attributes:
        group: answers to a prompt.
    """

    group: int

    def __call__(
        self, prompts: Mapping[str, Any], step: int, accumulation: int, model: Decoder, variables: Any, mesh: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The batch, leaves [A, B, T] with what the objective reads, and figures of it.

        Args:
            prompts: leaves [1, B, T] of records, their answers marked as trained.
            step: decides, with the run's seed, what is drawn.
            accumulation: A.
            variables: what `Decoder.apply` takes.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with its inputs opened.

    Attributes:
        config: the run.
        run_yaml: the config as text, kept with every checkpoint.
        model: shape of the model.
        source: where base parameters are read from; None for a fresh model.
        adapter: adapter to start from; None for a fresh one.
        data: the rows.
        files: small files kept with every checkpoint (tokenizer/..., hf_config.json).
        verbose: say at start-up also what choices rest on.
        tensor_name: how messages name a tensor of the source.
        objective: makes what is minimised.
        tasks: run on the model while it is trained.
        rollouts: where a step learns from answers that are drawn for it; None: from the data's.
    """

    config: RunConfig
    run_yaml: str
    model: DecoderSpec
    source: ParamSource | None
    adapter: LeafReader | None
    data: Data
    files: Mapping[str, bytes]
    verbose: bool = False
    tensor_name: Namer = leaf_name
    objective: ObjectiveFactory = objective_of
    tasks: tuple[TrainingTask, ...] = ()
    rollouts: Rollouts | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run leaves behind.

    Attributes:
        step: last step done.
        interrupted: what asked for the end before the last step, e.g. 'SIGTERM on process 1 (host)'; None: nothing did.
        saved: whether this start has saved a step.
        checkpoint: the newest checkpoint.
        model: the model object, for sampling.
        variables: trained variables, as `Model.apply` takes them.
        mesh: the mesh they live on.
        validation: validation losses by step, in order.
        best: (step, figure) of the best checkpoint kept: its validation loss, or the figure of train.best.
        complete: it was the last step of the run.
    """

    step: int
    interrupted: str | None
    saved: bool
    checkpoint: Path
    model: Decoder
    variables: Any
    mesh: jax.sharding.Mesh
    validation: list[tuple[int, float]]
    best: tuple[int, float] | None
    complete: bool
