"""Every format gives the same records; every bad input a message that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import SourceConfig
from jaxlm.data.records import Record, read_records
from jaxlm.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"instruction": f"Frage {i}, 石英", "input": "" if i % 2 else 'a, "b"\nc', "output": f"é{i}"} for i in range(5)
]


def read(path: Path, **options: Any) -> list[Record]:
    return list(read_records(SourceConfig(path=str(path), **options)))


def write(path: Path, kind: str) -> Path:
    file = path / f"data.{kind}"
    if kind == "json":
        file.write_text(json.dumps(RECORDS), encoding="utf-8-sig")
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(r) for r in RECORDS) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        import csv

        with file.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
    return file


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_all_formats_give_the_same_records(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, kind)
    records = read(file)
    assert [record.data for record in records] == RECORDS
    assert [record.name for record in records] == [f"{file}:{i}" for i in range(1, 6)]
    assert len(read(file, limit=2)) == 2
    renamed = file.rename(tmp_path / "data.dat")
    assert [record.data for record in read(renamed, format=kind)] == RECORDS


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    write(tmp_path, "jsonl").rename(tmp_path / "lines.json")
    assert [record.data for record in read(tmp_path / "lines.json")] == RECORDS


def test_a_line_or_a_file_of_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one \n\n  two\r\n", encoding="utf-8")
    assert [(r.name[-1], r.data["text"]) for r in read(tmp_path / "a.txt")] == [("1", "one "), ("3", "  two")]
    assert [r.data["text"] for r in read(tmp_path / "a.txt", documents="file")] == ["one \n\n  two\n"]


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "json")
    (tmp_path / "sub" / "b.txt").write_text("deep")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [r.data.get("text") for r in read(tmp_path)] == [None] * 5 + ["deep"]
    assert len(read(tmp_path / "*.json")) == 5
    assert len(read(tmp_path / "**" / "*.txt")) == 1


def test_directories_of_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([4])}).save_to_disk(tmp_path / "two")
    assert [r.data for r in read(tmp_path / "one")] == RECORDS
    assert [r.data for r in read(tmp_path / "two", split="test")] == RECORDS[4:]
    with pytest.raises(UserError, match=r"split of .* is missing; it has test, train"):
        read(tmp_path / "two")
    with pytest.raises(UserError, match=r"split of .* is 'dev'"):
        read(tmp_path / "two", split="dev")
    with pytest.raises(UserError, match="without splits"):
        read(tmp_path / "one", split="dev")


BROKEN = {
    "a.json": ('[{"a": 1},\n {"a": }]', r"a\.json:2: broken JSON"),
    "b.json": ('{"data": [\n{"a": 1}}', r"b\.json:2: broken JSON"),
    "c.json": ("[1, 2]", r"c\.json:1: a record must be an object with named fields, found int"),
    "d.json": ("", "d.json holds no records"),
    "e.json": ("[]", "e.json holds no records"),
    "f.jsonl": ('{"a": 1}\n{"a": \n', r"f\.jsonl:2: broken JSON"),
    "g.csv": ("a,b\n1,2\n1,2,3\n", "g.csv:2: the record ending at line 3 does not have the header's 2 columns"),
    "h.csv": ("a,b\n1\n", "ending at line 2"),
    "i.csv": ('a,b\n1,"2', "i.csv: line .: broken CSV: unexpected end of data"),
    "j.csv": ("a,b\n", "j.csv holds no records"),
    "k.parquet": ("PAR1", "k.parquet is not a readable Parquet file"),
    "l.txt": (" \n", "l.txt holds no records"),
    "m.dat": ("x", r"m\.dat: the ending '\.dat' is unknown; set format"),
    "n": ("x", "n: the ending '' is unknown"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_the_place(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_sources_that_are_not_there_or_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        read(tmp_path / "gone.json")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "*.json")
    with pytest.raises(UserError, match="no file of a known kind"):
        read(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="not a directory written by datasets"):
        read(tmp_path, format="hf")
    with pytest.raises(UserError, match="split is 'train', but"):
        read(tmp_path / "latin.txt", split="train")
    with pytest.raises(UserError, match=r"limit of .* is 0"):
        read(tmp_path / "latin.txt", limit=0)


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "txt"])
def test_compressed_files_are_read_and_broken_ones_refused(tmp_path: Path, kind: str, ending: str) -> None:
    import bz2
    import gzip
    import lzma

    import pyarrow

    plain = {
        "json": json.dumps([{"text": "granite 石英"}, {"text": "b"}], ensure_ascii=False),
        "jsonl": '{"text": "granite 石英"}\n{"text": "b"}\n',
        "csv": 'text,n\n"granite 石英",1\nb,2\n',
        "txt": "granite 石英\nb\n",
    }[ending].encode("utf-8-sig")
    packed = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
    }[kind](plain)
    (tmp_path / f"data.{ending}.{kind}").write_bytes(packed)
    records = read(tmp_path)  # found in a folder by both endings
    assert [record.data["text"] for record in records] == ["granite 石英", "b"]
    (tmp_path / f"data.{ending}.{kind}").write_bytes(plain * 3)
    with pytest.raises(UserError, match=rf"data\.{ending}\.{kind} cannot be decompressed as"):
        read(tmp_path)
    (tmp_path / f"data.{ending}.{kind}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"data\.{ending}\.{kind} cannot be decompressed as"):
        read(tmp_path)


def test_records_may_stand_within_an_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for indent in (None, 1):
        file.write_text(json.dumps({"version": "1.0", "data": [{"text": "a"}, {"text": "b"}]}, indent=indent))
        assert [record.data for record in read(file)] == [{"text": "a"}, {"text": "b"}]
        one = {"messages": [{"role": "user", "content": "q"}], "id": 3}
        file.write_text(json.dumps(one, indent=indent))
        assert [record.data for record in read(file)] == [one]
        file.write_text(json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}, indent=indent))
        with pytest.raises(
            UserError, match=r"several lists of records \(train, test\).*jq '.train' a.json > train.json"
        ):
            read(file)
        file.write_text(json.dumps({"text": {"0": "a", "1": "b"}, "n": {"0": 1}}, indent=indent))
        with pytest.raises(UserError, match=r"one object \(text, n\), not a list of records.*orient=\"records\""):
            read(file)
    file.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [(record.name[-1], record.data) for record in read(file)] == [("2", {"a": 1}), ("4", {"a": 2})]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1" * 5000, r"an integer of more than 4,300 digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the name 'a' stands twice in one object"),
    ],
    ids=["digits", "brackets", "twins"],
)
def test_json_that_python_cannot_read_is_refused_by_record(
    tmp_path: Path, ending: str, value: str, message: str
) -> None:
    good, bad = '{"text": "a"}', f'{{"text": {value}}}'
    content = f"[{good},\n{good}, {bad}]" if ending == "json" else f"{good}\n{good}\n{bad}\n"
    (tmp_path / f"a.{ending}").write_text(content)
    with pytest.raises(UserError, match=rf"a\.{ending}:3: .*{message}"):
        read(tmp_path)


def test_csv_as_spreadsheets_write_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for text in ("q;a\n1,5;x\n", "sep=;\nq;a\n1,5;x\n", "q\ta\n1,5\tx\n", '"q";"a"\n"1,5";x\n'):
        file.write_text(text)
        assert [record.data for record in read(file)] == [{"q": "1,5", "a": "x"}]
    file.write_text("text\none; two\n")
    assert [record.data for record in read(file)] == [{"text": "one; two"}]
    file.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"a\.csv has two columns of the name 'a'"):
        read(file)
    file.write_text("a;b\n1;2;3\n")
    with pytest.raises(
        UserError, match="ending at line 2 does not have the header's 2 columns; is a quotation mark or ';'"
    ):
        read(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"},\n{"text": "b"},\n'),
        ("a.json", '{"text": "a"},\n{"text": "b"}\n'),
        ("b.json", '[{"text": "a"},\n {"text": "b"},]'),
        ("c.json", '[{"text": "a",}]'),
    ],
)
def test_a_comma_too_many_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"broken JSON: .*comma"):
        list(read_records(SourceConfig(path=str(tmp_path / name))))


def test_a_limit_beyond_all_records_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert len(list(read_records(SourceConfig(path=str(tmp_path / "a.txt"), limit=10**20)))) == 2
