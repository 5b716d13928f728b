"""Batches do not depend on workers, hosts or resumption; shapes, segments, epochs, validation, messages."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data import Batches, Data, build_data, loader
from jaxlm.data.batches import BATCH_DTYPES
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

MODES = ["first_fit", "group_texts", False]
KEYS = ["input_ids", "loss_mask", "segment_ids", "positions", "modality_ids"]


def make(tokenizer: Tokenizer, path: Path, count: int = 60, **options: Any) -> Data:
    random = np.random.default_rng(0)
    words = ["granite", "basalt", "quartz", "feldspar", "rock", "melt"]
    records = [{"text": f"{i} " + " ".join(random.choice(words, random.integers(1, 12)))} for i in range(count)]
    (path / "data.json").write_text(json.dumps(records))
    seed = options.pop("seed", 1)
    limits = {"vocab_size": options.pop("vocab_size", 1000), "max_positions": options.pop("max_positions", 64)}
    train = options.pop("train", (SourceConfig(path=str(path / "data.json")),))
    config = DataConfig(train=train, **{"sequence_length": 48, **options})
    return build_data(config, tokenizer, seed=seed, **limits)


def same(one: Any, two: Any) -> bool:
    return all(np.array_equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in KEYS)


@pytest.mark.parametrize("packing", MODES)
def test_batches_have_their_shapes_segments_and_positions(tokenizer: Tokenizer, tmp_path: Path, packing: Any) -> None:
    data = make(tokenizer, tmp_path, packing=packing)
    batches = data.train_batches(8, accumulation=2, epochs=1)
    plan = data.train_rows(0)
    assert len(batches) == math.ceil(len(plan) / 8)
    seen: list[int] = []
    for batch in batches:
        kinds = {key: (batch[key].shape, batch[key].dtype) for key in KEYS}
        assert kinds == {key: ((2, 4, 48), np.dtype(BATCH_DTYPES[key])) for key in KEYS}
        for row in range(8):
            ids, mask, segments, positions = (batch[key].reshape(8, 48)[row] for key in KEYS[:4])
            used = segments > 0
            assert not ids[~used].any() and not mask[~used].any() and not positions[~used].any() and not mask[0]
            assert not np.any(np.diff(used.astype(int)) > 0)  # padding is at the end
            seen += ids[used].tolist()
            for segment in range(1, segments.max(initial=0) + 1):
                here = segments == segment
                assert positions[here].tolist() == list(range(here.sum()))
                if packing != "group_texts":
                    assert ids[here][0] == tokenizer.bos_id and ids[here][-1] == tokenizer.eos_id
                    assert mask[here].tolist() == [False] + [True] * (here.sum() - 1)
            if packing == "group_texts":
                assert segments.max(initial=0) <= 1 and mask[used].sum() == max(used.sum() - 1, 0)
    if packing != "group_texts":
        assert sorted(seen) == sorted(data.train.input_ids.tolist())


@pytest.mark.parametrize("packing", MODES)
def test_hosts_see_shares_of_the_same_batches(tokenizer: Tokenizer, tmp_path: Path, packing: Any) -> None:
    data = make(tokenizer, tmp_path, packing=packing)
    alone = data.train_batches(8, 2, epochs=2.5)
    for hosts in (2, 4):
        blocks = [range(host * 4 // hosts, (host + 1) * 4 // hosts) for host in range(hosts)]
        shares = [data.train_batches(8, 2, 2.5, None, block) for block in blocks]
        for step in range(len(alone)):
            parts = [share[step] for share in shares]
            assert same(alone[step], {key: np.concatenate([p[key] for p in parts], axis=1) for key in KEYS})


def test_accumulation_does_not_change_the_global_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = make(tokenizer, tmp_path)
    one, four = data.train_batches(8, 1), data.train_batches(8, 4)
    for step in range(len(one)):
        assert np.array_equal(one[step]["input_ids"].reshape(8, 48), four[step]["input_ids"].reshape(8, 48))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterators_go_on_from_their_state(tokenizer: Tokenizer, tmp_path: Path, workers: int) -> None:
    data = make(tokenizer, tmp_path, packing="first_fit", workers=workers)
    batches = data.train_batches(4, epochs=2)
    assert len(batches) > 5
    with batches.iterator() as rows:
        first = [next(rows) for _ in range(3)]
        state = json.loads(json.dumps(rows.get_state()))
        rest = list(rows)
        assert rows.get_state() == {"step": len(batches)} and not list(rows)
        rows.set_state({"step": 1})
        assert same(next(rows), batches[1])
    assert len(first) + len(rest) == len(batches)
    assert all(same(batch, batches[step]) for step, batch in enumerate([*first, *rest]))
    resumed = Batches(batches.source, 0).iterator()  # whatever the number of workers was
    resumed.set_state(state)
    assert all(same(one, two) for one, two in zip(resumed, rest, strict=True))


def test_epochs_differ_and_steps_run_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = make(tokenizer, tmp_path, packing=False)
    one = data.train_batches(20, epochs=2)  # 60 rows an epoch
    assert len(one) == 6
    epochs = [np.concatenate([one[s]["input_ids"][0] for s in part]) for part in (range(3), range(3, 6))]
    assert not np.array_equal(*epochs)
    assert sorted(map(tuple, epochs[0])) == sorted(map(tuple, epochs[1]))
    long = data.train_batches(20, steps=100)
    assert len(long) == 100 and all(same(one[s], long[s]) for s in range(6))
    assert long[99]["segment_ids"][0, :, 0].all()
    assert same(long[2], one[2])  # back to an epoch whose plan was let go
    assert long.source.epoch(0) == 0 and long.source.epoch(4) == pytest.approx(4 / 3)
    half = data.train_batches(20, epochs=0.5)
    assert len(half) == 2 and half[1]["segment_ids"][0, :, 0].sum() == 10
    assert half.source.epoch(2) == pytest.approx(0.5)
    with pytest.raises(IndexError):
        half[2]


@pytest.mark.parametrize("packing", MODES)
@pytest.mark.parametrize("length", [{"epochs": 900.5}, {"steps": 600}], ids=["epochs", "steps"])
def test_a_late_epoch_needs_no_plan_of_the_earlier_ones(
    tokenizer: Tokenizer, tmp_path: Path, packing: Any, length: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows an epoch of first_fit has depends on its order; what is known of earlier ones is kept."""
    planned: list[int] = []
    plan = loader.plan_rows

    def counted(mode: str, offsets: Any, order: Any, length: int, seed: int, epoch: int, encoder: Any) -> Any:
        planned.append(epoch)
        return plan(mode, offsets, order, length, seed, epoch, encoder)

    monkeypatch.setattr(loader, "plan_rows", counted)
    data = make(tokenizer, tmp_path, count=12, packing=packing)
    whole = data.train_batches(4, **length)
    late = int(0.8 * len(whole))
    wanted = [whole[step] for step in range(late, late + 5)]
    known = json.loads(json.dumps(whole.counters(late)))
    assert known["epoch"] > 100 and len(set(planned)) > known["epoch"]
    planned.clear()
    resumed = data.train_batches(4, **length, known=known)
    assert len(resumed) == len(whole)
    assert all(same(resumed[late + at], batch) for at, batch in enumerate(wanted))
    assert max(planned) <= min(planned) + 15 and min(planned) >= known["epoch"] - 1
    # Longer than it was: only what is to come is planned. Without counters, as of older checkpoints: all of it.
    planned.clear()
    longer = {key: value * 1.1 if key == "epochs" else value * 2 for key, value in length.items()}
    extended = data.train_batches(4, **longer, known=known)
    assert same(extended[late], wanted[0]) and min(planned) >= known["epoch"] - 1
    assert len(extended) == len(data.train_batches(4, **longer))
    assert same(data.train_batches(4, **length)[late], wanted[0])
    assert same(resumed[0], whole[0]), "what lies before is planned when it is asked for"


