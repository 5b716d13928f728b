"""The loss plot's lines."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxlm.runs.curves import binned, loss_curve, smoothed
from jaxlm.runs.plots import plot_losses, plot_rewards
from jaxlm.training.consumption import plot_consumption


@pytest.mark.parametrize("steps", [2, 5, 150, 1000])
def test_a_straight_loss_stays_as_it_is(steps: int) -> None:
    """No lag, and no pull at either end."""
    step = np.arange(steps, dtype=np.float64)
    loss = 9.0 - 0.05 * step
    np.testing.assert_allclose(smoothed(step, loss, np.ones(steps)), loss, atol=1e-9)


def test_a_falling_loss_is_followed() -> None:
    """Where the exponential average of before was half a nat late."""
    step = np.arange(150, dtype=np.float64)
    loss = 7.5 * np.exp(-step / 30)
    noisy = loss + np.random.default_rng(0).normal(0, 0.05, 150)
    found = smoothed(step, noisy, np.ones(150))
    assert np.abs(found - loss).max() < 0.15
    assert np.abs(np.diff(found)).mean() < np.abs(np.diff(noisy)).mean()


def test_a_last_batch_of_few_tokens_is_not_an_outlier() -> None:
    step = np.arange(100, dtype=np.float64)
    loss, tokens = np.full(100, 2.0), np.full(100, 2048.0)
    loss[-1], tokens[-1] = 6.0, 10.0
    assert np.abs(smoothed(step, loss, tokens) - 2).max() < 0.05
    assert smoothed(step, loss, np.ones(100))[-1] > 3


def test_one_point_and_many() -> None:
    np.testing.assert_allclose(smoothed(*binned(np.array([[1.0, 3.0, 7.0]]))), [3.0])
    points = np.stack([np.arange(1, 5001.0), np.linspace(5, 1, 5000), np.full(5000, 8.0)], 1)
    step, loss, tokens = binned(points)
    assert len(step) == 1000 and tokens.sum() == 40000
    np.testing.assert_allclose((loss * tokens).sum(), (points[:, 1] * points[:, 2]).sum())
    # Within a group a line of many tokens counts for more.
    np.testing.assert_allclose(binned(np.array([[1.0, 1.0, 3.0], [2.0, 5.0, 1.0]]), most=1)[1], [2.0])


def test_the_beginning_does_not_flatten_the_rest() -> None:
    """What lies above the plot is said; a short run is shown whole."""
    lines = [{"step": i, "loss": 2.0 + 8 * 0.8**i + 0.01 * (i % 3), "tokens": 8} for i in range(1, 501)]
    low, high, is_cut = loss_curve(lines).loss_range()
    assert is_cut and 1.99 < low < 2.01 and high < 2.5
    assert loss_curve(lines[:40]).loss_range()[2] is False
    assert loss_curve([]).loss_range() == (0.0, 1.0, False)


def test_tokens_of_a_step_are_those_of_the_data() -> None:
    """Where not every step has a line, the run's own count is exact; older runs have none."""
    lines = [{"step": 10 * i, "loss": 1.0, "tokens": 5, "consumed_tokens": {"a": 60 * i, "b": i}} for i in range(1, 4)]
    curve = loss_curve(lines)
    np.testing.assert_allclose(curve.tokens_at(np.array([0.0, 15, 30, 40])), [0, 91.5, 183, 244])
    np.testing.assert_allclose(curve.step_at(curve.tokens_at(np.array([0.0, 15, 30, 40]))), [0, 15, 30, 40])
    old = loss_curve([{key: line[key] for key in ("step", "loss", "tokens")} for line in lines])
    np.testing.assert_allclose(old.tokens_at(np.array([10.0, 30.0])), [50, 150])
    assert loss_curve([{"step": 1, "loss": 2.0}]).seen is None


def test_a_later_line_of_a_step_counts() -> None:
    """As of a run that was killed after its last checkpoint, by a version that kept these lines."""
    lines = [{"step": 1, "loss": 3.0, "tokens": 1}, {"step": 2, "loss": 9.0, "tokens": 1}]
    curve = loss_curve([*lines, {"step": 2, "loss": 2.0, "tokens": 1}, {"step": 2, "validation_loss": 4.0}])
    assert curve.loss.tolist() == [3.0, 2.0] and curve.validation == [(2, 4.0)]


def test_many_steps_are_drawn_as_a_band() -> None:
    rng = np.random.default_rng(0)
    curve = loss_curve([{"step": i, "loss": float(rng.normal(2, 0.1)), "tokens": 4} for i in range(1, 20001)])
    assert curve.low is not None and curve.high is not None and len(curve.low) == len(curve.step) == 1000
    assert 1.75 < curve.low.mean() < 1.9 and 2.1 < curve.high.mean() < 2.25


def test_a_plot_of_any_run_can_be_drawn(tmp_path: Path) -> None:
    for number, lines in enumerate(
        (
            [],
            [{"step": 1, "loss": 3.0}],
            [{"step": 1, "loss": float("nan"), "tokens": 3}, {"step": 0, "validation_loss": 2.0}],
            [{"step": i, "loss": 3.0 - i / 100, "tokens": 64.0} for i in range(1, 90)],
            [{"step": i, "loss": 9.0 if i < 4 else 0.5, "tokens": 64.0} for i in range(1, 200)],
        )
    ):
        plot_losses(lines, tmp_path / f"{number}.png", [1])
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["锆石 ジルコン", "a$b_{$"])
def test_a_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Neither warnings of a font among a command's lines, nor a name that is read as a formula."""
    folder = tmp_path / name
    folder.mkdir()
    line = {"step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens": 8, "reward": 0.5, "kl": 0.1}
    sources = {"consumed_tokens": {f"{name}.json": 8}, "passes": {f"{name}.json": 0.5}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses([line], folder / "loss.png")
        plot_rewards([line], folder / "preference.png")
        plot_consumption([line | sources], folder / "data.png")
    assert all((folder / f"{figure}.png").stat().st_size > 1000 for figure in ("loss", "preference", "data"))
