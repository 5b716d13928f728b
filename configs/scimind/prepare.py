"""Molecules with captions, in the form of LPM-24's records: python configs/scimind/prepare.py SMILES.txt OUT [--test N]

Reads a SMILES a line, and writes OUT/train.json and OUT/test.json: lists of {"molecule": SMILES, "caption": text}. The
captions say what RDKit computes: formula, weight, rings, groups. Without SMILES.txt (`--made`) it puts molecules
together from chains, rings and groups; so the files beside this script were made:

    python configs/scimind/prepare.py --made configs/scimind --test 60

Needs RDKit: pip install 'jaxlm[science]'
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

try:
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Descriptors, rdMolDescriptors
except ModuleNotFoundError:
    sys.exit("prepare.py needs RDKit: pip install 'jaxlm[science]'")

# SMARTS of what captions name, in the order in which they do.
GROUPS = {
    "a carboxylic acid": "[CX3](=O)[OX2H]",
    "an ester": "[CX3](=O)[OX2][CX4,c]",
    "an amide": "[CX3](=O)[NX3]",
    "an aldehyde": "[CX3H1](=O)[#6]",
    "a ketone": "[#6][CX3](=O)[#6]",
    "an alcohol": "[CX4][OX2H]",
    "a phenol": "c[OX2H]",
    "an ether": "[CX4,c][OX2][CX4,c]",
    "an amine": "[NX3;H2,H1,H0;!$(N-C=O);!$(N~[#8])]([#6])",
    "a nitrile": "[CX2]#[NX1]",
    "a nitro group": "[$([NX3](=O)=O),$([NX3+](=O)[O-])]",
    "a thiol": "[#6][SX2H]",
    "a sulfide": "[#6][SX2][#6]",
    "a phosphate": "[PX4](=O)([OX2,OX1-])[OX2,OX1-]",
    "a halogen": "[F,Cl,Br,I]",
}
PATTERNS = {name: Chem.MolFromSmarts(smarts) for name, smarts in GROUPS.items()}
COUNTS = ("no ring", "one ring", "two rings", "three rings", "four rings", "five rings", "six rings")

CORES = [
    *("C" * n + "{a}" for n in range(1, 9)),
    *("C({b})" + "C" * n + "{a}" for n in range(0, 8)),
    *("CC({b})" + "C" * n + "{a}" for n in range(1, 6)),
    *("c1ccc({b})cc1{a}", "c1cc({b})ccc1{a}", "c1c({b})cccc1{a}", "n1ccc({b})cc1{a}", "c1cnc({b})cc1{a}"),
    *(
        "C1CCC({b})CC1{a}",
        "C1CC({b})CC1{a}",
        "O1CCC({b})C1{a}",
        "N1CCC({b})CC1{a}",
        "c1cc({b})sc1{a}",
        "c1cc({b})oc1{a}",
    ),
    *("c1ccc2cc({b})ccc2c1{a}", "c1ccc(C{b})cc1{a}", "c1ccc(CC{b})cc1{a}", "c1ccc(-c2ccc({b})cc2)cc1{a}"),
]
ENDS = (
    *("C", "O", "N", "F", "Cl", "Br", "S", "OC", "SC", "C(=O)O", "C(=O)OC", "C(=O)N", "C(=O)C", "C=O", "C#N", "NC"),
    *("N(C)C", "C(F)(F)F", "C(C)C", "[N+](=O)[O-]"),
)


def caption(molecule: Chem.Mol) -> str:
    """What RDKit knows of a molecule, in a few sentences."""
    rings = rdMolDescriptors.CalcNumRings(molecule)
    aromatic = rdMolDescriptors.CalcNumAromaticRings(molecule)
    ring_text = COUNTS[rings] if rings < len(COUNTS) else f"{rings} rings"
    if aromatic:
        ring_text += f", {'aromatic' if aromatic == rings else f'{aromatic} of them aromatic'}"
    found = [name for name, pattern in PATTERNS.items() if molecule.HasSubstructMatch(pattern)]
    groups = f" It is or has {', '.join(found)}." if found else ""
    return (
        f"The molecule has the formula {rdMolDescriptors.CalcMolFormula(molecule)} and a weight of "
        f"{Descriptors.MolWt(molecule):.1f} g/mol. It has {ring_text}.{groups}"
    )


def made() -> list[str]:
    """Molecules put together from CORES and ENDS, each once, in canonical form."""
    found = []
    for core, a, b in itertools.product(CORES, ENDS, ENDS):
        if "{b}" in core or b == ENDS[0]:
            found.append(Chem.MolToSmiles(Chem.MolFromSmiles(core.format(a=a, b=b))))
    return sorted(set(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("smiles", nargs="?", type=Path, help="a SMILES a line")
    parser.add_argument("out", type=Path, help="directory for train.json and test.json")
    parser.add_argument("--made", action="store_true", help="put 900 molecules together instead of reading a file")
    parser.add_argument("--test", type=int, default=100, help="molecules held out (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the split (default: 0)")
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    if options.made is (options.smiles is not None):
        parser.error("give either a file of SMILES or --made")
    shuffled = random.Random(options.seed)
    if options.made:
        smiles = made()
        shuffled.shuffle(smiles)
        smiles = smiles[:900]
    else:
        smiles = list(dict.fromkeys(options.smiles.read_text(encoding="utf-8").split()))
        shuffled.shuffle(smiles)
    records, bad = [], 0
    for each in smiles:
        molecule = Chem.MolFromSmiles(each)
        if molecule is None:
            bad += 1
        else:
            records.append({"molecule": each, "caption": caption(molecule)})
    if len(records) <= options.test:
        parser.error(f"--test {options.test}: there are only {len(records)} molecules")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", records[: options.test]), ("train", records[options.test :])):
        text = ",\n".join(json.dumps(record) for record in part)
        (options.out / f"{name}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    left_out = f"; {bad} lines are no SMILES that RDKit takes" if bad else ""
    print(
        f"{len(records) - options.test} records in {options.out / 'train.json'}, {options.test} in test.json{left_out}"
    )


if __name__ == "__main__":
    main()
