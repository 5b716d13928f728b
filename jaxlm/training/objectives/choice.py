"""The objective that a run's configuration asks for."""

from __future__ import annotations

from jaxlm.config import RunConfig
from jaxlm.models.decoder import Decoder
from jaxlm.training.objectives.cross_entropy import cross_entropy
from jaxlm.training.objectives.objective import Objective, ObjectiveFactory
from jaxlm.training.objectives.policy import policy
from jaxlm.training.objectives.preference import preference
from jaxlm.training.objectives.reward import reward

OBJECTIVES: dict[str, ObjectiveFactory] = {
    "cross_entropy": cross_entropy,
    "preference": preference,
    "reward": reward,
    "grpo": policy,
}


def objective_of(config: RunConfig, model: Decoder, micro_batch: int) -> Objective:
    """An `ObjectiveFactory`."""
    return OBJECTIVES[config.objective](config, model, micro_batch)
