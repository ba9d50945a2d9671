"""A LECS task as a picture: accuracy of each cell with its interval, and similarities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from megacode.evaluate.statistics import Interval
from megacode.report.drawing import new_figure, save, styled
from megacode.report.palette import FAINT, INK, domain_colours

BETWEEN = " | "
_SCALE = LinearSegmentedColormap.from_list("accuracy", ["#c9543f", "#ffffff", "#3d7ea6"])
_BINS = 40


@dataclass(frozen=True)
class Cell:
    """Of items with one kind of equivalent and one of other candidates.

    Attributes:
        given: of each item what the two candidates scored.
    """

    equivalent: str
    other: str
    accuracy: Interval
    given: Sequence[tuple[float, float]]


def draw_selection(title: str, cells: Sequence[Cell], path: Path) -> None:
    """Write the picture. UserError: the file cannot be written; its ending is the format."""
    save(_figure(title, cells), path)


@styled
def _figure(title: str, cells: Sequence[Cell]) -> Figure:
    rows = list(dict.fromkeys(cell.equivalent for cell in cells))
    columns = list(dict.fromkeys(cell.other for cell in cells))
    width = max(1.75 * len(columns) + 1.2, 5.5)
    figure = new_figure(width, 1.0 + 0.62 * len(rows) + 1.7 * len(rows), f"{title}: accuracy")
    grid, *panels = _axes(figure, len(rows), len(columns))
    shown = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        row, column = rows.index(cell.equivalent), columns.index(cell.other)
        shown[row, column] = cell.accuracy.mean
        one = cell.accuracy
        label = f"{one.mean:.1%}\n{one.low:.0%} to {one.high:.0%}"
        grid.text(column, row, label, ha="center", va="center", fontsize=8, color=INK)
    grid.imshow(shown, cmap=_SCALE, vmin=0, vmax=1, aspect="auto")
    grid.set_xticks(range(len(columns)), columns)
    grid.set_yticks(range(len(rows)), rows)
    grid.xaxis.tick_top()
    grid.grid(False)
    grid.tick_params(length=0)
    grid.set_title(f"{title}: equivalent candidate (rows) chosen over the other (columns)")
    colours = domain_colours(["equivalent", "other"])
    by_place = {(rows.index(c.equivalent), columns.index(c.other)): c for c in cells}
    for number, axes in enumerate(panels):
        place = divmod(number, len(columns))
        if place not in by_place:
            axes.set_axis_off()
            continue
        cell = by_place[place]
        values = np.array(cell.given)
        edges = np.linspace(*_span(values), _BINS + 1).tolist()
        for column, name in enumerate(("equivalent", "other")):
            axes.hist(values[:, column], edges, color=colours[name], alpha=0.6, label=name)
        axes.set_yticks([])
        axes.grid(False)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{cell.equivalent}{BETWEEN}{cell.other}", fontsize=7, color=FAINT)
    panels[0].legend(fontsize=7)
    return figure


def _axes(figure: Figure, rows: int, columns: int) -> list[Axes]:
    """The grid's axes, and one for each cell below it."""
    spec = figure.add_gridspec(rows + 1, columns, height_ratios=[0.62 * rows + 0.3, *[1.5] * rows])
    grid = figure.add_subplot(spec[0, :])
    places = itertools.product(range(1, rows + 1), range(columns))
    return [grid, *(figure.add_subplot(spec[i, j]) for i, j in places)]


def _span(values: np.ndarray) -> tuple[float, float]:
    """Of the middle 99 % of the values, so that one far off does not hide the others."""
    low, high = np.quantile(values, [0.005, 0.995])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(high) + 0.5)