def test_seed_decides_the_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, again, other = (make(tokenizer, tmp_path, seed=seed) for seed in (1, 1, 2))
    assert same(one.train_batches(4)[0], again.train_batches(4)[0])
    assert not same(one.train_batches(4)[0], other.train_batches(4)[0])


@pytest.mark.parametrize("packing", MODES)
def test_evaluation_sees_every_row_once(tokenizer: Tokenizer, tmp_path: Path, packing: Any) -> None:
    data = make(tokenizer, tmp_path, packing=packing, validation=17)
    assert data.validation is not None and len(data.validation) == 17 and len(data.train) == 43
    batches = list(data.eval_batches(4))
    assert all(batch["input_ids"].shape == (4, 48) for batch in batches)
    rows = np.concatenate([batch["input_ids"] for batch in batches])
    used = np.concatenate([batch["segment_ids"] for batch in batches]) > 0
    if packing == "group_texts":
        assert used.sum() == len(data.validation.input_ids) // 48 * 48
    else:
        assert sorted(rows[used].tolist()) == sorted(data.validation.input_ids.tolist())
    halves = [list(data.eval_batches(4, block)) for block in ((0, 1), (2, 3))]
    for step, batch in enumerate(batches):
        assert same(batch, {key: np.concatenate([half[step][key] for half in halves]) for key in KEYS})
    kept = {tuple(data.train[i].input_ids) for i in range(len(data.train))}
    assert not any(tuple(data.validation[i].input_ids) in kept for i in range(17))
    train, held = data.report.train[0], data.report.validation[0]
    assert (train.records, train.tokens) == (43, len(data.train.input_ids))
    assert (held.records, held.tokens) == (17, len(data.validation.input_ids))
    assert (train.trained_tokens, held.trained_tokens) == (data.train.loss_mask.sum(), data.validation.loss_mask.sum())


