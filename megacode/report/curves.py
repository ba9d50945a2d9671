"""Numbers between a run's records and a picture: smoothing within phases, thinning of long curves, readable limits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megacode.report.run_data import Floats, Series

MOST_POINTS = 900
"""Points of a drawn curve: more than a page has pixels across serve nobody."""


def smoothing_window(points: int) -> int:
    """Records of the running mean that smooths: an odd number, about a sixtieth of the run."""
    return max(3, points // 60) | 1


def smooth(values: Floats, series: Series, weights: Floats | None = None) -> Floats:
    """Smoothed `values` (NaN: no value there): a centred, triangle-shaped mean over about two `smoothing_window`s of records,
    never across a phase's boundary. `weights` are those of the mean.

    The triangle is a running mean taken twice; a single one draws a box around every spike.
    """
    half = smoothing_window(len(series)) // 2
    weight = np.isfinite(values) * (np.ones(len(values)) if weights is None else weights)
    mean, weight = _running_mean(values, weight, series, half)
    return _running_mean(mean, weight, series, half)[0]


def _running_mean(
    values: Floats, weight: Floats, series: Series, half: int
) -> tuple[Floats, Floats]:
    """(means, total weights) over the records from `half` before to `half` after, inside a phase."""
    total = np.concatenate([[0.0], np.cumsum(np.where(weight > 0, values, 0.0) * weight)])
    sums = np.concatenate([[0.0], np.cumsum(weight)])
    means, many = np.full(len(values), np.nan), np.zeros(len(values))
    for part in series.phase_slices():
        here = np.arange(part.start, part.stop)
        low, high = np.maximum(here - half, part.start), np.minimum(here + half + 1, part.stop)
        many[part] = np.maximum(sums[high] - sums[low], 0.0)
        np.divide(total[high] - total[low], many[part], out=means[part], where=many[part] > 1e-12)
    many[~np.isfinite(means)] = 0.0
    return means, many


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about `MOST_POINTS` points, evenly chosen; for curves that are smooth already."""
    if len(x) <= MOST_POINTS:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    return x[chosen], y[chosen]


def envelope(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """A thinned raw curve that keeps its extremes: the least and the greatest of each stretch."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    stretches = MOST_POINTS // 2
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), stretches + 1).round().astype(int)
    low = np.array([a + int(np.argmin(y[a:b])) for a, b in pairwise(edges)])
    high = np.array([a + int(np.argmax(y[a:b])) for a, b in pairwise(edges)])
    chosen = np.sort(np.concatenate([low, high]))
    return x[chosen], y[chosen]


def readable_limits(curves: list[Floats]) -> tuple[float, float] | None:
    """Vertical limits for losses: all of the curves but their first twentieth, where a new model falls from chance level."""
    tails = [curve[len(curve) // 20 :] for curve in curves]
    finite = [tail[np.isfinite(tail)] for tail in tails]
    values = np.concatenate([tail for tail in finite if len(tail)] or [np.empty(0)])
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
