"""Matplotlib in the page's clothes: bare axes, phase bands, labels at the ends of lines, SVG in the page's colours."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megacode.report.curves import thin
from megacode.report.palette import BAND, FAINT, GRID, INK, PAPER, light, with_variables
from megacode.report.run_data import Floats
from megacode.terminal import count

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched and read aloud
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
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.5,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}
_NICE = [1, 2, 2.5, 5, 10]
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.4, 1.2, 1.4)),
    (0, (2.5, 2.5)),
)


@dataclass(frozen=True)
class Band:
    """A phase on the horizontal axis."""

    name: str
    start: float
    end: float


def draw(width: float, height: float, paint: Callable[[Figure], None], description: str) -> str:
    """An SVG to stand in a page.

    Args:
        width, height: inches; the page scales it to its column.
        description: what a reader who cannot see it should know.
    """
    salt = hashlib.sha256(description.encode()).hexdigest()[:8]
    with rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids are page-wide: those of another picture must not be taken for this one's.
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{salt}-", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{_attribute(description)}">',
        svg,
        count=1,
    )
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return with_variables(svg)


def draw_png(
    width: float, height: float, paint: Callable[[Figure], None], description: str
) -> bytes:
    """The same picture as a PNG on white, for pages that show no SVG; 160 dots per inch."""
    with rc_context({key: light(value) for key, value in _STYLE.items()}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        figure.canvas.draw()  # ticks come into being
        for artist in figure.findobj():
            for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
                get, put = (
                    getattr(artist, f"get_{name}", None),
                    getattr(artist, f"set_{name}", None),
                )
                if get and put:
                    put(light(get()))
        out = io.BytesIO()
        figure.savefig(
            out, format="png", dpi=160, metadata={"Description": description, "Software": None}
        )
    return out.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def phase_bands(axes: Axes, bands: Sequence[Band], labels: bool = True, shade: bool = True) -> None:
    """Every other phase shaded; names along the top where they fit."""
    if not bands:
        return
    span = bands[-1].end - bands[0].start
    for index, band in enumerate(bands):
        if shade and index % 2 == 0 and len(bands) > 1:
            axes.axvspan(band.start, band.end, color=BAND, linewidth=0, zorder=-5)
        if index:
            axes.axvline(band.start, color=GRID, linewidth=1, zorder=-4)
        # about 95 characters of this size go along a full-width picture
        room = (band.end - band.start) / span * 13 * _inches(axes)[0] if span else 0
        if labels and room >= len(band.name):
            axes.annotate(
                band.name, ((band.start + band.end) / 2, 1), (0, 4), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="bottom", color=FAINT, fontsize=8.5, annotation_clip=False,
            )  # fmt: skip


def curve(axes: Axes, x: Floats, y: Floats, **style: Any) -> None:
    """A line of no more points than the page can show; dots where there are too few points for a line to be seen."""
    few = {"marker": "o", "markersize": 3.5} if np.isfinite(y).sum() < 4 else {}
    axes.plot(*thin(x, y), **(style | few))


def _inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the whole figure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    return float(width), float(height)


def dots(
    axes: Axes, x: Floats, y: Floats, colour: str, size: float, mark: str = "o", **style: Any
) -> None:
    """Points with a rim of the page's colour, whole also at the picture's edge."""
    if len(x):  # an empty line that is not clipped spoils matplotlib's layout
        look: Any = {
            "color": colour,
            "markersize": size,
            "markeredgecolor": PAPER,
            "markeredgewidth": 1.0,
            "zorder": 4,
        }
        axes.plot(x, y, mark, clip_on=False, **(look | style))


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], size: float = 8.5) -> None:
    """Names to the right of the lines that they belong to, moved apart where they would overlap.

    Args:
        labels: (height in data units, text, colour).
    """
    entries = sorted(
        (entry for entry in labels if np.isfinite(entry[0])), key=lambda entry: entry[0]
    )
    if not entries:
        return
    low, high = axes.get_ylim()
    inches = _inches(axes)[1] * axes.get_position().height
    gap = size * 1.25 / 72 / inches * (high - low)
    heights = [float(np.clip(entry[0], low, high)) for entry in entries]
    for _ in range(60):
        for n in range(1, len(heights)):
            overlap = gap - (heights[n] - heights[n - 1])
            if overlap > 1e-9:
                heights[n] += overlap / 2
                heights[n - 1] -= overlap / 2
    for height, (_, text, colour) in zip(heights, entries, strict=True):
        axes.annotate(
            text, (1, height), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", ha="left",
            color=colour, fontsize=size, annotation_clip=False,
        )  # fmt: skip


def count_axis(axes: Axes, label: str, many: int = 8) -> None:
    """Whole numbers along the bottom: 20,000 or 1.2 B."""
    axes.xaxis.set_major_locator(
        MaxNLocator(many, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(label)


def number_axis(axes: Axes, form: Callable[[float], str]) -> None:
    """A few round numbers up the side."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_NICE))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def rate(value: float) -> str:
    """A learning rate: 3e-4, 2.5e-5, 0."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short(value: float) -> str:
    """12,000 as it is, 1,500,000 as 1.5 M."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    number, _, suffix = count(value).partition(" ")
    return f"{float(number.replace(',', '')):g} {suffix}"
