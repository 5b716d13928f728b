"""How well a model predicts texts: loss per token, perplexity, and bits per byte and per character.

Texts are packed into rows, as in training, and scored batch by batch. Batches are planned before the first is scored,
so that a run that was killed and goes on computes each in the same shape, and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxlm.config import DataConfig
from jaxlm.data.batches import EvaluationSource
from jaxlm.data.examples import Examples
from jaxlm.data.loader import Data
from jaxlm.data.report import Report
from jaxlm.devices.mesh import local_rows, put_batch, replicated, rows_axis_size, use_mesh
from jaxlm.errors import UserError
from jaxlm.evaluation.task import Answer, Answers
from jaxlm.evaluation.texts import Texts
from jaxlm.models.decoder import Decoder
from jaxlm.training.objectives.cross_entropy import CrossEntropy

# Rows have at least this many tokens (or all tokens of the texts), so that many short texts make few rows.
_SHORTEST = 512


@dataclasses.dataclass(frozen=True)
class Batch:
    """What is kept of a batch of rows.

    Attributes:
        loss, correct, tokens: sums over its scored tokens: -log p in nats, those that were the most probable, all.
        windows: (number of the window, and its own loss, correct and tokens) of each window in it.
    """

    loss: float
    correct: float
    tokens: float
    windows: tuple[tuple[int, float, int, int], ...]


# Stands for a batch whose sums another process has.
UNSEEN = Batch(0.0, 0.0, 0.0, ())


def from_json(values: Mapping[str, Any]) -> Batch:
    """A batch from its fields as JSON has them."""
    windows = tuple(tuple(window) for window in values["windows"])
    return Batch(values["loss"], values["correct"], values["tokens"], windows)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Figures of a model on texts.

    Attributes:
        tokens: number of predicted tokens.
        loss: mean over them of -log p, in nats.
        perplexity: exp(loss).
        accuracy: share of tokens whose logit was the largest.
        bits_per_token: loss in bits.
        bits_per_byte, bits_per_character: all bits over the bytes and characters of the text, comparable between
            tokenizers. None where only ends were scored, which have no text.
    """

    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    bits_per_token: float
    bits_per_byte: float | None
    bits_per_character: float | None


def measure(
    model: Decoder,
    trainable: Any,
    frozen: Any,
    mesh: Mesh,
    texts: Texts,
    rows: int,
    known: Mapping[int, Batch],
    keep: Callable[[int, Batch], None],
    progress: Callable[[int, int], None],
) -> list[Batch]:
    """Runs a model over texts, packed into rows with segment ids; several processes call it together.

    Args:
        model: with the adapters that are applied on the fly, if any.
        trainable: {"params": ...} of a full model, {"lora": ...} of an adapter, on the mesh.
        frozen: {} or, for an adapter, {"params": ...}.
        mesh: the devices.
        texts: the windows to score.
        rows: number of rows of a device group at a time.
        known: batches that were scored before, by number; the same numbers on every process.
        keep: is given each batch that is scored, and its number.
        progress: called with the number of batches done, and of all.

    Returns:
        All batches.

    Raises:
        UserError: when a loss is not finite.
    """
    length = int(texts.examples.lengths.max())
    moe = model.spec.experts
    data = Data(
        config=DataConfig(sequence_length=row_length(texts.examples, length), packing=True),
        seed=0,
        train=texts.examples,
        validation=texts.examples,
        report=Report((), ()),
        fingerprint="",
        ranges=() if moe is None else moe.ranges,
    )
    batch_rows = rows * rows_axis_size(mesh)
    batches = data.eval_batches(batch_rows)
    source = batches.source
    assert isinstance(source, EvaluationSource)
    objective = CrossEntropy(model)

    def score(trainable: Any, frozen: Any, batch: Any) -> Any:
        return objective.by_token(trainable, frozen, {name: value[0] for name, value in batch.items()})

    step = jax.jit(score, out_shardings=replicated(mesh))
    # Each process makes whole batches, because the sums of windows need them, and places the rows of its devices.
    own_rows = list(local_rows(mesh, batch_rows))
    result = []
    with use_mesh(mesh):
        for number in range(len(batches)):
            scored = known.get(number)
            if scored is None:
                batch = batches[number]
                placed = put_batch({name: batch[name][None, own_rows] for name in objective.fields}, mesh, batch_rows)
                sums, tokens = jax.device_get(step(trainable, frozen, placed))
                _check_finite(float(sums["loss"]))
                scored = Batch(
                    float(sums["loss"]),
                    float(sums["correct"]),
                    float(sums["target_tokens"]),
                    _by_window(batch, source.examples(number), tokens.loss, tokens.correct),
                )
                keep(number, scored)
            result.append(scored)
            progress(number + 1, len(batches))
    return result


def _by_window(
    batch: Mapping[str, NDArray[Any]], examples: NDArray[np.int64], losses: NDArray[Any], correct: NDArray[Any]
) -> tuple[tuple[int, float, int, int], ...]:
    """The sums of each window, see `Batch`.

    Args:
        batch: arrays [B, T].
        examples: the number of the window by [row, segment id].
        losses, correct: of each token, float32 [B, T].
    """
    scored = batch["loss_mask"].copy()
    scored[:, 0] = False
    owner = examples[np.arange(len(examples))[:, None], batch["segment_ids"]]
    numbers = np.unique(owner[owner >= 0])
    at = np.searchsorted(numbers, owner[scored])
    sums = [np.bincount(at, values[scored], len(numbers)).tolist() for values in (losses, correct, scored)]
    return tuple(
        (int(number), float(loss), int(right), int(count))
        for number, loss, right, count in zip(numbers, *sums, strict=True)
    )


def by_text(texts: Texts, batches: list[Batch]) -> list[Answers]:
    """The answer to each text: its log-likelihood, and its length in tokens, bytes and characters."""
    sums = np.zeros((3, texts.records))
    for batch in batches:
        for window, *values in batch.windows:
            sums[:, texts.examples.record[window]] += values
    answers: list[Answers] = []
    for (loss, right, tokens), (characters, size) in zip(sums.T.tolist(), texts.lengths.tolist(), strict=True):
        answer = Answer(
            log_probs=(-loss,),
            num_tokens=(int(tokens),),
            num_correct=(int(right),),
            num_bytes=(size,),
            num_characters=(characters,),
        )
        answers.append({"text": answer})
    return answers


def row_length(examples: Examples, longest: int) -> int:
    """Tokens of a row: the longest window, or more where windows are short; kernels like multiples of 128."""
    total = int(examples.lengths.sum())
    return max(longest, min(_SHORTEST, -(-total // 128) * 128), 2)


def figures(loss: float, tokens: int, correct: float, size: int, characters: int) -> Perplexity:
    """The figures from sums over tokens.

    Args:
        loss: sum of -log p, nats.
        tokens: number of tokens.
        correct: number of tokens whose logit was the largest.
        size, characters: bytes and characters of the text.

    Raises:
        UserError: when the loss is not finite.
    """
    _check_finite(loss)
    mean, bits = loss / tokens, loss / math.log(2)

    def per(count: int) -> float | None:
        return bits / count if count else None

    return Perplexity(
        tokens=tokens,
        loss=mean,
        perplexity=float(np.exp(min(mean, 700.0))),
        accuracy=correct / tokens,
        bits_per_token=bits / tokens,
        bits_per_byte=per(size),
        bits_per_character=per(characters),
    )


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the model's loss on these texts is {loss}: some of its weights are not finite, or overflow "
            "in this dtype; try --model.dtype float32, and look at the weights with `convert inspect`"
        )
