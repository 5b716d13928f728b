"""MindRecord: the bytes that MindSpore writes, and what is wrong with a file is said."""

from __future__ import annotations

import gzip
import hashlib
import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.mindrecord import (
    SCIMIND_FIELDS,
    MindRecordWriter,
    read_rows,
    read_scimind,
    scimind_row,
    shards_of,
)
from jaxlm.errors import UserError
from tests.data.mindrecord_rows import CASES, HEADER_SIZE, PAGE_SIZE, rows

GOLDEN = Path(__file__).parents[2] / "../shared/data/golden/mindrecord"
# SHA-256 of the files that MindSpore 2.10 writes of these rows, in one call; test_mindrecord_peer.py makes them anew.
MINDSPORE = {
    "scimind.mindrecord": "00d737b8184cc03818254c7013a0296e303099e33d03a0aa57b2578c4ad41199",
    "lone.mindrecord": "b5ab138896d118f45bdbe94b20dd4e61b70b8f39f549e253e9d2acbaeeccc624",
    "types.mindrecord": "3169c015eada76aa6791e3357e8088dc128cd43812367d9016559bba95570123",
}


def write(folder: Path, name: str, shards: int = 1) -> Path:
    sizes = {"page_size": PAGE_SIZE, "header_size": HEADER_SIZE}
    with MindRecordWriter(folder / name, CASES[name], shards=shards, **sizes) as writer:
        for row in rows(name):
            writer.write(row)
    return folder / name


def small(folder: Path, shards: int = 1, page_size: int = 200) -> Path:
    """Twelve rows as SciMind has them, on several pages, in 4 KiB."""
    path = folder / "small.mindrecord"
    with MindRecordWriter(path, SCIMIND_FIELDS, shards=shards, page_size=page_size, header_size=3072) as writer:
        for number in range(12):
            ids = np.array([1, 32000 + number, 300, 2], np.int32)
            writer.write(scimind_row(ids, np.array([False, True, True, True]), 6))
    return path


