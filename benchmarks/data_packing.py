"""Packing, starts and batches, beside how they were done before: first-fit one document after the other, and a loop.

    python benchmarks/data_packing.py                 # 10^5, 10^6, 10^7 documents; some minutes
    python benchmarks/data_packing.py --most 1e6      # a quick look

Lengths are log-normal with a median of 148 tokens, clipped at a row of 2,048. No tokenizer, no model.

- An epoch: time on one core, what is left empty, peak of allocated memory. First-fit up to 10^6 documents.
- A start: the time until a run of 1,000 epochs knows its number of steps, and until a resumed one has its first batch.
- A batch of short documents, tokens a second.
- What a step loses while the next epoch is planned in a thread: a step is 20 ms of waiting, as for a device.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxlm.data.batches import BATCH_DTYPES, BatchSource
from jaxlm.data.examples import Examples
from jaxlm.data.order import EpochOrder
from jaxlm.data.packing import written_out
from jaxlm.data.planner import Documents, Planner

LENGTH = 2048
REPEATS = 3
FIRST_FIT_UP_TO = 1_000_000


def examples_of(count: int, mean_log: float = 5.0, with_tokens: bool = False) -> Examples:
    """Documents of log-normal lengths; without tokens only planning is possible."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(mean_log, 0.8, count), 2, LENGTH).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(offsets[-1]) if with_tokens else 0
    ids = random.integers(1, 32000, tokens, np.int32)
    source = np.zeros(count, np.int32)
    return Examples(ids, np.ones(tokens, np.bool_), offsets, source, np.zeros(0, np.int64))


