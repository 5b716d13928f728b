"""Best-of-n: a reward model says which of several answers to a prompt is the best one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.answering import Completion
from jaxlm.inference.paged.followers import Orders, together
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer

Ids = Sequence[int]
# Two tokenizers that cut this alike are taken for the same one.
_SAMPLE = "Quartz, SiO2, has a hardness of 7.\n石英的硬度是7。 naïve C1=CC=CC=C1 {}"


def check_tokens(spec: DecoderSpec, reward_spec: DecoderSpec, *tokenizers: Tokenizer) -> None:
    """Checks that a reward model reads the tokens that a model writes.

    Args:
        spec, reward_spec: of the model that writes, and of the reward model.
        tokenizers: of both; none: they are not known.

    Raises:
        UserError: it has other tokens.
    """
    if reward_spec.vocab_size != spec.vocab_size:
        raise UserError(
            f"best_of: the reward model has {reward_spec.vocab_size:,} tokens, this model {spec.vocab_size:,}; it "
            "reads this model's tokens, so both need the same tokenizer"
        )
    cut = [tuple(tokenizer.encode(_SAMPLE).ids) for tokenizer in tokenizers]
    if len(set(cut)) > 1:
        raise UserError(
            "best_of: the reward model's tokenizer cuts texts otherwise than this model's; both need the same"
        )


@dataclass(frozen=True)
class Judge:
    """A reward model as it is asked.

    Args:
        rewards: rewards [number of texts] float32 of token ids, as `LoadedModel.rewards`.
        end: the token that stands behind an answer that has come to its end.
        max_length: tokens of the longest text that it reads.
    """

    rewards: Callable[[Sequence[Ids]], NDArray[np.float32]]
    end: int
    max_length: int

    def check_prompt(self, length: int, options: Decoding, context: int, name: str) -> None:
        """Checks that it can read the longest answer to a prompt.

        Args:
            length: tokens of the prompt.
            context: tokens that a prompt and its answer may have together.

        Raises:
            UserError: it cannot; the message begins with `name`.
        """
        # An answer that ends with a stop text has the end token behind all of its tokens.
        longest = min(length + options.max_new_tokens, context) + bool(options.stop)
        if longest > self.max_length:
            raise UserError(
                f"{name}: prompt and answer may have {longest} tokens, the reward model reads at most "
                f"{self.max_length}; give fewer max_new_tokens"
            )

    def of_answers(self, answers: Sequence[tuple[Ids, Ids, bool]]) -> NDArray[np.float32]:
        """The reward of each answer.

        Args:
            answers: tokens of prompt and answer, and whether the answer has come to its end by itself.
        """
        return self.rewards([[*prompt, *ids, *([self.end] if ended else [])] for prompt, ids, ended in answers])

    def in_all(self, orders: Orders | None) -> Judge:
        """The judge of a server, whose other processes read the same answers by `acts`; None: there are none."""
        name, act = next(iter(self.acts().items()))
        rewards = together(orders, name, act)

        def told(texts: Sequence[Ids]) -> NDArray[np.float32]:
            ids = np.array([token for text in texts for token in text], np.int32)
            return rewards(ids, np.array([len(text) for text in texts]))

        return self if orders is None else replace(self, rewards=told)

    def acts(self) -> dict[str, Callable[..., NDArray[np.float32]]]:
        """What gives rewards of texts one behind the other and their lengths, by the name of its order."""

        def rewards(ids: np.ndarray, lengths: np.ndarray) -> NDArray[np.float32]:
            return self.rewards([part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])])

        return {"rewards": rewards}

    def best(
        self, prompts: Mapping[int, Ids], answers: Mapping[int, Sequence[Completion]]
    ) -> dict[int, tuple[Completion, float]]:
        """For each prompt, by its number, the answer of the highest reward (the first of equals), and the reward."""
        asked = [
            (prompts[number], each.ids, each.finish == "stop") for number, some in answers.items() for each in some
        ]
        rewards = iter(self.of_answers(asked))
        result = {}
        for number, some in answers.items():
            values = [float(next(rewards)) for _ in some]
            place = int(np.argmax(values))
            result[number] = some[place], values[place]
        return result
