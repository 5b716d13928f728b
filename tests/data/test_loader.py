"""Batches do not depend on workers, hosts or resumption; shapes, segments, epochs, validation, messages."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data import batches as batches_module
from jaxlm.data import planner
from jaxlm.data.batches import BATCH_DTYPES, ENCODER_DTYPES, SOURCE_TOKENS, Batches
from jaxlm.data.examples import Examples
from jaxlm.data.loader import Data, build_data
from jaxlm.data.report import Report
from jaxlm.errors import UserError
from jaxlm.modalities import PADDING
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


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("packing", MODES)
@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_is_what_a_plain_loop_writes(
    packing: Any, encoder: bool, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "CHUNK", 32)  # two rows at a time
    random = np.random.default_rng(0)
    lengths, more = random.integers(1, 17, 120), {}
    if encoder:
        of_encoder = random.integers(1, 11, 120)
        ends = np.concatenate([[0], np.cumsum(of_encoder)])
        more = {"encoder_ids": random.integers(1, 99, ends[-1]).astype(np.int32), "encoder_offsets": ends}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, mask = random.integers(1, 99, offsets[-1]).astype(np.int32), random.random(offsets[-1]) < 0.5
    examples = Examples(ids, mask, offsets, np.zeros(120, np.int32), np.arange(120), **more)
    config = DataConfig(train=(SourceConfig(path="a"),), packing=packing, sequence_length=16, encoder_length=10)
    data = Data(config, 1, examples, None, Report((), ()), "", packing_version=version)
    plans = [data.train_rows(epoch) for epoch in range(2)]
    rows = [(plan, row) for plan in plans for row in range(len(plan))]
    source = data.train_batches(6, 2, epochs=2, local_rows=[0, 2])
    for step in range(len(source)):
        expected = {name: np.zeros((2, 2, 16), dtype) for name, dtype in BATCH_DTYPES.items()}
        if encoder:
            expected |= {name: np.zeros((2, 2, 10), dtype) for name, dtype in ENCODER_DTYPES.items()}
        for a, (b, global_b) in itertools.product(range(2), enumerate([0, 2])):
            number = step * 6 + a * 3 + global_b
            if number >= len(rows):
                continue
            plan, row = rows[number]
            at = at_encoder = 0
            for segment, piece in enumerate(range(plan.rows[row], plan.rows[row + 1]), 1):
                start, length = plan.starts[piece], plan.lengths[piece]
                here = a, b, slice(at, at + length)
                expected["input_ids"][here] = ids[start : start + length]
                expected["loss_mask"][here] = mask[start : start + length]
                expected["segment_ids"][here] = 1 if plan.one_segment else segment
                expected["positions"][here] = np.arange(length) + (at if plan.one_segment else 0)
                at += length
                if plan.encoder_starts is not None and plan.encoder_lengths is not None:
                    start, length = plan.encoder_starts[piece], plan.encoder_lengths[piece]
                    there = a, b, slice(at_encoder, at_encoder + length)
                    expected["encoder_ids"][there] = more["encoder_ids"][start : start + length]
                    expected["encoder_segment_ids"][there] = segment
                    at_encoder += length
            expected["loss_mask"][a, b, 0] = False
        expected["modality_ids"][expected["segment_ids"] == 0] = PADDING
        batch = source[step]
        assert batch.keys() == expected.keys() | {SOURCE_TOKENS}
        for name, array in expected.items():
            assert np.array_equal(batch[name], array) and batch[name].dtype == array.dtype, name


def test_the_next_plan_is_made_ahead_and_old_ones_are_let_go() -> None:
    made: list[tuple[int, str]] = []
    second = threading.Event()

    def plan(number: int) -> Any:
        made.append((number, threading.current_thread().name))
        if number == 1:
            second.set()
        if number == 3:
            raise UserError("the third")
        return number

    plans = planner.Plans(plan)  # type: ignore[arg-type]
    assert plans.get(0, then_next=True) == 0 and second.wait(10)
    assert plans.get(1, then_next=False) == 1 and plans.get(2, then_next=False) == 2
    assert [number for number, _ in made] == [0, 1, 2]
    assert threading.current_thread().name not in {thread for _, thread in made}
    with pytest.raises(UserError, match="the third"):
        plans.get(3, then_next=False)
    assert plans.get(0, then_next=False) == 0 and [number for number, _ in made] == [0, 1, 2, 3, 0]


def test_older_runs_keep_their_rows_and_their_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    now = make(tokenizer, tmp_path)
    older = now.with_packing(1)
    settings = json.dumps({"sequence_length": 48, "seed": 1}, sort_keys=True).encode()
    assert older.fingerprint == hashlib.sha256(settings + "".join(now.digests).encode()).hexdigest()
    assert now.packing_version == 2 and now.fingerprint != older.fingerprint
    assert now.with_packing(2).fingerprint == now.fingerprint
    assert not np.array_equal(now.train_rows(0).starts, older.train_rows(0).starts)
    with pytest.raises(UserError, match=r"begun with version 3 of packing, this jaxlm knows 2; update it"):
        now.with_packing(3)
    for packing in ("group_texts", False):  # they have but one
        one = make(tokenizer, tmp_path, packing=packing)
        assert one.packing_version == 1 and same(one.train_batches(4)[0], one.with_packing(1).train_batches(4)[0])


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
    assert long.order.epoch(0) == 0 and long.order.epoch(4) == pytest.approx(4 / 3)
    half = data.train_batches(20, epochs=0.5)
    assert len(half) == 2 and half[1]["segment_ids"][0, :, 0].sum() == 10
    assert half.order.epoch(2) == pytest.approx(0.5)
    with pytest.raises(IndexError):
        half[2]


@pytest.mark.parametrize("length", [{"epochs": 900.5}, {"steps": 600}], ids=["epochs", "steps"])
def test_a_late_epoch_of_version_1_needs_no_plan_of_the_earlier_ones(
    tokenizer: Tokenizer, tmp_path: Path, length: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows an epoch of version 1 has depends on its order; what is known of earlier ones is kept."""
    planned: list[int] = []
    plan = planner.plan_rows

    def counted(mode: str, offsets: Any, order: Any, length: int, seed: int, epoch: int, encoder: Any) -> Any:
        planned.append(epoch)
        return plan(mode, offsets, order, length, seed, epoch, encoder)

    monkeypatch.setattr(planner, "plan_rows", counted)
    data = make(tokenizer, tmp_path, count=12).with_packing(1)
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


