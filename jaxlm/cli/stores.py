"""`jaxlm prepare inspect | merge | drop`: looking into what was prepared, and stores made of stores."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.data.prepare.inspect import Contents
    from jaxlm.data.prepare.stores import Progress
    from jaxlm.data.store.stored import StoredTokens

VERBS = {
    "inspect": "counts, lengths and samples of a store, a step's folder or files",
    "merge": "several stores into one",
    "drop": "a store without some of its examples",
}
BAR = 30  # signs of the longest bar


def run(verb: str, words: Sequence[str], prog: str) -> int:
    """Runs a verb; its words are its own, as it has no configuration."""
    parser = argparse.ArgumentParser(prog=f"{prog} {verb}", description=VERBS[verb])
    command: Callable[[argparse.Namespace], None]
    if verb == "inspect":
        parser.add_argument(
            "path", type=Path, help="a store, an .idx, a folder below output_dir, or files of documents"
        )
        parser.add_argument("--samples", type=int, default=3, help="texts to show (default: 3)")
        parser.add_argument("--tokenizer", help="turns ids into text (default: the one that the store was made with)")
        parser.add_argument("--text", default="text", help="for files: the column of the text, or an expression")
        parser.add_argument("--png", type=Path, help="draw the lengths to this file")
        parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
        command = _inspect
    elif verb == "merge":
        parser.add_argument("destination", type=Path, help="a new directory")
        parser.add_argument("stores", type=Path, nargs="+", help="directories of stores")
        command = _merge
    else:
        parser.add_argument("store", type=Path, help="the directory of a store")
        parser.add_argument("destination", type=Path, help="a new directory")
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("--indices", help="numbers of examples from 0: 3,10-19, or a file of them, one a line")
        what.add_argument("--source", help="the name of a source")
        what.add_argument("--consumed", type=Path, metavar="RUN", help="what a run on this store has been given")
        parser.add_argument("--steps", type=int, help="with --consumed: only in its first steps")
        command = _drop
    command(parser.parse_args(list(words)))
    return 0


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    from jaxlm.data.prepare.inspect import inspect, plot

    if options.samples < 0:
        raise UserError(f"--samples: {options.samples} must be 0 or more")
    with Console(stderr=True).status("reading"):
        contents = inspect(options.path, options.tokenizer, options.samples, options.text)
    if options.json:
        print(json.dumps(_to_dict(contents), indent=1, ensure_ascii=False))
    else:
        _show(contents)
    if options.png is not None:
        plot(contents, options.png)
        print(f"lengths drawn to {options.png}", file=sys.stderr if options.json else sys.stdout)


def _to_dict(contents: Contents) -> dict[str, Any]:
    """What --json prints; `what` and `unit` say what is counted, and in what it is measured."""
    return {
        "what": contents.what,
        "unit": contents.unit,
        "sources": {name: {"count": count, "length": length} for name, (count, length) in contents.sources.items()},
        "facts": dict(contents.facts),
        "lengths": [{"from": low, "to": high, "count": count} for low, high, count in contents.histogram()],
        "samples": [{"name": name, "text": text} for name, text in contents.samples],
    }


def _show(contents: Contents) -> None:
    from rich.console import Console

    from jaxlm.screen import new_table, print_table

    console = Console(highlight=False, soft_wrap=True)
    table = new_table("source", contents.what, contents.unit, "mean")
    total = [sum(column) for column in zip(*contents.sources.values(), strict=True)] or [0, 0]
    rows = [*contents.sources.items(), *([("all", tuple(total))] if len(contents.sources) > 1 else [])]
    for source, (number, length) in rows:
        table.add_row(source, f"{number:,}", f"{length:,}", f"{length / max(number, 1):,.1f}")
    print_table(table)
    for name, fact in contents.facts.items():
        console.print(f"{name}: {fact}", markup=False)
    histogram = contents.histogram()
    if histogram:
        lengths = new_table(f"{contents.unit} of one", contents.what, "", left=[""])
        most = max(number for _, _, number in histogram)
        for low, high, number in histogram:
            lengths.add_row(f"{low:,} to {high:,}", f"{number:,}", "█" * -(-BAR * number // most))
        console.print()
        print_table(lengths)
    for name, text in contents.samples:
        console.print(f"\n{name}", style="bold", markup=False)
        console.print(text, markup=False)


def _merge(options: argparse.Namespace) -> None:
    from jaxlm.data.prepare.stores import merge_stores

    with _bar("merging") as progress:
        merged = merge_stores(options.destination, options.stores, progress)
    _say(options.destination, merged)


def _drop(options: argparse.Namespace) -> None:
    from jaxlm.data.prepare import stores

    if options.steps is not None and options.consumed is None:
        raise UserError("--steps: goes with --consumed RUN")
    if options.indices is not None:
        gone, why = stores.examples_by_index(options.store, options.indices), "--indices"
    elif options.source is not None:
        gone, why = stores.examples_of_source(options.store, options.source), f"--source {options.source}"
    else:
        from jaxlm.training.consumed import consumed_examples

        gone = consumed_examples(options.store, options.consumed, options.steps)
        why = f"--consumed {options.consumed}"
    with _bar("writing") as progress:
        left = stores.drop_examples(options.destination, options.store, gone, why, progress)
    _say(options.destination, left)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from jaxlm.screen import Bars

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(path: Path, store: StoredTokens) -> None:
    manifest = store.manifest
    print(f"{path}: {manifest.examples:,} examples of {manifest.documents:,} documents, {manifest.tokens:,} tokens")
