"""The verbs coverage and distil-router: how well experts stand for the dense layer, and a learned router."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import add_verb, write_result
from convert.commands.sample import add_sample_options, sample_of, say_sample
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from convert.analysis.coverage import Coverage
    from convert.analysis.distil import Distilled
    from convert.analysis.sample import Sample
    from jaxlm.weights.leaves import ParamSource

COVERAGE_TOKENS = 8192
DISTIL_TOKENS = 32768
STEPS = 100
# Those of convert.analysis.distil, which is too heavy for --help; a test compares.
TEACHERS = ("activation", "magnitude")


def add_routing_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "coverage", _coverage, "show how much of the dense layer a model's experts cover")
    verb.add_argument("source", metavar="MODEL", help="a model of experts")
    verb.add_argument(
        "--out",
        metavar="DIR",
        help="directory to create, with coverage.json and coverage.png (default: MODEL-coverage)",
    )
    add_sample_options(verb, COVERAGE_TOKENS, True, "to run through the model")

    verb = add_verb(
        verbs, "distil-router", _distil, "train the learned router to choose the experts that are most active"
    )
    verb.add_argument("source", metavar="MODEL", help="a model of experts with any router")
    verb.add_argument("destination", metavar="OUT", help="jaxlm directory to create: the same with router learned")
    verb.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of training a layer (default: {STEPS})")
    verb.add_argument("--seed", type=int, default=0, help="decides which rows are held out (default: 0)")
    verb.add_argument(
        "--teacher",
        choices=TEACHERS,
        default="activation",
        help="the experts to learn: those whose activations sum highest, as the router `activation` (default), or "
        "whose activations without their signs do, which cover more of the dense layer",
    )
    add_sample_options(verb, DISTIL_TOKENS, True, "to train on")


def open_experts(path: str) -> ParamSource:
    """A model that is divided into experts.

    Raises:
        UserError: when it is dense.
    """
    from convert.source import open_model

    source = open_model(path)
    if source.config.experts is None:
        raise UserError(
            f"{path}: is a dense model; divide it into experts first: convert moefy {shlex.quote(str(path))} OUT "
            "--experts E"
        )
    return source


def coverage_directory(model: str) -> Path:
    """Where the coverage of a model is written by default: beside it, as its own files are those of its manifest.

    Raises:
        UserError: when it exists.
    """
    path = Path(os.path.normpath(model))
    if path.name in ("", ".."):
        path = path.resolve()
    directory = path.with_name(f"{path.name}-coverage")
    check_new(directory)
    return directory


def check_new(directory: Path) -> None:
    """Refuses what exists, before any work is done."""
    if os.path.lexists(directory):
        raise UserError(f"{directory}: exists already; name another destination or remove it first")


def report_coverage(source: ParamSource, sample: Sample, directory: Path) -> None:
    """Measures, prints the table and writes the report."""
    from convert.analysis.coverage import measure, write_coverage
    from jaxlm.weights.output import output_directory

    assert source.config.experts is not None
    coverage = measure(source, sample)
    say_coverage(coverage)
    about = {"model": str(source.path), "sample": list(sample.files)}
    with output_directory(directory, 1 << 20) as folder:
        write_coverage(coverage, folder, about)
    say_sample(sample, source.config.experts)
    print(f"{'coverage':12} {directory}/coverage.json, {directory}/coverage.png")


def _coverage(options: argparse.Namespace) -> None:
    source = open_experts(options.source)
    directory = coverage_directory(options.source) if options.out is None else Path(options.out)
    check_new(directory)
    assert source.config.experts is not None
    report_coverage(source, sample_of(options, source, source.config.experts), directory)


def _distil(options: argparse.Namespace) -> None:
    from convert.analysis.distil import DistilledSource, distil

    for name, least in (("steps", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: expected a whole number from {least} on")
    check_new(Path(options.destination))
    source = open_experts(options.source)
    assert source.config.experts is not None
    sample = sample_of(options, source, source.config.experts)
    result = distil(source, sample, options.steps, options.seed, options.teacher)
    write_result("jax", DistilledSource(source, result.routers), options.destination)
    say_distilled(result)
    say_sample(sample, source.config.experts)


def say_coverage(coverage: Coverage) -> None:
    """A table: layers, and for each modality what its experts have, could have, and the output's error."""
    from convert.analysis.coverage import describe_rule
    from jaxlm.screen import new_table, print_sentence, print_table

    moe = coverage.moe
    print_sentence(f"share of |h| in the experts of a token; chosen by: {describe_rule(coverage)}")
    table = new_table("layer")
    for number in coverage.present:
        chance = f"{coverage.used[number]:.3g}/{moe.num_experts} = {coverage.chance[number]:.1%}"
        for title in (f"{moe.modalities[number]}\n{chance}\nchosen", "best", "error"):
            table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    columns = [
        (array[:, number], form)
        for number in coverage.present
        for array, form in ((coverage.chosen, ".1%"), (coverage.best, ".1%"), (coverage.error, ".3f"))
    ]
    _add_layers(table, columns)
    print_table(table)


def _add_layers(table: Table, columns: list[tuple[np.ndarray, str]]) -> None:
    """Adds a row for each layer, and one with the means, of columns [L] with their formats."""
    layers = len(columns[0][0])
    for layer in range(layers):
        cells = [format(float(values[layer]), form) for values, form in columns]
        table.add_row(str(layer), *cells, end_section=layer == layers - 1)
    table.add_row("mean", *(format(float(values.mean()), form) for values, form in columns))


def say_distilled(result: Distilled) -> None:
    """A table: layers, and for each modality recall before and after, and the output's error."""
    from jaxlm.screen import new_table, print_sentence, print_table

    moe = result.moe
    print_sentence(f"share of the experts chosen by {result.teacher} that the router chooses too, on tokens held out")
    table = new_table("layer")
    columns = []
    for number, name in enumerate(moe.modalities):
        if result.tokens[number]:
            chance = f"{moe.top_k[number]}/{moe.num_experts} = {moe.top_k[number] / moe.num_experts:.1%}"
            for title in (f"{name}\n{chance}\nbefore", "after", "error"):
                table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
            for values, form in ((result.before, ".1%"), (result.after, ".1%"), (result.error, ".3f")):
                columns.append((values[:, number], form))
    for title, values in zip(("loss before", "after"), result.losses.T, strict=True):
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
        columns.append((values, ".3f"))
    _add_layers(table, columns)
    print_table(table)
    held = ", ".join(f"{name} {count:,}" for name, count in zip(moe.modalities, result.tokens, strict=True))
    print_sentence(
        f"{'held out':12} tokens of {held}; error: the output beside that with the experts by {result.teacher}"
    )