@pytest.mark.parametrize("packing", MODES)
def test_a_late_step_needs_the_plan_of_its_own_epoch_alone(
    tokenizer: Tokenizer, tmp_path: Path, packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    plan = planner.Planner.__call__
    monkeypatch.setattr(planner.Planner, "__call__", lambda self, number: planned.append(number) or plan(self, number))
    data = make(tokenizer, tmp_path, packing=packing)
    size = len(data.train_rows(0))
    planned.clear()
    batches = data.train_batches(4, epochs=100_000.5)
    assert len(batches) == math.ceil((100_000 * size + math.ceil(size / 2)) / 4) and not planned
    late = 77_777 * size // 4 + 1
    assert batches.counters(late) == {
        "epoch": 77_777,
        "rows_before": 77_777 * size,
        "epochs": 100_000.5,
        "total_rows": 100_000 * size + math.ceil(size / 2),
    }
    assert not planned
    first = batches[late]
    assert set(planned) <= {77_777, 77_778}
    assert same(first, data.train_batches(4, steps=2 * 10**6)[late])


def test_an_epoch_of_fractions_is_counted_without_its_plan(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: planner.Planner, number: int) -> Any:
        raise AssertionError("planned")

    train = (SourceConfig(path=str(tmp_path / "data.json"), weight=1.37),)
    data = make(tokenizer, tmp_path, count=200, train=train)
    sizes = [len(data.train_rows(epoch)) for epoch in range(5)]
    whole = data.train_batches(1, epochs=5)
    assert len(whole) == sum(sizes) and len(set(sizes)) > 1
    known = json.loads(json.dumps(whole.counters(sum(sizes[:4]) + 1)))
    monkeypatch.setattr(planner.Planner, "__call__", refused)
    again = data.train_batches(1, epochs=5, known=known)
    assert len(again) == len(whole) and known["epoch"] == 4 and known["rows_before"] == sum(sizes[:4])


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
