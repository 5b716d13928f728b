"""Files of answers beside what is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxlm.data.entries import read_entries
from jaxlm.errors import UserError
from jaxlm.evaluation.lpm24 import Pair

# Task -> columns in which the right answer, and the model's, are looked for.
REFERENCES = {"smiles2text": ("caption", "ground truth"), "text2smiles": ("molecule", "ground truth")}
PREDICTIONS = ("prediction", "answer", "output")


def read_pairs(
    path: Path, task: str, reference: str | None = None, prediction: str | None = None
) -> tuple[list[Pair], int]:
    """The right answers beside the model's, and the number of records with an error in place of an answer.

    Args:
        path: .json, .jsonl, .csv or .tsv / .txt (the benchmark's table, columns divided by tabs).
        reference, prediction: columns; None: the first there is of the usual ones.

    Raises:
        UserError: for a broken file, or a record without one of the two.
    """
    pairs, missing = [], 0
    for number, row in enumerate(read_rows(path, "predictions"), 1):
        texts = []
        for option, given, usual in (
            ("reference", reference, REFERENCES[task]),
            ("prediction", prediction, PREDICTIONS),
        ):
            names = usual if given is None else (given,)
            text = next((row[name] for name in names if isinstance(row.get(name), str)), None)
            if text is None and option == "prediction" and row.get("error"):
                text, missing = "", missing + 1
            if text is None:
                raise UserError(
                    f"{path}: record {number} has no text in {' or '.join(names)}; columns found: "
                    f"{', '.join(map(str, row)) or 'none'}. Name the column: --{option} NAME"
                )
            texts.append(_molecule(text) if task == "text2smiles" else text)
        pairs.append(Pair(*texts))
    if not pairs:
        raise UserError(f"{path} holds no answer")
    return pairs, missing


def _molecule(text: str) -> str:
    """What stands between the first tags, if there are any; else the text."""
    tagged = re.search(r"<(\w+)>(.*?)</\1>", text, re.DOTALL)
    return (tagged.group(2) if tagged else text).strip()


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """The records of a file: JSON, JSON lines or CSV, or LPM-24's table (.tsv or .txt, columns divided by tabs).

    Args:
        key: the key of the configuration that names the file, for messages.

    Raises:
        UserError: for a file that is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{key}: {path} does not exist")
    ending = path.suffix.lower()
    kind = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "csv"}.get(ending, "json")
    delimiter = "\t" if ending in (".tsv", ".txt") else None
    rows = []
    for entry in read_entries(path, kind, key=key, delimiter=delimiter, strict=False):
        problem = entry.problem if isinstance(entry.value, dict) or entry.problem else "is not a record"
        if problem is not None:
            raise UserError(f"{key}: {entry.name}: {problem}; {path} must hold a list of records")
        rows.append(entry.value)
    return rows
