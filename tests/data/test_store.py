"""The token store: its formats to the byte, what opening it checks, and damaged files."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.store import knowlm, megatron
from jaxlm.data.store.columns import InMemory, Part, PartWriter
from jaxlm.data.store.manifest import check_tokenizer, read_manifest
from jaxlm.data.store.stored import Selected, StoredTokens, write_store
from jaxlm.data.store.torch_numbers import read_numbers, write_numbers
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer
from tests.data.store_samples import chunks, manifest, small_store

ATTRIBUTES = ("input_ids", "loss_mask", "offsets", "source", "record", "encoder_ids", "encoder_offsets")


def same(stored: Any, wanted: Any) -> None:
    for name in ATTRIBUTES:
        mine, other = getattr(stored, name), getattr(wanted, name)
        assert (mine is None) == (other is None), name
        if other is not None:
            np.testing.assert_array_equal(mine, other, name)
    assert stored.digest() == wanted.digest()
    assert len(stored) == len(wanted)
    for number in range(len(wanted)):
        np.testing.assert_array_equal(stored[number].input_ids, wanted[number].input_ids)
        assert stored[number].input_ids.dtype == np.int32


@pytest.mark.parametrize("with_encoder", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_store_gives_what_was_written(tmp_path: Path, dtype: Any, with_encoder: bool) -> None:
    wanted = small_store(tmp_path / "s", dtype, with_encoder)
    stored = StoredTokens(tmp_path / "s")
    assert stored.input_ids.dtype == dtype
    same(stored, wanted)
    again = pickle.loads(pickle.dumps(stored))  # noqa: S301  (as loader processes get it)
    assert len(pickle.dumps(stored)) < 500
    same(again, wanted)
    stored.verify()


def test_parts_joined_are_the_same_as_one_whole(tmp_path: Path) -> None:
    small_store(tmp_path / "whole")
    for number, (source, chunk) in enumerate(chunks()):
        part = PartWriter(tmp_path / f"part-{number}", np.dtype(np.uint16), False)
        part.add(source, chunk)
        part.finish()
    parts = [Part(tmp_path / f"part-{number}") for number in range(3)]
    assert [list(part.reports) for part in parts] == [[0], [0], [1]]
    write_store(tmp_path / "joined", parts, np.dtype(np.uint16), manifest(np.uint16))
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "joined" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_selection_is_what_take_gives(tmp_path: Path, with_encoder: bool) -> None:
    wanted = small_store(tmp_path / "s", with_encoder=with_encoder)
    keep = np.random.default_rng(1).random(len(wanted)) < 0.5
    columns = Selected(StoredTokens(tmp_path / "s"), keep)
    taken = wanted.take(np.flatnonzero(keep))
    counts = {"examples": columns.examples}
    if taken.encoder_ids is not None:
        counts["encoder_tokens"] = len(taken.encoder_ids)
    write_store(tmp_path / "t", [columns], np.dtype(np.uint16), manifest(np.uint16, with_encoder, **counts))
    part = StoredTokens(tmp_path / "t")
    for name in set(ATTRIBUTES) - {"record"}:
        np.testing.assert_array_equal(getattr(part, name), getattr(taken, name), name)
    assert part.digest() == taken.digest()
    np.testing.assert_array_equal(np.diff(part.record) != 0, np.diff(taken.record) != 0)


def test_an_index_is_megatrons_to_the_byte(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    # Written out by hand from the format: two documents of one and two sequences.
    lengths = [3, 0, 2]
    raw = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    raw += struct.pack("<3i3q3q", *lengths, 0, 6, 6, 0, 1, 3)
    file = io.BytesIO()
    blocks = [np.array(lengths, np.int32)]
    megatron.write_index(file, np.dtype(np.uint16), (3, 2), blocks, blocks, [np.array([0, 1])])
    assert file.getvalue() == raw
    index = megatron.parse_index(raw, Path("x.idx"), 10)
    assert index.lengths.tolist() == lengths and index.documents.tolist() == [0, 1, 3] and index.dtype == np.uint16


def test_small_vocabularies_take_two_bytes() -> None:
    assert [megatron.token_dtype(size) for size in (32000, 65499, 65500, 128256)] == ["u2", "u2", "i4", "i4"]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut short, made longer, or with some bytes changed."""
    kind = random.integers(4)
    if kind == 0:
        return content[: random.integers(len(content))]
    if kind == 1:
        return content + random.bytes(int(random.integers(1, 20)))
    changed = bytearray(content)
    for place in random.integers(len(content), size=random.integers(1, 4)):
        changed[place] = random.integers(256) if kind == 2 else changed[place] ^ (1 << random.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("module", [megatron, knowlm])
def test_a_damaged_index_never_leads_outside_of_its_tokens(module: Any) -> None:
    random = np.random.default_rng(3)
    lengths = np.array([5, 7, 1, 30], np.int32)
    if module is megatron:
        file = io.BytesIO()
        megatron.write_index(file, np.dtype(np.uint16), (4, 2), [lengths], [lengths], [np.array([0, 3])])
        content = file.getvalue()
    else:
        starts = np.cumsum(lengths) - lengths
        content = starts.astype("<u8").tobytes() + lengths.astype("<u2").tobytes()
    size = 2 * int(lengths.sum())
    refused = 0
    for _ in range(5000):
        try:
            index = module.parse_index(damaged(content, random), Path("x.idx"), size)
        except UserError as error:
            assert str(error).startswith("x.idx: ")
            refused += 1
            continue
        assert index.tokens * index.dtype.itemsize == size
        assert index.lengths.min() >= 0 and (np.diff(index.documents) >= 0).all()
        assert index.documents[0] == 0 and index.documents[-1] == len(index.lengths)
    assert refused > 4000


def test_what_opening_finds(tmp_path: Path) -> None:
    small_store(tmp_path / "s")

    def refusal(change: Any) -> str:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(tmp_path / "s", tmp_path / "t")
        change(tmp_path / "t")
        with pytest.raises(UserError) as caught:
            StoredTokens(tmp_path / "t")
        return str(caught.value)

    def cut(path: Path, by: int = 1) -> None:
        path.write_bytes(path.read_bytes()[:-by])

    assert "tokens.bin: is missing" in refusal(lambda t: (t / "tokens.bin").unlink())
    for name in ("tokens.bin", "tokens.idx", "mask.bin", "source.bin", "offsets.bin"):
        assert f"{name}: " in (text := refusal(lambda t, name=name: cut(t / name))) and "its manifest says" in text
    assert "holds no store" in refusal(lambda t: (t / "manifest.json").unlink())
    assert "manifest.json" in refusal(lambda t: cut(t / "manifest.json", 9))
    newer = refusal(lambda t: edit(t / "manifest.json", '"version": 1', '"version": 2'))
    assert "version is 2" in newer and "newer" in newer

    def swap(directory: Path) -> None:
        raw = bytearray((directory / "offsets.bin").read_bytes())
        raw[8] ^= 1
        (directory / "offsets.bin").write_bytes(raw)

    assert "tokens.idx and its offsets differ" in refusal(swap)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_checksums_find_what_sizes_do_not(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    raw = bytearray((tmp_path / "s/tokens.bin").read_bytes())
    raw[3] ^= 1
    (tmp_path / "s/tokens.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"tokens\.bin: differs from what was written"):
        StoredTokens(tmp_path / "s").verify()


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small_store(tmp_path / "s", tokenizer="abc", tokenizer_path="/models/other", largest_id=70000)
    with pytest.raises(UserError, match=r"tokenised with /models/other \(abc, 300 ids\).*largest id is 70,000"):
        check_tokenizer(tmp_path / "s", read_manifest(tmp_path / "s"), tokenizer, "def")
    small_store(tmp_path / "u", tokenizer="abc", tokenizer_path="/models/other")
    check_tokenizer(tmp_path / "u", read_manifest(tmp_path / "u"), tokenizer, "abc")


def test_nothing_is_left_of_a_store_that_failed(tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_store(tmp_path / "s", [], np.dtype(np.uint16), fail)
    assert not list(tmp_path.iterdir())


def test_knowlms_store_is_written_as_the_original_does(tmp_path: Path, samples: Path) -> None:
    golden = samples / "golden/knowlm_mmap"
    index = knowlm.read_index(golden / "g.idx")
    assert index.lengths.tolist() == [35, 40, 32, 40, 36]
    ids = np.fromfile(golden / "g.bin", np.uint16)
    ends = np.cumsum(index.lengths)
    parts = [(0, ids[end - length : end]) for end, length in zip(ends, index.lengths, strict=True)]
    knowlm.write_store(tmp_path / "g", parts, 1, 2)
    for ending in (".bin", ".idx", ".dis", ".tmp"):
        assert (tmp_path / f"g{ending}").read_bytes() == (golden / f"g{ending}").read_bytes(), ending


def test_numbers_are_written_as_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for numbers in ([], [7], [0, 300, 70_000, 1 << 40, -3], list(range(1001))):
        torch.save(numbers, tmp_path / "a.dis")
        wanted = (tmp_path / "a.dis").read_bytes()
        assert read_numbers(tmp_path / "a.dis") == numbers
        write_numbers(tmp_path / "a.dis", numbers)
        assert (tmp_path / "a.dis").read_bytes() == wanted
    torch.save({"a": 1}, tmp_path / "a.dis")
    with pytest.raises(UserError, match="not a list of whole numbers"):
        read_numbers(tmp_path / "a.dis")


def test_what_knowlms_store_cannot_hold_is_refused(tmp_path: Path) -> None:
    for ids in (np.zeros(70_000, np.int64), np.array([70_000])):
        with pytest.raises(UserError, match="16 bits"):
            knowlm.write_store(tmp_path / "g", [(0, ids)], 1, 2)


def test_swapped_halves_of_two_stores_are_refused(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 4)):
        knowlm.write_store(tmp_path / name, [(0, np.arange(count))], 1, 2)
    (tmp_path / "a.bin").rename(tmp_path / "c.bin")
    with pytest.raises(UserError, match=r"a\.bin is missing"):
        knowlm.read_index(tmp_path / "a.idx")
    (tmp_path / "b.bin").rename(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"describes 6 bytes of tokens, a\.bin has 8"):
        knowlm.read_index(tmp_path / "a.idx")
    (tmp_path / "a.bin").write_bytes((tmp_path / "c.bin").read_bytes())
    (tmp_path / "b.dis").rename(tmp_path / "a.dis")
    knowlm.read_index(tmp_path / "a.idx")
    write_numbers(tmp_path / "a.dis", [2])
    with pytest.raises(UserError, match=r"a\.dis: counts 2 samples"):
        knowlm.read_index(tmp_path / "a.idx")


def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the system does not say how much of a process's memory is of files")
    count = 4_000_000
    ids = np.arange(count, dtype=np.int32)
    chunk = dataclasses.replace(
        chunks()[0][1],
        input_ids=ids,
        loss_mask=np.ones(count, np.bool_),
        lengths=np.array([count], np.int32),
        begins=np.ones(1, np.bool_),
    )
    make = manifest(np.int32, examples=1)
    write_store(tmp_path / "s", [InMemory([(0, chunk)])], np.dtype(np.int32), make)
    stored = StoredTokens(tmp_path / "s")

    def of_files() -> int:
        return int(statm.read_text(encoding="ascii").split()[2]) * os.sysconf("SC_PAGE_SIZE")

    before = of_files()
    assert int(stored.input_ids.sum(dtype=np.int64)) == count * (count - 1) // 2
    assert of_files() - before > 3 * count
    stored.release()
    assert of_files() - before < count
