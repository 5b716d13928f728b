"""Line charts as SVG that takes its colours from the page around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 78, 26, 14, 40


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: in the legend and in the notes of its points.
        points: (x, y), by x.
        kind: a class of the page's style: train, raw, valid, quiet, other0 … other5.
        dots: draw the points instead of a line; with both, `line` stays true.
        line: draw a line through them.
    """

    name: str
    points: Points
    kind: str
    dots: bool = False
    line: bool = True


def chart(
    curves: Sequence[Curve],
    label: str,
    *,
    height: int = 260,
    y_range: tuple[float, float] | None = None,
    zero: bool = False,
    number: Callable[[float], str] = lambda value: f"{value:.4g}",
    marks: Sequence[float] = (),
    last: float | None = None,
    above: Callable[[float], str] | None = None,
) -> Markup:
    """An SVG over steps; an empty one where there is nothing to draw.

    Args:
        curves: drawn in order.
        label: what y is.
        height: in pixels of the page's width of 760.
        y_range: values that are shown; what is higher is cut off. None: all.
        zero: y begins at 0.
        number: writes values of y.
        marks: x of dotted vertical lines.
        last: the largest x; None: that of the curves.
        above: writes what stands at the top of a grid line, by its x; None: nothing.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("")
    first, end = min(x for x, _ in points), max([x for x, _ in points] + ([] if last is None else [last]))
    low, high = y_range or (min(y for _, y in points), max(y for _, y in points))
    low = min(low, 0.0) if zero else low
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if zero else low - margin), high + margin
    top = TOP + (18 if above else 0)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - first) / (end - first) if end > first else 0.5)

    def down(y: float) -> float:
        return top + (height - top - BOTTOM) * (1 - (y - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)} by step">']
    for y in ticks(low, high, max(height // 60, 2)):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(first, end, 8, whole=True):
        place = f"{across(x):.1f}"
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{top}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{place}" y="{height - BOTTOM + 16}" text-anchor="middle">{x:,.0f}</text>')
        if above is not None:
            parts.append(f'<text class="tick" x="{place}" y="{top - 6}" text-anchor="middle">{escape(above(x))}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{height - 6}" text-anchor="middle">step</text>')
    middle = (top + height - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'
    )
    for x in marks:
        place = f"{across(x):.1f}"
        parts.append(f'<line class="mark" x1="{place}" x2="{place}" y1="{top}" y2="{height - BOTTOM}"/>')
    for curve in curves:
        kept = _up_to(curve.points, high)
        if curve.line and len(kept) > 1:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in kept)
            parts.append(f'<polyline class="{curve.kind}" points="{path}"/>')
        if curve.dots or len(kept) == 1:
            size = 3 if curve.line else 2
            for x, y in kept:
                note = escape(f"{curve.name}: {number(y)} at step {x:,.0f}")
                parts.append(
                    f'<circle class="{curve.kind}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="{size}">'
                    f"<title>{note}</title></circle>"
                )
    parts.append("</svg>")
    legend = " ".join(f'<span class="{curve.kind}">{escape(curve.name)}</span>' for curve in curves if curve.points)
    return Markup("".join(parts) + f'<p class="legend">{legend}</p>')


def _up_to(points: Points, high: float) -> list[tuple[float, float]]:
    """The points from the first on that is not too high."""
    start = next((place for place, (_, y) in enumerate(points) if y <= high), len(points))
    return [(x, min(y, high)) for x, y in points[start:]]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers between two."""
    if not high > low:
        return [low]
    size = (high - low) / max(most, 1)
    scale = 10.0 ** math.floor(math.log10(size))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= size * (1 - 1e-9))
    if whole:
        step = max(math.ceil(step), 1)
    first = math.ceil(low / step - 1e-9)
    values = [round(place * step, 12) for place in range(first, first + 2 * most + 2)]
    return [value for value in values if value <= high + 1e-9 * step]
