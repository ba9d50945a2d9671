"""Matplotlib in the page's style: axes, phases as bands, figures as SVG for a page or as files."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megacode.errors import UserError
from megacode.files import replace_file
from megacode.report.palette import BAND, FAINT, GRID, INK, css_variables
from megacode.report.run_data import Run
from megacode.terminal import count

STYLE: Any = {
    "svg.fonttype": "none",  # text takes the page's font, can be searched and read aloud
    "font.size": 9.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # dollar signs in a name are no formula
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.5,
    "path.simplify_threshold": 0.5,  # points: keeps a curve of 300,000 steps at 100 kB of SVG
}
styled = rc_context(STYLE)
"""Decorator of functions that make a figure or write one."""
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (2.5, 2.5)))
MARKERS = "osD^v"


def run_look(index: int) -> dict[str, Any]:
    """Dash and weight of colour that tell a run from others; its colour is the domain's."""
    return {"linestyle": DASHES[index % 5], "alpha": (1.0, 0.85, 0.7, 0.6, 0.5)[index % 5]}


def new_figure(width: float, height: float, description: str) -> Figure:
    """An empty figure of that many inches; `description` is its text alternative."""
    figure = Figure(figsize=(width, height))
    figure.set_label(description)
    return figure


@styled
def svg(figure: Figure) -> str:
    """The figure as an SVG element of a page, as wide as its column."""
    out, description = io.StringIO(), str(figure.get_label())
    # Ids are page-wide: only those that are referred to stay, and the salt tells them apart.
    with rc_context({"svg.hashsalt": description}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    content = out.getvalue().partition("<svg")[2].partition(">")[2]
    referred = set(re.findall(r"#([\w.]+)", content))
    ids = re.compile(r' id="(.*?)"')
    content = ids.sub(lambda match: match[0] if match[1] in referred else "", content)
    width, height = 72 * figure.get_size_inches()
    view, label = f"0 0 {width:g} {height:g}", html.escape(description)
    return f'<svg viewBox="{view}" role="img" aria-label="{label}">{css_variables(content)}'


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure to a file, whole or not at all; the ending (.png, .svg, .pdf) is its format.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replace_file(path) as file:
            figure.savefig(file, format=path.suffix[1:] or "png", dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be drawn ({error}); give FILE.png in a folder you may write"
        ) from error


def across(runs: list[Run]) -> str:
    """What the horizontal axis counts: steps of one run, tokens of several."""
    return "step" if len(runs) == 1 else "tokens"


def common_bands(runs: list[Run], number: str | None = None) -> list[tuple[str, float, float]]:
    """(phase, start, end) along the horizontal axis; none if the runs' phases differ."""
    all_bands = [run.bands(number or across(runs)) for run in runs]
    longest = max(all_bands, key=lambda bands: bands[-1][2])
    for bands in all_bands:
        if [band[:2] for band in bands] != [band[:2] for band in longest[: len(bands)]]:
            return []
    return longest


def frame(
    axes: Axes,
    runs: list[Run],
    ticks: int,
    labels: bool = True,
    shade: bool = True,
    number: str | None = None,
) -> None:
    """The horizontal axis and phases as bands: every other one shaded, names where they fit.

    Args:
        number: what the axis counts, `step` or `tokens`; default: as `across` says.
    """
    number = number or across(runs)
    end = max(run.train[number][-1] for run in runs)
    axes.set_xlim(0, end)
    count_axis(axes, "steps" if number == "step" else "tokens", ticks)
    figure = axes.get_figure(root=True)
    letters = 13 * figure.get_size_inches()[0] if figure else 0  # along the whole figure
    bands = common_bands(runs, number)
    for index, (name, start, stop) in enumerate(bands):
        if shade and index % 2 == 0 and len(bands) > 1:
            axes.axvspan(start, stop, color=BAND, linewidth=0, zorder=-5)
        if index:
            axes.axvline(start, color=GRID, linewidth=1, zorder=-4)
        if labels and (stop - start) / end * letters >= len(name):
            place: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text((start + stop) / 2, 1.02, name, color=FAINT, fontsize=8.5, **place)


def count_axis(axes: Axes, label: str, ticks: int) -> None:
    """Whole numbers along the bottom: 20,000 or 1.2 B."""
    locator = MaxNLocator(ticks, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel(label)


def number_axis(axes: Axes, form: Callable[[float], str] = "{:g}".format) -> None:
    """A few round numbers up the side."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))


def short(value: float) -> str:
    """12,000 as it is, 1,500,000 as 1.5 M."""
    number, _, suffix = count(value).partition(" ")
    return f"{float(number.replace(',', '')):g} {suffix}" if suffix else number
