"""Stores that a run fills and opens: the same data as in memory, by any number of processes, through kills."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm.data.store.cache
from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import resolve_ends
from jaxlm.data.loader import Data, build_data
from jaxlm.data.store import knowlm
from jaxlm.data.store.build import Work, join, make_parts, open_parts, reports_of
from jaxlm.data.store.cache import Cache, cache_directory
from jaxlm.data.store.manifest import MANIFEST
from jaxlm.data.store.pool import Pool
from jaxlm.data.store.stored import StoredTokens
from jaxlm.data.tokenise import Tokeniser, read_batches
from jaxlm.errors import UserError
from jaxlm.lock import Lock
from jaxlm.tokenizer import Tokenizer
from tests.data.conftest import WORDS


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr(jaxlm.data.store.cache, "_POLL", 0.02)


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * k + k) % len(WORDS)] for k in range(1, count + 1))


def write_once(folder: Path) -> tuple[SourceConfig, ...]:
    """Documents of up to 180 words, and questions; as sources."""
    files = folder / "texts.jsonl", folder / "questions.json"
    if not files[0].exists():
        texts = [{"text": words(n, 3 + 5 * (n % 38)), "note": "x" if n == 20 else ""} for n in range(60)]
        files[0].write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        rows = [{"instruction": words(n, 5), "input": "", "output": words(n + 1, 6 * (n % 9))} for n in range(50)]
        files[1].write_text(json.dumps(rows), encoding="utf-8")
    return SourceConfig(path=str(files[0]), weight=1.5), SourceConfig(path=str(files[1]), template="alpaca_short")


def data_of(folder: Path, tokenizer: Tokenizer, cache: Cache | None, **options: Any) -> Data:
    start_id = options.pop("start_id", None)
    config = DataConfig(**{"train": write_once(folder), "sequence_length": 96, **options})
    return build_data(
        config, tokenizer, seed=3, vocab_size=tokenizer.vocab_size, max_positions=512, cache=cache, start_id=start_id
    )


def test_sources_behind_an_address_are_kept_like_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    local = write_once(tmp_path)
    memory.put([source.path for source in local], [f"/cached/{Path(source.path).name}" for source in local])
    remote = tuple(dataclasses.replace(source, path=f"memory://cached/{Path(source.path).name}") for source in local)
    try:
        first, second = (
            data_of(tmp_path, tokenizer, Cache(tmp_path / "cache", always=True), train=remote) for _ in range(2)
        )
        in_memory = data_of(tmp_path, tokenizer, None)
        assert first.fingerprint == second.fingerprint == in_memory.fingerprint
        assert len(list((tmp_path / "cache").glob("tokens-*/manifest.json"))) == 1
        memory.pipe("/cached/texts.jsonl", b'{"text": "granite"}\n')
        data_of(tmp_path, tokenizer, Cache(tmp_path / "cache", always=True), train=remote)
        assert len(list((tmp_path / "cache").glob("tokens-*/manifest.json"))) == 2, "another version of the file"
    finally:
        memory.rm("/cached", recursive=True)


def same(mine: Data, other: Data) -> None:
    assert mine.report == other.report
    assert mine.fingerprint == other.fingerprint and mine.digests == other.digests
    pairs = [(mine.train_batches(4, 2, epochs=2), other.train_batches(4, 2, epochs=2))]
    if mine.validation is not None:
        pairs.append((mine.eval_batches(4), other.eval_batches(4)))
    for here, there in pairs:
        assert len(here) == len(there) > 0
        for step in range(len(here)):
            for name, array in here[step].items():
                np.testing.assert_array_equal(array, there[step][name])
                assert array.dtype == there[step][name].dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": 7},
        {"validation": 0.2, "packing": "group_texts", "too_long": "drop"},
        {"packing": False, "train_on_inputs": True, "add_bos": False, "too_long": "split"},
    ],
    ids=str,
)
def test_batches_from_a_store_are_those_from_memory(tmp_path: Path, tokenizer: Tokenizer, options: Any) -> None:
    cache = Cache(tmp_path / "cache", always=True)
    wanted = data_of(tmp_path, tokenizer, None, **options)
    same(data_of(tmp_path, tokenizer, cache, **options), wanted)
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    again = data_of(tmp_path, tokenizer, cache, **options)
    same(again, wanted)
    assert isinstance(again.train, StoredTokens) and again.train.input_ids.dtype == np.uint16
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == names  # nothing was made anew
    assert not [name for name in names if name.endswith((".tmp", ".parts", ".lock"))]


def test_an_encoders_questions_are_stored_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = write_once(tmp_path)[1:]
    options = {"train": sources, "validation": 5, "start_id": 0, "encoder_length": 80}
    wanted = data_of(tmp_path, tokenizer, None, **options)
    same(data_of(tmp_path, tokenizer, Cache(tmp_path / "cache", always=True), **options), wanted)


def test_validation_of_its_own_sources_has_its_own_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = write_once(tmp_path)
    options = {"train": sources[:1], "validation": sources[1:]}
    wanted = data_of(tmp_path, tokenizer, None, **options)
    same(data_of(tmp_path, tokenizer, Cache(tmp_path / "cache", always=True), **options), wanted)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def work_of(folder: Path, tokenizer: Tokenizer, **options: Any) -> Work:
    given = {"train": write_once(folder), "sequence_length": 96} | options
    config, _ = resolve_ends(DataConfig(**given), tokenizer)
    return Work(config.train, config, tokenizer, part_characters=700)


def whole_store(work: Work, folder: Path, number: int, name: str) -> dict[str, bytes]:
    parts = open_parts(folder, number)
    assert parts is not None
    join(work, folder / name, parts, reports_of(parts), {})
    return {file.name: file.read_bytes() for file in (folder / name).iterdir()}


def test_any_number_of_processes_and_hosts_makes_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.data.tokenise.RECORDS", 7)
    work = work_of(tmp_path, tokenizer)
    number = make_parts(work, tmp_path / "one")
    assert number > 5
    wanted = whole_store(work, tmp_path / "one", number, "store")
    # Few parts of many batches, which the processes finish in any order.
    several = dataclasses.replace(work, part_characters=20_000)
    few = make_parts(several, tmp_path / "two", processes=2)
    assert 1 < few < number
    assert whole_store(several, tmp_path / "two", few, "store") == wanted
    for index in (2, 0, 1):
        assert open_parts(tmp_path / "three", number) is None
        assert make_parts(work, tmp_path / "three", share=(index, 3)) == number
    assert whole_store(work, tmp_path / "three", number, "store") == wanted
    whole = dataclasses.replace(work, part_characters=1 << 20)
    assert make_parts(whole, tmp_path / "four") == 1
    assert whole_store(whole, tmp_path / "four", 1, "store") == wanted


def test_what_was_finished_before_a_kill_is_not_made_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.data.tokenise.RECORDS", 7)
    work = work_of(tmp_path, tokenizer)
    number = make_parts(work, tmp_path / "whole")

    def killed(characters: int, tokens: int) -> None:
        if characters > 8000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_parts(work, tmp_path / "parts", count=killed)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert 0 < len(done) < number and not any(name.endswith(".tmp") for name in done)
    made = []
    monkeypatch.setattr(Tokeniser, "chunk", counted(Tokeniser.chunk, made))
    make_parts(work, tmp_path / "parts")
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in done} == done
    assert 0 < sum(made) < 110
    assert whole_store(work, tmp_path / "parts", number, "s") == whole_store(work, tmp_path / "whole", number, "s")


def counted(chunk: Any, made: list[int]) -> Any:
    def count(self: Tokeniser, batch: Any) -> Any:
        made.append(len(batch.records))
        return chunk(self, batch)

    return count


def test_a_process_says_what_is_wrong_in_the_order_of_the_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"} for _ in range(2000)]
    rows[700]["output"], rows[1900]["output"] = [1], [2]  # type: ignore[assignment]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "bad.json"), template="alpaca")
    config, _ = resolve_ends(DataConfig(train=(source,)), tokenizer)
    messages = []
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"bad\.json:701") as caught:
            make_parts(Work((source,), config, tokenizer), tmp_path / "parts", processes)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not list((tmp_path / "parts").iterdir())


def test_a_process_that_is_killed_is_reported_and_leaves_no_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    work = work_of(tmp_path, tokenizer)
    tokeniser = Tokeniser([{}, {}], work.config, tokenizer, None)
    with Pool(tokeniser, 2) as pool:
        pids = [worker._process.pid for worker in pool._workers]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"ended with status .*what is finished is kept"):
            list(pool.map((0, batch) for batch in read_batches(0, work.sources[0], tokenizer)))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Meeting:
    """`Hosts.exchange` between threads."""

    def __init__(self, count: int) -> None:
        self._barrier, self._values = threading.Barrier(count), [""] * count

    def exchange_of(self, process: int) -> Any:
        def exchange(name: str, value: str) -> list[str]:
            self._values[process] = value
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()
            return values

        return exchange


@pytest.mark.parametrize("shared", [True, False])
def test_several_hosts_fill_one_cache_or_each_its_own(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setattr("jaxlm.data.tokenise.RECORDS", 7)
    monkeypatch.setattr(jaxlm.data.store.cache, "cores", lambda: 1)
    monkeypatch.setattr(jaxlm.data.store.cache, "_SECONDS_SHOWN", 0.2)
    wanted = data_of(tmp_path, tokenizer, None, validation=5)
    work = [work_of(tmp_path, tokenizer, validation=5)] * 3
    shares: list[Any] = []
    make = jaxlm.data.store.cache.make_parts

    def noted(work: Work, directory: Path, processes: int, share: Any, count: Any) -> int:
        shares.append(share)
        return make(work, directory, processes, share, count)

    monkeypatch.setattr(jaxlm.data.store.cache, "make_parts", noted)
    meeting = Meeting(3)

    def host(process: int) -> Any:
        directory = tmp_path / ("cache" if shared else f"cache-{process}")
        return Cache(directory, True, meeting.exchange_of(process), process, 3).open(work[process], 5, 3)

    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(host, range(3)))
    assert sorted(shares) == ([(0, 3), (1, 3), (2, 3)] if shared else [(0, 1)] * 3)
    for opened in stores:
        assert (opened.train.digest(), opened.validation.digest()) == wanted.digests


def test_a_second_run_waits_for_the_first(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(tmp_path, tokenizer)
    Cache(tmp_path / "cache", True).open(work)
    (store,) = (tmp_path / "cache").iterdir()
    store.rename(tmp_path / "aside")
    said: list[str] = []
    lock = Lock(tmp_path / "cache" / f"{store.name}.lock", "data.cache", "-")
    with lock, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(Cache(tmp_path / "cache", True, say=said.append).open, work)
        while not said:
            time.sleep(0.01)
        (tmp_path / "aside").rename(store)  # the other has finished
        lock.release()
        made: list[int] = []
        monkeypatch.setattr(jaxlm.data.store.cache, "make_parts", counted(None, made))
        assert len(waiting.result().train)
    assert "another run tokenises the same data" in said[0] and not made


def test_whatever_the_tokens_depend_on_leads_to_another_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = write_once(tmp_path)
    names = set()

    def name(**options: Any) -> None:
        work = work_of(tmp_path, tokenizer, **options)
        names.add(jaxlm.data.store.cache._name(work, jaxlm.data.store.cache._describe(work.sources)))

    name()
    name(packing=False, workers=2, allow_no_end=True)  # none of which shows in the tokens
    assert len(names) == 1
    for number, options in enumerate(
        ({"too_long": "drop"}, {"add_eos": False}, {"train_on_inputs": True}, {"packing": "group_texts"}), 2
    ):
        name(**options)
        assert len(names) == number
    template = tmp_path / "own.json"
    own = {"description": "", "prompt_input": "{instruction}{input}:", "prompt_no_input": "{instruction}:"}
    for number, split in enumerate((":", "::"), 6):  # the file's name stays
        template.write_text(json.dumps(own | {"response_split": split}), encoding="utf-8")
        name(train=(dataclasses.replace(sources[1], template=str(template)),))
        assert len(names) == number
    file = Path(sources[0].path)
    text = file.read_text(encoding="utf-8")
    about = file.stat()
    file.write_text(text.replace("granite", "granitE", 1), encoding="utf-8")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    name()
    assert len(names) == 8


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(tmp_path, tokenizer)
    make = jaxlm.data.store.cache.make_parts

    def growing(*arguments: Any) -> int:
        number = make(*arguments)
        with Path(work.sources[0].path).open("a", encoding="utf-8") as file:
            file.write('{"text": "granite"}\n')
        return number

    monkeypatch.setattr(jaxlm.data.store.cache, "make_parts", growing)
    with pytest.raises(UserError, match=r"changed while it was read: .*texts\.jsonl"):
        Cache(tmp_path / "cache", True).open(work)
    assert not list((tmp_path / "cache").iterdir())


def test_a_store_that_older_code_made_otherwise_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    work = work_of(tmp_path, tokenizer)
    cache = Cache(tmp_path / "cache", True)
    cache.open(work)
    (store,) = (tmp_path / "cache").iterdir()
    raw = bytearray((store / "tokens.bin").read_bytes())
    raw[2] ^= 1
    (store / "tokens.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"holds other tokens .*texts\.jsonl; remove that directory"):
        cache.open(work)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jaxlm.data.store.cache, "join", full)
    with pytest.raises(UserError, match=r"data\.cache: No space left .*what is finished is kept"):
        Cache(tmp_path / "cache", True).open(work_of(tmp_path, tokenizer))
    (parts,) = (tmp_path / "cache").iterdir()
    assert parts.suffix == ".parts"


def test_small_sources_stay_in_memory(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    assert not isinstance(data_of(tmp_path, tokenizer, cache).train, StoredTokens)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(jaxlm.data.store.cache, "SMALL", 1000)
    assert isinstance(data_of(tmp_path, tokenizer, cache).train, StoredTokens)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("JAXLM_CACHE_DIR", raising=False)
    assert cache_directory() == Path("/x/jaxlm")
    monkeypatch.setenv("JAXLM_CACHE_DIR", "/y")
    assert cache_directory() == Path("/y")


def test_a_store_is_a_source_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wanted = data_of(tmp_path, tokenizer, None)
    work = work_of(tmp_path, tokenizer)
    sources = work.sources
    Cache(tmp_path / "cache", True).open(work)
    (store,) = (tmp_path / "cache").iterdir()
    for path in (store, store / "tokens.idx"):
        source = SourceConfig(path=str(path))
        data = data_of(tmp_path, tokenizer, None, train=(source,))
        for name in ("input_ids", "loss_mask", "offsets"):
            np.testing.assert_array_equal(getattr(data.train, name), getattr(wanted.train, name))
        assert data.report.train[0].line().startswith(f"{path} (text: tokens as the store has them): ")
        for options in ({}, {"validation": 9}, {"sequence_length": 50}, {"train": (source, sources[1])}):
            given = {"train": (source,), **options}
            other = tmp_path / f"other-{len(str(options))}"
            stored = data_of(tmp_path, tokenizer, Cache(other, True), **given)
            same(stored, data_of(tmp_path, tokenizer, None, **given))
            is_copied = bool(options)  # cut, split, or beside others
            assert bool(list(other.iterdir())) == is_copied
    text = (store / MANIFEST).read_text(encoding="utf-8")
    digest = json.loads(text)["tokenizer"]
    (store / MANIFEST).write_text(text.replace(digest, "0" * 64), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not fit: it was tokenised with .*tokenizer\.model \(0000"):
        data_of(tmp_path, tokenizer, None, train=(source,))


def test_stores_of_others_are_cut_and_masked_as_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [np.arange(5, 5 + count) % 300 for count in (3, 240, 1, 96)]
    knowlm.write_store(tmp_path / "k", [(0, ids) for ids in samples], 1, 2)
    source = SourceConfig(path=str(tmp_path / "k.idx"))
    data = data_of(tmp_path, tokenizer, None, train=(source,), add_eos=False)
    assert data.train.lengths.tolist() == [3, 96, 96, 48, 96]
    pieces = [samples[0], samples[1][:96], samples[1][96:192], samples[1][192:], samples[3]]
    np.testing.assert_array_equal(data.train.input_ids, np.concatenate(pieces))
    masks = np.concatenate([np.arange(len(piece)) > 0 for piece in pieces])
    np.testing.assert_array_equal(data.train.loss_mask, masks)
    assert data.train.record.tolist() == [0, 1, 1, 1, 2]
    few = data_of(tmp_path, tokenizer, None, train=(dataclasses.replace(source, limit=1),))
    assert few.train.lengths.tolist() == [3]
    for wrong, text in (
        ({"template": "alpaca"}, "template of .* is 'alpaca', but a store holds tokens"),
        ({"columns": {"text": "x"}}, "columns of"),
        ({"format": "megatron"}, "not an index of Megatron's"),
        ({"path": str(tmp_path / "k.bin"), "format": "knowlm"}, "not the index of a store"),
    ):
        with pytest.raises(UserError, match=text):
            data_of(tmp_path, tokenizer, None, train=(dataclasses.replace(source, **wrong),))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nothing for an encoder"):
        data_of(tmp_path, tokenizer, None, train=(source,), start_id=0)
