"""Parts of the loop: evaluation without waiting between batches, and speed with and without pauses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training import loop, report
from jaxlm.training.report import ProgressReport

VALUES = [0.1, 1e8, 0.3, 7.7, 1e-3, 2.5]


def validate(batches: int, due_after: int | None = None) -> Any:
    """`loop.validate` over batches whose sums are VALUES."""
    asked: list[int] = []

    def due() -> bool:
        asked.append(1)
        return due_after is not None and len(asked) > due_after

    compiled = SimpleNamespace(
        weights=lambda state: state,
        evaluate=lambda weights, frozen, micro: {"loss": jnp.float32(VALUES[int(micro["ids"][0, 0])])},
    )
    setup = SimpleNamespace(
        eval_rows=1,
        mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
        put_batch=lambda batch, rows: batch,
        objective=SimpleNamespace(validation=lambda sums: (sums, "text")),
    )
    data = SimpleNamespace(eval_batches=lambda rows, local: ({"ids": np.array([n])} for n in range(batches)))
    hosts = SimpleNamespace(due=due)
    return loop.validate(SimpleNamespace(data=data), setup, compiled, None, None, hosts)  # type: ignore[arg-type]


def test_sums_of_validation_are_read_once_and_added_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "local_rows", lambda mesh, rows: [0])
    reads: list[Any] = []
    read = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(tree) or read(tree))
    figures, _ = validate(len(VALUES))
    assert len(reads) == 1
    assert figures["loss"] == sum(float(np.float32(value)) for value in VALUES)  # to the last bit
    assert validate(len(VALUES), due_after=2) is None and len(reads) == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    yield now


def test_speed_with_pauses_counts_all_the_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    shown = ProgressReport(Console(width=200), total=4, start=0, flops=1.0)
    metrics = {"tokens": 100.0, "loss": 1.0, "learning_rate": 1e-3, "skipped": 0}

    def step(number: int, seconds: float) -> dict[str, float]:
        clock[0] += seconds
        return shown.step(number, metrics)

    first = step(1, 1.0)
    assert (first["tokens_per_second"], first["tokens_per_second_with_pauses"]) == (100, 100)
    assert "pauses" not in capsys.readouterr().out
    clock[0] += 2.0  # a save
    shown.pause()
    second = step(2, 1.0)
    assert (second["tokens_per_second"], second["step_seconds"]) == (100, 1)
    assert second["tokens_per_second_with_pauses"] == 50
    assert "100 tokens/s (50 with pauses)" in capsys.readouterr().out


def test_a_run_for_rewards_says_them(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    clock[0] += 1.0
    metrics = {"tokens": 10.0, "loss": 0.0, "learning_rate": 1e-3, "skipped": 0, "reward": 0.625}
    ProgressReport(Console(width=200), total=1, start=0, flops=1.0).step(1, metrics)
    assert capsys.readouterr().out.startswith("step 1/1  reward 0.625  loss 0.0000  ")


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_is_one_line_of_a_terminal(width: int, clock: list[float]) -> None:
    from rich.console import Console

    console = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    shown = ProgressReport(console, total=12_000, start=0, flops=1.0)
    metrics = {"tokens": 99_000.0, "loss": 1.0, "learning_rate": 1e-3, "skipped": 0}
    for step in (1, 11_998):
        clock[0] += 2.0  # a save
        shown.pause()
        clock[0] += 1.0
        shown.step(step, metrics)
    assert shown._bar is not None
    other = Console(width=width, file=io.StringIO(), color_system=None)  # the first one has all earlier frames, too
    with other.capture() as capture:
        other.print(shown._bar.get_renderable())
    shown.close()
    line, *rest = capture.get().strip().splitlines()
    assert "loss 1.0000  lr 1.00e-03  99,000 tokens/s" in line and not rest
    assert ("(33,000 with pauses)" in line) is (width == 120)
