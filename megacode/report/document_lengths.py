"""A plot of document lengths: their histograms by number of documents and by tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from megacode.data.lengths import log_edges, merged
from megacode.errors import UserError
from megacode.report.drawing import DASHES, new_figure, number_axis, save, short, styled
from megacode.report.palette import FAINT, HUES


def plot_lengths(histograms: Mapping[str, NDArray[np.int64]], path: Path) -> None:
    """Draw shares of documents (above) and of tokens (below) by length, for each dataset.

    Args:
        histograms: name of a dataset -> its `length_histogram`, int64 [2, BINS].
        path: where the plot goes; its ending (.png, .svg, .pdf) is the format.

    Raises:
        UserError: there is no document to draw, or the file cannot be written.
    """
    if not any(histogram[1].sum() for histogram in histograms.values()):
        names = ", ".join(histograms)
        raise UserError(f"{path}: nothing to draw: {names}: no document with a token")
    save(lengths_figure(histograms), path)


@styled
def lengths_figure(histograms: Mapping[str, NDArray[np.int64]]) -> Figure:
    """The figure of `plot_lengths`; at least one of the histograms has a document with a token."""
    figure = new_figure(10, 5.6, "Lengths of documents")
    per_octave = _bins_per_octave(histograms)
    edges = log_edges(per_octave)
    # 1, but for lengths below 8 or so, whose bins are wider.
    widths = np.diff(np.log2(edges[1:])) * per_octave
    counts = {name: merged(histogram, edges) for name, histogram in histograms.items()}
    used = np.flatnonzero(sum(count[0, 1:] for count in counts.values()))
    first, last = edges[1 + used[0]], edges[2 + used[-1]]
    looks = [(colour, dash) for dash, colour in product(DASHES, HUES)]
    panels = figure.subplots(2, 1, sharex=True)
    for row, (axes, what) in enumerate(zip(panels, ("documents", "tokens"), strict=True)):
        for number, (name, count) in enumerate(counts.items()):
            shares = count[row, 1:] / max(count[row].sum(), 1) / widths
            colour, dash = looks[number % len(looks)]
            if len(counts) <= 3:
                axes.stairs(shares, edges[1:], fill=True, color=colour, alpha=0.12, linewidth=0)
            label = _label(name, count) if row == 0 else None
            axes.stairs(shares, edges[1:], color=colour, linewidth=1.6, linestyle=dash, label=label)
        axes.set_title(f"Share of {what} by length, {per_octave} bins to a doubling")
        axes.set_xscale("log", base=2)
        axes.set_xlim(first, last)
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        number_axis(axes, lambda share: f"{100 * share:.3g}%")
        _mark_context_lengths(axes, label=row == 0)
    panels[1].xaxis.set_major_locator(LogLocator(2, numticks=16))
    panels[1].xaxis.set_major_formatter(lambda length, _: _power_of_two(int(length)))
    panels[1].set_xlabel("tokens in a document")
    figure.legend(loc="outside upper left", fontsize=8.5, ncols=1 if len(counts) <= 4 else 2)
    return figure


def _bins_per_octave(histograms: Mapping[str, NDArray[np.int64]]) -> int:
    """As many as the smallest dataset fills without gaps."""
    fewest = min(int(histogram[0].sum()) for histogram in histograms.values() if histogram[1].any())
    if fewest < 2_000:
        return 2
    return 4 if fewest < 200_000 or len(histograms) > 4 else 8


def _power_of_two(length: int) -> str:
    return f"{length:,}" if length < 2**20 else f"{length >> 20:,} Mi"


def _label(name: str, count: NDArray[np.int64]) -> str:
    documents, tokens = count.sum(axis=1)
    empty = f", {count[0, 0]:,} empty" if count[0, 0] else ""
    return f"{name}: {short(documents)} documents{empty}, {short(tokens)} tokens"


def _mark_context_lengths(axes: Axes, label: bool) -> None:
    """Faint lines at the usual context lengths within the axes."""
    low, high = axes.get_xlim()
    for length in (2048, 4096, 8192):
        if low < length < high:
            axes.axvline(length, color=FAINT, linewidth=0.7, linestyle=(0, (1, 3)), zorder=0)
            if label:
                place: Any = {"transform": axes.get_xaxis_transform(), "va": "top"}
                axes.text(length, 0.98, f" {length // 1024} k", color=FAINT, fontsize=7.5, **place)
