"""Packing by lengths: every document once, no row too full, the number of rows known before, others each epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import patterns
from jaxlm.data.packing import Plan, first_fit, written_out
from jaxlm.data.patterns import best_fit, num_rows, pack


def packed(lengths: list[int], capacity: int, seed: int = 0, documents: list[int] | None = None) -> Plan:
    array = np.array(lengths, np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chosen = np.arange(len(lengths)) if documents is None else np.array(documents)
    plan = written_out(pack(chosen.astype(np.int32), array, offsets, capacity, np.random.default_rng(seed)))
    assert set(plan.starts.tolist()) <= set(offsets[:-1].tolist())
    return plan


def rows_of(plan: Plan) -> list[list[int]]:
    """The starts of the documents of each row."""
    return [plan.starts[begin:end].tolist() for begin, end in zip(plan.rows[:-1], plan.rows[1:], strict=True)]


def best_fit_of_textbooks(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing, document by document; the fill of each row."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda row: fills[row])] += length
        else:
            fills.append(length)
    return sorted(fills)


@given(st.lists(st.integers(1, 40), max_size=120))
def test_many_rows_at_a_time_are_the_rows_of_best_fit_decreasing(lengths: list[int]) -> None:
    found = best_fit(np.bincount(lengths, minlength=1), 40)
    fills = [sum(length * count for length, count in row.members) for row in found for _ in range(row.rows)]
    assert sorted(fills) == best_fit_of_textbooks(lengths, 40)


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=400), st.integers(0, 5))
def test_each_document_is_in_one_row_and_no_row_is_too_full(lengths: list[int], seed: int) -> None:
    plan = packed(lengths, 60, seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    assert sorted(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)) == sorted(
        zip(offsets[:-1].tolist(), lengths, strict=True)
    )
    assert len(plan) == num_rows(np.bincount(lengths), 60)
    fills = np.add.reduceat(plan.lengths, plan.rows[:-1])
    assert (np.diff(plan.rows) > 0).all() and fills.max() <= 60


@pytest.mark.parametrize("small", [0, 10**6], ids=["many", "few"])
def test_rows_differ_by_epoch_and_their_number_does_not(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SMALL", small)
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.9, 3000), 2, 512).astype(int).tolist()
    plans = [packed(lengths, 512, seed) for seed in (1, 1, 2, 3)]
    assert rows_of(plans[0]) == rows_of(plans[1]) != rows_of(plans[2])
    assert len({len(plan) for plan in plans}) == 1
    together = [{frozenset(row) for row in rows_of(plan) if len(row) > 1} for plan in plans[1:]]
    assert len(together[0] & together[1]) < 0.1 * len(together[0]), "the same documents again and again"


def test_few_documents_of_different_lengths_change_partners() -> None:
    """By lengths alone, each would be beside the same others in every epoch."""
    lengths = np.random.default_rng(0).permutation(np.arange(20, 520)).tolist()
    epochs = [{frozenset(row) for row in rows_of(packed(lengths, 1024, seed))} for seed in range(4)]
    best = {frozenset(length for length, _ in row.members) for row in best_fit(np.bincount(lengths), 1024)}
    assert len(best) > 100
    for one, two in itertools.pairwise(epochs):
        assert len(one & two) < 0.5 * len(one)


@pytest.mark.parametrize("capacity", [512, 2048])
@pytest.mark.parametrize("scale", [4.5, 6.5])
def test_less_is_left_empty_than_by_first_fit(capacity: int, scale: float) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(scale, 1.0, 4000), 2, capacity).astype(int).tolist()
    plan = packed(lengths, capacity)
    assert plan.padding(capacity) < 0.03 and len(plan) <= 1.0025 * len(first_fit(lengths, capacity))


def test_one_row_may_be_torn_into_many() -> None:
    """4,000 full rows may become ten more, but only one of them has documents to give."""
    lengths = [8] * 3999 + [1] * 8
    assert len(packed(lengths, 8)) == num_rows(np.bincount(lengths), 8) == 4007


def test_documents_may_come_several_times_or_not_at_all() -> None:
    plan = packed([3, 4, 5], 7, documents=[0, 0, 2])
    assert sorted(plan.starts.tolist()) == [0, 0, 7]
    assert packed([3, 4], 7, documents=[]).rows.tolist() == [0]
