"""Sources in shares: per batch as KnowLM mixes them, by sizes, by tokens, with limits; what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, MixingConfig, RunConfig, SourceConfig, TrainConfig
from jaxlm.config.ranges import check_ranges
from jaxlm.data.batches import SOURCE_TOKENS
from jaxlm.data.examples import Examples
from jaxlm.data.loader import Data
from jaxlm.data.mixing import source_weights, table
from jaxlm.data.report import Report
from jaxlm.errors import UserError

LENGTH = 16


def data_of(sizes: tuple[int, ...], lengths: Any = None, **config: Any) -> Data:
    """Sources of documents whose tokens all are the document's number; the first document is 1."""
    counts = np.full(sum(sizes), LENGTH) if lengths is None else np.array(lengths)
    ids = np.repeat(np.arange(1, len(counts) + 1, dtype=np.int32), counts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    source = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    examples = Examples(ids, np.ones(len(ids), np.bool_), offsets, source, np.arange(len(counts)))
    sources = config.pop("train", tuple(SourceConfig(path=f"{name}.json") for name in "abcd"[: len(sizes)]))
    settings = DataConfig(train=sources, sequence_length=LENGTH, **{"packing": False, **config})
    return Data(settings, 1, examples, None, Report((), ()), "")


def documents(batch: Any) -> list[int]:
    """The first document of every row of a batch."""
    return batch["input_ids"][..., 0].reshape(-1).tolist()


# KnowLM's preview/dataloader.py run with sizes [7, 5], [2, 2] of each in a batch: batches of an epoch by drop_mode.
KNOWLM = {("shortest", "drop"): 2, ("shortest", "fill"): 3, ("longest", "drop"): 3, ("longest", "fill"): 4}


@pytest.mark.parametrize(("epoch", "last_rows"), KNOWLM)
def test_an_epoch_has_as_many_steps_as_in_knowlm(epoch: Any, last_rows: Any) -> None:
    data = data_of((7, 5), mixing=MixingConfig(per_batch=(2, 2), epoch=epoch, last_rows=last_rows))
    batches = data.train_batches(4)
    assert len(batches) == KNOWLM[epoch, last_rows]
    assert len(data.train_batches(4, epochs=2.5)) == math.ceil(2.5 * len(batches))
    for step in range(len(batches)):
        assert sum(document <= 7 for document in documents(batches[step])) == 2
    assert batches.order.epoch(len(batches)) == 1.0


@pytest.mark.parametrize("last_rows", ["fill", "drop"])
def test_all_rows_of_a_source_come_before_any_comes_again(last_rows: Any) -> None:
    data = data_of((23, 5), mixing=MixingConfig(per_batch=(4, 2), last_rows=last_rows))
    batches = data.train_batches(6, steps=60)
    for number, (share, size) in enumerate(((4, 23), (2, 5))):
        first = 24 * number
        seen = [d for step in range(60) for d in documents(batches[step]) if (d > 23) == bool(number)]
        assert len(seen) == 60 * share
        used = size if last_rows == "fill" else size // share * share
        passes = [seen[at : at + used] for at in range(0, len(seen) - used, used)]
        assert all(len(set(rows)) == used for rows in passes)
        assert len({tuple(rows) for rows in passes}) > 0.7 * len(passes), "each pass is shuffled anew"
        assert set(seen) == set(range(max(1, first), 24 if number == 0 else 29))


def test_sources_of_the_same_lengths_are_not_shuffled_alike() -> None:
    batches = data_of((30, 30), mixing=MixingConfig(per_batch=(30, 30))).train_batches(60)
    first, second = ([d for d in documents(batches[0]) if (d > 30) == late] for late in (False, True))
    assert sorted(second) == [d + 30 for d in sorted(first)] and second != [d + 30 for d in first]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    mixing = MixingConfig(per_batch=(5, 3))
    data = data_of((40, 9), lengths=np.random.default_rng(0).integers(1, LENGTH, 49), mixing=mixing, packing=True)
    batches = data.train_batches(8, 2, steps=50)
    for hosts in (2, 4):
        blocks = [range(host * 4 // hosts, (host + 1) * 4 // hosts) for host in range(hosts)]
        shares = [data.train_batches(8, 2, 1.0, 90, block) for block in blocks]
        for step in (0, 7, 49):
            joined = np.concatenate([share[step]["input_ids"] for share in shares], axis=1)
            assert np.array_equal(joined, batches[step]["input_ids"])
            assert all(np.array_equal(s[step][SOURCE_TOKENS], batches[step][SOURCE_TOKENS]) for s in shares)
    other = dataclasses.replace(data, seed=2).train_batches(8, 2, steps=50)
    assert not np.array_equal(other[3]["input_ids"], batches[3]["input_ids"])
    with data.train_batches(8, 2, steps=50).iterator(step=30) as rows:
        assert np.array_equal(next(rows)["input_ids"], batches[30]["input_ids"])


def test_every_micro_step_has_the_same_shares() -> None:
    batches = data_of((90, 30), mixing=MixingConfig(per_batch=(9, 3))).train_batches(12, 3)
    for micro in batches[0]["input_ids"][..., 0]:
        assert (micro > 90).sum() == 1


def test_tokens_are_counted_by_source() -> None:
    lengths = np.random.default_rng(0).integers(1, LENGTH, 60)
    for packing in (True, "group_texts", False):
        data = data_of((20, 40), lengths=lengths, packing=packing)
        batches = data.train_batches(4, 2, local_rows=[1])
        whole = data.train_batches(4, 2)
        for step in range(len(whole)):
            ids = whole[step]["input_ids"]
            expected = [((ids > 0) & (ids <= 20)).sum(), (ids > 20).sum()]
            assert whole[step][SOURCE_TOKENS].tolist() == batches[step][SOURCE_TOKENS].tolist() == expected


def test_alpha_gives_shares_by_size() -> None:
    def shares(alpha: float, **sources: Any) -> list[float]:
        train = tuple(SourceConfig(path=name, **sources.get(name, {})) for name in "ab")
        config = DataConfig(train=train, mixing=MixingConfig(alpha=alpha))
        tokens = (9_000, 1_000)
        weights = source_weights(config, tokens)
        taken = [weight * count for weight, count in zip(weights, tokens, strict=True)]
        assert sum(taken) == pytest.approx(10_000, rel=1e-5)
        return [each / sum(taken) for each in taken]

    assert shares(1.0) == pytest.approx([0.9, 0.1])
    assert shares(0.0) == pytest.approx([0.5, 0.5], rel=1e-5)
    assert shares(0.5) == pytest.approx([0.75, 0.25], rel=1e-5)
    assert shares(0.0, b={"weight": 3.0}) == pytest.approx([0.25, 0.75], rel=1e-5)


def test_tokens_of_a_source_stand_for_a_weight() -> None:
    train = (SourceConfig(path="a"), SourceConfig(path="b", tokens=40 * LENGTH))
    data = data_of((10, 16), train=train)
    batches = data.train_batches(5)
    seen = [document for batch in batches for document in documents(batch)]
    assert sorted(document for document in seen if 0 < document <= 10) == list(range(1, 11))
    later = [document for document in seen if document > 10]
    assert len(later) == 40 and set(np.bincount(later)[11:]) == {2, 3}


def test_a_source_is_left_out_after_its_passes() -> None:
    train = (SourceConfig(path="a"), SourceConfig(path="b", weight=2.0, max_passes=5))
    data = data_of((30, 4), train=train)
    assert [len(data.train_rows(epoch)) for epoch in range(5)] == [38, 38, 34, 30, 30]
    batches = data.train_batches(10, epochs=6)
    seen = np.bincount([document for batch in batches for document in documents(batch)], minlength=35)[1:]
    assert seen.tolist() == [6] * 30 + [5] * 4
    assert batches.order.passes(len(batches)) == [6.0, 5.0]
    assert data.train_batches(10, steps=100)[99]["segment_ids"].all(), "the other goes on"
    limited = data_of((30,), train=(SourceConfig(path="a", max_passes=2),))
    assert len(limited.train_batches(10, epochs=2)) == len(limited.train_batches(10, steps=6)) == 6
    for length in ({"epochs": 2.1}, {"steps": 7}):
        with pytest.raises(UserError, match=r"max_passes allows after 2 epochs, 6 steps; set train.epochs"):
            limited.train_batches(10, **length)


def test_what_a_run_takes_is_told() -> None:
    data = data_of((40, 10), mixing=MixingConfig(per_batch=(4, 4)))
    lines = table(data.shares(data.train_batches(8)))
    assert [line.split() for line in lines] == [
        ["source", "tokens", "in", "the", "run", "share", "passes"],
        ["a.json", "640", "640", "50.00%", "1.00"],
        ["b.json", "160", "640", "50.00%", "4.00"],
    ]
    assert len({len(line) for line in lines}) == 1
    twice = data_of((3, 3), train=(SourceConfig(path="a"), SourceConfig(path="a", weight=0.5)))
    assert twice.source_names == ("a (1)", "a (2)")
    assert [share.passes for share in twice.shares(twice.train_batches(2, epochs=4))] == [4.0, 2.0]


def test_shares_that_data_cannot_give_are_refused() -> None:
    few = data_of((40, 3), mixing=MixingConfig(per_batch=(4, 4)))
    with pytest.raises(UserError, match=r"per_batch: 4 rows of b.json in every batch, but all of it is 3 rows"):
        few.train_batches(8)
    with pytest.raises(UserError, match=r"per_batch: \[4, 4\] are 8 rows, but train.global_batch_size is 12"):
        few.train_batches(12)
    train = (SourceConfig(path="a"), SourceConfig(path="b", max_passes=2))
    limited = data_of((40, 10), train=train, mixing=MixingConfig(per_batch=(4, 4)))
    with pytest.raises(
        UserError, match=r"max_passes of b is 2, but 10 steps of 4 rows pass over it 4.00 times; run at"
    ):
        limited.train_batches(8)
    assert len(limited.train_batches(8, steps=5)) == 5
    empty = (SourceConfig(path="a"), SourceConfig(path="b", tokens=5.0))
    with pytest.raises(UserError, match=r"b: tokens is 5, but nothing is left of this source"):
        data_of((4, 0), train=empty).train_batches(2)


@pytest.mark.parametrize(
    ("mixing", "sources", "message"),
    [
        (
            {"per_batch": (3, 4)},
            ({}, {}),
            r"data.mixing.per_batch: 3 \+ 4 rows are 7, but train.global_batch_size is 8",
        ),
        ({"per_batch": (8,)}, ({}, {}), r"data.mixing.per_batch: \[8\] has 1 numbers, data.train has 2 sources"),
        ({"per_batch": (8, 0)}, ({}, {}), r"data.mixing.per_batch: \[8, 0\] must be 1 or more"),
        (
            {"per_batch": (4, 4)},
            ({}, {"weight": 2.0}),
            r"data.train: b: weight: 2 has no meaning with data.mixing.per_",
        ),
        (
            {"per_batch": (4, 4)},
            ({}, {"tokens": 9.0}),
            r"data.train: b: tokens: 9 has no meaning with data.mixing.per_",
        ),
        ({"alpha": 0.3}, ({}, {"tokens": 9.0}), r"data.train: b: tokens: 9 has no meaning with data.mixing.alpha"),
        ({"alpha": 0.3, "per_batch": (4, 4)}, ({}, {}), r"data.mixing: give per_batch or alpha, not both"),
        ({"alpha": 1.5}, ({}, {}), r"data.mixing.alpha: 1.5 must be between 0 and 1"),
        ({}, ({}, {}), r"data.mixing: needs per_batch, e.g. \[424, 80\], or alpha"),
        (None, ({}, {"weight": 2.0, "tokens": 9.0}), r"data.train: b: weight 2 and tokens 9 both say"),
        (None, ({}, {"max_passes": 0.0}), r"data.train: b: max_passes: 0.0 must be above 0"),
    ],
)
def test_settings_that_contradict_are_refused(mixing: Any, sources: Any, message: str) -> None:
    train = tuple(SourceConfig(path=name, **more) for name, more in zip("ab", sources, strict=True))
    data = DataConfig(train=train, mixing=None if mixing is None else MixingConfig(**mixing))
    with pytest.raises(UserError, match=message):
        check_ranges(RunConfig(data=data, train=TrainConfig(global_batch_size=8)))


def test_validation_sources_have_no_shares() -> None:
    data = DataConfig(train=(SourceConfig(path="a"),), validation=(SourceConfig(path="b", max_passes=2.0),))
    with pytest.raises(UserError, match=r"data.validation: b: max_passes: 2.0 must be left out"):
        check_ranges(RunConfig(data=data))
