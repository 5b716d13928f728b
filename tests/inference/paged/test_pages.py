"""Pages are handed out, shared, kept and given up; none is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.inference.paged.pages import Node, Pages
from jaxlm.inference.paged.programs import chunk_shapes
from jaxlm.inference.paged.schedule import Shape, best_chunk

SLOTS = 2


def walk(pages: Pages) -> set[int]:
    """The pages of the tree."""
    found, nodes = set(), [*pages._roots.values()]
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        found |= {child.page for child in node.children.values()}
    return found


def read(pages: Pages, adapter: int, tokens: list[int]) -> list[Node] | None:
    """A text that is read to its end; None where pages run out."""
    nodes = pages.find(adapter, tokens)
    while len(nodes) < len(tokens) // SLOTS:
        page = pages.take()
        if page is None:
            pages.release(nodes)
            return None
        start = len(nodes) * SLOTS
        nodes.append(pages.add(adapter, nodes[-1] if nodes else None, tokens[start : start + SLOTS], page))
    return nodes


@given(st.data())
def test_no_page_is_lost_or_has_two_owners(data: Any) -> None:
    pages = Pages(7, SLOTS)
    texts: list[list[Node]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if texts and data.draw(st.booleans()):
            pages.release(texts.pop(data.draw(st.integers(0, len(texts) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), max_size=9))
            nodes = read(pages, data.draw(st.integers(0, 1)), tokens)
            if nodes is not None:
                texts.append(nodes)
        used = {node.page for nodes in texts for node in nodes}
        assert used <= walk(pages)
        assert len(walk(pages)) == len(used) + pages.cached
        assert walk(pages).isdisjoint(pages._free)
        assert len(walk(pages)) + pages.free == pages.count
    for nodes in texts:
        pages.release(nodes)
    assert pages.free + pages.cached == pages.count == pages.available


def test_what_was_used_longest_ago_goes_first() -> None:
    pages = Pages(3, SLOTS)
    for tokens in ([1, 1, 2, 2], [3, 3], [1, 1]):
        nodes = read(pages, 0, tokens)
        assert nodes is not None
        pages.release(nodes)
    assert pages.take() is not None  # of the second half of the first text
    assert [len(pages.find(0, tokens)) for tokens in ([1, 1, 2, 2], [3, 3])] == [1, 1]


def test_texts_of_different_adapters_share_nothing() -> None:
    pages = Pages(3, SLOTS)
    assert read(pages, 1, [1, 2]) and not pages.find(0, [1, 2]) and len(pages.find(1, [1, 2])) == 1


@pytest.mark.parametrize(
    ("left", "on_a_cpu", "elsewhere"),
    [
        ([20], (4, 16), (1, 64)),
        ([128], (4, 16), (1, 256)),  # a CPU would compute 128 tokens of padding
        ([128, 20], (4, 16), (4, 64)),
        ([240], (8, 32), (1, 256)),
        ([64] * 4, (8, 32), (4, 64)),
        ([64, 64], (4, 16), (4, 64)),
        ([9] * 5, (4, 16), (4, 64)),
    ],
)
def test_padding_is_weighed_against_steps(
    left: list[int], on_a_cpu: tuple[int, int], elsewhere: tuple[int, int]
) -> None:
    for overhead, is_cpu, expected in ((32, True, on_a_cpu), (512, False, elsewhere)):
        shape = Shape(8, 9, 16, 9, chunk_shapes(256, 16, is_cpu), overhead)
        assert best_chunk(shape, left) == expected
