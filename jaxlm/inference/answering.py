"""Many prompts in batches of like length, and their answers as texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxlm.config import Decoding
from jaxlm.inference.generator import Generator
from jaxlm.inference.text import answer_text, cut_at_stop
from jaxlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """An answer as text.

    Args:
        text: without the stop text and what follows it.
        ids: the new tokens, without the stop id; those of a stop text are among them.
        finish: 'stop' for a stop id or text, 'length' for max_new_tokens, 'context' for the end of the model's context.
    """

    text: str
    ids: tuple[int, ...]
    finish: str


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Mapping[int, Sequence[int]],
    options: Decoding,
    batch_size: int,
    strip: bool,
) -> Iterator[dict[int, list[Completion]]]:
    """Answers prompts, one batch after the other.

    Prompts of like length are answered together, the longest first: little padding, and memory that does not suffice
    is noticed at once. A batch ends with its longest answer before the next begins: an answer then does not depend,
    not even in the last bit of a logit, on when its neighbours ended.

    Args:
        prompts: token ids by number, which with the seed decides what is drawn.
        strip: take white space off both ends of the texts.

    Yields:
        For each prompt of a batch, by its number, the completions of its samples.
    """
    order = sorted(prompts, key=lambda number: (-len(prompts[number]), number))
    full = min(batch_size, len(order))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        session = generator.start([prompts[number] for number in numbers], options, numbers, rows=full)
        for _ in session.steps():
            if options.stop and options.num_beams == 1:
                for row, answers in enumerate(session.answers()):
                    for sample, answer in enumerate(answers):
                        text = answer_text(tokenizer, session.beginnings[row], answer.ids)
                        if not answer.complete and cut_at_stop(text, options.stop)[1]:
                            session.stop(row, sample)
        completions: dict[int, list[Completion]] = {}
        for number, beginning, answers in zip(numbers, session.beginnings, session.answers(), strict=True):
            completions[number] = []
            for answer in answers:
                text, stopped = cut_at_stop(answer_text(tokenizer, beginning, answer.ids), options.stop)
                finish = "stop" if stopped else answer.finish
                completions[number].append(Completion(text.strip() if strip else text, answer.ids, finish))
        yield completions
