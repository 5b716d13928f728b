"""Next-token cross-entropy, with the losses of learned routers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import MoeRunConfig, RunConfig
from jaxlm.kernels.cross_entropy import LossOutput, TokenLosses
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec
from jaxlm.training.objectives.objective import Batch, Metrics, MicroLoss, packed_inputs, routed_fields
from jaxlm.training.state import model_variables


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the target tokens, weighted so that the loss of a step is one sum.

    Attributes:
        model: the decoder, with its adapters.
        frozen: ('params',) where the model trains an adapter.
        normalisation: see `target_weights`.
        group_rows: rows of one device's micro-batch, see `target_weights`.
        packed: rows hold several documents. Otherwise the attention needs no segment ids: padding stands behind the
            document, where no token looks; but for an encoder, whose tokens look there too.
        moe: factors of the routers' losses.
    """

    model: Decoder
    frozen: tuple[str, ...] = ()
    normalisation: str = "tokens"
    group_rows: int = 1
    packed: bool = True
    moe: MoeRunConfig = MoeRunConfig()  # noqa: RUF009 (frozen)

    @property
    def fields(self) -> tuple[str, ...]:
        source = () if self.model.spec.encoder is None else ("encoder_ids", "encoder_segment_ids")
        return ("input_ids", "loss_mask", "segment_ids", "positions", *routed_fields(self.model), *source)

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, "weights": target_weights(batch["loss_mask"], self.normalisation, self.group_rows)}

    def loss(self, trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int) -> MicroLoss:
        output, router_notes = self._apply(trainable, frozen, micro, deterministic=False, rngs={"dropout": key})
        penalty, figures = router_figures(router_notes, self.model.spec, self.moe, micro_steps)
        counts = {"target_tokens": (micro["weights"] > 0).sum(), "tokens": (micro["segment_ids"] > 0).sum()}
        return MicroLoss(output.loss + penalty, output.loss, counts | figures)

    def evaluate(self, trainable: Any, frozen: Any, micro: Batch) -> Metrics:
        weights = micro["loss_mask"].at[:, 0].set(False).astype(jnp.float32)
        output, _ = self._apply(trainable, frozen, {**micro, "weights": weights}, accuracy=True)
        return {"loss": output.loss, "correct": output.correct, "target_tokens": weights.sum()}

    def by_token(self, trainable: Any, frozen: Any, micro: Batch) -> tuple[Metrics, TokenLosses]:
        """The sums of `evaluate`, and what each token [B, T] adds to them."""
        weights = micro["loss_mask"].at[:, 0].set(False).astype(jnp.float32)
        (output, tokens), _ = self.model.apply(
            model_variables(trainable, frozen),
            micro["input_ids"],
            weights,
            method="token_losses",
            mutable=["moe"],
            **packed_inputs(self.model, micro),
        )
        return {"loss": output.loss, "correct": output.correct, "target_tokens": weights.sum()}, tokens

    def validation(self, sums: dict[str, float]) -> tuple[dict[str, float], str]:
        targets = max(sums["target_tokens"], 1.0)
        loss, accuracy = sums["loss"] / targets, sums["correct"] / targets
        perplexity = float(np.exp(min(loss, 700.0)))
        figures = {
            "validation_loss": loss,
            "validation_perplexity": perplexity,
            "validation_accuracy": accuracy,
            "validation_tokens": int(sums["target_tokens"]),
        }
        return figures, f"validation loss {loss:.4f}, perplexity {perplexity:.2f}, accuracy {accuracy:.1%}"

    def _apply(self, trainable: Any, frozen: Any, micro: Batch, **options: Any) -> tuple[LossOutput, Any]:
        """The model's loss of a micro-batch, and what its routers noted: {} for a dense model."""
        inputs = packed_inputs(self.model, micro)
        if self.model.spec.encoder is not None:
            inputs |= {name: micro[name] for name in ("encoder_ids", "encoder_segment_ids")}
        elif not self.packed:
            inputs["segment_ids"] = None
        result = self.model.apply(
            model_variables(trainable, frozen),
            micro["input_ids"],
            micro["weights"],
            method="loss",
            mutable=["moe"],
            **inputs,
            **options,
        )
        return cast(tuple[LossOutput, Any], result)


def cross_entropy(config: RunConfig, model: Decoder, micro_batch: int) -> CrossEntropy:
    """The objective of a run: an `ObjectiveFactory`."""
    return CrossEntropy(
        model,
        () if config.lora is None else ("params",),
        config.train.loss_normalisation,
        micro_batch,
        config.data.packed,
        config.moe or MoeRunConfig(),
    )


def target_weights(loss_mask: jax.Array, normalisation: str, group_rows: int) -> jax.Array:
    """Weight of each target token [A, B, T] float32, so that the loss of a step is one weighted sum.

    Args:
        loss_mask: [A, B, T] bool, True where the token is a target. Column 0 never is.
        normalisation: 'tokens': every target of the global batch weighs the same. 'mean_of_means': targets
            weigh the same within a group of rows, and groups that have any weigh the same among each other.
        group_rows: rows of a group, i.e. the micro batch of one device.
    """
    mask = loss_mask.at[..., 0].set(False).astype(jnp.float32)
    if normalisation == "tokens":
        return mask / jnp.maximum(mask.sum(), 1.0)
    a, b, t = mask.shape
    grouped = mask.reshape(a, b // group_rows, group_rows, t)
    counts = grouped.sum(axis=(2, 3), keepdims=True)
    groups = jnp.maximum((counts > 0).sum(), 1)
    return (grouped / jnp.maximum(counts, 1.0) / groups).reshape(a, b, t)


def router_figures(
    notes: Any, spec: DecoderSpec, config: MoeRunConfig, micro_steps: int
) -> tuple[jax.Array | float, Metrics]:
    """The routers' weighted losses, and figures to be summed over the micro-batches of a step.

    The losses are means over tokens, so that each micro-batch counts alike.

    Args:
        notes: the collection `moe` of an application of the model, or {}.
        spec: of the model.
        config: factors of the losses.
        micro_steps: number of micro-batches of the step.

    Returns:
        What is added to the loss, and figures: router_balance and router_z (means over layers); expert_use
        [L, modalities, E] (the L layers of experts) and modality_tokens [modalities], the numbers of tokens that used
        each expert, and of all tokens. Nothing for a dense model.
    """
    if "moe" not in notes:
        return 0.0, {}
    routed = _by_layer(notes["moe"], spec)
    figures = {"expert_use": routed["used"], "modality_tokens": routed["tokens"][0]}
    penalty: jax.Array | float = 0.0
    if "balance_loss" in routed:
        balance, z = routed["balance_loss"].mean() / micro_steps, routed["z_loss"].mean() / micro_steps
        figures |= {"router_balance": balance, "router_z": z}
        penalty = config.balance_loss * balance + config.z_loss * z
    return penalty, figures


def _by_layer(notes: Any, spec: DecoderSpec) -> dict[str, jax.Array]:
    """The notes of all layers of experts, stacked in the order of the layers."""
    stacks = [stack for stack in spec.stacks if stack.layer.feed_forward.experts is not None]
    parts = [functools.reduce(lambda tree, key: tree[key], stack.path.split("/"), notes)["mlp"] for stack in stacks]
    if len(parts) == 1:
        return dict(parts[0])
    order = np.argsort([number for stack in stacks for number in stack.numbers])
    return jax.tree.map(lambda *each: jnp.concatenate(each)[order], *parts)
