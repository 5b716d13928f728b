"""What the train step and the loop ask of an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from jaxlm.config import RunConfig
from jaxlm.models.decoder import Decoder

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class MicroLoss(NamedTuple):
    """One micro-batch's share of a step's loss; shares are added up over the micro-batches.

    Attributes:
        total: scalar that is differentiated.
        loss: scalar that is reported as the loss; `total` may contain regularisers besides.
        figures: further sums for the metrics, of any shape (extremes, where a name ends in /min or /max); `tokens`, the
            number of tokens read, must be among them.
    """

    total: jax.Array
    loss: jax.Array
    figures: Metrics


class Objective(Protocol):
    """A loss as weighted sums, so that accumulation, packing and several hosts do not change it.

    Trees: `trainable` is {'params': …} or, for an adapter, {'lora': …}; `frozen` has the trees named in `frozen`.

    Attributes:
        fields: names of the batch's fields that it reads.
        frozen: names of the trees that it reads and nothing trains. Each is filled with the parameters of model.path;
            'params' is the base under an adapter.
    """

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def frozen(self) -> tuple[str, ...]: ...

    def prepare(self, batch: Batch) -> Batch:
        """The batch with what depends on all rows of a step, such as the weight of each target.

        Args:
            batch: leaves [A, B, T]: A micro-batches of B rows.

        Returns:
            Leaves [A, B, …]; the micro-batches are its slices along A.
        """

    def loss(self, trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int) -> MicroLoss:
        """The share of one micro-batch.

        Args:
            micro: leaves [B, …] of what `prepare` returned.
            key: for dropout.
            micro_steps: A, the number of micro-batches of the step.
        """

    def evaluate(self, trainable: Any, frozen: Any, micro: Batch) -> Metrics:
        """Sums over a batch with leaves [B, T], without dropout; `validation` reads them."""

    def validation(self, sums: dict[str, float]) -> tuple[dict[str, float], str]:
        """Figures for the metrics file, and the line that is shown.

        Args:
            sums: what `evaluate` returned, added up over all validation rows.

        Returns:
            The figures, `validation_loss` among them, which decides which checkpoint is the best; and a text.
        """


def routed_fields(model: Decoder) -> tuple[str, ...]:
    """Fields that a model of experts reads beside the tokens."""
    return () if model.spec.experts is None else ("modality_ids",)


def packed_inputs(model: Decoder, micro: Batch) -> dict[str, Any]:
    """What a model takes beside the tokens of packed rows."""
    modality_ids = None if model.spec.experts is None else micro["modality_ids"]
    return {"positions": micro["positions"], "segment_ids": micro["segment_ids"], "modality_ids": modality_ids}


# (the run, its model, rows of a device's micro-batch) -> the objective
ObjectiveFactory = Callable[[RunConfig, Decoder, int], Objective]
