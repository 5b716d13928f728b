"""`python configs/qlora/questions.py OUT`: what small.sh asks of its model, OUT/questions.json, and OUT/chance.json.

The questions are those for the facts that no record of the quickstart answers, each asked in its two forms; the right
answer is the sentence that the records of the same kind have. Chance: the kind of fact is known, and the value is that
of another mineral, drawn at random.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from prepare import ANSWERS, FACTS, QUESTIONS, minerals, say  # noqa: E402


def main(out: Path) -> None:
    table = minerals()
    questions, chances = [], []
    for asked in json.loads((QUICKSTART / "questions.json").read_text(encoding="utf-8")):
        name, fact = next(
            (name, fact)
            for name in table
            for fact in FACTS
            if asked["instruction"] == say(QUESTIONS[fact][0], name, table[name][fact])
        )
        value = table[name][fact]
        others = [facts[fact] == value for other, facts in table.items() if other != name]
        for form in QUESTIONS[fact]:
            questions.append({"question": say(form, name, value), "answers": [say(ANSWERS[fact], name, value)]})
            chances.append(statistics.mean(others))
    out.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f" {json.dumps(question)}" for question in questions)
    (out / "questions.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    (out / "chance.json").write_text(json.dumps({"exact": statistics.mean(chances)}) + "\n", encoding="utf-8")
    print(f"{len(questions)} questions in {out / 'questions.json'}; guessing: {statistics.mean(chances):.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
