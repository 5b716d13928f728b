"""Preference losses: a scalar function of sums of log-probabilities over the texts of packed rows.

Formulae as TRL has them (dpo_trainer.py, kto_trainer.py, cpo_trainer.py, orpo_trainer.py). The gradient of such a
function is that of a weighted cross-entropy, so the output layer is that of any training: no logits of the whole batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import MoeRunConfig, PreferenceConfig, RunConfig
from jaxlm.models.decoder import Decoder
from jaxlm.training.objectives.cross_entropy import router_figures
from jaxlm.training.objectives.objective import Batch, Metrics, MicroLoss, packed_inputs, routed_fields
from jaxlm.training.objectives.sequences import TEXTS, apart, num_documents, text_sums
from jaxlm.training.state import model_variables

REFERENCE = "reference_log_probs"  # field of a batch


class Pairs(NamedTuple):
    """Log-probabilities of pairs, each [B, N]: of the model, or what it has more of them than the reference.

    Attributes:
        chosen, rejected: sums over an answer.
        chosen_tokens, rejected_tokens: tokens of an answer, at least 1.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array

    def means(self) -> tuple[jax.Array, jax.Array]:
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def pair_losses(settings: PreferenceConfig, pairs: Pairs) -> jax.Array:
    """The loss [B, N] of each pair.

    Args:
        pairs: log-ratios to the reference; log-probabilities for a loss without one.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    difference = pairs.chosen - pairs.rejected
    chosen, rejected = pairs.means()
    by_token = chosen - rejected
    log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid
    up, down = log_sigmoid(beta * difference), log_sigmoid(-beta * difference)
    match settings.loss:
        case "sigmoid":
            return -(1 - smoothing) * up - smoothing * down
        case "robust":
            return (-(1 - smoothing) * up + smoothing * down) / (1 - 2 * smoothing)
        case "ipo":
            return jnp.square(by_token - 1 / (2 * beta))
        case "hinge":
            return jax.nn.relu(1 - beta * difference)
        case "sigmoid_norm":
            return -log_sigmoid(beta * by_token)
        case "apo_zero":
            return 1 - sigmoid(beta * pairs.chosen) + sigmoid(beta * pairs.rejected)
        case "simpo":
            return -log_sigmoid(beta * by_token - settings.margin)
        case "orpo":
            odds = by_token - (jax.nn.log1mexp(-chosen) - jax.nn.log1mexp(-rejected))
            return -beta * log_sigmoid(odds)
    raise AssertionError(f"{settings.loss} is not a loss over pairs")


def kto_losses(settings: PreferenceConfig, ratios: jax.Array, kl: jax.Array, wanted: jax.Array) -> jax.Array:
    """KTO's loss [B, N] of each answer.

    Args:
        ratios: [B, N], log-ratio of the answer to the reference.
        kl: scalar, the same of mismatched answers on the mean, at least 0; a constant to differentiation.
        wanted: bool [B, N].
    """
    signed = settings.beta * jnp.where(wanted, ratios - kl, kl - ratios)
    return jnp.where(wanted, settings.wanted, settings.unwanted) * (1 - jax.nn.sigmoid(signed))


@dataclasses.dataclass(frozen=True)
class OverDocuments:
    """A mean over the documents of a step: pairs, or labelled answers.

    Attributes:
        model: the decoder, with its adapters.
        frozen: ('params',) where the model trains an adapter.
        moe: factors of the routers' losses.
    """

    model: Decoder
    frozen: tuple[str, ...] = ()
    moe: MoeRunConfig = MoeRunConfig()  # noqa: RUF009 (frozen)
    labelled: ClassVar[bool] = False
    sft_weight: ClassVar[float] = 0.0

    @property
    def fields(self) -> tuple[str, ...]:
        return ("input_ids", "loss_mask", "segment_ids", *routed_fields(self.model))

    def _figures(self, trainable: Any, frozen: Any, micro: Batch, **options: Any) -> tuple[Metrics, Any]:
        """Sums over the documents of a micro-batch, `loss` and `documents` among them; and what routers noted."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Batch:
        split = apart(batch)
        rows = batch["segment_ids"].shape[:-1]
        first = (split["places"] % TEXTS == 0) * split["weights"]
        documents = num_documents(batch)
        unwanted = (split["places"] % TEXTS == TEXTS - 1).sum()  # each has one token for a third text
        counts = {"share": documents, "token_share": first.sum()}
        counts |= {"wanted_share": documents - unwanted, "unwanted_share": unwanted}
        shares = {name: 1 / jnp.maximum(count, 1) for name, count in counts.items()}
        return split | {name: jnp.broadcast_to(value, rows).astype(jnp.float32) for name, value in shares.items()}

    def loss(self, trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int) -> MicroLoss:
        figures, notes = self._figures(trainable, frozen, micro, deterministic=False, rngs={"dropout": key})
        sides = {"chosen": "wanted_share", "rejected": "unwanted_share"} if self.labelled else {}
        means = {
            name: value * micro[sides.get(name.rpartition("/")[2], "share")][0]
            for name, value in figures.items()
            if name not in ("chosen_nll", "chosen_tokens", "documents")
        }
        loss = means.pop("loss")
        if self.sft_weight:
            loss += self.sft_weight * figures["chosen_nll"] * micro["token_share"][0]
        penalty, routing = router_figures(notes, self.model.spec, self.moe, micro_steps)
        counts = {"target_tokens": micro["weights"].sum(), "tokens": (micro["segment_ids"] > 0).sum()}
        return MicroLoss(loss + penalty, loss, counts | means | routing)

    def evaluate(self, trainable: Any, frozen: Any, micro: Batch) -> Metrics:
        figures, _ = self._figures(trainable, frozen, apart(micro))
        return figures

    def validation(self, sums: dict[str, float]) -> tuple[dict[str, float], str]:
        count = max(sums["documents"], 1.0)
        wanted = sums.get("wanted", count)
        counts = {"chosen": wanted, "rejected": count - wanted if "wanted" in sums else count}
        means = {
            f"validation_{name}": value / max(counts.get(name.rpartition("/")[2], count), 1.0)
            for name, value in sums.items()
            if "/" in name or name == "loss"
        }
        if self.sft_weight:
            means["validation_loss"] += self.sft_weight * sums["chosen_nll"] / max(sums["chosen_tokens"], 1.0)
        text = f"validation loss {means['validation_loss']:.4f}"
        accuracy = means.get("validation_rewards/accuracies")
        return means, text if accuracy is None else f"{text}, chosen preferred {accuracy:.1%}"


