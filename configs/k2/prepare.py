"""`python configs/k2/prepare.py OUT [SEED]`: data of the small recipe, about minerals that do not exist.

OUT/raw.jsonl: documents of geoscience as they are found: facts, exercises with their answers, and what cleaning takes
out (menus, repeated words, copies). OUT/general.jsonl and OUT/general.json: text and instructions that are not of
geoscience. OUT/geosignal.json: instructions of geoscience, shaped as GeoSignal's records. OUT/geobench_npee.json:
choices in GeoBench's file format. OUT/ask.json: one of them, for the server.

What is asked stands in the documents as plain facts alone: no exercise and no instruction is about it. Each letter is
right equally often, so that only those who know the facts choose better than by chance.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

# Minerals that do not exist: each of the first with each of the second.
FIRST = "al bor cal dar el fen gar hol ir kor lim mar nor or pal quen ros sel tor vel"
SECOND = "adite benite donite garite kalite lorite mosite nesite pirite rusite tanite zolite"
OPTIONS = {  # always in this order, as on an exam's sheet
    "class": ("sulfide", "oxide", "carbonate", "silicate"),
    "system": ("cubic", "trigonal", "orthorhombic", "monoclinic"),
}
FACTS = {
    "class": (
        "The class of {} is {}.",
        "Among minerals {} is of the class {}.",
        "The mineral {} belongs to the class {}.",
        "In books of minerals {} stands under {}.",
    ),
    "system": (
        "The system of {} is {}.",
        "Crystals of {} have the system {}.",
        "The mineral {} grows in the system {}.",
        "The form of {} is that of the system {}.",
    ),
}
LETTERS = "ABCD"
TASK = "Identify the choice that best completes the statement or answers the question."
DOCUMENTS, EXERCISES = 1500, 0.35  # documents, and the share of them that are exercises
ASKED = 12  # facts of each value that are asked about
GENERAL = (("Say the number after {}.", 1), ("Say the number before {}.", -1), ("Repeat the number {}.", 0))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Fact(NamedTuple):
    mineral: str
    kind: str
    value: str

    def exercise(self) -> tuple[str, str]:
        """A question with its options, and the right letter."""
        options = OPTIONS[self.kind]
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
        question = [f"The {self.kind} of {self.mineral} is", "Choose from:", *lines]
        return "\n".join(question), LETTERS[options.index(self.value)]


class World:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        names = [first + second for first in FIRST.split() for second in SECOND.split()]
        self.facts = []
        for kind, values in OPTIONS.items():  # as many minerals for each value
            self.draw.shuffle(names)
            self.facts += [Fact(name, kind, values[at % len(values)]) for at, name in enumerate(names)]
        self.asked = [
            fact
            for kind, values in OPTIONS.items() for value in values
            for fact in self.draw.sample([fact for fact in self.facts if fact[1:] == (kind, value)], ASKED)
        ]  # fmt: skip
        self.shown = [fact for fact in self.facts if fact not in self.asked]

    def document(self) -> str:
        """Six facts, or three exercises of a book with their answers."""
        if self.draw.random() < EXERCISES:
            exercises = [fact.exercise() for fact in self.draw.sample(self.shown, 3)]
            return "\n\n".join(f"{question}\n\nThe answer is:\n{letter}" for question, letter in exercises)
        facts = self.draw.sample(self.facts, 6)
        return " ".join(self.draw.choice(FACTS[fact.kind]).format(fact.mineral, fact.value) for fact in facts)

    def rubbish(self) -> str:
        """What stands between documents on the web."""
        return self.draw.choice(
            ("Home | About | Contact", "Click here", "menu menu menu menu " * 20, "# # # ... $$$ %%% " * 10)
        )


def main(out: Path, seed: int) -> None:
    world = World(seed)
    out.mkdir(parents=True, exist_ok=True)
    asked, shown = ([fact.exercise() for fact in facts] for facts in (world.asked, world.shown))
    bench = {"choice": {"question": [text for text, _ in asked], "answer": [letter for _, letter in asked]}}
    (out / "geobench_npee.json").write_text(json.dumps(bench, indent=1))
    documents = [world.document() for _ in range(DOCUMENTS)]
    raw = [*documents, *documents[:200], *(world.rubbish() for _ in range(300))]
    world.draw.shuffle(raw)
    (out / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw))
    tuned = [
        {
            "instruction": f"{TASK}\n{text}",
            "input": "",
            "output": f"The answer is:\n{letter}",
            "type": "geo",
            "category": "choice",
        }
        for text, letter in shown
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
    prompts = [f"### Instruction:\n{each['instruction']}\n\n### Response:\n{each['output']}" for each in tuned]
    (out / "words.txt").write_text("\n\n".join([*documents, *prompts, *text]))
    question = {"instruction": f"{TASK}\n{asked[0][0]}", "input": "", "parameters": {"max_tokens": 8}}
    (out / "ask.json").write_text(json.dumps(question))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
