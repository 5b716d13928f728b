"""How well a model predicts texts: loss per token, perplexity, and bits per byte and per character.

Scored are the tokens that training on the same data would take as targets: a whole text, or the answers of
instructions. A text that is longer than a row is cut into windows; each begins with tokens that were scored before, as
context. So every token is scored once, except a first token that nothing precedes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import Example, encode_rendered
from jaxlm.data.examples import Examples, from_list
from jaxlm.data.loader import Data
from jaxlm.data.records import read_records
from jaxlm.data.report import Report
from jaxlm.data.templates import choose_template, load_template
from jaxlm.devices.mesh import put_batch, replicated, rows_axis_size, use_mesh
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.models.decoder import Decoder
from jaxlm.tokenizer import Tokenizer
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.step import make_eval_step

_BATCH = 512  # records tokenised in one call
# Rows have at least this many tokens (or all tokens of the texts), so that many short texts make few rows.
_SHORTEST = 512


@dataclasses.dataclass(frozen=True)
class Settings:
    """How records become rows.

    Attributes:
        length: largest number of tokens of a row.
        stride: number of new tokens in each further window of a longer text; the others are context.
        add_bos, add_eos: as in `DataConfig`.
        train_on_inputs: whether prompts are scored too.
    """

    length: int
    stride: int
    add_bos: bool
    add_eos: bool
    train_on_inputs: bool = False


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as windows of tokens, and the amount of text that is scored.

    Attributes:
        examples: the windows; `loss_mask` marks the tokens that are scored.
        template: name of the template that made text of the records.
        records: number of records read.
        empty: number of records with nothing to score.
        long: number of records with several windows.
        characters, bytes: length of the scored text, as Unicode and as UTF-8; an end (eos) has no text.
        unscored: number of tokens of that text that nothing precedes, so that nothing predicts them.
    """

    examples: Examples
    template: str
    records: int
    empty: int
    long: int
    characters: int
    bytes: int
    unscored: int


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


def choose(source: SourceConfig, tokenizer: Tokenizer, trained_with: str | None) -> tuple[str, str]:
    """The template of a source, and the reason for it.

    Args:
        source: its `template` is used unless it is auto.
        trained_with: the template that the model records, which is used for instructions; None: not recorded.
    """
    if source.template != "auto":
        return source.template, "as asked for"
    by_columns = choose_template(next(iter(read_records(source))), tokenizer, source.columns)
    if by_columns != "text" and trained_with not in (None, "text"):
        assert trained_with is not None
        return trained_with, "the one it was trained with"
    return by_columns, "by the columns"


def read_texts(
    source: SourceConfig,
    template: str,
    tokenizer: Tokenizer,
    settings: Settings,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> Texts:
    """Reads and tokenises a source.

    Args:
        source: file, format and columns of the data.
        template: a template name or JSON file.
        tokenizer: the model's.
        settings: lengths, and the tokens around texts.
        vocab_size: number of rows of the model's embedding.
        progress: called with the number of records read so far.

    Raises:
        UserError: for records or settings that cannot be used, a token outside the model's vocabulary, or data with
            nothing to score.
    """
    _check(settings, tokenizer)
    renderer = load_template(template, tokenizer, source.columns)
    windows_of_all: list[Example] = []
    origin: list[int] = []
    records = empty = long = characters = size = unscored = 0
    reader = iter(read_records(source))
    while batch := list(itertools.islice(reader, _BATCH)):
        rendered = [renderer.render(record) for record in batch]
        try:
            encoded = encode_rendered(
                rendered,
                tokenizer,
                add_bos=settings.add_bos,
                add_eos=settings.add_eos,
                train_on_inputs=settings.train_on_inputs,
            )
        except TextError as error:
            raise UserError(f"data: {batch[error.number].name}: {error}") from None
        for record, rendering, example in zip(batch, rendered, encoded, strict=True):
            if len(example.input_ids) and int(example.input_ids.max()) >= vocab_size:
                largest = int(example.input_ids.max())
                raise UserError(
                    f"data: {record.name}: token id {largest} ({tokenizer.token(largest)!r}) of the tokenizer "
                    f"{tokenizer.path} is outside of the model's vocabulary of {vocab_size}; use the model's own"
                )
            pieces = [piece for piece in windows(example, settings) if piece.loss_mask.any()]
            if pieces:
                text = _scored(rendering, settings.train_on_inputs)
                first = _first(rendering, example, tokenizer, settings)
                unscored += first is not None
                characters += len(text) - len(first or "")
                size += len(text.encode()) - len((first or "").encode())
            empty += not pieces
            long += len(pieces) > 1
            windows_of_all += pieces
            origin += [records] * len(pieces)
            records += 1
        if progress is not None:
            progress(records)
    if not windows_of_all:
        raise UserError(
            f"data: {source.path} has nothing to score in {records:,} records (template {template}); are the columns "
            "the right ones? See data.columns and data.template"
        )
    examples = from_list(windows_of_all, [0] * len(windows_of_all), origin)
    return Texts(examples, template, records, empty, long, characters, size, unscored)


def _check(settings: Settings, tokenizer: Tokenizer) -> None:
    for name, asked in (("bos", settings.add_bos), ("eos", settings.add_eos)):
        if asked and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"add_{name}: the tokenizer of {tokenizer.path} has no {name} token; set it to false")
    if settings.length < 2:
        raise UserError(f"sequence_length: {settings.length}; nothing predicts the first token, so it is at least 2")
    if not 1 <= settings.stride < settings.length:
        raise UserError(
            f"stride: {settings.stride} must be 1 to {settings.length - 1}: a window of {settings.length} tokens "
            "begins with at least one that was scored before"
        )


