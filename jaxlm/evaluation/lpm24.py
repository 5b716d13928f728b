"""LPM-24's figures (ACL L+M 2024 shared task): captions of molecules, and molecules for captions.

They use the packages of the task's own scripts: corpus BLEU of NLTK, ROUGE of `rouge-score`, RDKit's fingerprints. Two
details differ, and the report says so: captions are cut into words and signs, not by SciBERT's tokenizer, unless a
Hugging Face tokenizer is named; METEOR, which needs WordNet's data, FCD, which needs a network of its own, and
properties, which need LPM-24's hierarchy of them, belong to the tasks `lpm24_captions` and `lpm24_molecules`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import molecules, text

Metrics = dict[str, float]
WORDS = re.compile(r"\w+|[^\w\s]")
ORDERS = {"bleu_2": (0.5, 0.5), "bleu_4": (0.25, 0.25, 0.25, 0.25)}


@dataclass(frozen=True)
class Pair:
    """A right answer, and a model's answer."""

    reference: str
    prediction: str


def word_tokens(caption: str) -> list[str]:
    """Words and signs, in small letters (SciBERT's vocabulary is uncased too)."""
    return WORDS.findall(caption.lower())


@functools.lru_cache(maxsize=4)  # figures of resamples ask for it again and again
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

    @functools.lru_cache(maxsize=65536)
    def pieces(caption: str) -> tuple[str, ...]:
        return tuple(tokenizer.tokenize(caption, truncation=True, max_length=512, padding=False))

    return lambda caption: list(pieces(caption))


def caption_metrics(pairs: Sequence[Pair], tokens: Callable[[str], list[str]] = word_tokens) -> Metrics:
    """Corpus BLEU-2 and BLEU-4 over `tokens`; mean F of ROUGE-1, ROUGE-2 and ROUGE-L; share of equal texts."""
    references = [tokens(pair.reference) for pair in pairs]
    predictions = [tokens(pair.prediction) for pair in pairs]
    result = {name: text.corpus_bleu(references, predictions, weights) for name, weights in ORDERS.items()}
    scores = [text.rouge(pair.reference, pair.prediction) for pair in pairs]
    result |= {name: _mean([score[name] for score in scores]) for name in text.ROUGE}
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
    likenesses = [molecules.compare(pair.reference, pair.prediction, morgan_radius) for pair in pairs]
    names = ("exact", "validity", *molecules.SIMILARITIES)
    result = {name: _mean([getattr(likeness, name) for likeness in likenesses]) for name in names}
    letters = [list(pair.reference) for pair in pairs], [list(pair.prediction) for pair in pairs]
    result["bleu"] = text.corpus_bleu(*letters, ORDERS["bleu_4"])
    result["levenshtein"] = _mean([likeness.levenshtein for likeness in likenesses])
    different = {likeness.canonical for likeness in likenesses} - {None}
    valid = sum(likeness.validity for likeness in likenesses)
    result["unique"] = len(different) / valid if valid else 0.0
    return result


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
