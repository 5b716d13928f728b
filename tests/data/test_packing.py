"""first_fit, group_texts against HF's own rule, padding waste."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data import packing
from jaxlm.data.loader import build_data
from jaxlm.data.packing import WINDOW, Plan, first_fit, group_texts, group_texts_rows, plan_rows
from jaxlm.tokenizer import Tokenizer


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int64)


def rows_of(plan: Plan) -> list[list[int]]:
    """The token numbers of each row."""
    result = []
    for begin, end in zip(plan.rows[:-1], plan.rows[1:], strict=True):
        pieces = zip(plan.starts[begin:end].tolist(), plan.lengths[begin:end].tolist(), strict=True)
        result.append([token for start, length in pieces for token in range(start, start + length)])
    return result


def hf_group_texts(documents: list[list[int]], block: int) -> list[list[int]]:
    """run_clm's group_texts under datasets.map(batched=True) with its batch size of 1000."""
    rows: list[list[int]] = []
    for first in range(0, len(documents), 1000):
        joined = [token for document in documents[first : first + 1000] for token in document]
        total = len(joined)
        if total >= block:
            total = (total // block) * block
        rows += [joined[i : i + block] for i in range(0, total, block)]
    return rows


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("block", [7, 64, 3000])
def test_group_texts_makes_the_rows_of_run_clm(count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SLAB", 1000)  # two and a half slabs at most
    lengths = np.random.default_rng(count).integers(0, 9, count).tolist()
    offsets = offsets_of(lengths)
    documents = [list(range(offsets[i], offsets[i + 1])) for i in range(count)]
    expected = hf_group_texts(documents, block)
    plan = group_texts(offsets, np.arange(count), block)
    assert rows_of(plan) == expected
    assert group_texts_rows(np.array(lengths), block) == len(expected)
    shuffled = plan_rows("group_texts", offsets, np.arange(count), block, seed=1, epoch=2)
    assert sorted(rows_of(shuffled)) == sorted(expected)
    assert len(expected) < 5 or rows_of(shuffled) != expected


def test_group_texts_drops_the_remainder_of_every_thousand() -> None:
    plan = group_texts(offsets_of([3] * 1001), np.arange(1001), 16)
    assert len(plan) == 3000 // 16 + 1
    assert plan.lengths[plan.rows[-2] :].tolist() == [3]  # 3 tokens in all of the last batch: kept as a short row
    assert plan.tokens == 3000 // 16 * 16 + 3


def test_group_texts_repeats_documents() -> None:
    plan = group_texts(offsets_of([2, 3]), np.array([0, 0, 1]), 3)
    assert rows_of(plan) == [[0, 1, 0], [1, 2, 3]]


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(1, 8))
def test_first_fit_loses_nothing_and_overfills_no_row(lengths: list[int], window: int) -> None:
    rows = first_fit(lengths, 50, window)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 for row in rows)


def test_first_fit_takes_the_first_row_with_room() -> None:
    assert first_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert first_fit([7, 6, 5, 3], 10) == [[0, 3], [1], [2]]
    assert first_fit([7, 6, 5, 3], 10, window=2) == [[0], [1, 3], [2]]  # the fullest was closed for the third row


@pytest.mark.parametrize("mode", ["first_fit", "none"])
def test_plans_hold_each_record_once(mode: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    offsets = offsets_of(lengths)
    plans = [
        plan_rows(mode, offsets, np.arange(200), 64, seed, epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    for plan in plans:
        assert sorted(t for row in rows_of(plan) for t in row) == list(range(sum(lengths)))
        assert set(plan.starts.tolist()) == set(offsets[:-1].tolist())
    assert rows_of(plans[0]) == rows_of(plans[1])
    assert rows_of(plans[0]) != rows_of(plans[2]) != rows_of(plans[3])
    if mode == "none":
        assert len(plans[0]) == 200


class Counted(int):
    """A length that counts how often room is looked for it."""

    looks = 0

    def __le__(self, room: int) -> bool:  # `room >= length` asks the length first
        Counted.looks += 1
        return int(self) <= int(room)


def test_first_fit_is_linear_and_tight() -> None:
    """No item is tried against more rows than are kept open, however many there are."""
    most = []
    for count in (5_000, 20_000):
        lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, count), 2, 2048).astype(int).tolist()
        Counted.looks = 0
        rows = first_fit([Counted(length) for length in lengths], 2048)
        most.append(Counted.looks / count)
        assert sum(lengths) / (len(rows) * 2048) > 0.98
        assert rows == first_fit(lengths, 2048)
    assert 1 < most[0] <= WINDOW and most[1] < 1.1 * most[0], most


def test_little_padding_is_left_on_real_records(llama: Tokenizer, samples: Path) -> None:
    source = SourceConfig(path=str(samples / "alpaca_schema_175.json"))

    def waste(sequence_length: int, repeats: float) -> tuple[int, float]:
        sources = (SourceConfig(path=source.path, weight=repeats),)
        data = build_data(
            DataConfig(train=sources, sequence_length=sequence_length),
            llama,
            seed=1,
            vocab_size=32000,
            max_positions=4096,
        )
        plan = data.train_rows(0)
        return len(plan) - math.ceil(plan.tokens / sequence_length), plan.padding(sequence_length)

    # One pass is 15.09 rows of tokens: 16 rows are the fewest possible, although that leaves 5.7 % empty.
    assert waste(2048, 1)[0] == 0
    extra, padding = waste(2048, 8)
    assert extra <= 3 and padding < 0.03
