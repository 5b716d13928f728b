"""The loss of a run as curves: grouped, smoothed, with the tokens that each step has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxlm.runs.metrics import Line, is_number, ordered, series

Floats = NDArray[np.float64]
MOST = 1000  # points that a curve is drawn of


def binned(points: Floats, most: int = MOST) -> tuple[Floats, ...]:
    """(step, loss, tokens) of at most `most` groups of neighbouring points; step and loss are means weighted by tokens.

    Args:
        points: [n, 3]: step, loss, number of target tokens.
        most: number of groups.
    """
    group = _groups(len(points), most)
    step, loss, tokens = points.T
    steps, losses, total = (
        np.bincount(group, values).astype(np.float64) for values in (tokens * step, tokens * loss, tokens)
    )
    return steps / total, losses / total, total


def _groups(number: int, most: int) -> NDArray[np.int64]:
    return np.arange(number) * most // number if number > most else np.arange(number)


def spread(loss: Floats, most: int = MOST) -> tuple[Floats, Floats]:
    """The 5th and the 95th percentile of each group of neighbouring points, as `binned` makes the groups."""
    starts = np.flatnonzero(np.diff(_groups(len(loss), most), prepend=-1))
    groups = np.split(loss, starts[1:])
    # Sorted once, not twice as by np.percentile, which also takes longer to be called than to compute.
    edges = [np.interp((0.05, 0.95), np.linspace(0, 1, len(group)), np.sort(group)) for group in groups]
    low, high = np.array(edges).T
    return low, high


def smoothed(step: Floats, loss: Floats, tokens: Floats) -> Floats:
    """The loss without its noise: at each point a straight line is fitted to its neighbours (local linear regression).

    Neighbours are weighted by a Gaussian whose width is a 50th of the run, and by their tokens. A moving average would
    lag behind a falling loss, and start at the first value; a straight line through both sides does neither.

    Args:
        step, loss, tokens: [n].

    Returns:
        [n].
    """
    width = max((step[-1] - step[0]) / 50, 1.0)
    result = np.empty_like(loss)
    for i, centre in enumerate(step):
        x = step - centre
        weight = tokens * np.exp(-0.5 * (x / width) ** 2)
        s0, s1, s2 = weight.sum(), (weight * x).sum(), (weight * x * x).sum()
        spread = s0 * s2 - s1 * s1
        line = weight * (s2 - s1 * x) / spread if spread > 1e-9 * s0 * s0 else weight / s0
        result[i] = (line * loss).sum()
    return result


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """What a plot of a run's loss shows; arrays have at most `MOST` points.

    Attributes:
        step, loss, tokens: of the training lines, grouped; tokens are those that the loss is the mean of.
        smooth: the loss without its noise.
        low, high: the 5th and 95th percentile of each group; None where every line is a group of its own.
        last_step: of the lines.
        seen_at, seen: steps, and the tokens of the data up to each; None where the lines do not say.
        validation: (step, loss).
        learning_rate: (step, value).
        not_finite: steps whose loss is not a number.
        unit: what the loss is a mean over.
    """

    step: Floats
    loss: Floats
    tokens: Floats
    smooth: Floats
    low: Floats | None
    high: Floats | None
    last_step: int
    seen_at: Floats
    seen: Floats | None
    validation: list[tuple[int, float]]
    learning_rate: list[tuple[int, float]]
    not_finite: list[int]
    unit: str

    def tokens_at(self, step: Floats) -> Floats:
        """Tokens of the data up to a step, straight lines between and beyond the lines that say it."""
        assert self.seen is not None
        return _straight(step, self.seen_at, self.seen)

    def step_at(self, tokens: Floats) -> Floats:
        """The other way round."""
        assert self.seen is not None
        return _straight(tokens, self.seen, self.seen_at)

    def loss_range(self) -> tuple[float, float, bool]:
        """Lowest and highest loss that is worth showing, and whether the beginning lies above it.

        A fresh model falls within its first hundredth from ln V; a plot that shows all of that shows nothing else.
        """
        values = [value for _, value in self.validation]
        edges = [self.smooth] if self.low is None or self.high is None else [self.smooth, self.low, self.high]
        everything = np.concatenate([*edges, self.loss if self.low is None else self.smooth, values])
        if not len(everything):
            return 0.0, 1.0, False
        low, high = float(everything.min()), float(everything.max())
        if len(self.step) < 50:
            return low, high, False
        begin = self.step[0] + 0.05 * (self.step[-1] - self.step[0])
        later = [value for step, value in self.validation if step >= begin]
        settled = np.concatenate([*(edge[self.step >= begin] for edge in edges), later])
        top = float(settled.max()) + 0.15 * (float(settled.max()) - low)
        return (low, top, True) if high - low > 2.5 * (top - low) else (low, high, False)


def _straight(x: Floats, xs: Floats, ys: Floats) -> Floats:
    x = np.asarray(x, np.float64)
    if len(xs) < 2:
        return x * (ys[0] / xs[0] if len(xs) and xs[0] else 1.0)
    inside = np.interp(x, xs, ys)
    first, last = (ys[1] - ys[0]) / (xs[1] - xs[0]), (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return np.where(x < xs[0], ys[0] + first * (x - xs[0]), np.where(x > xs[-1], ys[-1] + last * (x - xs[-1]), inside))


def loss_curve(metrics: Sequence[Line]) -> LossCurve:
    """The curve of a run's lines of metrics, in any order."""
    lines = ordered(metrics)
    training = [line for line in lines if is_number(line.get("loss"))]
    points = np.array([(m["step"], m["loss"], m.get("tokens") or 1.0) for m in training], np.float64).reshape(-1, 3)
    empty = np.zeros(0)
    step, loss, tokens = binned(points) if len(points) else (empty, empty, empty)
    smooth = smoothed(step, loss, tokens) if len(step) else empty
    low, high = spread(points[:, 1]) if len(points) > MOST else (None, None)
    seen_at, seen = _seen(training)
    return LossCurve(
        step=step,
        loss=loss,
        tokens=tokens,
        smooth=smooth,
        low=low,
        high=high,
        last_step=max((line["step"] for line in lines), default=0),
        seen_at=seen_at,
        seen=seen,
        validation=series(lines, "validation_loss"),
        learning_rate=_thinned(series(lines, "learning_rate")),
        not_finite=[line["step"] for line in lines if "loss" in line and not is_number(line["loss"])],
        unit=_unit(lines),
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    places = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST)).astype(int))
    return [points[place] for place in places]


def _seen(lines: Sequence[Line]) -> tuple[Floats, Floats | None]:
    """Steps and the tokens of the data up to each, as all starts of the run have counted them."""
    if not lines or not all(is_number(line.get("tokens")) for line in lines):
        return np.zeros(0), None
    places = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), MOST)).astype(int))
    if all(isinstance(line.get("consumed_tokens"), dict) for line in lines):
        # Exact, also where not every step has a line.
        total = np.array([sum(line["consumed_tokens"].values()) for line in lines], np.float64)
    else:
        gaps = np.diff([0, *(line["step"] for line in lines)])
        total = np.cumsum(gaps * np.array([line["tokens"] for line in lines], np.float64))
    steps = np.array([line["step"] for line in lines], np.float64)
    steps, total = steps[places], total[places]
    if steps[0] > 0:
        steps, total = np.append(0.0, steps), np.append(0.0, total)
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(total)) > 0])  # two axes need one order
    return steps[rising], np.maximum.accumulate(total)[rising]


def _unit(lines: Sequence[Line]) -> str:
    if any("rewards/margins" in line for line in lines):
        return "loss per pair"
    if any("reward" in line for line in lines):
        return "loss of the policy"
    return "loss per target token (nats)"
