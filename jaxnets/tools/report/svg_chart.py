"""Line charts as SVG text, colored by the style sheet of their page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: Number of colors that the page defines: var(--series-0), var(--series-1), ...
NUM_COLORS = 6

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 30
_MAX_POINTS = 300
_LARGEST = 1e100  # beyond this a value is not shown


class Series(NamedTuple):
    """A metric over the steps.

    Attributes:
        steps: [points], increasing.
        values: [points, seeds].
    """

    steps: np.ndarray
    values: np.ndarray


def line_chart(title: str, series: Mapping[str, Series]) -> str:
    """Draw metrics over steps: the mean over seeds as a line, their range as a band.

    Args:
        title: of the chart, for screen readers.
        series: {name: points}; values that are not finite, or beyond 1e100, are omitted, such as
            those of networks that diverged.

    Returns:
        An <svg> element, or "" if there is no finite point.
    """
    drawn = {name: _downsampled(_finite(points)) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points.steps)}
    if not drawn:
        return ""
    every = np.ma.concatenate([points.values.ravel() for points in drawn.values()])
    last = max(points.steps[-1] for points in drawn.values()) or 1
    ticks = nice_ticks(float(every.min()), float(every.max()))
    low, high = min(ticks[0], every.min()), max(ticks[-1], every.max())

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{html.escape(title)}</title>'
    ]
    for tick in ticks:
        at = y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in nice_ticks(0, float(last)):
        if tick <= last:
            place = f'x="{x(tick):.1f}" y="{_HEIGHT - 10}" text-anchor="middle"'
            parts.append(f"<text {place}>{tick:,.6g}</text>")
    for index, points in enumerate(drawn.values()):
        color = f"var(--series-{index % NUM_COLORS})"
        columns = [x(step) for step in points.steps]
        if points.values.shape[1] > 1:
            upper = zip(columns, points.values.max(1), strict=True)
            lower = zip(reversed(columns), points.values.min(1)[::-1], strict=True)
            corners = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in [*upper, *lower])
            parts.append(f'<polygon points="{corners}" fill="{color}" opacity=".22"/>')
        means = zip(columns, points.values.mean(1), strict=True)
        corners = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in means)
        if len(columns) > 1:
            parts.append(f'<polyline points="{corners}" stroke="{color}"/>')
        else:
            a, b = corners.split(",")
            parts.append(f'<circle cx="{a}" cy="{b}" r="3" fill="{color}"/>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, *, max_ticks: int = 6) -> list[float]:
    """Return round, equally spaced numbers that span a range.

    Args:
        low: start of the range.
        high: end of the range.
        max_ticks: maximum number of ticks.

    Returns:
        At least two ticks; the first is at most `low`, the last at least `high`.

    Example:
        >>> nice_ticks(0.13, 1.9)
        [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    if high <= low:
        wide = abs(low) * 0.1 or 1.0
        low, high = low - wide, high + wide
    step = 10.0 ** math.floor(math.log10((high - low) / max_ticks))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        first, last = math.floor(low / (factor * step)), math.ceil(high / (factor * step))
        if last - first < max_ticks:
            return [round(index * factor * step, 12) for index in range(first, last + 1)]
    raise AssertionError((low, high))  # high - low < 10 * max_ticks * step


def _finite(points: Series) -> Series:
    values = np.ma.masked_where(~(np.abs(points.values) < _LARGEST), points.values)
    shown = values.count(axis=1) > 0
    return Series(points.steps[shown], values[shown])


def _downsampled(points: Series) -> Series:
    """Average neighboring points down to as many as a screen can show."""
    count = len(points.steps)
    if count <= _MAX_POINTS:
        return points
    groups: Sequence[np.ndarray] = np.array_split(np.arange(count), _MAX_POINTS)
    steps = np.array([points.steps[group[-1]] for group in groups])
    return Series(steps, np.ma.stack([points.values[group].mean(axis=0) for group in groups]))
