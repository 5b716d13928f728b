"""Data behind addresses: what fsspec reads is read as from a disk, and what is wrong is told by its name."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.config import SourceConfig
from jaxlm.config.prepare import DocumentsConfig
from jaxlm.data.entries import read_entries
from jaxlm.data.prepare.shards import Bad, plan_shards, read_shard
from jaxlm.data.records import Record, check_source, read_records
from jaxlm.errors import UserError
from jaxlm.remote import open_location, scheme_of

LINES = b'{"text": "granite"}\n{"text": "basalt"}\n'
BUCKET = "memory://bucket"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    for name in list(filesystem.store):
        del filesystem.store[name]


def read(path: str, **options: object) -> list[Record]:
    source = SourceConfig(path=path, **options)  # type: ignore[arg-type]
    check_source(source)
    return list(read_records(source))


def texts(records: list[Record]) -> list[str]:
    return [record.data["text"] for record in records]


def put(filesystem: fsspec.AbstractFileSystem, name: str, content: bytes) -> None:
    with filesystem.open(f"/bucket/{name}", "wb") as stream:
        stream.write(content)


def test_files_folders_and_patterns_are_read_behind_an_address(memory: fsspec.AbstractFileSystem) -> None:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["gneiss"]}), sink)
    put(memory, "b.jsonl.gz", gzip.compress(LINES))
    put(memory, "a/z.parquet", sink.getvalue().to_pybytes())
    put(memory, "a/c.jsonl.zst", pyarrow.Codec("zstd").compress(LINES, asbytes=True))
    put(memory, "a/.hidden.jsonl", b"broken")
    put(memory, "a/list.json", b'[{"text": "tuff"}]')
    (first, second) = read(f"{BUCKET}/b.jsonl.gz")
    assert (first.name, texts([first, second])) == (f"{BUCKET}/b.jsonl.gz:1", ["granite", "basalt"])
    assert texts(read(f"{BUCKET}/*/*.jsonl.zst")) == ["granite", "basalt"]
    everything = ["granite", "basalt", "tuff", "gneiss", "granite", "basalt"]
    assert texts(read(BUCKET)) == everything


def test_prepare_reads_blocks_of_a_file_behind_an_address_and_sees_it_change(
    memory: fsspec.AbstractFileSystem,
) -> None:
    put(memory, "a.jsonl", LINES * 20)
    put(memory, "b.jsonl.gz", gzip.compress(LINES))
    shards = plan_shards([DocumentsConfig(path=BUCKET)], block_bytes=100)
    assert [shard.path for shard in shards] == [f"{BUCKET}/a.jsonl"] * 8 + [f"{BUCKET}/b.jsonl.gz"]
    records = [record for shard in shards for record in read_shard(shard, Bad(0))]
    assert texts(records) == ["granite", "basalt"] * 21
    put(memory, "a.jsonl", LINES * 19 + LINES)
    with pytest.raises(UserError, match=r"memory://bucket/a\.jsonl has changed since the work was planned"):
        list(read_shard(shards[0], Bad(0)))
    memory.rm("/bucket/a.jsonl")
    with pytest.raises(UserError, match=r"memory://bucket/a\.jsonl does not exist"):
        list(read_shard(shards[0], Bad(0)))
    for options in ({"path": f"{BUCKET}/x.idx"}, {"path": BUCKET, "format": "mindrecord"}):
        with pytest.raises(UserError, match="copy it here and give the path"):
            plan_shards([DocumentsConfig(**options)], block_bytes=100)  # type: ignore[arg-type]


def test_an_address_of_this_machine_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.jsonl").write_bytes(LINES)
    for path in (f"file://{tmp_path}/a b.jsonl", f"file://{tmp_path}/a%20b.jsonl", f"file://{tmp_path}/*.jsonl"):
        assert texts(read(path)) == ["granite", "basalt"]
    assert isinstance(open_location(f"file://{tmp_path}", "data"), Path)
    assert scheme_of("C:/x") is None and scheme_of("a/b://c") is None and scheme_of("S3://b") == "s3"


def test_a_directory_of_datasets_is_read_behind_an_address(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["granite"]}).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        put(memory, f"saved/{file.name}", file.read_bytes())
    assert texts(read(f"{BUCKET}/saved")) == ["granite"]


def test_what_is_missing_or_cannot_be_read_is_named(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory, "cut.jsonl.gz", gzip.compress(LINES * 100)[:-9])
    put(memory, "broken.jsonl", LINES + b'{"text": \n')
    for path, message in (
        (f"{BUCKET}/none.jsonl", r"data: memory://bucket/none\.jsonl does not exist$"),
        (f"{BUCKET}/*.csv", r"data: memory://bucket/\*\.csv does not exist$"),
        (f"{BUCKET}/cut.jsonl.gz", r"memory://bucket/cut\.jsonl\.gz cannot be decompressed as gzip: it is cut short"),
        (f"{BUCKET}/broken.jsonl", r"memory://bucket/broken\.jsonl:3: broken JSON"),
        ("s3://bucket/a.jsonl", r"s3:// is not installed; pip install 'jaxlm\[remote\]', or pip install s3fs"),
        ("oss://bucket/a.jsonl", r"oss:// is not installed; pip install ossfs"),
        ("foo://bucket/a.jsonl", r"data: foo://bucket/a\.jsonl: nothing reads foo://; known are"),
    ):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.setitem(sys.modules, "ossfs", None)
        with pytest.raises(UserError, match=message):
            read(path)


def test_a_connection_that_breaks_is_told_with_the_address(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory, "a.jsonl", LINES)
    put(memory, "a.jsonl.gz", gzip.compress(LINES))

    def fail(self: object, *args: object) -> bytes:
        raise TimeoutError("nobody answers")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.readinto", fail)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read1", fail, raising=False)
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=r"a\.jsonl(\.gz)? cannot be read: nobody answers; look after the network"):
            read(f"{BUCKET}/{name}")


def test_an_array_is_read_by_blocks_wherever_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [
        {"a": 'quoted "\\" ] , 石\ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16")},
        -12.5e3,
        [],
        "x" * 90,
        True,
        None,
        {"b": [1, 23]},
    ]
    file = tmp_path / "a.json"
    for text in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False) + "\n\n", "\n [ ] "):
        file.write_text(text, encoding="utf-8")
        for block in (1, 2, 3, 7, 50, 10_000):
            monkeypatch.setattr("jaxlm.data.entries._BLOCK", block)
            entries = list(read_entries(file, "json", key="k"))
            assert [entry.value for entry in entries] == json.loads(text)
            assert [entry.name for entry in entries] == [f"{file}:{n + 1}" for n in range(len(entries))]


@pytest.mark.parametrize("block", [1, 5, 10_000])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": x}\n]', ":2: broken JSON: Expecting value"),
        ('[{"a": 1},\n{"a": 2},\n]', ":3: broken JSON: nothing stands between a comma and ']'"),
        ('[{"a": 1}\n{"a": 2}]', ":2: broken JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n{"a": "2', ":2: broken JSON: Unterminated string"),
        ('[{"a": 1}', ":1: broken JSON: Expecting ',' delimiter"),
        ('[\n{"a": 1}\n] x', ":3: broken JSON: Extra data"),
        ('[{"a": 1}, {"b": 1, "b": 2}]', ":2: JSON that cannot be read: the name 'b' stands twice"),
        ("[", ":1: broken JSON: Expecting value"),
    ],
)
def test_a_broken_array_is_refused_with_the_line(
    text: str, message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.data.entries._BLOCK", block)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        list(read_entries(tmp_path / "a.json", "json", key="k"))
    assert message in str(caught.value)


def test_an_array_of_any_size_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "a.json"
    record = json.dumps({"text": "x" * 1000})
    file.write_text(f"[{','.join([record] * 20_000)}]")  # 20 MB in one line
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_entries(file, "json", key="k"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000 and peak < 8e6


def test_web_archives_are_refused_with_the_tool_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "CC-MAIN.warc.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"web archives are not read here; .* datatrove"):
        read(str(tmp_path / "CC-MAIN.warc.gz"))
