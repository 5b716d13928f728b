"""`python -m jaxlm.evaluate --task NAME --predictions FILE`: figures of a file of answers."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli import parse_config
from jaxlm.config import EvaluateConfig
from jaxlm.errors import UserError
from jaxlm.jsontext import parse

if TYPE_CHECKING:
    from jaxlm.evaluation.lpm24 import Pair

DESCRIPTION = (
    "Compares answers with what is right, as the benchmark does. The file is what `jaxlm.generate --save_file` wrote "
    "for records that bring the right answers along, or the benchmark's own table."
)
# Task -> columns in which the right answer, and the model's, are looked for.
REFERENCES = {"smiles2text": ("caption", "ground truth"), "text2smiles": ("molecule", "ground truth")}
PREDICTIONS = ("prediction", "answer", "output")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 for a mistake in the input."""
    try:
        words = sys.argv[1:] if argv is None else argv
        config = parse_config(
            words, EvaluateConfig, prog="python -m jaxlm.evaluate", description=DESCRIPTION, aliases={}
        )
        return _run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(config: EvaluateConfig) -> int:
    from rich.console import Console
    from rich.table import Table

    from jaxlm.evaluation import lpm24

    if config.task is None or config.predictions is None:
        raise UserError(f"say the task (--task {' or '.join(REFERENCES)}) and the file (--predictions FILE)")
    pairs, missing = read_pairs(Path(config.predictions), config.task, config.reference, config.prediction)
    if config.task == "text2smiles":
        metrics = lpm24.molecule_metrics(pairs)
        how = "fingerprints by RDKit, Morgan radius 2"
    else:
        tokens = lpm24.word_tokens if config.metric_tokenizer is None else lpm24.hf_tokens(config.metric_tokenizer)
        metrics = lpm24.caption_metrics(pairs, tokens)
        how = f"BLEU over {'words and signs' if config.metric_tokenizer is None else config.metric_tokenizer}"
    console = Console()
    console.print(f"{config.task}: {len(pairs):,} answers ({how})", highlight=False)
    if missing:
        console.print(f"{missing:,} of them were not answered (see their 'error'); they count as wrong", style="bold")
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    if config.save_file is not None:
        content = {
            "task": config.task,
            "predictions": config.predictions,
            "answers": len(pairs),
            "missing": missing,
            "how": how,
            **metrics,
        }
        Path(config.save_file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def read_pairs(
    path: Path, task: str, reference: str | None = None, prediction: str | None = None
) -> tuple[list[Pair], int]:
    """The right answers and the model's, and how many there are none of: empty ones, of records with an error.

    Args:
        path: .json, .jsonl, .csv or .tsv / .txt (the benchmark's table, columns divided by tabs).
        reference, prediction: columns; None: the first there is of the usual ones.

    Raises:
        UserError: for a broken file, or a record without one of the two.
    """
    from jaxlm.evaluation.lpm24 import Pair

    pairs, missing = [], 0
    for number, row in enumerate(_rows(path), 1):
        texts = []
        for option, given, usual in (
            ("reference", reference, REFERENCES[task]),
            ("prediction", prediction, PREDICTIONS),
        ):
            names = usual if given is None else (given,)
            found = next((row[name] for name in names if isinstance(row.get(name), str)), None)
            if found is None and option == "prediction" and row.get("error"):
                found, missing = "", missing + 1
            if found is None:
                raise UserError(
                    f"{path}: record {number} has no text in {' or '.join(names)}; columns found: "
                    f"{', '.join(map(str, row)) or 'none'}. Name the column: --{option} NAME"
                )
            texts.append(_molecule(found) if task == "text2smiles" else found)
        pairs.append(Pair(*texts))
    if not pairs:
        raise UserError(f"{path} holds no answer")
    return pairs, missing


def _molecule(text: str) -> str:
    """What stands between the first tags, if there are any; else the text."""
    found = re.search(r"<(\w+)>(.*?)</\1>", text, re.DOTALL)
    return (found.group(2) if found else text).strip()


def _rows(path: Path) -> list[dict[str, Any]]:
    from jaxlm.data.sources import csv_delimiter, refuse_twins

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".csv", ".tsv", ".txt"):
            csv.field_size_limit(1 << 30)
            header = text.partition("\n")[0]
            delimiter = csv_delimiter(header) if path.suffix == ".csv" else "\t"
            table = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
            refuse_twins(path, table.fieldnames or ())
            rows: Any = list(table)
        elif path.suffix == ".jsonl":
            rows = [parse(line) for line in text.split("\n") if line.strip()]
        else:
            rows = parse(text)
    except FileNotFoundError:
        raise UserError(f"predictions: {path} does not exist") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"predictions: {path} cannot be read ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"predictions: {path} must hold a list of records")
    return rows


if __name__ == "__main__":
    sys.exit(main())
