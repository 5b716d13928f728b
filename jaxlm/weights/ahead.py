"""Tensors are read in another thread while those before them are written, so that neither waits for the other."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

Key = TypeVar("Key")
# Blocks that are read and not yet written have so many bytes together, or are one block that is larger.
BYTES_AHEAD = 2 << 20


class _Stopped(Exception):
    """Nobody takes blocks any more."""


class _Queue:
    """What one thread puts and another takes, in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[tuple[str, Any, int]] = deque()
        self._nbytes = 0
        self._stopped = False

    def put(self, kind: str, value: Any, nbytes: int = 0) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._nbytes == 0 or self._nbytes + nbytes <= BYTES_AHEAD)
            if self._stopped:
                raise _Stopped
            self._items.append((kind, value, nbytes))
            self._nbytes += nbytes
            self._changed.notify_all()

    def take(self) -> tuple[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            kind, value, nbytes = self._items.popleft()
            self._nbytes -= nbytes
            self._changed.notify_all()
            return kind, value

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@contextlib.contextmanager
def read_ahead(
    tensors: Iterable[tuple[Key, Iterable[np.ndarray]]],
) -> Iterator[Iterator[tuple[Key, Iterator[np.ndarray]]]]:
    """The same tensors and blocks in the same order, up to `BYTES_AHEAD` of them read before they are asked for.

    All blocks of a tensor are to be taken before the next tensor is. What reading raises is raised where the block is
    asked for. The thread ends with the `with` block.

    Args:
        tensors: (what tells a tensor, its blocks); only the thread goes over it.
    """
    items = _Queue()

    def read() -> None:
        try:
            for key, blocks in tensors:
                items.put("tensor", key)
                for block in blocks:
                    items.put("block", block, block.nbytes)
        finally:
            items.put("end", None)

    def given() -> Iterator[tuple[Key, Iterator[np.ndarray]]]:
        kind, value = items.take()
        while kind == "tensor":
            behind: list[tuple[str, Any]] = []
            yield value, own_blocks(behind)
            assert behind, "the tensor before has blocks that were not taken"
            kind, value = behind[0]
        reading.result()

    def own_blocks(behind: list[tuple[str, Any]]) -> Iterator[np.ndarray]:
        while (item := items.take())[0] == "block":
            yield item[1]
        if item[0] == "end":
            reading.result()
        behind.append(item)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        reading = pool.submit(read)
        try:
            yield given()
        finally:
            items.stop()