def planner_of(examples: Examples, mode: str = "first_fit", version: int = 2, weight: float = 1.0) -> Planner:
    return Planner(Documents(examples, LENGTH), (weight,), mode, LENGTH, seed=1, version=version)


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Time of one core that work takes: others may use the machine too."""
    started = clock()
    work()
    return clock() - started


def epochs(count: int) -> None:
    """The rows of an epoch."""
    examples = examples_of(count)
    kinds = [("by lengths", "first_fit", 2, 1.0), ("by lengths, weight 1.5", "first_fit", 2, 1.5)]
    kinds += [("group_texts", "group_texts", 1, 1.0), ("none", "none", 1, 1.0)]
    if count <= FIRST_FIT_UP_TO:
        kinds.append(("first-fit, one by one", "first_fit", 1, 1.0))
    by_lengths = 0.0
    for name, mode, version, weight in kinds:
        planner = planner_of(examples, mode, version, weight)
        counting = seconds(partial(planner.size, 3))
        repeats = 1 if name.startswith("first-fit") else REPEATS
        took = statistics.median([seconds(partial(planner, number)) for number in range(repeats)])
        by_lengths = by_lengths or took
        tracemalloc.start()
        rows = len(planner(1))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        empty = 1 - int(examples.offsets[-1]) * weight / (rows * LENGTH)
        print(
            f"{count:>11,}  {name:<22} {took:7.2f} s ({took / by_lengths:5.1f} x)  rows counted in {counting:6.3f} s  "
            f"{peak / 2**20:5.0f} MiB" + (f"  {empty:.3%} empty" if mode == "first_fit" else "")
        )


def starts(count: int) -> None:
    """How long a run takes to know its length, and to go on late."""
    examples = examples_of(count)
    for weight, number in ((1.0, 1000), (1.5, 20)):
        order = EpochOrder(planner_of(examples, weight=weight), 128, epochs=1)
        cold = seconds(partial(order.steps_of, number, {}))
        order = EpochOrder(planner_of(examples, weight=weight), 128, epochs=number)
        late = int(0.9 * len(order))
        again = seconds(partial(go_on, examples, weight, number, order.counters(late), late))
        print(
            f"{count:>11,}  weight {weight}  {number} epochs: length known in {cold:.2f} s; resumed at step {late:,} "
            f"in {again:.2f} s, two epochs planned"
        )
    if count <= FIRST_FIT_UP_TO:
        once = seconds(partial(planner_of(examples, version=1), 0))
        print(
            f"{count:>11,}  first-fit, 1000 epochs: length known in {1000 * once:.0f} s (reckoned: 1000 x {once:.2f})"
        )


def go_on(examples: Examples, weight: float, epochs: int, known: dict[str, Any], step: int) -> None:
    """What a resumed run does before its first batch."""
    EpochOrder(planner_of(examples, weight=weight), 128, epochs=epochs, known=known).shares(step)


def plain_batch(examples: Examples, plan: Any, first: int, rows: int) -> dict[str, np.ndarray]:
    """As batches were filled before, piece by piece."""
    batch = {name: np.zeros((rows, LENGTH), dtype) for name, dtype in BATCH_DTYPES.items()}
    for row in range(rows):
        at = 0
        for segment, piece in enumerate(range(plan.rows[first + row], plan.rows[first + row + 1]), 1):
            start, length = int(plan.starts[piece]), int(plan.lengths[piece])
            target, source = slice(at, at + length), slice(start, start + length)
            batch["input_ids"][row, target] = examples.input_ids[source]
            batch["loss_mask"][row, target] = examples.loss_mask[source]
            batch["segment_ids"][row, target] = segment
            batch["positions"][row, target] = np.arange(length)
            at += length
        batch["loss_mask"][row, 0] = False
    batch["modality_ids"][batch["segment_ids"] == 0] = -1
    return batch


def batches() -> None:
    """Batches of 128 rows of documents of about 100 tokens, and of long ones."""
    for mean_log in (4.3, 7.0):
        examples = examples_of(100_000, mean_log, with_tokens=True)
        planner = planner_of(examples)
        order = EpochOrder(planner, 128)
        source = BatchSource(examples, order, LENGTH, rows=128, num_sources=1)
        plan = written_out(planner(0))
        ours = [seconds(partial(source.__getitem__, step)) for step in range(12)]
        theirs = [seconds(partial(plain_batch, examples, plan, 128 * step, 128)) for step in range(12)]
        for name, array in plain_batch(examples, plan, 256, 128).items():
            assert np.array_equal(source[2][name][0], array), name
        tokens = examples.offsets[-1] / len(order)
        ratio = statistics.median(t / o for t, o in zip(theirs[2:], ours[2:], strict=True))
        mean = examples.offsets[-1] / len(examples)
        print(
            f"documents of {mean:.0f} tokens: {tokens / statistics.median(ours) / 1e6:.1f} M tokens/s, by a loop "
            f"{tokens / statistics.median(theirs) / 1e6:.1f}; ratio {ratio:.2f}"
        )


def loss_of_a_step(count: int) -> None:
    """Steps with and without planning beside them."""
    planner = planner_of(examples_of(count))
    planner.size(0)
    planner(0)

    def steps(until: Callable[[int], bool]) -> list[float]:
        times = []
        while until(len(times)):
            times.append(seconds(partial(time.sleep, 0.02), time.perf_counter))
        return times

    alone = steps(lambda done: done < 100)
    thread = threading.Thread(target=lambda: [planner(number) for number in range(3)])
    thread.start()
    beside = steps(lambda done: thread.is_alive())
    late = [t - 0.02 for t in beside]
    print(
        f"{count:>11,}  a step of 20 ms takes {1e3 * statistics.mean(alone):.2f} ms alone, "
        f"{1e3 * statistics.mean(beside):.2f} beside planning; {1e3 * sum(late) / 3:.0f} ms lost an epoch, "
        f"{1e3 * max(late):.0f} by the worst step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=1e7, help="documents of the largest set")
    most = int(parser.parse_args().most)
    sizes = [count for count in (100_000, 1_000_000, 10_000_000) if count <= most]
    for title, work in (("An epoch", epochs), ("A start", starts)):
        print(f"\n{title}")
        for count in sizes:
            work(count)
    print("\nA batch of 128 rows")
    batches()
    print("\nPlanning beside steps")
    loss_of_a_step(sizes[-1])


if __name__ == "__main__":
    main()
