"""`python configs/quickstart/prepare.py`: the quickstart's texts, records and questions, from one table of minerals.

The corpus says every fact of the table many times in other words and orders, so that a small model can learn it from
text. The records ask for some of the facts. The questions ask for others, which no record holds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
# name, class, formula, Mohs hardness, colour, what it is used for. Where books give a range, one value within it.
MINERALS = """
galena       | sulfide        | PbS     | 2.5 | grey       | making lead
pyrite       | sulfide        | FeS2    | 6   | yellow     | making sulfuric acid
sphalerite   | sulfide        | ZnS     | 4   | brown      | making zinc
chalcopyrite | sulfide        | CuFeS2  | 3.5 | yellow     | making copper
cinnabar     | sulfide        | HgS     | 2.5 | red        | making mercury
molybdenite  | sulfide        | MoS2    | 1   | grey       | making molybdenum
stibnite     | sulfide        | Sb2S3   | 2   | grey       | making antimony
hematite     | oxide          | Fe2O3   | 6   | red        | making iron
magnetite    | oxide          | Fe3O4   | 6   | black      | making iron
corundum     | oxide          | Al2O3   | 9   | grey       | grinding metal
cassiterite  | oxide          | SnO2    | 6.5 | brown      | making tin
rutile       | oxide          | TiO2    | 6   | red        | making titanium
chromite     | oxide          | FeCr2O4 | 5.5 | black      | making chromium
uraninite    | oxide          | UO2     | 5.5 | black      | making nuclear fuel
calcite      | carbonate      | CaCO3   | 3   | white      | making cement
magnesite    | carbonate      | MgCO3   | 4   | white      | lining furnaces
siderite     | carbonate      | FeCO3   | 4   | brown      | making iron
rhodochrosite | carbonate     | MnCO3   | 4   | pink       | making jewellery
malachite    | carbonate      | Cu2CO3(OH)2 | 4 | green    | making jewellery
halite       | halide         | NaCl    | 2.5 | colourless | salting food
fluorite     | halide         | CaF2    | 4   | purple     | making fluorine
sylvite      | halide         | KCl     | 2   | colourless | making fertiliser
barite       | sulfate        | BaSO4   | 3   | white      | drilling wells
celestine    | sulfate        | SrSO4   | 3   | blue       | making fireworks
quartz       | silicate       | SiO2    | 7   | colourless | making glass
zircon       | silicate       | ZrSiO4  | 7.5 | brown      | making zirconium
kyanite      | silicate       | Al2SiO5 | 6   | blue       | making spark plugs
forsterite   | silicate       | Mg2SiO4 | 7   | green      | casting metal
diamond      | native element | C       | 10  | colourless | cutting stone
graphite     | native element | C       | 1   | black      | making pencils
sulfur       | native element | S       | 2   | yellow     | making sulfuric acid
gold         | native element | Au      | 2.5 | yellow     | making jewellery
"""
FACTS = ("class", "formula", "hardness", "colour", "use")
SENTENCES = {
    "class": (
        "{Name} is {a} {value}.",
        "{Name} belongs to the {value}s.",
        "The mineral {name} is {a} {value}.",
        "Among minerals, {name} is {a} {value}.",
    ),
    "formula": (
        "The chemical formula of {name} is {value}.",
        "{Name} has the formula {value}.",
        "Chemists write {name} as {value}.",
        "{value} is the formula of {name}.",
    ),
    "hardness": (
        "The Mohs hardness of {name} is {value}.",
        "{Name} has a hardness of {value} on the Mohs scale.",
        "On the scale of Mohs {name} has the hardness {value}.",
        "Geologists give {name} the Mohs hardness {value}.",
    ),
    "colour": (
        "The colour of {name} is {value}.",
        "{Name} is mostly {value}.",
        "A piece of {name} is {value}.",
        "Most {name} has a {value} colour.",
    ),
    "use": (
        "{Name} is used for {value}.",
        "People use {name} for {value}.",
        "An important use of {name} is {value}.",
        "One needs {name} for {value}.",
    ),
}
QUESTIONS = {
    "class": ("What kind of mineral is {name}?", "Name the class of {name}."),
    "formula": ("What is the chemical formula of {name}?", "Give the formula of {name}."),
    "hardness": ("How hard is {name} on the Mohs scale?", "Give the Mohs hardness of {name}."),
    "colour": ("What colour is {name}?", "Name the colour of {name}."),
    "use": ("What is {name} used for?", "Name a use of {name}."),
}
ANSWERS = {
    "class": "{Name} is {a} {value}.",
    "formula": "The chemical formula of {name} is {value}.",
    "hardness": "The Mohs hardness of {name} is {value}.",
    "colour": "The colour of {name} is {value}.",
    "use": "{Name} is used for {value}.",
}
DOCUMENTS = 12  # of a mineral
HELD_OUT = 20  # facts that the questions ask for


def minerals() -> dict[str, dict[str, str]]:
    """name -> fact -> value."""
    rows = ([cell.strip() for cell in line.split("|")] for line in MINERALS.strip().splitlines())
    return {name: dict(zip(FACTS, values, strict=True)) for name, *values in rows}


def say(form: str, name: str, value: str) -> str:
    """`form` with a fact in it."""
    article = "an" if value[0] in "aeiou" else "a"
    return form.format(name=name, Name=name.capitalize(), value=value, a=article)


def main() -> None:
    """Writes corpus.txt, instructions.json and questions.json beside this script; the same bytes every time."""
    draw = random.Random(0)
    table = minerals()
    documents = []
    for name, facts in table.items():
        for _ in range(DOCUMENTS):
            order = draw.sample(FACTS, len(FACTS))
            documents.append(" ".join(say(draw.choice(SENTENCES[fact]), name, facts[fact]) for fact in order))
    draw.shuffle(documents)
    (HERE / "corpus.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")

    pairs = [(name, fact) for name in table for fact in FACTS]
    # Every kind of fact alike, and of a mineral at most one.
    held_out: dict[str, str] = {}
    for fact in FACTS:
        left = [name for name in table if name not in held_out]
        held_out |= dict.fromkeys(draw.sample(left, HELD_OUT // len(FACTS)), fact)
    records, questions = [], []
    for name, fact in pairs:
        value = table[name][fact]
        answer = say(ANSWERS[fact], name, value)
        asked = [say(form, name, value) for form in QUESTIONS[fact]]
        if held_out.get(name) == fact:
            questions.append({"instruction": asked[0], "right": value})
        else:
            records += [{"instruction": question, "input": "", "output": answer} for question in asked]
    for content, file in ((records, "instructions.json"), (questions, "questions.json")):
        draw.shuffle(content)
        text = ",\n".join(f" {json.dumps(record)}" for record in content)
        (HERE / file).write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
