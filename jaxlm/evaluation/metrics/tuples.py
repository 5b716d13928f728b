"""Tuples that were found, against those that are right: micro precision, recall and F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Counts(NamedTuple):
    """Tuples that are right, that were given, and that there are."""

    right: int = 0
    given: int = 0
    wanted: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sums: figures of many records are formed from the sums (micro)."""
        return Counts(self.right + other.right, self.given + other.given, self.wanted + other.wanted)


def count(wanted: Iterable[Hashable], given: Iterable[Hashable], as_sets: bool) -> Counts:
    """Compares tuples: as multisets, in which every right one is found once at most, or as sets."""
    right, found = Counter(wanted), Counter(given)
    if as_sets:
        right, found = Counter(right.keys()), Counter(found.keys())
    return Counts((right & found).total(), found.total(), right.total())


def precision_recall_f1(counts: Counts) -> tuple[float, float, float]:
    """Precision, recall and their harmonic mean; 0 where nothing was given, or nothing is there."""
    precision = counts.right / counts.given if counts.given else 0.0
    recall = counts.right / counts.wanted if counts.wanted else 0.0
    total = counts.given + counts.wanted
    return precision, recall, 2 * counts.right / total if counts.right else 0.0


def rounded_per_cent(counts: Counts) -> tuple[float, float, float]:
    """The same as `eval_func.py` of DeepKE has it: per cent to two places, and F1 from the rounded two.

    So F1 can differ in its last place from the rounded F1.
    """
    precision = round(counts.right / counts.given * 100, 2) if counts.given else 0.0
    recall = round(counts.right / counts.wanted * 100, 2) if counts.wanted else 0.0
    total = precision + recall
    return precision, recall, round(2 * precision * recall / total, 2) if total else 0.0
