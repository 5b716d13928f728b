"""Pairs for preference tuning: python configs/molecules/pairs.py RECORDS PAIRS.jsonl [--seed N]

Reads records of a caption, a molecule and answers that a model drew (JSON Lines, as `jaxlm generate --samples 4` writes
them), and writes pairs of the caption as `prompt`, a `chosen` answer and a `rejected` one:

    an answer that RDKit reads as a molecule, and one to the same caption that it does not: as many as there are
    where all answers are of one kind: the record's molecule, and the same SMILES with one mistake of those that a model
    makes, a parenthesis or a ring's digit too few or too many, an atom with too many bonds, half an aromatic ring

Pairs of the first kind teach more: both sides are what the model would say.

Needs RDKit: pip install 'jaxlm[science]'
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

try:
    from rdkit import Chem, RDLogger
except ModuleNotFoundError:
    sys.exit("pairs.py needs RDKit: pip install 'jaxlm[science]'")

TRIES = 1000


def _without(smiles: str, signs: str, chance: random.Random) -> str:
    places = [place for place, sign in enumerate(smiles) if sign in signs]
    if not places:
        return smiles
    place = chance.choice(places)
    return smiles[:place] + smiles[place + 1 :]


def _with(smiles: str, signs: str, chance: random.Random) -> str:
    place = chance.randint(1, len(smiles))
    return smiles[:place] + chance.choice(signs) + smiles[place:]


def corrupted(smiles: str, chance: random.Random) -> str:
    """A SMILES with one mistake, which RDKit does not read.

    Raises:
        ValueError: no mistake was found in `TRIES` tries, which has not been seen.
    """
    mistakes = (
        lambda: _without(smiles, "()", chance),
        lambda: _without(smiles, "123456789", chance),
        lambda: _without(smiles, "cnos", chance),
        lambda: _with(smiles, "()", chance),
        lambda: _with(smiles, "123", chance),
        lambda: _with(smiles, ("(C)(C)(C)C", "=O", "#N", "c"), chance),
    )
    for _ in range(TRIES):
        wrong = chance.choice(mistakes)()
        if Chem.MolFromSmiles(wrong) is None:
            return wrong
    raise ValueError(f"{smiles}: no mistake makes it unreadable")


def read(smiles: str) -> bool:
    """Whether RDKit reads it as a molecule."""
    return bool(smiles) and Chem.MolFromSmiles(smiles) is not None


def pairs(record: dict[str, Any], chance: random.Random) -> list[tuple[str, str]]:
    """(chosen, rejected) of a record."""
    answers = list(dict.fromkeys(answer.strip() for answer in record.get("answers", ())))
    good, bad = ([answer for answer in answers if answer and read(answer) is is_read] for is_read in (True, False))
    own = list(zip(good, bad, strict=False))
    return own or [(record["molecule"], corrupted(record["molecule"], chance))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="JSON Lines of records with molecule, caption and answers")
    parser.add_argument("pairs", type=Path, help="the file to write, a pair a line")
    parser.add_argument("--seed", type=int, default=0, help="of the mistakes (default: 0)")
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    chance = random.Random(options.seed)
    options.pairs.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in options.records.read_text(encoding="utf-8").splitlines()]
    made = [(record["caption"], *pair) for record in records for pair in pairs(record, chance)]
    with options.pairs.open("w", encoding="utf-8") as file:
        for prompt, chosen, rejected in made:
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    print(f"{len(made)} pairs of {len(records)} captions in {options.pairs}")


if __name__ == "__main__":
    main()
