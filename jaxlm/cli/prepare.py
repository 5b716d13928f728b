"""`python -m jaxlm.prepare [VERB] --config FILE`: data of any size, filtered, deduplicated, split, and in a store."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli import extraction, instructions, stores
from jaxlm.cli.hub import with_commits
from jaxlm.cli.parser import parse_config_and_flags
from jaxlm.cli.words import Flag
from jaxlm.config import PrepareConfig
from jaxlm.errors import UserError, exit_status
from jaxlm.locate import on_disk
from jaxlm.tokenizer.files import main_file
from jaxlm.training.stop import newest_step

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.data.prepare.pipeline import Progress, Share, StepReport

STEPS = {
    "filter": "repair texts, and take out those that break a rule",
    "dedup": "take out equal and nearly equal documents",
    "split": "cut documents into samples of whole sentences, as token ids",
    "build": "write a token store, which data.train of a run opens",
}
OTHER_VERBS = {**stores.VERBS, "ie": extraction.SUMMARY, "instructions": instructions.SUMMARY}
DESCRIPTION = (
    "Prepares documents for training. Without a verb all `steps` of the configuration are run; a verb runs one of "
    "them: "
    + "; ".join(f"{name}: {what}" for name, what in STEPS.items())
    + ". A step that was stopped, killed or interrupted goes on where it was. Other verbs, each with a --help of its "
    "own: " + "; ".join(f"{name}: {what}" for name, what in OTHER_VERBS.items()) + "."
)
FLAGS = {
    "shard": Flag(
        "do the i-th of n shares of the work, e.g. 3/16: start each share once, anywhere on a shared disk", str
    ),
    "wait": Flag("seconds for which a share waits for the others where it needs what they do (default: 0)", float),
    "json": Flag("what each step did as one JSON object, in place of the tables"),
}
UNFINISHED = 75  # EX_TEMPFAIL: schedulers start again what ends so


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.prepare") -> int:
    """Exit status: 0 done, 75 other shares have not finished, 2 for a mistake in the input."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_status(
        lambda: _main(words, prog), interrupted="interrupted; what is finished is kept: start the same command again"
    )


def _main(words: list[str], prog: str) -> int:
    verb = words.pop(0) if words and not words[0].startswith("-") else None
    if verb in stores.VERBS:
        return stores.run(verb, words, prog)
    if verb == "ie":
        return extraction.run(words, prog)
    if verb == "instructions":
        return instructions.run(words, prog)
    if verb is not None and verb not in STEPS:
        known = [*STEPS, *OTHER_VERBS]
        near = difflib.get_close_matches(verb, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{verb!r} is not a verb of {prog}; {hint}")
    config, flags = parse_config_and_flags(
        words, PrepareConfig, prog=prog, description=DESCRIPTION, aliases={}, flags=FLAGS
    )
    config = with_commits(config, lambda line: print(line, file=sys.stderr), output_dir=config.output_dir)
    if config.tokenizer is not None:
        config = dataclasses.replace(
            config, tokenizer=str(tokenizer_directory(on_disk(config.tokenizer, "small", "tokenizer")))
        )
    return _run(config, verb, _share(flags), bool(flags.get("json")))


def tokenizer_directory(path: Path) -> Path:
    """The tokenizer's own directory, of a run, a checkpoint or a converted model too."""
    if not path.is_dir() or main_file([file.name for file in path.iterdir()]) is not None:
        return path
    step = newest_step(path)
    root = path if step is None else path / "checkpoints" / str(step)
    inside = root / "jaxlm" / "tokenizer"
    return inside if inside.is_dir() else path


def _share(flags: dict[str, Any]) -> Share:
    from jaxlm.data.prepare.pipeline import Share

    word = flags.get("shard", "1/1")
    index, _, of = word.partition("/")
    if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise UserError(f"--shard: {word!r}; expected i/n, e.g. 3/16, the first being 1/16")
    return Share(int(index) - 1, int(of), flags.get("wait", 0.0))


def _run(config: PrepareConfig, verb: str | None, share: Share, as_json: bool) -> int:
    from rich.console import Console

    from jaxlm.data.prepare.pipeline import UnfinishedError, run_steps

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with _bar(console) as progress:
            reports = run_steps(config, verb, share, progress)
    except UnfinishedError as error:
        print(error, file=sys.stderr)
        return UNFINISHED
    if as_json:
        print(json.dumps({"steps": [_to_dict(report) for report in reports]}, indent=1))
        return 0
    for report in reports:
        _show(report)
    return 0


def _to_dict(report: StepReport) -> dict[str, Any]:
    """What --json says of a step; counts of documents are by source."""
    counts = report.counts
    sources = {
        source: {**numbers, "taken": dict(counts.taken[source]), "masked": dict(counts.masked[source])}
        for source, numbers in counts.numbers.items()
    }
    return {"step": report.step, "folder": str(report.folder), "sources": sources, **report.extra}


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from jaxlm.screen import Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bar:
        tasks: dict[tuple[str, str], Any] = {}

        def progress(step: str, phase: str, total: int, done: int) -> None:
            if (step, phase) not in tasks:
                name = step if step == phase else f"{step}: {phase}"
                tasks[step, phase] = bar.add_task(name, total=total)
            bar.update(tasks[step, phase], completed=done)

        yield progress


def _show(report: StepReport) -> None:
    """A table of what a step did to each source."""
    from rich.console import Console

    from jaxlm.screen import new_table, print_table

    console = Console(highlight=False, soft_wrap=True)
    counts = report.counts
    rules = sorted({rule for taken in counts.taken.values() for rule in taken})
    masks = sorted({kind for masked in counts.masked.values() for kind in masked})
    others = [
        name
        for name in ("repaired", "samples", "tokens", "short_samples", "trained_tokens", "cut", "split")
        if any(name in n for n in counts.numbers.values())
    ]
    table = new_table("", *counts.numbers, title=f"{report.step}: documents")
    rows: list[tuple[str, list[int]]] = [("read", [numbers["read"] for numbers in counts.numbers.values()])]
    rows += [(f"- {rule}", [counts.taken[source][rule] for source in counts.numbers]) for rule in rules]
    rows += [("kept", [numbers["kept"] for numbers in counts.numbers.values()])]
    rows += [(name.replace("_", " "), [n[name] for n in counts.numbers.values()]) for name in others]
    rows += [(f"{kind} masked", [counts.masked[source][kind] for source in counts.numbers]) for kind in masks]
    for name, numbers in rows:
        table.add_row(name, *(f"{number:,}" for number in numbers))
    shares = [numbers["kept"] / max(numbers["read"], 1) for numbers in counts.numbers.values()]
    table.add_row("kept share", *(f"{share:.1%}" for share in shares))
    print_table(table)
    if report.extra["bad"]:
        console.print(f"{report.extra['bad']:,} broken records were left out", style="bold")
    if report.extra.get("large_clusters"):
        console.print(
            f"{report.extra['large_clusters']:,} groups of near duplicates are larger than dedup.max_cluster: of those "
            "only documents went that are themselves like one that stays"
        )
    console.print(f"written to {report.folder} (report.json, examples.jsonl)", markup=False)


if __name__ == "__main__":
    sys.exit(main())
