"""`python configs/llm4academic/table.py OUT`: what small.sh found, a line for each base.

With `--left-out SHAPE` it exits with 0, and says why, where jaxlm does not have the family of a config.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.families import load_shape
from jaxlm.weights.names import num_params

HEAD = ("base", "parameters", "tokens/s", "validation loss", "exact answers")


def left_out(shape: str) -> bool:
    """Whether jaxlm does not have the family of a config.json; says so."""
    try:
        load_shape(shape)
    except UserError as error:
        print(f"left out: {Path(shape).stem}: {error}")
        return True
    return False


def row(base: str, out: Path) -> tuple[str, ...]:
    """The figures of a base's run and of its answers."""
    metrics = [json.loads(line) for line in (out / base / "metrics.jsonl").read_text().splitlines()]
    # The first steps wait for the compiler.
    speeds = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line][2:]
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    answers = json.loads((out / f"{base}.json").read_text(encoding="utf-8"))
    exact = sum(answer["answer"].strip() == answer["output"] for answer in answers)
    parameters = num_params(open_model(out / base).config)
    speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
    return base, f"{parameters:,}", speed, f"{losses[-1]:.3f}", f"{exact} of {len(answers)}"


def main(words: list[str]) -> int:
    if words[0] == "--left-out":
        return 0 if left_out(words[1]) else 1
    out = Path(words[0])
    bases = sorted(path.stem for path in (Path(__file__).parent / "small").glob("*.json"))
    rows = [HEAD, *(row(base, out) for base in bases if (out / f"{base}.json").is_file())]
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEAD))]
    for line in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
