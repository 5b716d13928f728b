"""Data for small.sh, made for it: python configs/darwin/prepare.py OUT [--sii 240] [--mdp 800]

Invented solar cells in the shape of Darwin's own records (SII_MDP/data of MasterAI-EAM/Darwin).

- OUT/sii-train.json, sii-test.json: a paragraph about a cell, and the 31 values of it as lines 'KEY: value,'.
- OUT/mdp-train.json, mdp-test.json: the parameters of a cell, and lines for Voc, Jsc, FF and PCE.
- OUT/sii-others.json, mdp-others.json: the right answers to the test, each in the place of another: answers by chance.

The numbers follow from a toy formula, so that there is something to learn; no laboratory measured them:

    band gap   Eg  = 1.57 + 0.39 x + 0.33 x^2 eV      a share x of bromide, as of MAPb(I1-xBrx)3
    Voc        = Eg - 0.52 + contact(ETL) + contact(HTL) V
    Jsc        = 64 - 26 Eg - 4 [substrate is flexible] mA/cm2
    FF         = 0.66 + 0.04 [annealed at 100 C or more] + 0.05 [additive]
    PCE        = Voc Jsc FF %

The test's cells are combinations that no record of the training has. Both tests ask in the words of the training.

    python configs/darwin/prepare.py --close PREDICTIONS.jsonl OUT.json

writes {"share": …}: how many of the answers give a PCE within 5 per cent of the right one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from jaxlm.evaluation.metrics.regression import device_values
from jaxlm.evaluation.metrics.sii import KEYS

BROMIDE = (0, 10, 20, 30, 40, 50)  # per cent
ETL = {"SnO2": 0.02, "TiO2": 0.0, "ZnO": -0.06, "PCBM": -0.03}
HTL = {"Spiro-MeOTAD": 0.03, "PTAA": 0.02, "NiO": -0.02, "PEDOT:PSS": -0.08}
SUBSTRATES = {"SLG | ITO": False, "SLG | FTO": False, "PET | ITO": True}
ADDITIVES = ("Undoped", "MACl", "Pb(SCN)2")
CONTACTS = ("Au", "Ag", "Cu", "Carbon")
SOLVENTS = ("DMF; DMSO", "DMF", "GBL; DMSO")
PROCEDURES = ("Spin-coating", "Blade-coating", "Evaporation")
TEMPERATURES = ("80", "100", "120", "150")
TIMES = ("10", "20", "30", "60")
ATMOSPHERES = ("N2", "Air", "Vacuum")
AREAS = ("0.09", "0.1", "0.16", "1.0")

CLOSE = 0.05

SII = "Summarize stack and method information from given paragraph about solar cell."
MDP = "What's the PCE of the perovskite solar cell with the parameters below."


def perovskite(bromide: int) -> str:
    """The short form of the composition."""
    return {0: "MAPbI"}.get(bromide, "MAPbBrI")


def long_form(bromide: int) -> str:
    share = 3 * bromide / 100
    return "MAPbI3" if bromide == 0 else f"MAPbBr{share:g}I{3 - share:g}"


def cell(draw: random.Random) -> dict[str, Any]:
    """The choices that make a cell."""
    return {
        "bromide": draw.choice(BROMIDE),
        "etl": draw.choice(list(ETL)),
        "htl": draw.choice(list(HTL)),
        "substrate": draw.choice(list(SUBSTRATES)),
        "additive": draw.choice(ADDITIVES),
        "contact": draw.choice(CONTACTS),
        "solvent": draw.choice(SOLVENTS),
        "procedure": draw.choice(PROCEDURES),
        "temperature": draw.choice(TEMPERATURES),
        "time": draw.choice(TIMES),
        "atmosphere": draw.choice(ATMOSPHERES),
        "hours": draw.choice(("100", "250", "500", "1000")),
        "area": draw.choice(AREAS),
        "cells": draw.choice(("2", "4", "6", "8")),
    }


def properties(values: dict[str, Any]) -> tuple[float, float, float, float]:
    """Voc, Jsc, FF and PCE by the toy formula."""
    x = values["bromide"] / 100
    gap = 1.57 + 0.39 * x + 0.33 * x * x
    voc = gap - 0.52 + ETL[values["etl"]] + HTL[values["htl"]]
    jsc = 64 - 26 * gap - 4 * SUBSTRATES[values["substrate"]]
    fill = 0.66 + 0.04 * (int(values["temperature"]) >= 100) + 0.05 * (values["additive"] != "Undoped")
    return voc, jsc, fill, voc * jsc * fill


def mdp(values: dict[str, Any]) -> dict[str, str]:
    """A record of Darwin's regression."""
    given = {
        "Substrate stack sequence": values["substrate"],
        "ETL stack sequence": values["etl"],
        "Perovskite composition long form": long_form(values["bromide"]),
        "Perovskite additives compounds": values["additive"],
        "Perovskite deposition thermal annealing temperature": values["temperature"],
        "HTL stack sequence": values["htl"],
        "Cell flexible": "TRUE" if SUBSTRATES[values["substrate"]] else "FALSE",
    }
    voc, jsc, fill, pce = properties(values)
    numbers = {"Voc": f"{voc:.2f}", "Jsc": f"{jsc:.1f}", "FF": f"{fill:.2f}", "PCE": f"{pce:.1f}"}
    output = " \n".join(f" JV default {name}: {number}" for name, number in numbers.items())
    return {
        "instruction": MDP,
        "input": "\n".join(f"{name}: {value} " for name, value in given.items()).rstrip() + "###",
        "output": output,
    }


