"""The options of a sample of data, which `moefy`, `coverage` and `distil-router` take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.analysis.sample import Sample
    from jaxlm.spec import ExpertsSpec
    from jaxlm.weights.leaves import ParamSource


def add_sample_options(verb: argparse.ArgumentParser, tokens: int, required: bool, purpose: str) -> None:
    """Adds --sample and what goes with it to a verb.

    Args:
        tokens: the default number of them.
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
        help=f"use the first records with N tokens in all, each file its share (default: {tokens})",
    )
    verb.set_defaults(default_sample_tokens=tokens)


def check_no_sample(options: argparse.Namespace) -> None:
    """Refuses options that say more of a sample which is not there."""
    for name in ("template", "columns", "tokens"):
        value = getattr(options, f"sample_{name}")
        if value is not None:
            raise UserError(f"--sample-{name} {value}: goes with --sample FILE; give the data too, or leave it out")


def sample_of(options: argparse.Namespace, source: ParamSource, moe: ExpertsSpec) -> Sample:
    """The sample that the options of `add_sample_options` name.

    Raises:
        UserError: as `read_sample`.
    """
    from convert.analysis.sample import read_sample

    tokens = options.default_sample_tokens if options.sample_tokens is None else options.sample_tokens
    if tokens < len(options.sample):
        raise UserError(f"--sample-tokens {tokens}: expected a whole number, at least one token of each file")
    columns = pairs("--sample-columns", options.sample_columns or [])
    return read_sample(options.sample, source, moe, tokens, options.sample_template or "auto", columns)


def pairs(option: str, arguments: Sequence[str]) -> dict[str, str]:
    """The values by name of 'a=1,b=2', given once or several times."""
    values: dict[str, str] = {}
    for part in (part for argument in arguments for part in argument.split(",")):
        name, equals, value = part.partition("=")
        if not name.strip() or not equals:
            raise UserError(f"{option} {part}: expected NAME=VALUE, several with commas")
        if name.strip() in values:
            raise UserError(f"{option} {part}: {name.strip()!r} is there twice; give each modality once")
        values[name.strip()] = value.strip()
    return values


def say_sample(sample: Sample, moe: ExpertsSpec) -> None:
    """How many tokens of each modality there are; and which have none, as nothing is known of them."""
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(moe.modalities, sample.tokens, strict=True) if count)
    print(f"{'sample':12} {', '.join(str(Path(file)) for file in sample.files)}: tokens of {counts}")
    absent = [name for name, count in zip(moe.modalities, sample.tokens, strict=True) if not count]
    if absent:
        print(f"{'absent':12} {', '.join(absent)}: the sample has no such token; give more --sample files")
