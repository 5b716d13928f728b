"""LPM-24's figures (ACL L+M 2024 shared task): captions of molecules, and molecules for captions.

They use the packages of the task's own scripts: corpus BLEU of NLTK, ROUGE of `rouge-score`, RDKit's fingerprints. Two
details differ, and the report says so: captions are cut into words and signs, not by SciBERT's tokenizer, unless a
Hugging Face tokenizer is named; METEOR needs WordNet's data and FCD a network of its own, and neither is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxlm.errors import UserError

Metrics = dict[str, float]
WORDS = re.compile(r"\w+|[^\w\s]")
_ORDERS = {"bleu_2": (0.5, 0.5), "bleu_4": (0.25, 0.25, 0.25, 0.25)}


@contextmanager
def _needs_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"these figures need {error.name}: pip install 'jaxlm[science]'") from None


@dataclass(frozen=True)
class Pair:
    """A right answer, and a model's answer."""

    reference: str
    prediction: str


def word_tokens(text: str) -> list[str]:
    """Words and signs, in small letters (SciBERT's vocabulary is uncased too)."""
    return WORDS.findall(text.lower())


def hf_tokens(path: str) -> Callable[[str], list[str]]:
    """The pieces of a Hugging Face tokenizer, at most 512 as in the task's script.

    Raises:
        UserError: when `path` has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"metric_tokenizer: {path} holds no Hugging Face tokenizer ({error})") from None
    return lambda text: list(tokenizer.tokenize(text, truncation=True, max_length=512, padding=False))


def caption_metrics(pairs: Sequence[Pair], tokens: Callable[[str], list[str]] = word_tokens) -> Metrics:
    """Corpus BLEU-2 and BLEU-4 over `tokens`; mean F of ROUGE-1, ROUGE-2 and ROUGE-L; share of equal texts."""
    with _needs_extra():
        from nltk.translate.bleu_score import corpus_bleu
        from rouge_score.rouge_scorer import RougeScorer

    references = [[tokens(pair.reference)] for pair in pairs]
    predictions = [tokens(pair.prediction) for pair in pairs]
    result = {name: _bleu(corpus_bleu, references, predictions, weights) for name, weights in _ORDERS.items()}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(pair.reference, pair.prediction) for pair in pairs]
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        result[name] = _mean([score[key].fmeasure for score in scores])
    result["exact"] = _mean([pair.reference.strip() == pair.prediction.strip() for pair in pairs])
    return result


def molecule_metrics(pairs: Sequence[Pair], morgan_radius: int = 2) -> Metrics:
    """Figures of molecules written as SMILES.

    bleu: corpus BLEU-4 over characters. exact: equal InChI. levenshtein: mean edit distance of the texts. validity:
    share that RDKit can read. maccs, rdk, morgan: mean Tanimoto similarity of fingerprints, 0 for an invalid answer.
    unique: share of different molecules among the valid answers.

    Raises:
        UserError: when a reference is not a molecule.
    """
    with _needs_extra():
        from nltk.translate.bleu_score import corpus_bleu
        from rapidfuzz.distance import Levenshtein
        from rdkit import Chem, DataStructs, RDLogger
        from rdkit.Chem import MACCSkeys, rdFingerprintGenerator

    logger: Any = RDLogger
    logger.DisableLog("rdApp.*")  # otherwise it prints a line for every answer that is not a molecule
    keys: Any = MACCSkeys
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=morgan_radius)
    kinds: dict[str, Callable[[Any], Any]] = {
        "maccs": keys.GenMACCSKeys,
        "rdk": Chem.RDKFingerprint,
        "morgan": morgan.GetSparseCountFingerprint,
    }
    sums = dict.fromkeys(("exact", "validity", *kinds), 0.0)
    molecules = set()
    for pair in pairs:
        reference, answer = Chem.MolFromSmiles(pair.reference), Chem.MolFromSmiles(pair.prediction)
        if reference is None or not pair.reference:
            raise UserError(
                f"the reference {pair.reference!r} is not a SMILES that RDKit can read; correct or remove it"
            )
        if answer is None or not pair.prediction:
            continue
        sums["validity"] += 1
        sums["exact"] += Chem.MolToInchi(reference) == Chem.MolToInchi(answer)
        molecules.add(Chem.MolToSmiles(answer))
        for name, fingerprint in kinds.items():
            sums[name] += DataStructs.TanimotoSimilarity(fingerprint(reference), fingerprint(answer))
    result = {name: value / len(pairs) for name, value in sums.items()}
    letters = [[list(pair.reference)] for pair in pairs], [list(pair.prediction) for pair in pairs]
    result["bleu"] = _bleu(corpus_bleu, *letters, _ORDERS["bleu_4"])
    result["levenshtein"] = _mean([Levenshtein.distance(pair.reference, pair.prediction) for pair in pairs])
    result["unique"] = len(molecules) / sums["validity"] if sums["validity"] else 0.0
    return result


def _bleu(corpus_bleu: Any, references: Any, predictions: Any, weights: Sequence[float]) -> float:
    import warnings

    # Short texts have n-grams that never match; NLTK warns of each.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\nThe hypothesis contains 0 counts")
        return float(corpus_bleu(references, predictions, weights=weights))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