@dataclasses.dataclass(frozen=True)
class Preference(OverDocuments):
    """A preference loss.

    Attributes:
        settings: which.
    """

    settings: PreferenceConfig = PreferenceConfig()  # noqa: RUF009 (frozen)

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        return self.settings.loss == "kto"

    @property
    def sft_weight(self) -> float:  # type: ignore[override]
        return self.settings.sft_weight

    @property
    def stored_reference(self) -> bool:
        """Whether batches bring the reference's log-probabilities."""
        return self.settings.needs_reference and self.settings.reference == "stored"

    @property
    def fields(self) -> tuple[str, ...]:
        return (*super().fields, *((REFERENCE,) if self.stored_reference else ()))

    def log_probs(self, trainable: Any, frozen: Any, micro: Batch, **options: Any) -> tuple[jax.Array, Any]:
        """Log-probabilities [B, T] of the trained tokens, 0 for others, and what routers noted."""
        return text_log_probs(self.model, model_variables(trainable, frozen), micro, **options)

    def _figures(self, trainable: Any, frozen: Any, micro: Batch, **options: Any) -> tuple[Metrics, Any]:
        log_probs, notes = self.log_probs(trainable, frozen, micro, **options)
        policy = text_sums(log_probs, micro["places"])
        tokens = jnp.maximum(text_sums(micro["weights"], micro["places"]), 1)
        ratios = policy
        if self.stored_reference:
            ratios = text_sums(log_probs - micro[REFERENCE] * micro["weights"], micro["places"])
        elif self.settings.needs_reference:
            plain = text_log_probs(self.model.clone(adapters={}), {"params": frozen["params"]}, micro)[0]
            ratios = text_sums(log_probs - jax.lax.stop_gradient(plain), micro["places"])
        real = text_sums((micro["segment_ids"] > 0).astype(jnp.float32), micro["places"]) > 0
        if self.labelled:
            return self._labelled(policy, ratios, real), notes
        return self._paired(policy, ratios, tokens, real[..., 0]), notes

    def _paired(self, policy: jax.Array, ratios: jax.Array, tokens: jax.Array, real: jax.Array) -> Metrics:
        pairs = Pairs(ratios[..., 0], ratios[..., 1], tokens[..., 0], tokens[..., 1])
        chosen, rejected = pairs.means() if self.settings.loss in ("orpo", "simpo") else pairs[:2]
        # Places without a pair get numbers that no loss trips over.
        held = Pairs(*(jnp.where(real, value, -1.0) for value in pairs))
        figures = pair_figures(chosen, rejected, self.settings.beta) | {
            "loss": pair_losses(self.settings, held),
            "logps/chosen": policy[..., 0],
            "logps/rejected": policy[..., 1],
            "chosen_nll": -policy[..., 0],
            "chosen_tokens": tokens[..., 0],
        }
        return sums_where(real, figures)

    def _labelled(self, policy: jax.Array, ratios: jax.Array, real: jax.Array) -> Metrics:
        there, wanted = real[..., 0], real[..., 0] & ~real[..., 2]
        mismatched = jnp.where(there, ratios[..., 1], 0.0).sum() / jnp.maximum(there.sum(), 1)
        kl = jax.lax.stop_gradient(jnp.maximum(mismatched, 0.0))
        ratio = ratios[..., 0]
        figures = {
            "loss": kto_losses(self.settings, ratio, kl, wanted),
            "rewards/chosen": jnp.where(wanted, self.settings.beta * ratio, 0.0),
            "rewards/rejected": jnp.where(wanted, 0.0, self.settings.beta * ratio),
            "logps/chosen": jnp.where(wanted, policy[..., 0], 0.0),
            "logps/rejected": jnp.where(wanted, 0.0, policy[..., 0]),
            "kl": jnp.broadcast_to(kl, ratio.shape),
            "wanted": wanted.astype(jnp.float32),
            "documents": jnp.ones_like(ratio),
        }
        return sums_where(there, figures)