def same(row: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return row.keys() == other.keys() and all(
        row[name].dtype == other[name].dtype and row[name].tobytes() == other[name].tobytes() for name in row
    )


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_mindspore_to_the_byte_and_read_back(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == MINDSPORE[name]
    back = list(read_rows(file))
    assert all(same(mine, theirs) for mine, theirs in zip(back, rows(name), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.db"]


def test_shards_hold_all_rows_in_turn(tmp_path: Path) -> None:
    write(tmp_path, "scimind.mindrecord", shards=3)
    shards = [tmp_path / f"scimind.mindrecord{number}" for number in range(3)]
    assert shards_of(shards[1]) == shards
    wanted = list(rows("scimind.mindrecord"))
    for number, shard in enumerate(shards):
        assert all(same(a, b) for a, b in zip(read_rows(shard), wanted[number::3], strict=True))
    shards[2].unlink()
    with pytest.raises(
        UserError, match=r"mindrecord0: belongs to a data set of 3 files, of which scimind\.mindrecord2"
    ):
        shards_of(shards[0])


def test_files_of_mindspore_are_read_and_written_anew_alike(tmp_path: Path) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("files written by MindSpore are not at hand")
    for name in ("a.mindrecord", "b.mindrecord0", "b.mindrecord1"):
        with gzip.open(GOLDEN / f"{name}.gz") as packed, (tmp_path / name).open("wb") as file:
            shutil.copyfileobj(packed, file)
        shutil.copy(GOLDEN / f"{name}.db", tmp_path)
    whole = list(read_rows(tmp_path / "a.mindrecord"))
    assert [len(row["input_ids"]) for row in whole] == [6, 7, 8, 9, 10]
    assert whole[0]["input_ids"].tolist() == [1, 300, -100, 32000, 70000, 2]
    assert whole[0]["molecular_mask"].tolist() == [0, 0, 0, 1, 1, 0]
    parts = [row for shard in shards_of(tmp_path / "b.mindrecord1") for row in read_rows(shard)]
    key = [row["input_ids"].tobytes() for row in whole]
    assert sorted(row["input_ids"].tobytes() for row in parts) == sorted(key)
    (tmp_path / "again").mkdir()
    with MindRecordWriter(tmp_path / "again/a.mindrecord", SCIMIND_FIELDS, description="qa") as writer:
        for row in whole:
            writer.write(row)
    assert (tmp_path / "again/a.mindrecord").read_bytes() == (tmp_path / "a.mindrecord").read_bytes()
    indexes = [sqlite3.connect(tmp_path / folder / "a.mindrecord.db") for folder in (".", "again")]
    for table in ("INDEXES", "SHARD_NAME"):
        mine, theirs = (list(index.execute(f"SELECT * FROM {table}")) for index in indexes)
        assert mine == theirs


def test_examples_are_what_scimind_trains_on(tmp_path: Path) -> None:
    example = np.array([1, 5, 32010, 7, 2], np.int32), np.array([False, False, True, False, True])
    row = scimind_row(*example, 9)
    assert row["input_ids"].tolist() == [1, 5, 32010, 7, 2, 0, 0, 0, 0]
    assert row["labels"].tolist() == [-100, -100, 32010, -100, 2, -100, -100, -100, -100]
    assert row["molecular_mask"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    untrained = {"input_ids": np.array([1, 5, 6]), "labels": np.array([-100] * 3), "molecular_mask": np.zeros(2)}
    with MindRecordWriter(tmp_path / "qa", SCIMIND_FIELDS) as writer:
        writer.write(row)
        writer.write(untrained)
    first, second = read_scimind(tmp_path / "qa")
    assert all(map(np.array_equal, first, example))
    assert second[0].tolist() == [1, 5, 6] and not second[1].any()
    with MindRecordWriter(tmp_path / "wiki", {"input_ids": "int32"}) as writer:
        writer.write({"input_ids": np.array([4, 0, 0])})
    (only,) = read_scimind(tmp_path / "wiki")
    assert only[0].tolist() == [4, 0, 0] and only[1].tolist() == [False, True, True]
    for change, message in (
        ({"labels": np.full(9, 3)}, "qa2?:1: a label is neither its token nor -100"),
        ({"labels": np.full(8, -100)}, ":1: 9 input_ids, but 8 labels"),
        ({"input_ids": np.full(9, -1)}, ":1: input_ids are not token ids"),
    ):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        with MindRecordWriter(tmp_path / "other/qa", SCIMIND_FIELDS) as writer:
            writer.write({**row, **change})
        with pytest.raises(UserError, match=message):
            list(read_scimind(tmp_path / "other/qa"))


def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path: Path) -> None:
    file = small(tmp_path, shards=2)
    first, second = tmp_path / "small.mindrecord0", tmp_path / "small.mindrecord1"
    assert not file.exists()
    content, index = first.read_bytes(), tmp_path / "small.mindrecord0.db"

    def refused(message: str, change: bytes | None = None) -> None:
        first.write_bytes(content if change is None else change)
        with pytest.raises(UserError, match=rf"small\.mindrecord0(\.db)?: .*(?:{message})"):
            list(read_rows(first))
        first.write_bytes(content)

    for length in (0, 5, 40, 500):
        refused("is not a MindRecord file, or is cut short|header", content[:length])
    for length in (3072, 3100, len(content) - 200, len(content) - 1):
        refused("it is cut short", content[:length])
    refused(r"its header is that of small\.mindrecord1", second.read_bytes())
    refused("its schema does not describe its arrays", content.replace(b"input_ids", b"input_idz", 1))
    refused("has molecular_mask of a kind", content.replace(b'"float32"', b'"gloat32"'))
    refused("has input_ids of a kind", content.replace(b"[-1]", b"[-2]"))
    lengths = [(length).to_bytes(8, "big") for length in (20, 16)]
    refused("row 0 is longer than its fields", content.replace(lengths[0], lengths[1], 1))
    codes = bytes([0, 0, 0, 6, 0b00010100, 0])  # the widths of 1, 32000, ... in the first row's input_ids
    refused(
        "input_ids of row 0 does not have the length that its numbers' widths say",
        content.replace(codes, codes[:-1] + b"\1", 1),
    )
    refused(r"version '2\.0'", content.replace(b'"version":"3.0"', b'"version":"2.0"'))
    refused("its index has 6 rows, the file 7", content.replace(b'"end_row_id":6', b'"end_row_id":7'))
    index.rename(tmp_path / "kept.db")
    refused("its index, small.mindrecord0.db, is not beside it")
    shutil.copy(tmp_path / "small.mindrecord1.db", index)
    refused("its index is that of small.mindrecord1")
    index.write_bytes(b"no database" * 100)
    refused("is not an index of MindRecord")
    for statement, message in (
        ("DELETE FROM INDEXES WHERE ROW_ID = 5", "its index has 5 rows, the file 6"),
        ("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 90 WHERE ROW_ID = 0", "row 0 does not have the length"),
        ("UPDATE INDEXES SET ROW_ID = 9 WHERE ROW_ID = 2", "has row 2 elsewhere"),
        ("UPDATE INDEXES SET PAGE_ID_BLOB = 0 WHERE ROW_ID = 5", "has row 5 elsewhere"),
        ("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 'x' WHERE ROW_ID = 5", "has row 5 elsewhere|end outside"),
        ("DROP TABLE SHARD_NAME", "is not an index"),
    ):
        shutil.copy(tmp_path / "kept.db", index)
        with sqlite3.connect(index) as connection:
            connection.execute(statement)
        connection.close()
        refused(message)
    shutil.copy(tmp_path / "kept.db", index)
    assert len(list(read_rows(first))) == 6


def test_damaged_files_are_refused_by_name_and_never_give_rows_of_another_shape(tmp_path: Path) -> None:
    file = small(tmp_path)
    index = tmp_path / "small.mindrecord.db"
    originals = {path: path.read_bytes() for path in (file, index)}
    wanted = list(read_rows(file))
    shapes = [{name: array.shape for name, array in row.items()} for row in wanted]
    rng, refusals = random.Random(0), 0
    for case in range(800):
        path = file if case % 3 else index
        content = bytearray(originals[path])
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(3900 if rng.random() < 0.5 else len(content)) % len(content)] = rng.randrange(256)
        if case % 7 == 0:
            begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
            content[begin:end] = content[end : end + rng.randrange(40)] if case % 2 else b""
        path.write_bytes(content)
        try:
            back = list(read_rows(file))
        except UserError as error:
            refusals += 1
            assert "small.mindrecord" in str(error)
        else:
            assert [{name: array.shape for name, array in row.items()} for row in back] == shapes
        path.write_bytes(originals[path])
    assert refusals > 200


def test_a_writer_leaves_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), MindRecordWriter(tmp_path / "x", {"input_ids": "int32"}, shards=2) as writer:
        writer.write({"input_ids": np.array([1])})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for row, message in (
        ({"a": np.zeros(0)}, "row 0: fields a, expected input_ids"),
        ({"input_ids": np.array([1 << 31])}, "holds a number that does not fit int32"),
        ({"input_ids": np.array([0.5])}, r"expected a row of int32, found float64 \[1\]"),
        ({"input_ids": np.arange(300)}, "does not fit a page of 100"),
    ):
        with (
            pytest.raises(UserError, match=message),
            MindRecordWriter(tmp_path / "x", {"input_ids": "int32"}, page_size=100) as writer,
        ):
            writer.write(row)
    with (
        pytest.raises(UserError, match="more than a header of 600 bytes can name; write more shards"),
        MindRecordWriter(tmp_path / "x", {"input_ids": "int32"}, page_size=100, header_size=600) as writer,
    ):
        for _ in range(50):
            writer.write({"input_ids": np.arange(20)})
    assert list(tmp_path.iterdir()) == []
    with MindRecordWriter(tmp_path / "x", {"input_ids": "int32"}):
        pass
    assert list(read_rows(tmp_path / "x")) == []
    with pytest.raises(UserError, match=r"x: exists already"):
        MindRecordWriter(tmp_path / "x", {"input_ids": "int32"})
