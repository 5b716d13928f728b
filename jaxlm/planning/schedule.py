"""The learning rate of a run over its steps: a line of text, and a plot."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlm.config import OptimizerConfig
from jaxlm.training.optimizer import make_schedule, warmup_steps


def rates(config: OptimizerConfig, steps: int) -> NDArray[np.float32]:
    """float32 [steps], the learning rate of each step of a run."""
    return np.asarray(jax.vmap(make_schedule(config, steps))(jnp.arange(steps)))


def describe(config: OptimizerConfig, values: NDArray[np.float32]) -> str:
    """What becomes of the learning rate, in a line.

    Args:
        values: see `rates`.
    """
    steps, warmup = len(values), warmup_steps(config, len(values))
    peak = int(values.argmax())
    before = f"from {values[0]:.2e} at step 1 to {values[peak]:.2e} at step {peak + 1:,}, then " if warmup else ""
    after = f"{config.schedule} to {values[-1]:.2e} at step {steps:,}"
    if values[-1] == values[peak]:
        after = f"{values[-1]:.2e} to step {steps:,}"
    return f"{before}{after}; mean {values.mean():.2e}"


def draw(config: OptimizerConfig, values: NDArray[np.float32], target: Path) -> None:
    """Writes the plot as a PNG.

    Args:
        values: see `rates`.
    """
    # Not pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(values) + 1), values, color="tab:blue")
    axes.set(xlabel="step", ylabel="learning rate", title=f"{config.name}, {config.schedule}", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Software": None})