def pair_figures(chosen: jax.Array, rejected: jax.Array, scale: float = 1.0) -> Metrics:
    """What is reported of pairs [B, N], whose rewards are `scale` times what is given."""
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * (chosen - rejected),
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "documents": jnp.ones_like(chosen),
    }


def sums_where(real: jax.Array, figures: Metrics) -> Metrics:
    """Sums of figures [B, N] over the places that hold a document."""
    return {name: jnp.where(real, value, 0.0).sum() for name, value in figures.items()}


def text_log_probs(model: Decoder, variables: Any, micro: Batch, **options: Any) -> tuple[jax.Array, Any]:
    """Log-probabilities [B, T] of the trained tokens of texts, 0 for others; and what the model's routers noted.

    Args:
        micro: of `apart`.
        options: deterministic, and keys for dropout.
    """
    (_, tokens), notes = model.apply(
        variables,
        micro["input_ids"],
        micro["weights"],
        accuracy=False,
        method="token_losses",
        mutable=["moe"],
        **packed_inputs(model, micro),
        **options,
    )
    return -tokens.loss, notes


def preference(config: RunConfig, model: Decoder, micro_batch: int) -> Preference:
    """The objective of a run: an `ObjectiveFactory`."""
    model.spec.refuse_encoder("objective: preference")
    frozen = () if config.lora is None else ("params",)
    return Preference(model, frozen, config.moe or MoeRunConfig(), config.preference or PreferenceConfig())
