"""The loss plot's lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxlm.training.report import binned, plot_losses, smoothed


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


def test_a_plot_of_any_run_can_be_drawn(tmp_path: Path) -> None:
    for number, lines in enumerate(
        (
            [],
            [{"step": 1, "loss": 3.0}],
            [{"step": 1, "loss": float("nan"), "tokens": 3}, {"step": 0, "validation_loss": 2.0}],
            [{"step": i, "loss": 3.0 - i / 100, "tokens": 64.0} for i in range(1, 90)],
        )
    ):
        plot_losses(lines, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
