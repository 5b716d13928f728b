"""What small.sh found, a line for each base: python configs/llm4academic/table.py OUT

Reads the runs below OUT and OUT/zbench.csv, the table of questions with a column of answers for each base; prints the
figures, and writes OUT/figures.json.

    --left-out SHAPE       exit with 0, and say why, where jaxlm does not have the family of a config.json
    --rate TABLE NAME NEW  write TABLE anew with the ratings of the column NAME: right where an answer is the reference

Z-Bench is rated by people. Each question here has one right answer, so that a comparison does as well.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import zbench
from jaxlm.models.families import load_shape
from jaxlm.weights.names import num_params

HEAD = ("base", "parameters", "tokens/s", "validation loss", "right answers")


def left_out(shape: str) -> bool:
    """Whether jaxlm does not have the family of a config.json; says so."""
    try:
        load_shape(shape)
    except UserError as error:
        print(f"left out: {Path(shape).stem}: {error}")
        return True
    return False


def rating(name: str) -> str:
    """The column of a base's ratings, as `evaluate --task zbench` names it."""
    return f"{name} 答案{zbench.RATING}"


def rate(table: Path, name: str, new: Path) -> None:
    """Fills in the ratings of one column of answers."""
    header, *lines = zbench.read_lines(table)
    names = header.values()
    places = zbench.layout(table, names)
    at = names.index(name)
    verdicts = [
        zbench.RIGHT if values[at].strip() == values[places.reference].strip() else zbench.WRONG
        for values in (line.values() for line in lines)
    ]
    new.write_bytes(zbench.with_columns(header, lines, [(rating(name), verdicts)], places.own))


def shares(table: Path) -> dict[str, tuple[int, int]]:
    """For each rated column of answers the number of right ones, and of all."""
    header, *lines = zbench.read_lines(table)
    names = header.values()
    end = rating("")
    result = {}
    for at, name in enumerate(names):
        if name.endswith(end):
            right = [zbench.verdict(line.values()[at]) for line in lines]
            result[name.removesuffix(end)] = sum(each is True for each in right), len(right)
    return result


def guessing(table: Path) -> float:
    """What the reference answers in another order get on average: a guess by someone who knows them all."""
    header, *lines = zbench.read_lines(table)
    place = zbench.layout(table, header.values()).reference
    references = [line.values()[place].strip() for line in lines]
    return statistics.mean(references.count(each) / len(references) for each in references)


def figures(base: str, out: Path, right: tuple[int, int]) -> dict[str, Any]:
    """The figures of a base's run and of its answers."""
    metrics = [json.loads(line) for line in (out / base / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The first steps wait for the compiler.
    speeds = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line][2:]
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    return {
        "parameters": num_params(open_model(out / base).config),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "validation_loss": losses[-1],
        "right": right[0],
        "questions": right[1],
        "share": right[0] / right[1],
    }


def main(words: list[str]) -> int:
    if words[0] == "--left-out":
        return 0 if left_out(words[1]) else 1
    if words[0] == "--rate":
        rate(Path(words[1]), words[2], Path(words[3]))
        return 0
    out = Path(words[0])
    rated = shares(out / "zbench.csv")
    bases = {base: figures(base, out, right) for base, right in rated.items() if (out / base).is_dir()}
    found = {"guessing": guessing(out / "zbench.csv"), "bases": bases}
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [HEAD]
    for base, values in sorted(bases.items()):
        speed = values["tokens_per_second"]
        rows.append(
            (
                base,
                f"{values['parameters']:,}",
                "-" if speed is None else f"{speed:,.0f}",
                f"{values['validation_loss']:.3f}",
                f"{values['right']} of {values['questions']}",
            )
        )
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEAD))]
    for line in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
