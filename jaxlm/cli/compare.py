"""`jaxlm evaluate compare A B …`: evaluations of the same questions side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jaxlm.cli.parser import parse_config_and_flags
from jaxlm.cli.words import Flag
from jaxlm.errors import UserError
from jaxlm.locate import WrittenPath, at_home

DESCRIPTION = (
    "Puts evaluations side by side: compare A B C, each a directory that `evaluate --output` wrote, or one of its "
    "tasks' directories. Differences are to the first, with the interval in which 95 % of paired resamples of the "
    "questions lie."
)


FLAGS = {"json": Flag("the figures and differences as one JSON object, in place of the tables")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """How evaluations are compared.

    Args:
        resamples: draws of the questions; a tenth of them for figures that are not means over questions.
        seed: the same seed gives the same draws.
        save_file: the table as .md, or as .json.
    """

    resamples: int = 10_000
    seed: int = 0
    save_file: WrittenPath | None = None


def compare(argv: Sequence[str], prog: str) -> int:
    """Exit status 0; arguments are the words behind `compare`."""
    words = list(argv)
    paths = []
    while words and not words[0].startswith("-"):
        paths.append(at_home(words.pop(0)))
    if words or not paths:
        config, flags = parse_config_and_flags(
            words, CompareConfig, prog=f"{prog} compare", description=DESCRIPTION, aliases={}, flags=FLAGS
        )
    else:
        config, flags = CompareConfig(), {}
    if len(paths) < 2:
        raise UserError(f"compare: name two directories or more, e.g. {prog} compare evaluation/a evaluation/b")
    if config.resamples < 1:
        raise UserError(f"resamples: {config.resamples} must be at least 1")
    kind = None if config.save_file is None else Path(config.save_file).suffix
    if kind not in (None, ".md", ".json"):
        raise UserError(f"save_file: {config.save_file}: the ending must be .md or .json")
    return _compare(paths, config, bool(flags.get("json")))


def _compare(paths: Sequence[Path], config: CompareConfig, as_json: bool) -> int:
    from rich.console import Console

    from jaxlm.evaluation.compare import check_same_questions, differences, find_evaluations, read_evaluation
    from jaxlm.evaluation.outputs import write_file
    from jaxlm.screen import new_table, print_table

    found = [find_evaluations(path) for path in paths]
    tasks = [task for task in found[0] if all(task in each for each in found)]
    if not tasks:
        held = "; ".join(f"{path} has {', '.join(each)}" for path, each in zip(paths, found, strict=True))
        raise UserError(f"compare: no task that all of them have: {held}")
    names = _names(paths)
    lines, content = [], {}
    for task in tasks:
        evaluations = [read_evaluation(each[task]) for each in found]
        check_same_questions(evaluations)
        figures = [each.figures() for each in evaluations]
        with Console(stderr=True).status(f"{task}: drawing {config.resamples:,} resamples"):
            changes = [differences(evaluations[0], each, config.resamples, config.seed) for each in evaluations[1:]]
        heads = ["figure", *names, *(f"{name} - {names[0]}" for name in names[1:])]
        rows = []
        for figure in figures[0]:
            cells = [figure]
            for own in figures:
                shown = own.get(figure)
                error = "" if shown is None or shown.stderr is None else f" ± {shown.stderr:.4f}"
                cells.append("" if shown is None else f"{shown.value:.4f}{error}")
            for change in changes:
                there = change.get(figure)
                cells.append(
                    "" if there is None else f"{there.value:+.4f} [{there.low:+.4f}, {there.high:+.4f}] p {there.p:.3g}"
                )
            rows.append(cells)
        title = f"{task}, {len(evaluations[0].records):,} records"
        table = new_table(*heads, title=title)
        for cells in rows:
            table.add_row(*cells)
        if not as_json:
            print_table(table)
        lines += [f"## {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows] + [""]
        content[task] = {
            "figures": {
                name: {key: {"value": f.value, "stderr": f.stderr, "n": f.n} for key, f in own.items()}
                for name, own in zip(names, figures, strict=True)
            },
            "differences": {
                name: {key: dataclasses.asdict(value) for key, value in change.items()}
                for name, change in zip(names[1:], changes, strict=True)
            },
        }
    whole = json.dumps({"resamples": config.resamples, "seed": config.seed, "tasks": content}, indent=1) + "\n"
    if as_json:
        print(whole, end="")
    if config.save_file is not None:
        file = Path(config.save_file)
        about = f"{config.resamples:,} paired resamples, seed {config.seed}; differences with 95 % intervals."
        text = "\n".join(["# Comparison", "", about, "", *lines]) if file.suffix == ".md" else whole
        write_file(file, text.encode())
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the last part of a path, or all of it."""
    short = [path.absolute().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]