def windows(example: Example, settings: Settings) -> Iterator[Example]:
    """The example in windows that fit a row; each token is scored in the first window that has it."""
    total, done = len(example.input_ids), 0
    for start in range(0, max(1, total), settings.stride):
        stop = min(start + settings.length, total)
        mask = example.loss_mask[start:stop].copy()
        mask[: done - start] = False
        yield Example(example.input_ids[start:stop], mask)
        done = stop
        if stop == total:
            return


def _scored(rendering: Any, everything: bool) -> str:
    """The text of a rendered record that is scored."""
    spans = [span for segment in rendering.segments for span in segment.spans]
    return "".join(span.text for span in spans if everything or span.trained)


def _first(rendering: Any, example: Example, tokenizer: Tokenizer, settings: Settings) -> str | None:
    """The part of the scored text that a record's first token stands for; None where bos or a prompt comes first."""
    if not rendering.segments or (settings.add_bos and not rendering.has_bos):
        return None
    segment = rendering.segments[0]
    if not settings.train_on_inputs and not (segment.spans and segment.spans[0].trained):
        return None
    encoding = tokenizer.encode_batch([segment.text], rendering.special_tokens)[0]
    if not encoding.ids or encoding.ids[0] != example.input_ids[0]:
        return None
    return segment.text[: encoding.offsets[0][1]]


def measure(
    model: Decoder,
    trainable: Any,
    frozen: Any,
    mesh: Mesh,
    texts: Texts,
    rows: int,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Runs a model over texts, packed into rows with segment ids.

    Args:
        model: with the adapters that are applied on the fly, if any.
        trainable: {"params": ...} of a full model, {"lora": ...} of an adapter, on the mesh.
        frozen: {} or, for an adapter, {"params": ...}.
        mesh: the devices.
        texts: the windows to score.
        rows: number of rows of a device group at a time.
        progress: called with the number of batches done, and of all.
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
    objective = CrossEntropy(model)
    step = jax.jit(make_eval_step(objective), out_shardings=replicated(mesh))
    sums = dict.fromkeys(("loss", "correct", "target_tokens"), 0.0)
    with use_mesh(mesh):
        for number, batch in enumerate(batches):
            placed = put_batch({name: batch[name][None] for name in objective.fields}, mesh, batch_rows)
            out = jax.device_get(step(trainable, frozen, placed))
            for key in sums:
                sums[key] += float(out[key])
            if progress is not None:
                progress(number + 1, len(batches))
    return figures(sums["loss"], int(sums["target_tokens"]), sums["correct"], texts.bytes, texts.characters)


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
    if not math.isfinite(loss):
        raise UserError(
            f"the model's loss on these texts is {loss}: some of its weights are not finite, or overflow "
            "in this dtype; try --model.dtype float32, and look at the weights with `convert inspect`"
        )
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
