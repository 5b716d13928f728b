"""Likeness of texts, by the packages of the field: ROUGE, BLEU, METEOR. They are imported when they are needed."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


@contextmanager
def needs_extra(extra: str = "science") -> Iterator[None]:
    """Says which extra of jaxlm has a package that is missing.

    Raises:
        UserError: in place of the error of an import inside of it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"these figures need {error.name}: pip install 'jaxlm[{extra}]'") from None


@functools.cache
def _scorer(stemmed: bool) -> Any:
    with needs_extra():
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(list(ROUGE.values()), use_stemmer=stemmed)


@functools.lru_cache(maxsize=65536)  # resamples of records score the same texts again and again
def _rouge(reference: str, prediction: str, stemmed: bool) -> tuple[float, ...]:
    scores = _scorer(stemmed).score(reference, prediction)
    return tuple(float(scores[key].fmeasure) for key in ROUGE.values())


def rouge(reference: str, prediction: str, stemmed: bool = False) -> dict[str, float]:
    """F measures of ROUGE-1, ROUGE-2 and ROUGE-L of `rouge-score`: Latin letters and digits only, in small letters."""
    return dict(zip(ROUGE, _rouge(reference, prediction, stemmed), strict=True))


def corpus_bleu(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], weights: Sequence[float]
) -> float:
    """NLTK's corpus BLEU of tokens, one reference each; `weights` of the orders, e.g. four times 0.25.

    NLTK counts the n-grams of a pair once, however often resamples of records have it.
    """
    with needs_extra():
        from nltk.translate.bleu_score import brevity_penalty
    matches, totals = [0] * len(weights), [0] * len(weights)
    for pair in zip(references, predictions, strict=True):
        for at, (matched, total) in enumerate(_overlaps(*map(tuple, pair), len(weights))):
            matches[at] += matched
            totals[at] += total
    if not matches[0]:
        return 0.0
    # An order without a match counts as the smallest number, as in NLTK's SmoothingFunction.method0.
    precisions = (
        matched / total if matched else sys.float_info.min for matched, total in zip(matches, totals, strict=True)
    )
    mean = math.fsum(weight * math.log(precision) for weight, precision in zip(weights, precisions, strict=True))
    return float(brevity_penalty(sum(map(len, references)), sum(map(len, predictions))) * math.exp(mean))


@functools.lru_cache(maxsize=65536)
def _overlaps(reference: tuple[str, ...], prediction: tuple[str, ...], orders: int) -> tuple[tuple[int, int], ...]:
    """For n-grams of each order those of the prediction that the reference has too, and all of them, at least 1."""
    from nltk.translate.bleu_score import modified_precision

    fractions = [modified_precision([list(reference)], list(prediction), order + 1) for order in range(orders)]
    return tuple((each.numerator, each.denominator) for each in fractions)


def sentence_bleu(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """NLTK's BLEU-4 of one sentence, without smoothing."""
    with needs_extra():
        from nltk.translate.bleu_score import sentence_bleu as bleu
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\nThe hypothesis contains 0 counts")
        return float(bleu([list(reference)], list(prediction)))


def meteor(reference: Sequence[str], prediction: Sequence[str], nltk_data: Path) -> float:
    """NLTK's METEOR of tokens.

    Args:
        reference, prediction: tokens.
        nltk_data: directory with WordNet (`corpora/wordnet` or `corpora/wordnet.zip`), as `nltk.download` makes it.

    Raises:
        UserError: when WordNet is not there.
    """
    return _meteor(tuple(reference), tuple(prediction), nltk_data)


@functools.lru_cache(maxsize=65536)
def _meteor(reference: tuple[str, ...], prediction: tuple[str, ...], nltk_data: Path) -> float:
    return float(_meteor_scorer(nltk_data)([list(reference)], list(prediction)))


@functools.cache
def _meteor_scorer(nltk_data: Path) -> Any:
    with needs_extra():
        import nltk
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
    corpora = nltk_data / "corpora"
    if not (corpora / "wordnet").is_dir() and not (corpora / "wordnet.zip").is_file():
        raise UserError(
            f"options.nltk_data: {nltk_data} has no corpora/wordnet, which METEOR needs; make it where there is a "
            f"network, python -m nltk.downloader -d {nltk_data} wordnet, or leave nltk_data out"
        )
    nltk.data.path.insert(0, str(nltk_data))
    wordnet.ensure_loaded()
    return meteor_score
