"""`python configs/scimind/table.py OUT`: the figures of small.sh side by side, for guessing, before and after.

LPM-24's figures, as `jaxlm evaluate` wrote them, and one of this folder's captions, in OUT/facts.json: F1 of the facts
that they name, groups and rings. A molecule that was written is captioned by prepare.py first. A caption's form alone
gets a high BLEU; its facts have to be read from the molecule.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

try:
    from rdkit import Chem, RDLogger
except ModuleNotFoundError:
    sys.exit("table.py needs RDKit: pip install 'jaxlm[science]'")

sys.path.insert(0, str(Path(__file__).resolve().parent))

from prepare import caption

FIGURES = {
    "smiles2text": ("bleu_2", "bleu_4", "rouge_l", "exact"),
    "text2smiles": ("validity", "maccs", "morgan", "exact"),
}
COLUMNS = ("chance", "before", "after")


def facts(text: str) -> set[str]:
    """What a caption says of rings and groups."""
    found: set[str] = set()
    for sentence in re.split(r"\.(?:\s|$)", text):
        if sentence.strip().startswith("It has "):
            found.add(sentence.strip())
        elif sentence.strip().startswith("It is or has "):
            found.update(sentence.strip().removeprefix("It is or has ").split(", "))
    return found


def captioned(answer: str) -> str:
    """The caption of a molecule that was written; empty where there is none."""
    smiles = re.sub("</?smiles>", "", answer).strip()
    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return "" if molecule is None else caption(molecule)


def f1_of_facts(task: str, path: Path) -> float:
    """F1 of the facts of all answers together."""
    common = named = wanted = 0
    for record in json.loads(path.read_text(encoding="utf-8")):
        right = facts(record["caption"])
        given = facts(record["answer"] if task == "smiles2text" else captioned(record["answer"]))
        common, named, wanted = common + len(right & given), named + len(given), wanted + len(right)
    return 2 * common / (named + wanted)


def main(out: Path) -> None:
    RDLogger.DisableLog("rdApp.*")
    found = {task: {column: f1_of_facts(task, out / f"{column}-{task}.json") for column in COLUMNS} for task in FIGURES}
    (out / "facts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{'task':14}{'figure':10}" + "".join(f"{column:>8}" for column in COLUMNS))
    for task, names in FIGURES.items():
        print(f"{task:14}{'facts, F1':10}" + "".join(f"{found[task][column]:8.3f}" for column in COLUMNS))
        files = [json.loads((out / f"{column}-{task}-figures.json").read_text(encoding="utf-8")) for column in COLUMNS]
        for name in names:
            values = "".join(f"{'-' if file[name] is None else format(file[name], '.3f'):>8}" for file in files)
            print(f"{task:14}{name:10}{values}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
