"""BERTScore (arXiv:1904.09675) by the package `bert-score`: without idf weights and rescaling, its defaults."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.text import needs_extra
from jaxlm.jsontext import read_object

Scores = tuple[float, float, float]


@functools.cache
def bert_scorer(path: str, layer: int) -> Callable[[str, str], Scores]:
    """(reference, prediction) -> precision, recall, F1.

    Args:
        path: a Hugging Face directory with an encoder (BERT, RoBERTa, …) and its tokenizer.
        layer: whose states are compared; the package takes 17 of roberta-large, 10 of roberta-base, 9 of
            bert-base-uncased.

    Raises:
        UserError: there is no such model, it has fewer layers, or the package is not installed.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise UserError(f"bert_model: {path}: expected a Hugging Face directory of an encoder, with its tokenizer")
    layers = read_object(config).get("num_hidden_layers", 0)
    if not 1 <= layer <= layers:
        raise UserError(f"bert_layer: {layer}: {path} has {layers} layers")
    with needs_extra("bert"):
        from bert_score import BERTScorer
    scorer = BERTScorer(model_type=path, num_layers=layer, device="cpu")

    @functools.lru_cache(maxsize=65536)  # resamples of records score the same texts again and again
    def score(reference: str, prediction: str) -> Scores:
        precision, recall, f1 = (float(value[0]) for value in scorer.score([prediction], [reference]))
        return precision, recall, f1

    return score
