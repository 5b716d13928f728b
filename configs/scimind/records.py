"""Records to train on, of the files that SciMind's README names: python configs/scimind/records.py KIND FILE… OUT.jsonl

    chebi FILE.txt                  ChEBI-20: a table with tabs between CID, SMILES and description
    lpm24 FILE.tsv                  LPM-24's shared task: a table with tabs between SMILES and description
    promoter PROMOTERS.fa OTHERS.fa two FASTA files of DNA: what is a promoter, and what is not

The first two become records of `molecule` and `caption`, for the templates smiles2text and text2smiles; the third
becomes records of `sequence` and `answer`, for the template promoter.json beside this script. A line that cannot be
read ends the script with its number; sequences with letters other than A, C, G, T (N, mostly) are left out and counted.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

COLUMNS = {"chebi": ("SMILES", "description"), "lpm24": ("SMILES", "description")}
BASES = re.compile("[ACGT]+")


def molecules(kind: str, path: Path) -> Iterator[dict[str, str]]:
    """Records of a table.

    Raises:
        SystemExit: a column is missing, or a line has not the header's number of cells.
    """
    with path.open(encoding="utf-8", newline="") as file:
        # Descriptions hold quotation marks that do not stand around cells.
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, [])
        missing = [name for name in COLUMNS[kind] if name not in header]
        if missing:
            sys.exit(f"{path}: no column {missing[0]!r} in the first line; found {', '.join(header)[:80]!r}")
        molecule, caption = (header.index(name) for name in COLUMNS[kind])
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                sys.exit(f"{path}:{number}: {len(row)} cells, the first line has {len(header)}; correct the line")
            yield {"molecule": row[molecule].strip(), "caption": row[caption].strip()}


def sequences(path: Path) -> Iterator[tuple[str, str]]:
    """(name, letters in capitals) of a FASTA file.

    Raises:
        SystemExit: letters stand in front of the first name.
    """
    name, letters = "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith(">"):
            if letters:
                yield name, "".join(letters)
            name, letters = line[1:].strip(), []
        elif line.strip():
            if not name:
                sys.exit(f"{path}:{number}: a sequence without a name; a line that begins with > is expected before it")
            letters.append(line.strip().upper())
    if letters:
        yield name, "".join(letters)


def promoters(promoter: Path, other: Path) -> Iterator[dict[str, str]]:
    """Records of both files, and a line about what is left out."""
    left_out = 0
    for path, answer in ((promoter, "Yes."), (other, "No.")):
        for name, letters in sequences(path):
            if BASES.fullmatch(letters):
                yield {"id": name, "sequence": letters, "answer": answer}
            else:
                left_out += 1
    if left_out:
        print(f"{left_out} sequences are left out: they have letters other than A, C, G, T", file=sys.stderr)


def main(words: list[str]) -> None:
    kind, *files = words or [""]
    if kind not in (*COLUMNS, "promoter") or len(files) != (3 if kind == "promoter" else 2):
        sys.exit(__doc__)
    *sources, out = map(Path, files)
    for path in sources:
        if not path.is_file():
            sys.exit(f"{path} is not a file")
    records = list(promoters(*sources) if kind == "promoter" else molecules(kind, *sources))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records)} records in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
