"""Reading ahead of writing: the same blocks in the same order, and no thread that stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from jaxlm.weights import ahead
from jaxlm.weights.ahead import read_ahead

SIZES = {"a": 3, "empty": 0, "b": 8, "c": 1}
BLOCK_BYTES = 16


class Reading:
    """Blocks that count up, and the number of those that were read."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.done, self.breaks_at, self.thread = 0, breaks_at, threading.current_thread()

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            if self.done == self.breaks_at:
                raise ValueError("broken")
            self.done += 1
            self.thread = threading.current_thread()
            yield np.full(2, self.done, np.int64)

    def tensors(self) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        if self.breaks_at == -2:
            raise ValueError("broken")
        yield from ((name, self.blocks(count)) for name, count in SIZES.items())


def test_blocks_come_in_order_from_another_thread() -> None:
    reading = Reading()
    with read_ahead(reading.tensors()) as tensors:
        found = {name: [int(block[0]) for block in blocks] for name, blocks in tensors}
    assert found == {"a": [1, 2, 3], "empty": [], "b": list(range(4, 12)), "c": [12]}
    assert reading.thread is not threading.current_thread() and not reading.thread.is_alive()


@pytest.mark.parametrize(("limit", "num_ahead"), [(1, 1), (BLOCK_BYTES, 1), (4 * BLOCK_BYTES + 7, 4)])
def test_only_some_blocks_are_ahead(limit: int, num_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BYTES_AHEAD", limit)
    reading = Reading()
    with read_ahead(reading.tensors()) as tensors:
        name, blocks = next(tensors)
        assert name == "a" and int(next(blocks)[0]) == 1
        deadline = time.monotonic() + 20
        # The one that was taken, those ahead, and the one that waits for a place.
        while reading.done < num_ahead + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert reading.done == num_ahead + 2
    assert not reading.thread.is_alive()


@pytest.mark.parametrize("place", [-2, 0, 2, 3, 11])
def test_an_error_is_raised_where_the_block_is_asked_for(place: int) -> None:
    reading, seen = Reading(place), 0
    with pytest.raises(ValueError, match="broken"), read_ahead(reading.tensors()) as tensors:
        for _, blocks in tensors:
            for _ in blocks:
                seen += 1
    assert seen == max(place, 0)


def test_an_error_of_the_writer_ends_the_thread() -> None:
    reading = Reading()
    with pytest.raises(OSError, match="full"), read_ahead(reading.tensors()) as tensors:
        for _, blocks in tensors:
            next(blocks)
            raise OSError("full")
    assert not reading.thread.is_alive()
