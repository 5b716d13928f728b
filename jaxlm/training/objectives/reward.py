"""A reward model: Bradley-Terry over pairs (arXiv:2203.02155, eq. 1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import MoeRunConfig, RunConfig
from jaxlm.kernels.cross_entropy import soft_capped
from jaxlm.models.decoder import Decoder
from jaxlm.training.objectives.objective import Batch, Metrics, packed_inputs
from jaxlm.training.objectives.preference import OverDocuments, pair_figures, sums_where
from jaxlm.training.objectives.sequences import text_sums
from jaxlm.training.state import model_variables


@dataclasses.dataclass(frozen=True)
class Reward(OverDocuments):
    """How likely it is that the chosen answer has the higher reward, which is read at an answer's last token."""

    def _figures(self, trainable: Any, frozen: Any, micro: Batch, **options: Any) -> tuple[Metrics, Any]:
        (x, matrix), notes = self.model.apply(
            model_variables(trainable, frozen),
            micro["input_ids"],
            method="hidden",
            mutable=["moe"],
            **packed_inputs(self.model, micro),
            **options,
        )
        places = micro["places"]
        last = (micro["weights"] > 0) & (jnp.roll(places, -1, axis=-1).at[..., -1].set(-1) != places)
        spec = self.model.spec
        # A product with one row: the reward is a logit, and the other V - 1 are not computed.
        logits = jnp.einsum("btd,d->bt", x.astype(jnp.float32), matrix[spec.reward_token_id].astype(jnp.float32))
        found = soft_capped(logits, spec.logits_soft_cap) * last
        chosen, rejected, _ = jnp.moveaxis(text_sums(found, places), -1, 0)
        real = text_sums(last.astype(jnp.float32), places)[..., 0] > 0
        figures = pair_figures(chosen, rejected) | {"loss": -jax.nn.log_sigmoid(chosen - rejected)}
        return sums_where(real, figures), notes


def reward(config: RunConfig, model: Decoder, micro_batch: int) -> Reward:
    """The objective of a run: an `ObjectiveFactory`."""
    model.spec.refuse_encoder("objective: reward")
    return Reward(model, () if config.lora is None else ("params",), config.moe or MoeRunConfig())
