"""Plots of several runs in one, over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megacode.report.curves import curve, draw_losses, readable_limits, smooth
from megacode.report.drawing import MARKERS, common_bands, frame, new_figure, run_look, styled
from megacode.report.figures import planned_shares
from megacode.report.palette import INK
from megacode.report.run_data import Floats, Run


def all_domains(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(domain for run in runs for domain in run.domains))


@styled
def losses(runs: list[Run], colours: dict[str, str]) -> Figure:
    """A panel a domain: smoothed training loss and validation points of every run."""

    def draw(axes: Axes, domain: str) -> None:
        for index, run in enumerate(runs):
            look: Any = {"color": colours[domain], "linewidth": 1.6, **run_look(index)}
            points = {"marker": MARKERS[index % 5], "markersize": 5}
            draw_losses(axes, run, "loss_by_domain", domain, "tokens", points, **look)
        readable_limits(axes)

    return _panels(runs, all_domains(runs), colours, draw, "loss, nats per token")


@styled
def differences(runs: list[Run], colours: dict[str, str]) -> Figure | None:
    """A panel a domain: smoothed training loss less the first run's after as many tokens."""
    first, others = runs[0], runs[1:]
    names = [
        name
        for name in all_domains(runs)
        if np.isfinite(_smoothed(first, name)).any()
        and any(name in run.train.loss_by_domain for run in others)
    ]

    def draw(axes: Axes, domain: str) -> None:
        tokens, base = first.train["tokens"], _smoothed(first, domain)
        known = np.isfinite(base)
        for index, run in enumerate(others, 1):
            at = run.train["tokens"]
            # Beyond the first run's values there is nothing to subtract.
            reference = np.interp(at, tokens[known], base[known], left=np.nan, right=np.nan)
            look: Any = {"color": colours[domain], "linewidth": 1.6, **run_look(index)}
            curve(axes, at, _smoothed(run, domain) - reference, **look)
        axes.axhline(0, color=colours[domain], linewidth=1.6)
        readable_limits(axes)

    label = f"difference from {first.label}"
    return _panels(runs, names, colours, draw, label) if names else None


def _smoothed(run: Run, domain: str) -> Floats:
    train = run.train
    loss = train.loss_by_domain.get(domain, np.full(len(train), np.nan))
    return smooth(loss, train, train.ratio_by_domain.get(domain))


@styled
def mixtures(runs: list[Run], colours: dict[str, str]) -> Figure | None:
    """A panel a domain: its share of sequences, consumed faint and planned on top."""
    names = [n for n in all_domains(runs) if any(n in run.train.ratio_by_domain for run in runs)]

    def draw(axes: Axes, domain: str) -> None:
        for index, run in enumerate(runs):
            train = run.train
            look: Any = {"color": colours[domain], **run_look(index)}
            if domain in train.ratio_by_domain:
                consumed = smooth(train.ratio_by_domain[domain], train, train["batch_size"])
                faint = {"linestyle": "-", "linewidth": 3.2, "alpha": 0.3}
                curve(axes, train["tokens"], consumed, **(look | faint))
            for phase in run.phases:
                steps, planned = planned_shares(phase, [domain])
                done = steps <= run.steps_done
                axes.plot(run.at(steps[done], "tokens"), planned[0][done], **look)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return _panels(runs, names, colours, draw, "share of sequences") if names else None


def _panels(
    runs: list[Run],
    names: list[str],
    colours: dict[str, str],
    draw: Callable[[Axes, str], None],
    label: str,
) -> Figure:
    """A panel for each domain of `names`, three in a row, and a legend of the runs."""
    rows, columns = -(-len(names) // 3), min(len(names), 3)
    labels = ", ".join(run.label for run in runs)
    figure = new_figure(10, 3.2 * rows, f"{label}, by domain over tokens: {labels}")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw(axes, name)
        axes.set_title(name, color=colours[name], pad=16 if common_bands(runs) else None)
        frame(axes, runs, 5)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    for index, run in enumerate(runs):
        look: Any = {"color": INK, "marker": MARKERS[index % 5], **run_look(index)}
        grid[0, 0].plot([], [], label=run.label, markersize=5, **look)
    place: Any = {"loc": "outside upper center", "ncols": min(len(runs), 4)}
    figure.legend(handlelength=4, fontsize=9, **place)
    return figure
