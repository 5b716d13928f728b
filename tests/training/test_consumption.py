"""What a run consumed of each source: counts, figures, a plot whatever sources are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxlm.training.consumption import Consumption, plot_consumption
from jaxlm.training.report import numbers_by_name


def test_counts_go_on_where_a_checkpoint_left_off() -> None:
    first = Consumption(["a", "b"], [100, 0], {"step": 0})
    first.add(np.array([30, 0]))
    first.add(np.array([40, 0]))
    assert first.figures() == {"consumed_tokens": {"a": 70, "b": 0}, "passes": {"a": 0.7, "b": 0.0}}
    later = Consumption(["a", "b"], [100, 0], {"step": 2, **first.state()})
    later.add(np.array([50, 0]))
    assert later.figures()["passes"] == {"a": 1.2, "b": 0.0}
    older = Consumption(["a", "b"], [100, 0], {"step": 2})  # of a version that did not count
    older.add(np.array([50, 0]))
    assert older.figures() == {} == older.state()


@pytest.mark.filterwarnings("error")
def test_a_plot_of_any_names_can_be_drawn(tmp_path: Path) -> None:
    names = ["_hidden.json", "cost$ of $x_$.json", "long/" * 40 + "name"]
    lines = [
        {
            "step": step,
            "consumed_tokens": dict.fromkeys(names, step * 10),
            "passes": dict.fromkeys(names, step / 100),
        }
        for step in range(1, 3000)
    ]
    plot_consumption([{"step": 1, "loss": 2.0}, *lines], tmp_path / "data.png")
    assert (tmp_path / "data.png").stat().st_size > 10_000
    plot_consumption(lines[:1], tmp_path / "one.png")
    plot_consumption([{"step": 1, "loss": 2.0}], tmp_path / "none.png")
    assert (tmp_path / "one.png").exists() and not (tmp_path / "none.png").exists()


def test_figures_by_source_have_names_of_their_own() -> None:
    assert numbers_by_name({"loss": 1.5, "passes": {"a": 0.5}, "text": "x"}) == {"loss": 1.5, "passes/a": 0.5}
