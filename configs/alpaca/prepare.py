"""`python configs/alpaca/prepare.py OUT [SEED]`: data of the small recipe, from one table of animals.

OUT/base.jsonl: lists of tasks as a base model meets them, one in each document. OUT/words.txt: the tokenizer's text.
OUT/seeds.json: seed tasks. OUT/questions.json: what is asked before and after; no other file has these instructions.
OUT/chance.json: the share of questions that the most frequent answer of each kind gets right.

`prepare.py --without QUESTIONS FROM TO` copies instructions, less those that are among the questions.
`prepare.py --same A B` compares the weights of two Hugging Face directories, and fails where a number differs.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

# name, colour, home, food: elementary, one value where there are several.
ANIMALS = """
fox      | red    | forest | mice
crow     | black  | tree   | seeds
frog     | green  | pond   | flies
bee      | yellow | hive   | nectar
cow      | brown  | barn   | grass
swan     | white  | lake   | weed
seal     | grey   | sea    | fish
mole     | black  | ground | worms
snake    | green  | grass  | mice
sheep    | white  | field  | grass
wolf     | grey   | forest | sheep
lion     | yellow | plain  | meat
parrot   | green  | tree   | fruit
bear     | brown  | cave   | honey
"""
ASKED = {
    "colour": (
        "Name the colour of a {}.", "What colour is a {}?", "Tell me which colour a {} has.", "Give a {} its colour.",
    ),
    "home": (
        "Name the home of a {}.", "Where does a {} live?", "Tell me where a {} lives.", "Say where you find a {}.",
    ),
    "food": ("Name the food of a {}.", "What does a {} eat?", "Tell me what a {} eats.", "Say what feeds a {}."),
}  # fmt: skip
QUESTIONS, LISTS, TASKS, SEEDS = 40, 500, 6, 20
# The prompt of Alpaca's training, so that the small tokenizer has its words.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


def tasks() -> list[tuple[str, str, str]]:
    """(kind, instruction, answer) of all animals."""
    found = []
    for line in ANIMALS.strip().splitlines():
        name, *values = (cell.strip() for cell in line.split("|"))
        for (kind, ways), value in zip(ASKED.items(), values, strict=True):
            found += [(kind, way.format(name), value) for way in ways]
    return found


def record(instruction: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output}


def main(out: Path, seed: int) -> None:
    draw = random.Random(seed)
    everything = tasks()
    draw.shuffle(everything)
    asked, others = everything[:QUESTIONS], everything[QUESTIONS:]
    documents = []
    for _ in range(LISTS):
        text = "Tasks:\n"
        for number, (_, instruction, value) in enumerate(draw.sample(others, TASKS), 1):
            text += (
                f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\n{value}\n"
            )
        documents.append({"text": text + "###\n"})
    out.mkdir(parents=True, exist_ok=True)
    (out / "base.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (out / "words.txt").write_text("".join(d["text"] for d in documents[:200]) + (PROMPT.format("") + "\n") * 60)
    (out / "prompt.txt").write_text("Tasks:\n")
    (out / "seeds.json").write_text(json.dumps([record(*each[1:]) for each in others[:SEEDS]], indent=1))
    questions = [{"question": instruction, "answer": value} for _, instruction, value in asked]
    (out / "questions.json").write_text(json.dumps(questions, indent=1))
    held_out = [record(instruction, value) for _, instruction, value in asked]
    (out / "validation.json").write_text(json.dumps(held_out, indent=1))
    guesses = {kind: Counter(a for k, _, a in others if k == kind).most_common(1)[0][0] for kind in ASKED}
    right = sum(guesses[kind] == value for kind, _, value in asked)
    (out / "chance.json").write_text(json.dumps({"exact": right / len(asked)}))


def without(questions: Path, source: Path, destination: Path) -> None:
    asked = {each["question"] for each in json.loads(questions.read_text())}
    records = json.loads(source.read_text())
    kept = [each for each in records if each["instruction"] not in asked]
    answers = {instruction: value for _, instruction, value in tasks()}
    known = [each for each in kept if each["instruction"] in answers]
    right = sum(answers[each["instruction"]] == each["output"] for each in known)
    destination.write_text(json.dumps(kept, indent=1))
    print(f"{len(records)} instructions; {len(records) - len(kept)} of them are among the questions and left out")
    print(f"{len(known)} of the others ask for something in the table, and {right} of these have its answer")


def same(first: Path, second: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    if set(one) != set(other):
        raise SystemExit(f"{first} and {second} have other tensors")
    different = [name for name in one if not np.array_equal(one[name], other[name])]
    if different:
        raise SystemExit(f"{second}: {different[0]} and {len(different) - 1} other tensors differ from {first}")
    print(f"{second}: all {sum(each.size for each in one.values()):,} numbers are those of {first}")


if __name__ == "__main__":
    if sys.argv[1] == "--without":
        without(*map(Path, sys.argv[2:]))
    elif sys.argv[1] == "--same":
        same(*map(Path, sys.argv[2:]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
