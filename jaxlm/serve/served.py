"""A model as the server sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.inference.best_of import Judge
from jaxlm.inference.paged.requests import EngineThread
from jaxlm.inference.prompts import Prompter
from jaxlm.serve.problems import Problem
from jaxlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Served:
    """An engine and what belongs to it.

    Args:
        name: the base's model id; an adapter's is `name:adapter`.
        created: when the server started, in seconds since 1970.
        prompter: makes prompts for an adapter, or for the base alone (None).
        adapters: names of the adapters that are loaded now.
        context: tokens that a prompt and its answer may have together.
        vocab_size: V of the model.
        stop_ids: tokens that end an answer.
        queue: answers that may wait; more of them in one request never could.
        embed: means of the last hidden states [number of texts, D] float32 of the base; None: the model has none.
        judge: a reward model, which chooses for best_of; None: the server has none.
    """

    name: str
    created: int
    engine: EngineThread
    tokenizer: Tokenizer
    prompter: Callable[[str | None], Prompter]
    adapters: Callable[[], Sequence[str]]
    context: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    queue: int = 256
    embed: Callable[[Sequence[Sequence[int]]], np.ndarray] | None = None
    judge: Judge | None = None

    @property
    def models(self) -> list[str]:
        """All model ids."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters())]

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model id names; no id means the base.

        Raises:
            Problem: there is no such model.
        """
        if model is None or model == self.name:
            return None
        base, _, adapter = model.rpartition(":")
        if base != self.name or adapter not in self.adapters():
            known = ", ".join(self.models)
            raise Problem(f"the model {model[:80]!r} does not exist; there is {known}", 404, "model", "model_not_found")
        return adapter

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """A prompt's token ids.

        Raises:
            Problem: it is empty, does not fit the context, or holds ids that the model does not have.
        """
        if not ids:
            raise Problem(f"{param}: it has no tokens: there is nothing to answer", param=param)
        if len(ids) >= self.context:
            raise Problem(
                f"{param}: it has {len(ids)} tokens, and the model's context of {self.context} must hold at least one "
                "more; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise Problem(
                f"{param}: it holds token ids {min(ids)} to {max(ids)}, the model has 0 to {self.vocab_size - 1}",
                param=param,
            )
        return tuple(ids)
