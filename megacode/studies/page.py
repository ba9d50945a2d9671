"""A sweep's results -> one HTML page: a plot and a table for each metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megacode.files import write_text
from megacode.report import palette
from megacode.report.curves import dots
from megacode.report.drawing import MARKERS, new_figure, number_axis, styled
from megacode.report.page import environment
from megacode.studies import tables
from megacode.studies.compare import MetricResult, number
from megacode.studies.results import CellResult
from megacode.studies.state import state_of
from megacode.studies.sweep import OpenSweep
from megacode.terminal import count
from megacode.version import __version__

PAGE = "sweep.html"


def write_page(
    sweep: OpenSweep, results: Sequence[CellResult], metrics: Sequence[MetricResult]
) -> Path:
    """`RUNS/sweep.html`, over the cells that are finished."""
    template = environment(Path(__file__).parent).get_template("sweep.html.j2")
    text = template.render(
        title=sweep.sweep.name,
        sweep=sweep,
        facts=_facts(sweep, results),
        states=[(cell, state_of(cell)) for cell in sweep.cells],
        finished=len(results),
        metrics=metrics,
        plot=lambda metric: plot(sweep, metric),
        tables=tables,
        palette=palette,
        version=__version__,
    )
    write_text(sweep.runs / PAGE, text)
    return sweep.runs / PAGE


def _facts(sweep: OpenSweep, results: Sequence[CellResult]) -> list[tuple[str, str]]:
    """(name, value) pairs that stand on top of the page."""
    tokens = sorted({cell.plan.total_tokens for cell in sweep.cells})
    facts = {
        "Cells": f"{len(results)} of {len(sweep.cells)} finished",
        "Seeds": ", ".join(dict.fromkeys(cell.recipe.seeds for cell in sweep.cells)),
        "Tokens of a cell": " to ".join(map(count, dict.fromkeys((tokens[0], tokens[-1])))),
        "Sweep": str(sweep.path),
    }
    if sweep.shared:
        facts["Shared first steps"] = f"{sweep.steps_saved:,} steps not trained twice"
    starts = []
    for result in results:
        path = result.cell.folder / "environment.json"
        starts += [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    for name, key in (("Machine", "host"), ("Device", "device"), ("Started", "started")):
        if found := sorted({str(start[key]) for start in starts if start.get(key)}):
            facts[name] = ", ".join(found) if key != "started" else _span(found)
    return list(facts.items())


def _span(times: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys((times[0], times[-1])))


@styled
def plot(sweep: OpenSweep, metric: MetricResult) -> Figure:
    """A point a seed, and the mean of each arm with its interval; a colour a series."""
    figure = new_figure(8, 3.6, f"{metric.name} against {sweep.axis}, by seed, with 95 % intervals")
    axes = figure.subplots()
    labels = list(dict.fromkeys(arm.label for one in metric.series for arm in one.arms))
    numbers = [value for label in labels if (value := number(label)) is not None]
    numeric = len(numbers) == len(labels)
    places = dict(zip(labels, numbers if numeric else map(float, range(len(labels))), strict=True))
    width = (max(places.values()) - min(places.values()) or 1.0) / max(len(places) - 1, 1)
    seeds = list(dict.fromkeys(s for one in metric.series for arm in one.arms for s in arm.values))
    for index, series in enumerate(metric.series):
        colour = palette.HUES[index % len(palette.HUES)]
        shift = 0.12 * width * (index - (len(metric.series) - 1) / 2)
        x = np.array([places[arm.label] + shift for arm in series.arms])
        order = np.argsort(x) if numeric else np.arange(len(x))
        _draw(axes, x, series.arms, order if numeric else None, colour, series.name)
        for number_of, seed in enumerate(seeds):
            known = [
                (at, arm.values[seed])
                for at, arm in zip(x, series.arms, strict=True)
                if seed in arm.values
            ]
            if known:
                aside = 0.05 * width
                at, values = np.array(known).T
                marker = MARKERS[number_of % len(MARKERS)]
                dots(
                    axes, at + aside, values, color=colour, alpha=0.6, marker=marker, markersize=4.5
                )
    axes.set_xticks(list(places.values()), labels)
    axes.set_xlim(min(places.values()) - 0.5 * width, max(places.values()) + 0.5 * width)
    axes.set_xlabel(sweep.axis)
    axes.set_ylabel(metric.name)
    number_axis(axes)
    if any(series.name for series in metric.series):
        place: Any = {"loc": "outside upper center", "ncols": min(len(metric.series), 4)}
        figure.legend(fontsize=9, **place)
    return figure


def _draw(axes: Axes, x: Any, arms: Any, order: Any, colour: str, name: str) -> None:
    """Means with intervals, joined where the axis is one of numbers."""
    means = np.array([arm.interval.mean for arm in arms])
    low, high = (np.array([getattr(arm.interval, end) for arm in arms]) for end in ("low", "high"))
    sizes = np.nan_to_num([means - low, high - means])
    look: Any = {"color": colour, "markersize": 7, "marker": "_", "capsize": 4, "elinewidth": 1.4}
    axes.errorbar(x, means, sizes, linestyle="", label=name or None, zorder=3, **look)
    if order is not None and math.isfinite(float(np.sum(means))):
        axes.plot(x[order], means[order], color=colour, linewidth=1.1, alpha=0.6, zorder=2)
