"""Writes what a small recipe came to, as one JSON file that `benchmarks/small_recipes.py` reads.

    python configs/result.py OUT/result.json --run OUT/tuned \\
        --metric "exact answers" --chance 0.05 --before OUT/before/scores.json:figures.exact.value \\
        --after OUT/after/scores.json:figures.exact.value

A figure is FILE:KEY, where KEY leads through the JSON file with points (a number counts into a list), or a number.
Several figures are given one behind the other, each with its own --chance, --before and --after; `--error` in place of
`--metric` says that less is better. Validation loss and tokens/s come from the run's metrics.jsonl; its first
validation is the one before the first step, so the run needs `train.eval_every` other than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError, exit_status
from jaxlm.jsontext import read_value

WARM_UP = 2  # steps of a run that wait for the compiler


def figure(word: str) -> float:
    """The number that `FILE:KEY`, or a number itself, stands for.

    Raises:
        UserError: the file or the key is missing, or holds something else than a number.
    """
    try:
        return float(word)
    except ValueError:
        pass
    file, colon, key = word.rpartition(":")
    if not colon:
        raise UserError(f"{word}: expected FILE:KEY or a number")
    value: Any = read_value(Path(file))
    for name in key.split("."):
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise UserError(f"{file}: no {name!r} on the way to {key!r}; there is {there}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{file}: {key!r} is {value!r}; expected a number")
    return float(value)


def of_run(run: Path) -> dict[str, Any]:
    """Validation loss before and after, tokens/s and steps, from the metrics.jsonl of a run.

    Raises:
        UserError: there is no such file, or the run was not validated before its first step.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --run is the directory of a finished training")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if len(losses) < 2 or losses[0][0] != 0:
        raise UserError(f"{path}: no validation loss of step 0; give the run validation data and an eval_every above 0")
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "steps": losses[-1][0],
        "tokens_per_second": round(statistics.median(speeds[WARM_UP:] or speeds), 1),
        "validation_loss": {"before": losses[0][1], "after": losses[-1][1]},
    }


class _Named(argparse.Action):
    """--metric NAME or --error NAME: begins a figure."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.figures.append({"name": values, "less_is_better": option_string == "--error"})


class _Value(argparse.Action):
    """--chance, --before, --after: of the figure named last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not namespace.figures:
            parser.error(f"{option_string} stands before --metric; name the metric first")
        if self.dest in namespace.figures[-1]:
            parser.error(f"{option_string} is given twice for {namespace.figures[-1]['name']!r}")
        namespace.figures[-1][self.dest] = values


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="result.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.set_defaults(figures=[])
    for name in ("--metric", "--error"):
        parser.add_argument(name, action=_Named, default=argparse.SUPPRESS)
    for name in ("--chance", "--before", "--after"):
        parser.add_argument(name, action=_Value, default=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if not given.figures:
        parser.error("--metric NAME is missing")
    for each in given.figures:
        for name in ("chance", "before", "after"):
            if name not in each:
                parser.error(f"--{name} of {each['name']!r} is missing")
            each[name] = figure(each[name])
    seed = int(os.environ.get("SEED", "0"))
    result = {"seed": seed, "run": str(given.run), **of_run(given.run), "metrics": given.figures}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    loss = result["validation_loss"]
    print(f"validation loss {loss['before']:.3f} -> {loss['after']:.3f}")
    for each in given.figures:
        print(f"{each['name']} {each['before']:.3f} -> {each['after']:.3f} (chance {each['chance']:.3f})")
    print(f"written to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