def test_validation_may_be_sources(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "granite melt"}\n')
    data = make(tokenizer, tmp_path, validation=(SourceConfig(path=str(tmp_path / "held.jsonl")),))
    assert len(data.train) == 60 and data.validation is not None and len(data.validation) == 1
    assert make(tokenizer, tmp_path).validation is None
    assert [line.split()[0] for line in data.report.lines()] == ["train", "validation"]


def test_group_texts_learns_the_bos_of_later_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = make(tokenizer, tmp_path, packing="group_texts")
    batch = data.train_batches(4)[0]
    later = (batch["input_ids"] == tokenizer.bos_id) & (batch["positions"] > 0)
    assert later.any() and batch["loss_mask"][later].all()
    assert (data.train.lengths > 0).all() and data.report.train[0].truncated == 0


def test_the_fingerprint_changes_with_tokens_and_order_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = make(tokenizer, tmp_path).fingerprint
    assert make(tokenizer, tmp_path).fingerprint == make(tokenizer, tmp_path, workers=2).fingerprint == one
    others = [{"seed": 2}, {"count": 61}, {"packing": False}, {"sequence_length": 47}, {"validation": 3}]
    assert len({one, *(make(tokenizer, tmp_path, **other).fingerprint for other in others)}) == 6


def test_mistakes_are_refused_by_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        make(tokenizer, tmp_path, train=())
    with pytest.raises(UserError, match=r"data\.sequence_length is 65; .* the model's max_position_embeddings, 64"):
        make(tokenizer, tmp_path, sequence_length=65)
    with pytest.raises(UserError, match=r"data\.sequence_length is 1;"):
        make(tokenizer, tmp_path, sequence_length=1)
    with pytest.raises(UserError, match=r"data\.validation is -1"):
        make(tokenizer, tmp_path, validation=-1)
    with pytest.raises(UserError, match=r"data\.validation is 60, but there are only 60 records"):
        make(tokenizer, tmp_path, validation=60)
    source = SourceConfig(path=str(tmp_path / "data.json"), weight=0.0)
    with pytest.raises(UserError, match=r"weight of .* is 0"):
        make(tokenizer, tmp_path, train=(source,))
    with pytest.raises(UserError, match="an epoch has no rows"):
        make(tokenizer, tmp_path, train=(dataclasses.replace(source, weight=0.001),)).train_batches(4)
    data = make(tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"train\.global_batch_size is 6, which 4 accumulation steps"):
        data.train_batches(6, 4)
    with pytest.raises(UserError, match=r"train\.epochs is 0"):
        data.train_batches(6, 2, epochs=0)
