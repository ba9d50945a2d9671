"""Measured and fitted losses against a domain's share, with the optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megacode.report.drawing import new_figure, number_axis, save, styled
from megacode.report.palette import INK, domain_colours
from megacode.studies.mixing_law import Fit
from megacode.studies.mixing_table import Floats

_COLUMNS = 3


def plot_fit(fit: Fit, axis: str, path: Path) -> None:
    """A panel for each target: means over seeds as dots, the fit as a line on which the other
    domains keep the proportions of the optimum, predictions of left-out mixtures as crosses.

    Args:
        axis: the domain along the bottom.

    Raises:
        UserError: the file cannot be written; its ending is the format.
    """
    save(_figure(fit, fit.table.domains.index(axis)), path)


@styled
def _figure(fit: Fit, axis: int) -> Figure:
    table, targets = fit.table, fit.table.targets
    rows, columns = -(-len(targets) // _COLUMNS), min(len(targets), _COLUMNS)
    name = table.domains[axis]
    about = f"Loss against the share of {name}, measured and fitted"
    figure = new_figure(max(4.2 * columns, 5), 3.2 * rows + 0.4, about)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    colours = domain_colours(targets)
    x = np.linspace(0, 1, 201)
    line = fit.model.predict(_along(fit.shares, axis, x))
    shares = table.shares[:, axis]
    inside = (x >= shares.min() - 0.02) & (x <= shares.max() + 0.02)
    for column, (target, axes) in enumerate(zip(targets, panels, strict=False)):
        colour = colours[target]
        axes.plot(x[inside], line[inside, column], color=colour)
        axes.scatter(
            shares, table.losses[:, column], s=26, color=colour, label="measured", zorder=3
        )
        left_out: Any = {"marker": "x", "s": 26, "linewidths": 1, "color": INK, "zorder": 4}
        axes.scatter(shares, fit.left_out[:, column], label="predicted, left out", **left_out)
        axes.axvline(fit.shares[axis], color=INK, linestyle=":", linewidth=1.2, label="optimum")
        axes.set_title(f"loss on {target}")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"share of {name}")
        number_axis(axes)
    for axes in list(panels)[len(targets) :]:
        axes.set_axis_off()
    axes = figure.axes[0]
    axes.legend(fontsize=8)
    axes.set_ylabel("nats per token")
    return figure


def _along(shares: Floats, axis: int, x: Floats) -> Floats:
    """Mixtures with share `x` of domain `axis`, [len(x), domains]; the others as in `shares`."""
    others = np.delete(shares, axis)
    others = others / others.sum() if others.sum() > 0 else np.full(len(others), 1 / len(others))
    return np.insert(np.outer(1 - x, others), axis, x, axis=1)
