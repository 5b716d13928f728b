"""docs/models.md is current: what the tests of the matrix find is in it (those compare each cell), for every family."""

from __future__ import annotations

import re

from jaxlm.models.families import FAMILIES
from tests.models.matrix import CAPABILITIES, COMMAND, NO, NOT_RUN, PAGE, REFUSED, YES, page_of, read_page


def test_every_family_and_capability_is_in_the_page() -> None:
    page = read_page()
    assert list(page) == list(FAMILIES), f"write the page: pytest {COMMAND}"
    for family, cells in page.items():
        assert list(cells) == list(CAPABILITIES), family
        assert {*cells.values()} <= {YES, REFUSED, NO}, f"{family}: not all of its tests ran: pytest {COMMAND}"
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{family.architecture}`" in text and f"| {family.name} |" in text for family in FAMILIES.values())
    numbers = {int(number) for number in re.findall(r"refused \[(\d+)\]", text)}
    assert numbers == {int(number) for number in re.findall(r"^(\d+)\. `.+`$", text, re.MULTILINE)}


def test_what_was_settled_is_what_is_read() -> None:
    cells = {"llama": {"convert": (YES, ""), "experts": (REFUSED, "no neurons"), "int8": (REFUSED, "no neurons")}}
    lines = page_of(cells).splitlines()
    (row,) = (line for line in lines if line.startswith("| llama |"))
    found = [cell.strip() for cell in row.strip("|").split("|")][1:]
    given = dict(zip(CAPABILITIES, found, strict=True))
    assert (given["convert"], given["experts"], given["int8"]) == (YES, "refused [1]", "refused [1]")
    assert (given["GGUF"], given["logits"]) == (NO, NOT_RUN) and "1. `no neurons`" in lines
