"""A sample of data as rows of tokens: what experts are measured on, and a router is trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jaxlm.data.examples import Examples
    from jaxlm.models.shapes import MoeConfig
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
        tokens: of each modality, by modality id.
        files: where they come from.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    modality: np.ndarray
    tokens: tuple[int, ...]
    files: tuple[str, ...]


def add_sample_options(verb: argparse.ArgumentParser, tokens: int, required: bool, purpose: str) -> None:
    """Adds --sample and what goes with it to a verb.

    Args:
        tokens: how many by default.
        purpose: what the sample is for, for --help.
    """
    verb.add_argument(
        "--sample",
        metavar="FILE",
        action="append",
        required=required,
        help=f"data {purpose}: json, jsonl, csv, parquet or text; may be given several times",
    )
    verb.add_argument(
        "--sample-template",
        metavar="NAME",
        help="how its records become text, as data.train's template (default: auto, by their columns)",
    )
    verb.add_argument(
        "--sample-columns",
        metavar="FIELD=COLUMN,...",
        action="append",
        help="the template's fields mapped to the columns of the data: instruction=question,output=answer",
    )
    verb.add_argument(
        "--sample-tokens",
        type=int,
        metavar="N",
        help=f"use the first records with so many tokens, as many of each file (default: {tokens})",
    )
    verb.set_defaults(default_sample_tokens=tokens)


def check_no_sample(options: argparse.Namespace) -> None:
    """Refuses options that say more of a sample which is not there."""
    for name in ("template", "columns", "tokens"):
        value = getattr(options, f"sample_{name}")
        if value is not None:
            raise UserError(f"--sample-{name} {value}: goes with --sample FILE; give the data too, or leave it out")


def read_sample(options: argparse.Namespace, source: ParamSource, moe: MoeConfig) -> Sample:
    """The sample that the options of `add_sample_options` name, tokenised with the model's tokenizer.

    Raises:
        UserError: when the model has no tokenizer, or the data cannot be used; see `jaxlm.data`.
    """
    from convert.commands.experts import pairs
    from jaxlm.config import DataConfig, SourceConfig
    from jaxlm.tokenizer import load_tokenizer

    tokens = options.default_sample_tokens if options.sample_tokens is None else options.sample_tokens
    if tokens < len(options.sample):
        raise UserError(f"--sample-tokens {tokens}: expected a whole number, at least one token of each file")
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
    columns = pairs("--sample-columns", options.sample_columns or [])
    template = options.sample_template or "auto"
    files = [SourceConfig(path=path, template=template, columns=columns) for path in options.sample]
    try:
        parts = [_first(file, tokens // len(files), data, tokenizer, source.config.vocab_size) for file in files]
    except UserError as error:
        # What a run's file calls data.template and so on.
        text = (
            str(error).removeprefix("data: ").replace("set template, and columns", "set --sample-template, and columns")
        )
        raise UserError(f"--sample: {text}") from None
    return make_rows(parts, data.sequence_length, moe, tuple(options.sample))


def _first(file: Any, tokens: int, data: Any, tokenizer: Any, vocab_size: int) -> Examples:
    """The first records of a file, so many that they have `tokens` tokens if there are."""
    import dataclasses

    import numpy as np

    from jaxlm.data.examples import build_examples

    limit = _RECORDS
    while True:
        examples, (report,) = build_examples([dataclasses.replace(file, limit=limit)], data, tokenizer, vocab_size)
        if examples.offsets[-1] >= tokens or report.records < limit:
            break
        limit *= 4
    return examples.take(np.arange(min(len(examples), int(np.searchsorted(examples.offsets, tokens)))))


def make_rows(parts: Sequence[Examples], length: int, moe: MoeConfig, files: tuple[str, ...]) -> Sample:
    """Packs examples into rows of `length` tokens, in an order drawn with a fixed seed."""
    import numpy as np

    from jaxlm.data.examples import from_list
    from jaxlm.data.loader import BatchSource
    from jaxlm.data.packing import plan_rows
    from jaxlm.nn.experts import modality_ids

    items = [part[number] for part in parts for number in range(len(part))]
    examples = from_list(items, np.zeros(len(items), np.int32), np.arange(len(items)))
    plan = plan_rows("first_fit", examples.offsets, np.arange(len(items)), length, 0, 0)
    batches = BatchSource(examples, lambda _: plan, length, rows=ROWS)
    chunks = [batches[number] for number in range(len(batches))]
    ids, segments, positions = (
        np.concatenate([chunk[name] for chunk in chunks]) for name in ("input_ids", "segment_ids", "positions")
    )
    modality = np.asarray(modality_ids(moe, ids, segments))  # type: ignore[arg-type]
    counts = np.bincount(modality[modality >= 0], minlength=len(moe.modalities))
    return Sample(ids, segments, positions, modality, tuple(int(count) for count in counts), files)


def say_sample(sample: Sample, moe: MoeConfig) -> None:
    """How many tokens of each modality there are; and which have none, as nothing is known of them."""
    found = ", ".join(f"{name} {count:,}" for name, count in zip(moe.modalities, sample.tokens, strict=True) if count)
    print(f"{'sample':12} {', '.join(str(Path(file)) for file in sample.files)}: tokens of {found}")
    absent = [name for name, count in zip(moe.modalities, sample.tokens, strict=True) if not count]
    if absent:
        print(f"{'absent':12} {', '.join(absent)}: the sample has no such token; give more --sample files")
