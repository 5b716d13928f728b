"""Group-relative policy optimisation (arXiv:2402.03300), from answers that the trained weights have drawn themselves.

Every answer is used for one step, so that the ratio of its probabilities, now and when it was drawn, is 1 but for the
rounding of two programs; the figures `ratio/…` show how near it is. The variants are weights of tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import GrpoConfig, MoeRunConfig, RunConfig
from jaxlm.models.decoder import Decoder
from jaxlm.training.objectives.cross_entropy import router_figures
from jaxlm.training.objectives.objective import Batch, Metrics, MicroLoss, routed_fields
from jaxlm.training.objectives.preference import text_log_probs
from jaxlm.training.state import model_variables

# Fields of a batch, float32 [A, B, T] at the tokens of the answers: log-probabilities when drawn, and advantages.
DRAWN, ADVANTAGES = "drawn_log_probs", "advantages"


@dataclasses.dataclass(frozen=True)
class Policy:
    """What `Decoder` is to draw more often: answers of a group that were worth more than its mean.

    Attributes:
        model: the decoder, with its adapters.
        settings: how.
        frozen: ('params',) where the model trains an adapter; ('reference',) where all trains and kl is asked for.
        moe: factors of the routers' losses.
    """

    model: Decoder
    settings: GrpoConfig
    frozen: tuple[str, ...] = ()
    moe: MoeRunConfig = MoeRunConfig()  # noqa: RUF009 (frozen)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("input_ids", "loss_mask", "segment_ids", "positions", DRAWN, ADVANTAGES, *routed_fields(self.model))

    def prepare(self, batch: Batch) -> Batch:
        mask = batch["loss_mask"].at[..., 0].set(False).astype(jnp.float32)
        return {**batch, "weights": mask, "token_weights": token_weights(mask, self.settings)}

    def loss(self, trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int) -> MicroLoss:
        mask, weights, advantages = micro["weights"], micro["token_weights"], micro[ADVANTAGES]
        log_probs, notes = text_log_probs(self.model, model_variables(trainable, frozen), micro)
        change = (log_probs - micro[DRAWN]) * mask
        ratio = jnp.exp(change)
        if self.settings.loss == "gspo":
            lengths = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
            ratio = jnp.broadcast_to(jnp.exp(change.sum(axis=-1, keepdims=True) / lengths), mask.shape)
        clipped = jnp.clip(ratio, 1 - self.settings.epsilon, 1 + self.settings.epsilon)
        gain = jnp.minimum(ratio * advantages, clipped * advantages)
        loss = -(gain * weights).sum()
        share = weights / jnp.maximum(weights.sum() * micro_steps, 1e-9)
        figures = {
            "target_tokens": mask.sum(),
            "tokens": (micro["segment_ids"] > 0).sum(),
            "ratio/mean": (jnp.exp(change) * share).sum(),
            "ratio/min": jnp.where(mask > 0, jnp.exp(change), jnp.inf).min(),
            "ratio/max": jnp.where(mask > 0, jnp.exp(change), -jnp.inf).max(),
            "clipped": ((clipped != ratio) * share).sum(),
            "entropy": (-log_probs * share).sum(),
        }
        if self.settings.kl:
            before = frozen["reference"] if "reference" in frozen else frozen["params"]
            plain, _ = text_log_probs(self.model.clone(adapters={}), {"params": before}, micro)
            behind = (jax.lax.stop_gradient(plain) - log_probs) * mask
            distance = jnp.expm1(behind) - behind  # k3 of http://joschu.net/blog/kl-approx.html
            loss += self.settings.kl * (distance * weights).sum()
            figures["kl"] = (distance * share).sum()
        penalty, routing = router_figures(notes, self.model.spec, self.moe, micro_steps)
        return MicroLoss(loss + penalty, loss, figures | routing)

    def evaluate(self, trainable: Any, frozen: Any, micro: Batch) -> Metrics:
        raise AssertionError("a run of this objective has no validation rows")

    def validation(self, sums: dict[str, float]) -> tuple[dict[str, float], str]:
        raise AssertionError("a run of this objective has no validation rows")


def token_weights(mask: jax.Array, settings: GrpoConfig) -> jax.Array:
    """The weight of each token [A, B, T] in the loss of a step.

    Args:
        mask: float32 [A, B, T], 1 at the tokens of answers; a row has one answer, or none.
    """
    lengths = mask.sum(axis=-1, keepdims=True)
    answers = jnp.maximum((lengths > 0).sum(), 1)
    if settings.loss == "dapo":
        return mask / jnp.maximum(mask.sum(), 1)
    if settings.loss == "dr_grpo":
        return mask / (answers * settings.max_new_tokens)
    return mask / (jnp.maximum(lengths, 1) * answers)


def policy(config: RunConfig, model: Decoder, micro_batch: int) -> Policy:
    """The objective of a run: an `ObjectiveFactory`."""
    model.spec.refuse_encoder("objective: grpo")
    settings = config.grpo or GrpoConfig()
    frozen = ("params",) if config.lora is not None else ("reference",) if settings.kl else ()
    return Policy(model, settings, frozen, config.moe or MoeRunConfig())
