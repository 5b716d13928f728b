"""Which page holds what: free pages, and a tree of pages that texts share by how they begin.

A page of the tree is named by the tokens of all pages before it and its own, so a text that begins with them need not
compute them again. Pages that no text in progress uses stay in the tree until they are needed, the one that was used
longest ago goes first. Everything here is in the host's memory: pages are handed out once in some tens of tokens, while
the device computes the step before.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(eq=False)
class Node:
    """A page of the tree.

    Attributes:
        users: texts in progress that use it; a node has no more than the one above it.
        used: when it was used last.
    """

    page: int
    above: Node | None
    tokens: tuple[int, ...]
    children: dict[tuple[int, ...], Node] = dataclasses.field(default_factory=dict)
    users: int = 0
    used: int = 0


class Pages:
    """The pages of one device memory.

    Texts of different adapters share nothing; an adapter is a number here, 0 is the base.

    Args:
        count: M.
        slots: tokens of a page.
    """

    def __init__(self, count: int, slots: int) -> None:
        self.count, self.slots = count, slots
        self._free = list(range(count - 1, -1, -1))
        self._roots: dict[int, Node] = {}
        self._clock = itertools.count(1)
        self._unused: list[tuple[int, int, Node]] = []  # a heap; entries that no longer hold are skipped
        self.cached = 0

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those that are only kept."""
        return len(self._free) + self.cached

    def take(self) -> int | None:
        """A page to write to; None: texts in progress use all."""
        if not self._free:
            self._evict()
        return self._free.pop() if self._free else None

    def give_back(self, page: int) -> None:
        """Frees a page that is not in the tree."""
        self._free.append(page)

    def find(self, adapter: int, tokens: Sequence[int]) -> list[Node]:
        """The pages of the tree that hold the beginning of a text, now in use by one more."""
        node, found = self._root(adapter), []
        for start in range(0, len(tokens) - self.slots + 1, self.slots):
            child = node.children.get(tuple(tokens[start : start + self.slots]))
            if child is None:
                break
            self._use(child)
            found.append(child)
            node = child
        return found

    def add(self, adapter: int, above: Node | None, tokens: Sequence[int], page: int) -> Node:
        """Puts a text's page that is full into the tree, in use by that text.

        Args:
            above: the text's page before; None: this is its first.
            tokens: of the page.

        Returns:
            Its node. It has another page where the same text was computed twice, and `page` is free then.
        """
        node, key = above or self._root(adapter), tuple(tokens)
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(page, node, key)
            child.users, child.used = 1, next(self._clock)
        else:
            self._use(child)
            self.give_back(page)
        return child

    def release(self, nodes: Sequence[Node]) -> None:
        """A text no longer uses these pages, which stay in the tree."""
        for node in reversed(nodes):
            node.users -= 1
            node.used = next(self._clock)
            if not node.users:
                self.cached += 1
                self._offer(node)

    def _root(self, adapter: int) -> Node:
        return self._roots.setdefault(adapter, Node(-1, None, ()))

    def _use(self, node: Node) -> None:
        self.cached -= not node.users
        node.users += 1

    def _offer(self, node: Node) -> None:
        if node.above is not None and not node.users and not node.children:
            heapq.heappush(self._unused, (node.used, node.page, node))

    def _evict(self) -> None:
        """Frees the page of the tree's outermost nodes that was used longest ago."""
        while self._unused:
            used, page, node = heapq.heappop(self._unused)
            above = node.above
            if above is None or node.users or node.children or node.used != used:
                continue
            node.above = None
            del above.children[node.tokens]
            self.cached -= 1
            self._free.append(page)
            self._offer(above)
            return
