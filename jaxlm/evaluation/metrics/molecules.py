"""Molecules that were given, against those that were asked for, by RDKit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.text import needs_extra

SIMILARITIES = ("maccs", "rdk", "morgan")


class Likeness(NamedTuple):
    """How alike two molecules are.

    Args:
        exact: 1 for the same InChI, else 0.
        validity: 1 for an answer that RDKit can read, else 0.
        levenshtein: edit distance of the texts.
        maccs, rdk, morgan: Tanimoto similarity of fingerprints; 0 for an answer that is not a molecule.
        canonical: RDKit's SMILES of the answer; None for one that is not a molecule.
    """

    exact: float
    validity: float
    levenshtein: float
    maccs: float
    rdk: float
    morgan: float
    canonical: str | None


@cache
def _rdkit() -> Any:
    with needs_extra():
        from rdkit import Chem, RDLogger
    logger: Any = RDLogger
    logger.DisableLog("rdApp.*")  # otherwise it prints a line for every answer that is not a molecule
    return Chem


@cache
def _fingerprints(morgan_radius: int) -> dict[str, Callable[[Any], Any]]:
    chem = _rdkit()
    from rdkit.Chem import MACCSkeys, rdFingerprintGenerator

    keys: Any = MACCSkeys
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=morgan_radius)
    return {
        "maccs": keys.GenMACCSKeys,
        "rdk": chem.RDKFingerprint,
        "morgan": morgan.GetSparseCountFingerprint,
    }


def read_smiles(smiles: str) -> Any | None:
    """RDKit's molecule; None for a text that is none, e.g. an empty one."""
    return _rdkit().MolFromSmiles(smiles) if smiles else None


def canonical(smiles: str, with_stereo: bool = True) -> str | None:
    """RDKit's own SMILES; None for a text that is not a molecule."""
    molecule = read_smiles(smiles)
    return None if molecule is None else str(_rdkit().MolToSmiles(molecule, isomericSmiles=with_stereo))


def from_selfies(text: str) -> str | None:
    """SMILES of a SELFIES string; None for a text that is none."""
    with needs_extra():
        import selfies
    try:
        smiles = selfies.decoder(text)
    except selfies.DecoderError:
        return None
    return str(smiles) or None


@lru_cache(maxsize=65536)  # resamples of records compare the same molecules again and again
def compare(reference: str, answer: str, morgan_radius: int = 2) -> Likeness:
    """Compares two SMILES.

    Raises:
        UserError: when the reference is not a molecule.
    """
    chem = _rdkit()
    from rapidfuzz.distance import Levenshtein
    from rdkit import DataStructs

    wanted, given = read_smiles(reference), read_smiles(answer)
    if wanted is None:
        raise UserError(f"the reference {reference!r} is not a SMILES that RDKit can read; correct or remove it")
    distance = float(Levenshtein.distance(reference, answer))
    if given is None:
        return Likeness(0.0, 0.0, distance, 0.0, 0.0, 0.0, None)
    exact = float(chem.MolToInchi(wanted) == chem.MolToInchi(given))
    alike = {
        name: float(DataStructs.TanimotoSimilarity(fingerprint(wanted), fingerprint(given)))
        for name, fingerprint in _fingerprints(morgan_radius).items()
    }
    return Likeness(exact, 1.0, distance, **alike, canonical=str(chem.MolToSmiles(given)))


def frechet_distance(references: Sequence[str], answers: Sequence[str]) -> float:
    """Fréchet ChemNet distance of two sets of molecules, by the package `fcd`, which brings its network along.

    Args:
        references, answers: SMILES that RDKit can read, at least two of each.
    """
    try:
        import fcd
    except ModuleNotFoundError as error:
        raise UserError(f"options.fcd: needs the package {error.name}: pip install fcd, or leave it out") from None
    return float(fcd.get_fcd(list(references), list(answers)))
