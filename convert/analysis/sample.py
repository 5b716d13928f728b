"""A sample of data as rows of tokens: what experts are measured on, and a router is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.batches import BatchSource
from jaxlm.data.examples import Examples, build_examples, from_list
from jaxlm.data.order import EpochOrder
from jaxlm.data.planner import Documents, Planner
from jaxlm.errors import UserError
from jaxlm.nn.routers import modality_ids
from jaxlm.spec import ExpertsSpec
from jaxlm.tokenizer import load_tokenizer
from jaxlm.weights.leaves import ParamSource

# Tokens of a row, and rows that go through a layer together.
ROW = 512
ROWS = 4
# Records that are read at first; four times as many when they are too short.
_RECORDS = 256


@dataclass(frozen=True)
class Sample:
    """Rows of tokens, in chunks that a layer takes one by one.

    Args:
        input_ids: [chunks, ROWS, T] int32.
        segment_ids: [chunks, ROWS, T] int32, 0 where there is no token.
        positions: [chunks, ROWS, T] int32.
        modality: [chunks, ROWS, T] int32, -1 where there is no token.
        tokens: number of tokens of each modality, by modality id.
        files: where they come from.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    modality: np.ndarray
    tokens: tuple[int, ...]
    files: tuple[str, ...]


def read_sample(
    files: Sequence[str],
    source: ParamSource,
    moe: ExpertsSpec,
    tokens: int,
    template: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> Sample:
    """The first records of `files`, tokenised with the model's own tokenizer and packed into rows.

    Args:
        files: json, jsonl, csv, parquet or text.
        moe: the modalities that tokens are counted by.
        tokens: number of tokens in all; each file gives its share.
        template: how a record becomes text, see `jaxlm.data.templates`.
        columns: the template's fields -> the columns of the data.

    Raises:
        UserError: when the model has no tokenizer, or the data cannot be used; see `jaxlm.data`.
    """
    if not source.tokenizer_files:
        raise UserError(
            f"{source.path}: has no tokenizer, and --sample is read with the model's own; copy its files "
            f"(tokenizer.json, or tokenizer.model) to {source.tokenizer_dir}"
        )
    tokenizer = load_tokenizer(source.tokenizer_dir)
    data = DataConfig(
        sequence_length=min(ROW, source.config.max_position_embeddings),
        train_on_inputs=True,
        too_long="split",
    )
    sources = [SourceConfig(path=path, template=template, columns=dict(columns or {})) for path in files]
    try:
        parts = [_first(file, tokens // len(files), data, tokenizer, source.config.vocab_size) for file in sources]
    except UserError as error:
        # The names of a run's file stand for the options of the command.
        text = (
            str(error).removeprefix("data: ").replace("set template, and columns", "set --sample-template, and columns")
        )
        raise UserError(f"--sample: {text}") from None
    return make_rows(parts, data.sequence_length, moe, tuple(files))


def _first(file: Any, tokens: int, data: Any, tokenizer: Any, vocab_size: int) -> Examples:
    """The first records of a file that have `tokens` tokens together, or all of them."""
    limit = _RECORDS
    while True:
        examples, (report,) = build_examples([dataclasses.replace(file, limit=limit)], data, tokenizer, vocab_size)
        if examples.offsets[-1] >= tokens or report.records < limit:
            break
        limit *= 4
    return examples.take(np.arange(min(len(examples), int(np.searchsorted(examples.offsets, tokens)))))


def make_rows(parts: Sequence[Examples], length: int, moe: ExpertsSpec, files: tuple[str, ...]) -> Sample:
    """Packs examples into rows of `length` tokens, in an order drawn with a fixed seed."""
    items = [part[number] for part in parts for number in range(len(part))]
    examples = from_list(items, np.zeros(len(items), np.int32), np.arange(len(items)))
    planner = Planner(Documents(examples, length), (1.0,), "first_fit", length, seed=0, version=1)
    batches = BatchSource(examples, EpochOrder(planner, ROWS), length, rows=ROWS)
    chunks = [batches[number] for number in range(len(batches))]
    ids, segments, positions = (
        np.concatenate([chunk[name] for chunk in chunks]) for name in ("input_ids", "segment_ids", "positions")
    )
    modality = np.asarray(modality_ids(moe, ids, segments))  # type: ignore[arg-type]
    counts = np.bincount(modality[modality >= 0], minlength=len(moe.modalities))
    return Sample(ids, segments, positions, modality, tuple(int(count) for count in counts), files)
