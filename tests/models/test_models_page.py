"""docs/models.md is current: what the tests of the matrix find is in it (those compare each cell), for every family."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlm.models.families import FAMILIES
from tests.models import matrix
from tests.models.matrix import CAPABILITIES, COMMAND, NOT_RUN, PAGE, REFUSED, YES, Matrix, page_of, read_page


def test_every_family_and_capability_is_in_the_page() -> None:
    page = read_page()
    assert list(page) == list(FAMILIES), f"write the page: pytest {COMMAND}"
    for family, cells in page.items():
        assert list(cells) == list(CAPABILITIES), family
        # Every run of a cell's test compares what it finds with the cell.
        assert {outcome for outcome, _ in cells.values()} <= {YES, REFUSED, NOT_RUN}
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{family.architecture}`" in text and f"| {family.name} |" in text for family in FAMILIES.values())
    numbers = {int(number) for number in re.findall(r"refused \[(\d+)\]", text)}
    assert numbers == {int(number) for number in re.findall(r"^(\d+)\. `.+`$", text, re.MULTILINE)}


def test_what_was_settled_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {
        "llama": {"convert": (YES, ""), "experts": (REFUSED, "no [3] neurons"), "int8": (REFUSED, "no [3] neurons")}
    }
    text = page_of(cells)
    assert "| refused [1] |" in text and "1. `no [3] neurons`" in text
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "models.md")
    assert read_page() == {}
    matrix.PAGE.write_text(text, encoding="utf-8")
    found = read_page()
    assert list(found) == list(FAMILIES)
    rest = dict.fromkeys(CAPABILITIES, (NOT_RUN, ""))
    assert found["llama"] == rest | cells["llama"] and found["bloom"] == rest


def test_what_did_not_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "models.md")
    for capability, outcome in (("convert", (YES, "")), ("experts", (REFUSED, "no neurons"))):
        run = Matrix()
        run.cells = {"llama": {capability: outcome}}
        run.pytest_terminal_summary(SimpleNamespace(config=SimpleNamespace(), write_line=lambda line: None))
    found = read_page()["llama"]
    assert (found["convert"], found["experts"], found["int8"]) == ((YES, ""), (REFUSED, "no neurons"), (NOT_RUN, ""))
