"""`python configs/scimind/chance.py TEST.json OUT`: answers that are right for another record, as what guessing gets.

Writes OUT/chance-smiles2text.json and OUT/chance-text2smiles.json, as `jaxlm generate --save_file` writes answers. Each
record's answer is that of another one, drawn at random (seed 0): a guess by someone who knows what answers look like.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ANSWERS = {"smiles2text": "caption", "text2smiles": "molecule"}


def main(test: Path, out: Path) -> None:
    records = json.loads(test.read_text(encoding="utf-8"))
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    other = dict(zip(order, order[1:] + order[:1], strict=True))  # one circle, so that nobody gets his own
    out.mkdir(parents=True, exist_ok=True)
    for task, field in ANSWERS.items():
        answers = [record | {"answer": records[other[number]][field]} for number, record in enumerate(records)]
        (out / f"chance-{task}.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
