"""loss.png and preference.png."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.fonts import any_script
from jaxlm.runs.curves import LossCurve, loss_curve
from jaxlm.runs.metrics import Line
from jaxlm.units import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, VALIDATION, QUIET, BAD = "#3b6fb6", "#d9822b", "#808080", "#c23b3b"


@any_script()
def plot_losses(metrics: Sequence[Line], target: Path, resumes: Iterable[int] = ()) -> None:
    """Training and validation loss over steps and tokens, the learning rate below, as a PNG.

    Args:
        metrics: the lines of the run, of all its starts.
        target: the file.
        resumes: steps from which later starts went on.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curve = loss_curve(metrics)
    heights = [5.0, 1.0] if curve.learning_rate else [5.0, 0.0001]
    with pyplot.rc_context({"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(8, 5), dpi=120, sharex=True, height_ratios=heights, layout="constrained"
        )
        _draw_losses(above, curve, list(resumes))
        lower = below if curve.learning_rate else above
        for axes in (above, below):
            axes.grid(alpha=0.25, linewidth=0.6)
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if curve.learning_rate:
            below.plot(*zip(*curve.learning_rate, strict=True), color=QUIET, linewidth=1.2)
            below.set_ylabel("learning\nrate", fontsize=9)
            below.set_ylim(bottom=0)
            below.yaxis.set_major_locator(MaxNLocator(2))
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else f"{value:.1e}"))
            below.tick_params(axis="y", labelsize=8)
        else:
            below.set_visible(False)
            above.tick_params(labelbottom=True)
        if curve.seen is not None and len(curve.seen) > 1:
            tokens = above.secondary_xaxis("top", functions=(curve.tokens_at, curve.step_at))
            tokens.set_xlabel("tokens", fontsize=9, color=QUIET)
            tokens.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            tokens.tick_params(labelsize=8, colors=QUIET)
            tokens.spines["top"].set_visible(True)
            tokens.spines["top"].set_color("#cccccc")
        above.set_title(target.absolute().parent.name, loc="left", parse_math=False, fontsize=11, fontweight="bold")
        figure.savefig(target)
        pyplot.close(figure)


def _draw_losses(axes: Axes, curve: LossCurve, resumes: Sequence[int]) -> None:
    single = len(curve.step) == 1
    if len(curve.step):
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.step, curve.low, curve.high, color=TRAINING, alpha=0.2, linewidth=0, label="90 % of the steps"
            )
        else:
            # A batch of few tokens is not an outlier: its dot is small.
            size = 16 * np.minimum(curve.tokens / np.median(curve.tokens), 2)
            axes.scatter(curve.step, curve.loss, size, color=TRAINING, alpha=0.3, linewidths=0, label="training, raw")
        label = f"training, smoothed: {curve.smooth[-1]:.4g}"
        axes.plot(curve.step, curve.smooth, "o" if single else "-", color=TRAINING, linewidth=1.8, label=label)
    if curve.validation:
        best, at = min((value, step) for step, value in curve.validation)
        text = f"validation: {curve.validation[-1][1]:.4g}"
        text += f" (lowest {best:.4g}, step {at:,})" if at != curve.validation[-1][0] else ""
        mark = "o" if len(curve.validation) <= 60 else ""
        line = zip(*curve.validation, strict=True)
        axes.plot(*line, color=VALIDATION, marker=mark, markersize=4, linewidth=1.5, label=text)
        axes.plot(at, best, "o", color=VALIDATION, markersize=8, markerfacecolor="none")
    low, high, is_cut = curve.loss_range()
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)
    if is_cut:
        start = max([curve.loss[0], *(value for _, value in curve.validation[:1])])
        axes.annotate(
            f"begins above, at {start:.4g}",
            (0.012, 0.04),
            xycoords="axes fraction",
            fontsize=8,
            color=QUIET,
        )
    for number, step in enumerate(resumes):
        axes.axvline(step, color=QUIET, linestyle=":", linewidth=1, label="" if number else "resumed")
    if curve.not_finite:
        number = len(curve.not_finite)
        places = np.full(number, 0.01)
        label = f"{number:,} step{'' if number == 1 else 's'} not finite"
        transform = axes.get_xaxis_transform()
        axes.plot(curve.not_finite, places, "|", color=BAD, markersize=9, transform=transform, label=label)
    axes.set_ylabel(curve.unit)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=9, framealpha=0.85, edgecolor="none")
    else:
        axes.annotate("no steps yet", (0.5, 0.5), xycoords="axes fraction", ha="center", color=QUIET)


# What `preference.png` shows, by the key whose lines a run has: two panels, each with its axis and its keys.
REWARD_PANELS = {
    "rewards/margins": (
        ("reward", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        ("share of pairs", ("rewards/accuracies",)),
    ),
    "reward": (("reward of an answer", ("reward",)), ("", ("kl", "entropy", "groups_without_signal"))),
}


@any_script()
def plot_rewards(metrics: Sequence[Line], target: Path) -> None:
    """Rewards over steps, of pairs or of the model's own answers, as a PNG; none for other runs."""
    panels = next((REWARD_PANELS[key] for key in REWARD_PANELS if any(key in line for line in metrics)), None)
    if panels is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), dpi=100)
    for axis, (label, keys) in zip(axes, panels, strict=True):
        for number, key in enumerate(keys):
            for prefix, style in (("", "-"), ("validation_", "o")):
                points = [(line["step"], line[prefix + key]) for line in metrics if prefix + key in line]
                if points:
                    name = f"{prefix}{key.rpartition('/')[2]}".replace("_", " ")
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", markersize=4, label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(target.absolute().parent.name, parse_math=False)
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)
