"""Lengths of documents: a histogram with fixed bins, to be summed over shards, and its picture.

Importing this costs numpy alone; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.lengths import EDGES, log_edges
from megacode.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def merged(histogram: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """`histogram` ([2, BINS]) over the wider bins of `edges` (some of EDGES, first and last included): int64 [2, n]."""
    return np.add.reduceat(histogram, np.searchsorted(EDGES, edges[:-1]), axis=1)


def plot_lengths(histograms: Mapping[str, NDArray[np.int64]], path: Path) -> None:
    """Draw how long the documents of each dataset are: share of documents above, share of tokens below.

    Args:
        histograms: name of a dataset -> its `length_histogram`, int64 [2, BINS].
        path: where the picture goes; its ending (.png, .svg, .pdf) is the format.

    Raises:
        UserError: there is no document to draw, or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megacode.files import replace_file
    from megacode.report import drawing

    if not any(histogram[1].sum() for histogram in histograms.values()):
        raise UserError(
            f"{path}: nothing to draw: {', '.join(histograms)}: no document with a token"
        )
    form = path.suffix[1:] or "png"
    style: Any = {key: _on_paper(value) for key, value in drawing._STYLE.items()}
    with rc_context(style):
        figure = Figure(figsize=(10, 5.6), layout="constrained", facecolor=_on_paper(drawing.PAPER))
        _paint(figure, histograms)
        try:
            with replace_file(path) as file:
                figure.savefig(file, format=form, dpi=150)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be drawn ({error}); give FILE.png in a folder you may write"
            ) from error


def _on_paper(value: Any) -> Any:
    """A colour of the page's pictures -> the one of the light scheme; anything else as it is."""
    from megacode.report.palette import FAINT, GRID, INK, PAPER, css

    light = css()["light"]
    return {
        INK: light["ink"],
        FAINT: light["faint"],
        GRID: light["grid"],
        PAPER: light["paper"],
    }.get(value, value)


def _paint(figure: Figure, histograms: Mapping[str, NDArray[np.int64]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from megacode.report.drawing import DASHES, number_axis
    from megacode.report.palette import FAINT, css

    light = css()["light"]
    colours = [light[f"hue{n}"] for n in range(sum(key.startswith("hue") for key in light))]
    per_octave = _fineness(histograms)
    edges = log_edges(per_octave)
    widths = (
        np.diff(np.log2(edges[1:])) * per_octave
    )  # 1, but for lengths below 8 or so, whose bins are wider
    counts = {name: merged(histogram, edges) for name, histogram in histograms.items()}
    used = np.flatnonzero(sum(count[0, 1:] for count in counts.values()))
    first, last = int(edges[1 + used[0]]), int(edges[2 + used[-1]])
    ticks = _octaves(first, last)
    panels = figure.subplots(2, 1, sharex=True)
    for row, (axes, what) in enumerate(zip(panels, ("documents", "tokens"), strict=True)):
        for number, (name, count) in enumerate(counts.items()):
            shares = count[row, 1:] / max(count[row].sum(), 1) / widths
            colour, dash = (
                colours[number % len(colours)],
                DASHES[number // len(colours) % len(DASHES)],
            )
            if len(counts) <= 3:
                axes.stairs(shares, edges[1:], fill=True, color=colour, alpha=0.12, linewidth=0)
            label = _label(name, count) if row == 0 else None
            axes.stairs(shares, edges[1:], color=colour, linewidth=1.6, linestyle=dash, label=label)
        axes.set_title(f"Share of {what} by length, {per_octave} bins to a doubling")
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0 ** ticks[0], 2.0 ** ticks[-1])
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        number_axis(axes, lambda share: f"{100 * share:.3g}%")
        _context_lengths(axes, _on_paper(FAINT), label=row == 0)
    panels[1].xaxis.set_major_locator(FixedLocator([2.0**power for power in ticks]))
    panels[1].xaxis.set_minor_locator(NullLocator())
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    panels[1].set_xlabel("tokens in a document")
    figure.legend(loc="outside upper left", fontsize=8.5, ncols=1 if len(counts) <= 4 else 2)


def _fineness(histograms: Mapping[str, NDArray[np.int64]]) -> int:
    """Bins per octave: as fine as the smallest dataset's number of documents bears without looking like a comb."""
    fewest = min(int(histogram[0].sum()) for histogram in histograms.values() if histogram[1].any())
    if fewest < 2_000:
        return 2
    return 4 if fewest < 200_000 or len(histograms) > 4 else 8


def _octaves(first: int, last: int) -> range:
    """Powers of two around `first` to `last`, four or more: all of them, or every other one."""
    low, high = int(np.floor(np.log2(first))), int(np.ceil(np.log2(last)))
    if high - low < 3:
        low, high = max(low - 1, 0), high + 1
    step = 1 if high - low <= 14 else 2
    return range(low - low % step, high + step, step)


def _tokens(length: float) -> str:
    return f"{length:,.0f}" if length < 2**20 else f"{length / 2**20:,.0f} Mi"


def _label(name: str, count: NDArray[np.int64]) -> str:
    from megacode.report.drawing import short

    documents, tokens = (int(number) for number in count.sum(axis=1))
    empty = f", {int(count[0, 0]):,} empty" if count[0, 0] else ""
    return f"{name}: {short(documents)} documents{empty}, {short(tokens)} tokens"


def _context_lengths(axes: Axes, colour: str, label: bool) -> None:
    """Faint lines at the usual context lengths within the axes."""
    low, high = axes.get_xlim()
    for length in (2048, 4096, 8192):
        if low < length < high:
            axes.axvline(length, color=colour, linewidth=0.7, linestyle=(0, (1, 3)), zorder=0)
            if label:
                axes.annotate(
                    f"{length // 1024} k", (length, 1), (2, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="left", va="top", color=colour, fontsize=7.5,
                )  # fmt: skip
