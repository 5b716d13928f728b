"""Texts whose tokens a model predicts: read, tokenised, and cut into windows.

Scored are the tokens that training on the same data would take as targets: a whole text, or the answers of
instructions. A text that is longer than a row is cut into windows; each begins with tokens that were scored before, as
context. So every token is scored once, except a first token that nothing precedes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import SourceConfig
from jaxlm.data.encoding import Example, encode_rendered
from jaxlm.data.examples import Examples, from_list
from jaxlm.data.records import read_records
from jaxlm.data.templates import choose_template, load_template
from jaxlm.errors import UserError
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Tokenizer

_BATCH = 512  # records tokenised in one call


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
class TextSource:
    """A file of texts.

    Attributes:
        source: file, format and columns.
        template: a template name or JSON file.
        settings: lengths, and the tokens around its texts.
    """

    source: SourceConfig
    template: str
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as windows of tokens, and the amount of text that is scored. A text is what a record becomes.

    Attributes:
        examples: the windows; `loss_mask` marks the tokens that are scored, `record` says the text of each.
        names: of the texts, "file:number".
        source: int32 [texts], the source of each.
        lengths: int64 [texts, 2], characters and bytes (UTF-8) that are scored; an end (eos) has none.
        has_unscored: bool [texts], its first token is not scored, since nothing predicts it.
        digest: sha256 of the records.
    """

    examples: Examples
    names: list[str]
    source: NDArray[np.int32]
    lengths: NDArray[np.int64]
    has_unscored: NDArray[np.bool_]
    digest: str

    @property
    def records(self) -> int:
        """Number of texts."""
        return len(self.names)

    @property
    def windows(self) -> NDArray[np.int64]:
        """int64 [texts], the number of windows of each."""
        return np.bincount(self.examples.record, minlength=self.records)

    def counts(self) -> dict[str, int]:
        """Texts, those with nothing to score, those of several windows; characters and bytes; first tokens left out."""
        windows, (characters, size) = self.windows, self.lengths.sum(axis=0)
        return {
            "records": self.records,
            "empty": int((windows == 0).sum()),
            "long": int((windows > 1).sum()),
            "characters": int(characters),
            "bytes": int(size),
            "unscored": int(self.has_unscored.sum()),
        }


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
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> Texts:
    """Reads and tokenises sources.

    Args:
        tokenizer: the model's.
        vocab_size: number of rows of the model's embedding.
        progress: called with the number of records read so far.

    Raises:
        UserError: for records or settings that cannot be used, a token outside the model's vocabulary, or a source with
            nothing to score.
    """
    windows_of_all: list[Example] = []
    origin: list[int] = []
    names: list[str] = []
    source_of: list[int] = []
    lengths: list[tuple[int, int]] = []
    has_unscored: list[bool] = []
    digest = hashlib.sha256()
    for number, each in enumerate(sources):
        source, template, settings = each.source, each.template, each.settings
        _check(settings, tokenizer)
        renderer = load_template(template, tokenizer, source.columns)
        records_before, windows_before = len(names), len(windows_of_all)
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
                _check_vocabulary(record.name, example, tokenizer, vocab_size)
                digest.update(json.dumps(record.data, sort_keys=True, default=str).encode() + b"\n")
                pieces = [piece for piece in windows(example, settings) if piece.loss_mask.any()]
                text, first = "", None
                if pieces:
                    text = _scored(rendering, settings.train_on_inputs)
                    first = _first(rendering, example, tokenizer, settings)
                beginning = first or ""
                lengths.append((len(text) - len(beginning), len(text.encode()) - len(beginning.encode())))
                has_unscored.append(first is not None)
                windows_of_all += pieces
                origin += [len(names)] * len(pieces)
                names.append(record.name)
                source_of.append(number)
            if progress is not None:
                progress(len(names))
        if len(windows_of_all) == windows_before:
            raise UserError(
                f"data: {source.path} has nothing to score in {len(names) - records_before:,} records (template "
                f"{template}); are the columns the right ones? See data.columns and data.template"
            )
    return Texts(
        from_list(windows_of_all, [0] * len(windows_of_all), origin),
        names,
        np.array(source_of, np.int32),
        np.array(lengths, np.int64).reshape(-1, 2),
        np.array(has_unscored, np.bool_),
        digest.hexdigest(),
    )


def _check_vocabulary(name: str, example: Example, tokenizer: Tokenizer, vocab_size: int) -> None:
    largest = int(example.input_ids.max(initial=0))
    if largest >= vocab_size:
        raise UserError(
            f"data: {name}: token id {largest} ({tokenizer.token(largest)!r}) of the tokenizer "
            f"{tokenizer.path} is outside of the model's vocabulary of {vocab_size}; use the model's own"
        )


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
