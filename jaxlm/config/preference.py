"""What is learned from besides answers: preferences, and rewards of the model's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """`objective: preference`: which loss, and what it is measured from. TRL's meaning of every number.

    Args:
        loss: sigmoid (DPO), ipo, hinge, robust, sigmoid_norm (log-probabilities per token), apo_zero; kto, from
            answers with a label; orpo and simpo, which need no reference.
        beta: how far the model may go from the reference (ipo: tau; orpo: lambda).
        label_smoothing: share of pairs that may be the wrong way round (sigmoid, robust).
        sft: adds this much of the chosen answers' cross-entropy; null: 1 for orpo, whose part it is, else 0.
        margin: simpo's gamma.
        wanted: kto's weight of wanted answers.
        unwanted: kto's weight of unwanted answers.
        reference: the model before its first step: stored computes its log-probabilities once, kept beside the
            run; live computes them at every step with the adapter off, where a fresh adapter is all that trains.
    """

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "kto", "orpo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft: float | None = None
    margin: float = 0.5
    wanted: float = 1.0
    unwanted: float = 1.0
    reference: Literal["stored", "live"] = "stored"

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("orpo", "simpo")

    @property
    def sft_weight(self) -> float:
        return float(self.loss == "orpo") if self.sft is None else self.sft


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """`objective: grpo`: the model's own answers to the prompts of data.train, and what they are worth.

    Of train.global_batch_size answers a step, each prompt gets `group`, drawn at temperature 1 from the weights that
    the step trains.

    Args:
        rewards: what an answer is worth, added up: exact (equal to the record's answer), number or number:TOLERANCE
            (the first number in both is the same, relative tolerance 0.01), valid_smiles, valid_json or
            json_schema:FILE, triple_f1 (KnowLM's JSON), or FILE.py:FUNCTION, which takes lists of prompts, answers and
            the records' answers, and returns a list of numbers.
        weights: of each of them; empty: 1.
        group: answers to a prompt.
        loss: how tokens are weighted: grpo, each answer alike; dapo, each token alike; dr_grpo, each token by
            max_new_tokens, with no division by the group's deviation; gspo, as grpo with one ratio for an answer.
        epsilon: how far a ratio of probabilities, now and when drawn, may be from 1 before its gradient is cut.
        kl: weight of the distance to the model before its first step; 0 is off.
        max_new_tokens: of an answer.
    """

    rewards: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    group: int = 8
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "dapo"
    epsilon: float = 0.2
    kl: float = 0.0
    max_new_tokens: int = 64
