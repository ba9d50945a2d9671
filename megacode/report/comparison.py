"""Pictures of several runs in one: over tokens, because steps of different batch sizes do not compare.

The colour stays the domain's; a run is told by its line (dash and weight of colour) and by its name in the legend.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from megacode.report.curves import readable_limits, smooth
from megacode.report.drawing import (
    DASHES,
    Band,
    count_axis,
    curve,
    dots,
    draw,
    number_axis,
    phase_bands,
)
from megacode.report.figures import FORMS, NOISY, TITLES, bands, planned_shares, validation_points
from megacode.report.palette import INK, placeholder
from megacode.report.run_data import Floats, Run

_MARKS = "osD^v"
_MOST_MARKS = 9
_WEIGHTS = (1.0, 0.85, 0.7, 0.6, 0.5)


def all_domains(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(domain for run in runs for domain in run.domains))


def losses(runs: list[Run], hue: dict[str, int]) -> str:
    """A panel a domain: smoothed training loss and validation points of every run."""
    names = all_domains(runs)

    def paint_panel(axes: Axes, name: str) -> None:
        colour, curves = placeholder(hue[name]), []
        for index, run in enumerate(runs):
            if name in run.train.loss_by_domain:
                line = _smoothed(run, name)
                _line(axes, run, line, colour, index)
                curves.append(line)
            at, loss = validation_points(run, "loss_by_domain", name)
            chosen = np.unique(
                np.linspace(0, len(at) - 1, min(len(at), _MOST_MARKS)).round().astype(int)
            )
            tokens = np.array([run.tokens_at(step) for step in at[chosen]])
            dots(axes, tokens, loss[chosen], colour, 5, _MARKS[index % 5], zorder=4 + index)
            curves.append(loss)
        if limits := readable_limits(curves):
            axes.set_ylim(limits)

    return _panels(
        runs,
        names,
        hue,
        paint_panel,
        "loss, nats per token",
        f"Loss by domain over tokens of {_names(runs)}",
    )


def differences(runs: list[Run], hue: dict[str, int]) -> str | None:
    """A panel a domain: smoothed training loss less that of the first run at the same number of tokens."""
    names = [
        name
        for name in all_domains(runs)
        if sum(name in run.train.loss_by_domain for run in runs) > 1
    ]
    names = [name for name in names if name in runs[0].train.loss_by_domain]
    names = [name for name in names if np.isfinite(_smoothed(runs[0], name)).any()]
    if not names:
        return None

    def paint_panel(axes: Axes, name: str) -> None:
        tokens, base = runs[0].train["tokens"], _smoothed(runs[0], name)
        known = np.isfinite(base)
        axes.axhline(0, color=placeholder(hue[name]), linewidth=1.6)
        curves = []
        for index, run in enumerate(runs[1:], 1):
            if name not in run.train.loss_by_domain:
                continue
            line = _smoothed(run, name)
            # beyond either run's values there is nothing to subtract
            gap = line - np.interp(
                run.train["tokens"], tokens[known], base[known], left=np.nan, right=np.nan
            )
            _line(axes, run, gap, placeholder(hue[name]), index)
            curves.append(gap)
        if limits := readable_limits(curves):
            axes.set_ylim(min(limits[0], 0), max(limits[1], 0))

    label = f"difference from {runs[0].label}"
    return _panels(
        runs, names, hue, paint_panel, label, f"{label}: {_names(runs[1:])}", legend=False
    )


def _panels(
    runs: list[Run], names: list[str], hue: dict[str, int], paint_panel: Callable[[Axes, str], None], label: str,
    description: str, legend: bool = True,
) -> str:  # fmt: skip
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.ravel(), names, strict=False):
            paint_panel(axes, name)
            axes.set_title(
                name, color=placeholder(hue[name]), pad=16 if common_bands(runs) else None
            )
            _frame(axes, runs, 5)
        for axes in grid.ravel()[len(names) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        if legend:
            _legend(figure, runs)

    return draw(10.0, (3.5 if legend else 2.8) * rows, paint, description)


def _smoothed(run: Run, domain: str) -> Floats:
    return smooth(
        run.train.loss_by_domain[domain], run.train, run.train.ratio_by_domain.get(domain)
    )


def _names(runs: list[Run]) -> str:
    return ", ".join(run.label for run in runs)


def ratios(runs: list[Run], hue: dict[str, int]) -> str | None:
    """Share of the leading domain (code where there is code) over tokens: consumed faint, planned on top."""
    names = all_domains(runs)
    if not names:
        return None
    name = "code" if "code" in names else names[0]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        colour = placeholder(hue[name])
        for index, run in enumerate(runs):
            if name in run.train.ratio_by_domain:
                line = smooth(run.train.ratio_by_domain[name], run.train, run.train["batch_size"])
                curve(axes, run.train["tokens"], line, color=colour, alpha=0.3, linewidth=3.2)
            pieces = planned_shares(run, [name])
            if pieces:
                steps = np.concatenate([at for at, _ in pieces])
                share = np.concatenate([levels[0] for _, levels in pieces])
                keep = steps <= run.steps_done
                tokens = np.array([run.tokens_at(step) for step in steps[keep]])
                axes.plot(
                    tokens,
                    share[keep],
                    color=colour,
                    linewidth=1.4,
                    linestyle=DASHES[index % 5],
                    alpha=_WEIGHTS[index % 5],
                )
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel(f"share of {name}")
        _frame(axes, runs, 10)
        _legend(figure, runs)

    return draw(10.0, 2.7, paint, f"Share of {name} over tokens")


def small_figures(runs: list[Run]) -> list[tuple[str, str]]:
    """(caption, SVG) of rate, gradient norm and throughput of all runs."""
    keys = ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "batch_size")
    return [
        (TITLES[key], _small(runs, key)) for key in keys if any(run.train.has(key) for run in runs)
    ]


def _small(runs: list[Run], key: str) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        highest = 0.0
        for index, run in enumerate(runs):
            values = smooth(run.train[key], run.train) if key in NOISY else run.train[key]
            _line(axes, run, values, INK, index)
            settled = values[len(values) // 20 :]
            highest = max(highest, float(settled[np.isfinite(settled)].max(initial=0.0)))
        axes.set_ylim(0, 1.08 * highest or 1)
        number_axis(axes, FORMS.get(key, lambda value: f"{value:g}"))
        _frame(axes, runs, 5, labels=False)

    return draw(5.0, 2.1, paint, f"{TITLES[key]} over tokens of {_names(runs)}")


def common_bands(runs: list[Run]) -> list[Band]:
    """Phases over tokens, if all runs have the same ones; otherwise none, for a band would be true of one run only."""
    all_bands = [
        [Band(b.name, run.tokens_at(b.start), run.tokens_at(b.end)) for b in bands(run)]
        for run in runs
    ]
    longest = max(all_bands, key=lambda some: some[-1].end if some else 0.0)
    for some in all_bands:
        same = [(a.name, a.start) for a in some] == [
            (b.name, b.start) for b in longest[: len(some)]
        ]
        if not same:
            return []
    return longest


def _line(axes: Axes, run: Run, values: Floats, colour: str, index: int) -> None:
    curve(
        axes,
        run.train["tokens"],
        values,
        color=colour,
        linestyle=DASHES[index % 5],
        alpha=_WEIGHTS[index % 5],
        linewidth=1.6,
    )


def _frame(axes: Axes, runs: list[Run], many: int, labels: bool = True) -> None:
    phase_bands(axes, common_bands(runs), labels)
    axes.set_xlim(0, max(float(run.train["tokens"][-1]) for run in runs))
    count_axis(axes, "tokens", many)


def _legend(figure: Figure, runs: list[Run]) -> None:
    marks = [
        Line2D(
            [],
            [],
            color=INK,
            linestyle=DASHES[n % 5],
            marker=_MARKS[n % 5],
            markersize=5,
            alpha=_WEIGHTS[n % 5],
            linewidth=1.6,
        )
        for n in range(len(runs))
    ]
    figure.legend(
        marks,
        [run.label for run in runs],
        loc="outside upper center",
        ncols=min(len(runs), 4),
        handlelength=4,
        fontsize=9,
    )
