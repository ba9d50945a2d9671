"""Results of cells -> a metric's arms with intervals, differences from the first, slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megacode.errors import UserError
from megacode.evaluate.statistics import (
    Interval,
    bootstrap,
    bootstrap_difference,
    holm,
    mean_interval,
    slope,
)
from megacode.studies.results import CellResult, ItemScores, Seed, metric_names, read_items
from megacode.studies.sweep import OpenSweep

ENOUGH = 3
"""Seeds below which an interval says little."""


@dataclass(frozen=True)
class ArmResult:
    """A metric of the runs of one arm.

    Attributes:
        label: on the axis.
        values: by seed.
        items: scores by seed, where every run has them.
        difference: from the first arm of its series, paired by seeds (and items); None for the
            first, or where they share no seed.
    """

    label: str
    values: dict[Seed, float]
    items: dict[Seed, ItemScores]
    interval: Interval
    difference: Interval | None = None


@dataclass(frozen=True)
class ArmSeries:
    """Arms along the axis that are the same on every other axis.

    Attributes:
        name: labels on the other axes; empty where there are none.
        slope: against the axis, None where its labels are no numbers or there is one arm.
        adjusted: p of the slope after Holm, over the slopes of all tasks; None for losses.
    """

    name: str
    arms: tuple[ArmResult, ...]
    slope: Interval | None
    adjusted: float | None = None


@dataclass(frozen=True)
class MetricResult:
    """A metric over the sweep.

    Attributes:
        missing: finished cells that have not measured it.
        early: cells that were last evaluated before their end.
    """

    name: str
    series: tuple[ArmSeries, ...]
    missing: int
    early: int

    @property
    def seeds(self) -> int:
        """The fewest seeds of an arm."""
        return min(len(arm.values) for one in self.series for arm in one.arms)


def compare(sweep: OpenSweep, results: Sequence[CellResult]) -> list[MetricResult]:
    """The sweep's metrics over its finished cells, without those that none has measured."""
    named = [_metric(sweep, name, results) for name in metric_names(sweep, results)]
    metrics = [metric for metric in named if metric.series]
    slopes = [
        (m, s)
        for m, metric in enumerate(metrics)
        for s, series in enumerate(metric.series)
        if metric.name.startswith("tasks.") and series.slope and series.slope.p is not None
    ]
    ps = holm([metrics[m].series[s].slope.p or 0.0 for m, s in slopes])  # type: ignore[union-attr]
    adjusted = dict(zip(slopes, ps, strict=True))
    return [
        replace(
            metric,
            series=tuple(
                replace(one, adjusted=adjusted.get((m, s))) for s, one in enumerate(metric.series)
            ),
        )
        for m, metric in enumerate(metrics)
    ]


def number(label: str) -> float | None:
    """A label as a number; None for a word."""
    try:
        return value if math.isfinite(value := float(label)) else None
    except ValueError:
        return None


def _metric(sweep: OpenSweep, name: str, results: Sequence[CellResult]) -> MetricResult:
    _check_items(name.removeprefix("tasks."), results)
    runs: dict[str, dict[str, list[CellResult]]] = {}
    for result in results:
        if name in result.metrics:
            arm = dict(result.cell.arm)
            label = arm.pop(sweep.axis)
            others = ", ".join(f"{axis} {value}" for axis, value in arm.items())
            runs.setdefault(others, {}).setdefault(label, []).append(result)
    series = tuple(_series(key, name, arms) for key, arms in runs.items())
    missing = sum(name not in result.metrics for result in results)
    return MetricResult(name, series, missing, sum(r.step < r.cell.end for r in results))


def _series(key: str, name: str, runs: dict[str, list[CellResult]]) -> ArmSeries:
    arms = [_arm(label, name, cells) for label, cells in runs.items()]
    first = arms[0]
    arms = [first, *(replace(arm, difference=_difference(arm, first)) for arm in arms[1:])]
    x = [number(arm.label) for arm in arms]
    if len(set(x)) < 2 or None in x:
        return ArmSeries(key, tuple(arms), None)
    points = [
        (at, value, str(seed))
        for at, arm in zip(x, arms, strict=True)
        for seed, value in arm.values.items()
    ]
    at, values, seeds = (np.array(column) for column in zip(*points, strict=True))
    # Arms of which no seed is shared have no slope within a seed.
    varies = any(len(set(at[seeds == seed])) > 1 for seed in set(seeds))
    return ArmSeries(key, tuple(arms), slope(at, values, seeds) if varies else None)


def _arm(label: str, name: str, cells: Sequence[CellResult]) -> ArmResult:
    values = {cell.seed: cell.metrics[name] for cell in cells}
    task = name.removeprefix("tasks.")
    paths = {c.seed: c.items[task] for c in cells if name.startswith("tasks.") and task in c.items}
    if len(paths) < len(values):
        return ArmResult(label, values, {}, mean_interval(list(values.values())))
    items = {seed: read_items(path) for seed, path in paths.items()}
    scores = [one.scores for one in items.values()]
    clusters = next(iter(items.values())).clusters
    return ArmResult(label, values, items, bootstrap(scores, clusters, shares=True))


def _difference(arm: ArmResult, first: ArmResult) -> Interval | None:
    both = [seed for seed in arm.values if seed in first.values]
    if not both:
        return None
    if arm.items and first.items:
        a, b = ([one.items[seed].scores for seed in both] for one in (arm, first))
        return bootstrap_difference(a, b, arm.items[both[0]].clusters)
    return mean_interval([arm.values[seed] - first.values[seed] for seed in both])


def _check_items(task: str, results: Sequence[CellResult]) -> None:
    """UserError where two runs were scored on different items: they cannot be paired."""
    paths = [result.items[task] for result in results if task in result.items]
    scored = [read_items(path).clusters for path in paths]
    for path, clusters in zip(paths, scored, strict=True):
        if not np.array_equal(clusters, scored[0]):
            raise UserError(
                f"{path}: has other items than {paths[0]}; evaluate both runs on the same task"
            )
