"""Tables, and bars where they cannot be drawn."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from jaxlm import screen
from jaxlm.machine import has_tpu


def test_a_table_in_a_pipe_is_as_wide_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = screen.new_table("figure", "value", "note", title="all", left=["note"])
    table.add_row("a long name of a figure", "1,234.5", "a long remark on it")
    table.add_row("b", "1", "")
    screen.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "all" and lines[1].split() == ["figure", "value", "note"]
    assert lines[3].split("  ") == ["a long name of a figure", "1,234.5", "a long remark on it"]
    assert lines[4].split() == ["b", "1"] and not any(line.endswith(" ") for line in lines)


def test_a_terminal_breaks_a_sentence_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    sentence = "the share of experts [2/4]"
    screen.print_sentence(sentence)
    assert capsys.readouterr().out == f"{sentence}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    screen.print_sentence(sentence)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == ["the share of", "experts", "[2/4]"]


def test_a_bar_in_a_file_writes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    with screen.Bars(console=Console(file=file, width=80), auto_refresh=False) as bars:
        task = bars.add_task("asking", total=100)
        for second in range(1, 100):
            clock[0] = float(second)
            bars.update(task, advance=1)
        text = file.getvalue().splitlines()
    assert [line.split(",")[0] for line in text] == [
        "asking: 31 of 100 (31%)",
        "asking: 61 of 100 (61%)",
        "asking: 91 of 100 (91%)",
    ]


@pytest.mark.parametrize(("transient", "lines"), [(True, 0), (False, 1)])
def test_a_bar_that_does_not_stay_leaves_no_empty_line_in_a_file(transient: bool, lines: int) -> None:
    file = io.StringIO()
    with screen.Bars(console=Console(file=file, width=80), transient=transient) as bars:
        bars.advance(bars.add_task("reading", total=1))
    assert len(file.getvalue().splitlines()) == lines


def test_a_tpu_is_told_by_its_vendor(tmp_path: Path) -> None:
    for name, vendor, found in (("0", "0x8086", False), ("1", "0x1ae0", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        assert has_tpu(tmp_path) is found