def sii(values: dict[str, Any], draw: random.Random) -> dict[str, str]:
    """A paragraph, and its 31 values; what it does not say is 'Unknown'."""
    known = {
        "Substrate_stack_sequence": values["substrate"],
        "ETL_stack_sequence": values["etl"],
        "ETL_deposition_procedure": "Spin-coating",
        "Perovskite_composition_long_form": long_form(values["bromide"]),
        "Perovskite_composition_short_form": perovskite(values["bromide"]),
        "Perovskite_additives_compounds": values["additive"],
        "Perovskite_deposition_solvents": values["solvent"],
        "Perovskite_deposition_procedure": values["procedure"],
        "Perovskite_deposition_thermal_annealing_temperature": values["temperature"],
        "Perovskite_deposition_thermal_annealing_time": values["time"],
        "HTL_stack_sequence": values["htl"],
        "HTL_deposition_procedure": "Spin-coating",
        "Backcontact_stack_sequence": values["contact"],
        "Backcontact_deposition_procedure": "Evaporation",
        "Cell_area_measured": values["area"],
        "Cell_number_of_cells_per_substrate": values["cells"],
        "Cell_architecture": "nip",
        "Cell_flexible": "TRUE" if SUBSTRATES[values["substrate"]] else "FALSE",
        "Cell_semitransparent": "FALSE",
        "Module": "FALSE",
    }
    layers, way = values["substrate"].replace(" | ", "/"), values["procedure"].lower().replace("-", " ")
    added = "" if values["additive"] == "Undoped" else f" with {values['additive']} as an additive"
    solvent = values["solvent"].replace("; ", " and ")
    sentences = [
        draw.choice((f"The cells were built on {layers}.", f"{layers} was cleaned and used as the substrate.")),
        draw.choice((f"A layer of {values['etl']} was spin coated.", f"{values['etl']} was spin coated on it.")),
        f"{known['Perovskite_composition_long_form']}{added} was made from {solvent} by {way} and annealed at "
        f"{values['temperature']} C for {values['time']} min.",
        draw.choice((f"{values['htl']} was spin coated on top.", f"As hole contact {values['htl']} was spin coated.")),
        draw.choice((f"{values['contact']} was evaporated.", f"Contacts of {values['contact']} were evaporated.")),
        f"Each substrate had {values['cells']} cells of {values['area']} cm2.",
    ]
    if draw.random() < 0.5:
        known |= {
            "Stability_measured": "TRUE",
            "Stability_atmosphere": values["atmosphere"],
            "Stability_time_total_exposure": values["hours"],
        }
        sentences.append(f"They were kept in {values['atmosphere']} for {values['hours']} h.")
    else:
        known["Stability_measured"] = "FALSE"
    lines = [f"{key}: {known.get(key, 'Unknown')}" for key in KEYS]
    return {"instruction": SII, "input": " ".join(sentences), "output": ",\n ".join(lines)}


def close(source: Path, destination: Path) -> None:
    """The share of an evaluation's answers whose PCE is near the right one."""
    hits = []
    for line in source.read_text(encoding="utf-8").splitlines():
        prediction = json.loads(line)
        given = (device_values(text).get("PCE") for text in prediction["answers"]["answer"]["texts"])
        right = device_values(prediction["record"]["output"])["PCE"]
        hits.append(any(value is not None and abs(value - right) <= CLOSE * right for value in given))
    destination.write_text(json.dumps({"share": sum(hits) / len(hits), "answers": len(hits)}) + "\n", encoding="utf-8")


def write(path: Path, records: list[Any]) -> None:
    text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory")
    parser.add_argument("--sii", type=int, default=240, help="records to train on (default: 240)")
    parser.add_argument("--mdp", type=int, default=800, help="records to train on (default: 800)")
    parser.add_argument("--test", type=int, default=30, help="records of each test (default: 30)")
    parser.add_argument("--close", type=Path, metavar="PREDICTIONS", help="write the share of close answers to OUT")
    options = parser.parse_args()
    if options.close is not None:
        close(options.close, options.out)
        return
    draw = random.Random(0)
    options.out.mkdir(parents=True, exist_ok=True)
    # A sixth of the combinations of composition, contacts and substrate is the test's.
    parts = list(itertools.product(BROMIDE, ETL, HTL, SUBSTRATES))
    held_out = set(draw.sample(parts, len(parts) // 6))

    def some(number: int, is_test: bool) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = []
        while len(cells) < number:
            values = cell(draw)
            if (tuple(values[key] for key in ("bromide", "etl", "htl", "substrate")) in held_out) == is_test:
                cells.append(values)
        return cells

    for name, number in (("sii", options.sii), ("mdp", options.mdp)):
        for part, count in (("train", number), ("test", options.test)):
            cells = some(count, part == "test")
            records = [sii(values, draw) if name == "sii" else mdp(values) for values in cells]
            write(options.out / f"{name}-{part}.json", records)
            if part == "test":
                outputs = [record["output"] for record in records]
                write(options.out / f"{name}-others.json", [*outputs[1:], outputs[0]])


if __name__ == "__main__":
    main()
