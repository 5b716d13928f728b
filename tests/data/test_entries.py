"""Entries of files: what is wrong with one is said with its place, and the others are still read."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxlm.data.entries import Entry, read_entries
from jaxlm.errors import UserError


def entries(file: Path, kind: str, content: str, **options: object) -> list[Entry]:
    file.write_text(content)
    return list(read_entries(file, kind, key="k", **options))  # type: ignore[arg-type]


def test_a_broken_line_is_an_entry_with_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good, broken, last = entries(file, "jsonl", '{"a": 1}\n\n{"a": \n"text"\n')
    assert good == Entry(f"{file}:1", {"a": 1}) and last == Entry(f"{file}:4", "text")
    assert broken.name == f"{file}:3" and broken.value is None
    assert broken.problem is not None and broken.problem.startswith("broken JSON: Expecting value")


def test_a_row_without_the_headers_columns_is_an_entry_with_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    good, short, last = entries(file, "csv", "sep=;\na;b\n1;2\n3\n4;5\n")
    assert (good.value, last) == ({"a": "1", "b": "2"}, Entry(f"{file}:3", {"a": "4", "b": "5"}))
    assert short.problem is not None
    assert short.problem.startswith("the record ending at line 4 does not have the header's 2 columns")


def test_quotation_marks_inside_a_field_count_only_when_strict(tmp_path: Path) -> None:
    content = 'a\tb\n"x" y\t2\n'
    (entry,) = entries(tmp_path / "a.tsv", "csv", content, delimiter="\t", strict=False)
    assert entry.value == {"a": "x y", "b": "2"}
    with pytest.raises(UserError, match=r"k: .*a\.tsv: line 2: broken CSV"):
        entries(tmp_path / "a.tsv", "csv", content)


def test_a_file_that_is_broken_as_a_whole_is_refused_by_its_key(tmp_path: Path) -> None:
    for name, kind, content, message in (
        ("a.json", "json", "[1,", r"k: .*a\.json:1: broken JSON"),
        ("a.json", "json", '"text"', r"k: .*a\.json must hold an array of records, found str"),
        ("a.csv", "csv", "a,a\n1,2\n", r"k: .*a\.csv has two columns of the name 'a'"),
        ("a.parquet", "parquet", "x", r"k: .*a\.parquet is not a readable Parquet file"),
    ):
        with pytest.raises(UserError, match=message):
            entries(tmp_path / name, kind, content)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"k: .*a\.txt is not UTF-8"):
        list(read_entries(tmp_path / "a.txt", "text", key="k"))
