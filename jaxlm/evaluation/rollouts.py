"""Answers that a model draws while it is trained, and what they are worth beside the others of their group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxlm.config import Decoding, GrpoConfig, RunConfig
from jaxlm.data.preferences import last_answer
from jaxlm.errors import UserError
from jaxlm.evaluation.rewards import checked, load_reward
from jaxlm.inference.engine import Engine, Request, Slot
from jaxlm.inference.rows import DeviceModel
from jaxlm.inference.samples import stacked_weights
from jaxlm.inference.text import answer_text
from jaxlm.models.decoder import Decoder
from jaxlm.nn.routers import modality_ids
from jaxlm.processes.distributed import Hosts
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer
from jaxlm.training.objectives.policy import ADVANTAGES, DRAWN
from jaxlm.weights.native.prompt_json import PromptFile


def rollouts(config: RunConfig, tokenizer: Tokenizer, asked: PromptFile, hosts: Hosts) -> GroupRollouts:
    """What draws the answers of a run with objective grpo.

    Raises:
        UserError: for a reward that cannot be used.
    """
    stops = sorted({*tokenizer.end_ids, *asked.stop_ids})
    return GroupRollouts(config.grpo or GrpoConfig(), config.train.seed, tokenizer, stops, hosts)


class GroupRollouts:
    """See `jaxlm.training.job.Rollouts`.

    Several processes draw all answers together; the first of them asks the rewards, whose functions need not give the
    same twice.

    Attributes:
        group: answers to a prompt.
    """

    def __init__(
        self, settings: GrpoConfig, seed: int, tokenizer: Tokenizer, stop_ids: Sequence[int], hosts: Hosts
    ) -> None:
        self.group, self._hosts = settings.group, hosts
        self._settings, self._seed, self._tokenizer, self._stop_ids = settings, seed, tokenizer, tuple(stop_ids)
        self._rewards = [(name, load_reward(name)) for name in settings.rewards]
        self._weights = settings.weights or (1.0,) * len(settings.rewards)

    def __call__(
        self, prompts: Mapping[str, Any], step: int, accumulation: int, model: Decoder, variables: Any, mesh: Mesh
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The batch, and figures of the answers and their rewards."""
        _, rows, length = prompts["input_ids"].shape
        asked = []
        for number in range(rows):
            used = prompts["segment_ids"][0, number] > 0
            if used.any():
                ids = prompts["input_ids"][0, number, used]
                start, stop = last_answer(prompts["loss_mask"][0, number, used])
                asked.append((number, ids[:start], ids[start:stop]))
        slots = self._drawn(asked, step * rows, length, model, variables, mesh)
        texts = [answer_text(self._tokenizer, slot.request.prompt, slot.answer.ids) for slot in slots]
        of_prompt = [slot.request.number - step * rows for slot in slots]
        said = {number: self._tokenizer.decode(ids.tolist()) for number, ids, _ in asked}
        right = {number: self._tokenizer.decode(ids.tolist()) for number, _, ids in asked}
        columns = [said[n] for n in of_prompt], texts, [right[n] for n in of_prompt]
        figures: dict[str, float] = {}
        total = np.zeros(len(slots))
        for weight, (name, _), values in zip(self._weights, self._rewards, self._values(*columns), strict=True):
            total += weight * values
            if len(self._rewards) > 1:
                figures[f"rewards/{name}"] = float(values.mean())
        advantages, silent = group_advantages(total.reshape(-1, self.group), self._settings.loss != "dr_grpo")
        lengths = [len(slot.ids) for slot in slots]
        figures |= {
            "reward": float(total.mean()),
            "reward_deviation": float(total.reshape(-1, self.group).std(axis=1).mean()),
            "groups_without_signal": silent,
            "answer_tokens": float(np.mean(lengths)),
            "answers_cut": float(np.mean([slot.answer.finish != "stop" for slot in slots])),
        }
        batch = self._batch(slots, advantages.reshape(-1), step * rows, (rows * self.group, length), model.spec)
        return {name: value.reshape(accumulation, -1, length) for name, value in batch.items()}, figures

    def _values(self, *columns: Sequence[str]) -> NDArray[np.float64]:
        """What the answers are worth [rewards, answers]; arguments as of `Reward`."""
        if self._hosts.processes == 1:
            return np.array([checked(name, reward(*columns), columns[1]) for name, reward in self._rewards])
        values: list[list[float]] = []
        problem = None
        if self._hosts.process == 0:
            for name, reward in self._rewards:
                try:
                    values.append(checked(name, reward(*columns), columns[1]).tolist())
                except UserError as error:
                    problem = str(error)
                except Exception as error:  # noqa: BLE001 (a user's function; the others wait for its values)
                    problem = f"grpo.rewards: {name!r} raised {type(error).__name__}: {error!s:.200}"
        self._hosts.check("rewards", problem)
        return np.array(json.loads(self._hosts.exchange("values of rewards", json.dumps(values))[0]))

    def _drawn(
        self, asked: Sequence[tuple[int, Any, Any]], first: int, room: int, model: Decoder, variables: Any, mesh: Mesh
    ) -> list[Slot]:
        """The answers, those of a prompt side by side."""
        requests = []
        for number, prompt, _ in asked:
            most = min(self._settings.max_new_tokens, room - len(prompt))
            options = Decoding(temperature=1.0, samples=self.group, max_new_tokens=most, seed=self._seed % 2**32)
            requests.append(Request(prompt.tolist(), options, first + number))
        device_model = DeviceModel(model, stacked_weights(model, variables), mesh, self._stop_ids)
        engine = Engine(device_model, len(asked) * self.group, log_probs=True)
        slots = [slot for group in engine.admit(requests) for slot in group]
        while not engine.idle:
            engine.step()
        return slots

    def _batch(
        self,
        slots: Sequence[Slot],
        advantages: NDArray[np.float64],
        first: int,
        shape: tuple[int, int],
        spec: DecoderSpec,
    ) -> dict[str, NDArray[Any]]:
        """A row for each answer [B, T], prompt in front."""
        kinds = {"input_ids": np.int32, "loss_mask": np.bool_, "segment_ids": np.int32, "positions": np.int32}
        kinds |= {DRAWN: np.float32, ADVANTAGES: np.float32}
        batch: dict[str, NDArray[Any]] = {name: np.zeros(shape, kind) for name, kind in kinds.items()}
        for number, (slot, advantage) in enumerate(zip(slots, advantages, strict=True)):
            row = (slot.request.number - first) * self.group + number % self.group
            start, end = len(slot.request.prompt), len(slot.request.prompt) + len(slot.ids)
            batch["input_ids"][row, :end] = [*slot.request.prompt, *slot.ids]
            batch["segment_ids"][row, :end] = 1
            batch["positions"][row, :end] = np.arange(end)
            batch["loss_mask"][row, start:end] = True
            batch[DRAWN][row, start:end] = slot.log_probs
            batch[ADVANTAGES][row, start:end] = advantage
        if spec.experts is not None:
            ids = modality_ids(spec.experts, *(jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids")))
            batch["modality_ids"] = np.asarray(ids, np.int8)
        return batch


def group_advantages(rewards: NDArray[np.float64], by_deviation: bool) -> tuple[NDArray[np.float64], float]:
    """How much better each answer is than the mean of its group [N, G], and the share of groups in which all are alike.

    Args:
        rewards: [N, G].
        by_deviation: divided by the group's standard deviation (with Bessel's correction and 1e-4, as TRL).
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    silent = np.ptp(rewards, axis=1) == 0
    if by_deviation:
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return np.where(silent[:, None], 0.0, centred), float(silent.mean())
