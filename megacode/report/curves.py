"""Lines of a plot: smoothing, validation losses as points, readable limits, labels at line ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megacode.report.palette import PAPER
from megacode.report.run_data import Floats, Run, Series

FAINTLY: Any = {"alpha": 0.22, "linewidth": 0.7, "zorder": 1}
"""Look of the values behind a smoothed line."""


def smooth(values: Floats, series: Series, weights: Floats | None = None) -> Floats:
    """Smoothed `values`, [records], NaN where there are none near; phases are smoothed apart.

    A running mean over a sixtieth of the run (an odd number of records), taken twice: a single one
    draws a box around every spike. `weights`, [records], are those of the mean.
    """
    half = max(3, len(series) // 60) // 2
    weights = np.isfinite(values) * (np.ones(len(values)) if weights is None else weights)
    sums = np.where(weights > 0, values, 0.0) * weights
    out = np.full(len(values), np.nan)
    for part in series.phase_slices():
        total, weight = sums[part], weights[part]
        for _ in range(2):
            total, weight = _running_sum(total, half), _running_sum(weight, half)
        np.divide(total, weight, out=out[part], where=weight > 1e-9)
    return out


def _running_sum(values: Floats, half: int) -> Floats:
    """Sum of each value and `half` of them on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    return sums[np.minimum(at + half + 1, len(values))] - sums[np.maximum(at - half, 0)]


def curve(axes: Axes, x: Floats, y: Floats, **style: Any) -> Line2D:
    """A line; points where there are too few for a line to be seen."""
    few = {"marker": "o", "markersize": 3.5} if np.isfinite(y).sum() < 4 else {}
    return axes.plot(x, y, **(style | few))[0]


def dots(axes: Axes, x: Floats, y: Floats, **style: Any) -> None:
    """Points with a rim of the page's colour, whole also at the plot's edge."""
    if len(x):  # an empty line that is not clipped spoils matplotlib's layout
        look: Any = {"marker": "o", "linestyle": "", "zorder": 4, "markeredgecolor": PAPER}
        axes.plot(x, y, clip_on=False, **(look | style))


def draw_losses(
    axes: Axes, run: Run, group: str, name: str, across: str, points: dict[str, Any], **style: Any
) -> list[tuple[float, str, str]]:
    """Smoothed training losses of a domain or source as a line, its validation losses as points.

    There are about 30 points at most, or 9 over tokens, where several runs share the axes.

    Args:
        group: `loss_by_domain` or `loss_by_source`.
        across: `step` or `tokens`, as `drawing.across` says.
        points, style: of the points and of the line; `style` has the `color` of both.

    Returns:
        The line's label for `end_labels`; nothing where there is no line.
    """
    steps, validation = run.validation(group, name)
    every = 1 + len(steps) // (30 if across == "step" else 9)
    shown = slice((len(steps) - 1) % every, None, every)
    at = run.at(steps[shown], across)
    dots(axes, at, validation[shown], color=style["color"], **points)
    training = getattr(run.train, group).get(name)
    if training is None:
        return []
    # The loss of a domain in a step is a mean over its share of the batch.
    shares = run.train.ratio_by_domain.get(name) if group == "loss_by_domain" else None
    line = smooth(training, run.train, shares)
    curve(axes, run.train[across], line, **style)
    return [(height, name, style["color"]) for height in line[np.isfinite(line)][-1:]]


def drawn_values(axes: Axes, skipped: float = 0.0) -> Floats:
    """Finite heights of the lines so far, without the first share `skipped` of each."""
    lines = [_heights(line) for line in axes.get_lines()]
    values = [line[int(skipped * len(line)) :] for line in lines]
    return np.concatenate([line[np.isfinite(line)] for line in values] or [np.empty(0)])


def _heights(line: Line2D) -> Floats:
    return np.asarray(line.get_ydata(), dtype=np.float64)


def readable_limits(axes: Axes) -> None:
    """Fit the vertical axis to the lines after their first twentieth, the fall from chance."""
    values = drawn_values(axes, skipped=0.05)
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    for line in axes.get_lines():
        heights = _heights(line)
        if not line.get_clip_on():  # `dots` beyond the limits would stand outside of the axes
            line.set_ydata(np.where((heights < low) | (heights > high), np.nan, heights))


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], size: float) -> None:
    """Names to the right of the lines that they belong to, moved apart where they would overlap.

    Args:
        labels: (height in data units, text, colour).
        size: of the text, points.
    """
    figure = axes.get_figure(root=True)
    if not labels or figure is None:
        return
    figure.draw_without_rendering()  # lays the axes out
    labels = sorted(labels)
    low, high = axes.get_ylim()
    gap = size * 1.25 / 72 / axes.get_window_extent().height * figure.dpi * (high - low)
    # Heights less their least distances: a sequence that rises has no overlaps.
    offsets = gap * np.arange(len(labels))
    wanted = np.clip([height for height, _, _ in labels], low, high) - offsets
    up, down = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    for height, (_, text, colour) in zip((up + down) / 2 + offsets, labels, strict=True):
        axes.annotate(
            text,
            (1, height),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )
