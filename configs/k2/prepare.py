"""`python configs/k2/prepare.py OUT [SEED]`: data of the small recipe, from one table of minerals.

OUT/raw.jsonl: documents of geoscience as they are found: facts, exercises with their answers, and what cleaning takes
out (menus, repeated words, copies). OUT/general.jsonl and OUT/general.json: text and instructions that are not of
geoscience. OUT/geosignal.json: instructions of geoscience, shaped as GeoSignal's records. OUT/geobench_npee.json:
questions in GeoBench's file format, about facts of which no instruction is. OUT/ask.json: one of them, for the server.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

# name, class, colour: elementary; one value where there are several.
MINERALS = """
galena    | sulfide   | grey
pyrite    | sulfide   | yellow
cinnabar  | sulfide   | red
hematite  | oxide     | red
magnetite | oxide     | black
rutile    | oxide     | red
calcite   | carbonate | white
siderite  | carbonate | brown
malachite | carbonate | green
halite    | halide    | white
fluorite  | halide    | purple
barite    | sulfate   | white
celestine | sulfate   | blue
quartz    | silicate  | white
zircon    | silicate  | brown
kyanite   | silicate  | blue
"""
STATEMENTS = {"class": "The class of {} is {}.", "colour": "The colour of {} is {}."}
FACTS = {
    "class": ("The class of {} is {}.", "Among minerals {} is of the class {}."),
    "colour": ("The colour of {} is {}.", "A piece of {} looks {} to the eye."),
}
TASK = "Decide whether the statement is true or false. Answer with True or False."
DOCUMENTS, TUNED, ASKED = 1500, 300, 16
GENERAL = (("Say the number after {}.", 1), ("Say the number before {}.", -1), ("Repeat the number {}.", 0))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class World:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        rows = [[cell.strip() for cell in line.split("|")] for line in MINERALS.strip().splitlines()]
        self.facts = [(name, kind, value) for name, *values in rows for kind, value in zip(FACTS, values, strict=True)]
        values = {kind: sorted({value for _, k, value in self.facts if k == kind}) for kind in FACTS}
        self.mistakes = {
            fact: self.draw.choice([value for value in values[fact[1]] if value != fact[2]]) for fact in self.facts
        }

    def claim(self, fact: tuple[str, str, str], is_true: bool) -> tuple[str, str, str]:
        """A fact, or what is said of the same mineral and is not so: always the same mistake, as in a book."""
        return fact if is_true else (*fact[:2], self.mistakes[fact])

    def document(self) -> str:
        """Four facts, or the exercises of a book with their answers, of which half are True."""
        chosen = self.draw.sample(self.facts, 4)
        if self.draw.random() < 0.3:
            return " ".join(self.draw.choice(FACTS[kind]).format(name, value) for name, kind, value in chosen)
        exercises = []
        for fact in chosen:
            is_true = self.draw.random() < 0.5
            name, kind, value = self.claim(fact, is_true)
            exercises.append(f"{STATEMENTS[kind].format(name, value)}\n\nThe answer is:\n{is_true}")
        return "\n\n".join(exercises)

    def rubbish(self) -> str:
        """What stands between documents on the web."""
        return self.draw.choice(
            ("Home | About | Contact", "Click here", "menu menu menu menu " * 20, "# # # ... $$$ %%% " * 10)
        )


def main(out: Path, seed: int) -> None:
    world = World(seed)
    out.mkdir(parents=True, exist_ok=True)
    facts = world.draw.sample(world.facts, len(world.facts))
    statements = {  # of facts that no instruction is about, and of the others
        part: [
            (STATEMENTS[kind].format(name, value), str(is_true))
            for fact in chosen for is_true in (True, False)
            for name, kind, value in [world.claim(fact, is_true)]
        ]
        for part, chosen in (("asked", facts[:ASKED]), ("shown", facts[ASKED:] * (TUNED // len(facts[ASKED:]) // 2)))
    }  # fmt: skip
    asked, shown = statements["asked"], statements["shown"]
    bench = {"tf": {"question": [text for text, _ in asked], "answer": [answer for _, answer in asked]}}
    (out / "geobench_npee.json").write_text(json.dumps(bench, indent=1))
    documents = [world.document() for _ in range(DOCUMENTS)]
    raw = [*documents, *documents[:200], *(world.rubbish() for _ in range(300))]
    world.draw.shuffle(raw)
    (out / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw))
    tuned = [
        {
            "instruction": f"{TASK}\n{text}",
            "input": "",
            "output": f"The answer is:\n{answer}",
            "type": "geo",
            "category": "tf",
        }
        for text, answer in shown
    ]
    (out / "geosignal.json").write_text(json.dumps(tuned, indent=1))
    general = []
    for way, step in GENERAL:
        for at, word in enumerate(NUMBERS):
            if 0 <= at + step < len(NUMBERS):
                general.append({"instruction": way.format(word), "input": "", "output": NUMBERS[at + step]})
    (out / "general.json").write_text(json.dumps(general, indent=1))
    text = [f"### Instruction:\n{each['instruction']}\n\n### Response:\n{each['output']}" for each in general * 6]
    (out / "general.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in text))
    prompts = [f"### Instruction:\n{each['instruction']}\n\n### Response:\n{each['output']}" for each in tuned[:40]]
    (out / "words.txt").write_text("\n\n".join([*documents[:400], *prompts, *text]))
    question = {"instruction": f"{TASK}\n{asked[0][0]}", "input": "", "parameters": {"max_tokens": 8}}
    (out / "ask.json").write_text(json.dumps(question))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
