"""The pictures of one run. Each function returns an SVG, or None where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from megacode.report.curves import envelope, readable_limits, smooth, thin
from megacode.report.drawing import (
    DASHES,
    Band,
    count_axis,
    curve,
    dots,
    draw,
    end_labels,
    number_axis,
    phase_bands,
    rate,
    short,
)
from megacode.report.palette import FAINT, INK, placeholder
from megacode.report.run_data import Floats, Run

_WIDTH = 10.0
_HALF = 5.0
FORMS = {
    "mfu": "{:.0%}".format,
    "learning_rate": rate,
    "tokens_per_second": short,
    "drift": "{:+.2%}".format,
}
NOISY = ("grad_norm", "tokens_per_second", "mfu", "tflops_per_device")
TITLES = {
    "learning_rate": "Learning rate",
    "batch_size": "Batch size, sequences",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Throughput, tokens/s of the whole run",
    "mfu": "Model FLOPs utilisation (MFU)",
    "tflops_per_device": "TFLOP/s per device",
    "memory_gb": "Peak memory of rank 0's device, GB",
    "drift": "Loss in FP8 against bf16, same weights and batch",
}


def bands(run: Run) -> list[Band]:
    """The run's phases over finished steps, as far as it has come."""
    end = run.steps_done
    if run.phases:
        starts = [
            (phase["name"], phase["first_step"], phase["first_step"] + phase["steps"])
            for phase in run.phases
        ]
        return [Band(name, start, min(stop, end)) for name, start, stop in starts if start < end]
    parts = run.train.phase_slices()
    steps = run.train["step"]
    return [
        Band(str(run.train.phase[part.start]), steps[part.start] - 1, steps[part.stop - 1])
        for part in parts
    ]


def validation_points(run: Run, key: str, name: str) -> tuple[Floats, Floats]:
    """(steps, losses) of a source (`loss_by_source`) or domain (`loss_by_domain`)."""
    pairs = [
        (r["step"], r[key][name])
        for r in run.validations
        if (r.get(key) or {}).get(name) is not None
    ]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def loss_by_domain(run: Run, hue: dict[str, int], draw: Callable[..., Any] = draw) -> Any:
    """Training loss of every domain, raw and smoothed, with validation losses as points; `draw_png` gives a PNG."""
    train = run.train
    if not train.loss_by_domain:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps, labels, curves = train["step"], [], []
        for name in run.domains:
            colour = placeholder(hue[name])
            at, losses = validation_points(run, "loss_by_domain", name)
            if name in train.loss_by_domain:
                raw = train.loss_by_domain[name]
                # a domain's loss in a step is a mean over its share of the batch: weigh it so
                line = smooth(raw, train, train.ratio_by_domain.get(name))
                axes.plot(*envelope(steps, raw), color=colour, alpha=0.22, linewidth=0.7)
                curve(axes, steps, line, color=colour, linewidth=1.9)
                curves.append(line)
                known = line[np.isfinite(line)]
                labels.append((known[-1] if len(known) else math.nan, name, colour))
            dots(axes, at, losses, colour, 6.5)
            curves.append(losses)
        if limits := readable_limits(curves):
            axes.set_ylim(limits)
        _frame(axes, run)
        axes.set_ylabel("loss, nats per token")
        figure.canvas.draw()
        end_labels(axes, labels, size=10)
        marks = [
            Line2D([], [], color=FAINT, linewidth=1.9),
            Line2D([], [], color=FAINT, marker="o", linestyle="", markersize=6),
        ]
        texts = ["training, smoothed (each step faint)", "validation"]
        axes.legend(marks, texts, loc="upper right", labelcolor=FAINT, fontsize=8.5)

    return draw(_WIDTH, 4.3, paint, f"Loss of {run.label} by domain over steps")


def loss_by_source(run: Run, hue: dict[str, int]) -> str | None:
    """One panel a domain, one line a source; None where no domain has two sources."""
    groups = {
        domain: [n for n in run.recipe.sources if run.recipe.sources[n].domain == domain]
        for domain in run.domains
    }
    read = {d: [n for n in names if n in run.train.loss_by_source] for d, names in groups.items()}
    read = {domain: names for domain, names in read.items() if names}
    if not any(len(names) > 1 for names in read.values()):
        return None

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(read), squeeze=False)[0]
        for axes, (domain, names) in zip(grid, read.items(), strict=True):
            colour, labels, curves = placeholder(hue[domain]), [], []
            for index, name in enumerate(names):
                line = smooth(run.train.loss_by_source[name], run.train)
                curve(
                    axes,
                    run.train["step"],
                    line,
                    color=colour,
                    linestyle=DASHES[index % len(DASHES)],
                    linewidth=1.4,
                )
                at, losses = validation_points(run, "loss_by_source", name)
                dots(axes, at, losses, colour, 4.5)
                known = line[np.isfinite(line)]
                labels.append((known[-1] if len(known) else math.nan, name, colour))
                curves += [line, losses]
            if limits := readable_limits(curves):
                axes.set_ylim(limits)
            _frame(axes, run, many=4, labels=False)
            axes.set_title(domain, color=colour)
            figure.canvas.draw()
            end_labels(axes, labels, size=8)
        grid[0].set_ylabel("loss, nats per token")

    return draw(_WIDTH, 3.1, paint, f"Loss of {run.label} by source over steps")


def mixture(run: Run, hue: dict[str, int], draw: Callable[..., Any] = draw) -> Any:
    """Consumed shares of sequences as areas, planned ones as lines; `draw_png` gives a PNG."""
    train = run.train
    names = [name for name in run.domains if name in train.ratio_by_domain]
    if not names:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps = train["step"]
        weight = train["batch_size"]
        shares = [smooth(train.ratio_by_domain[name], train, weight) for name in names]
        for part in train.phase_slices():
            x = np.concatenate([[steps[part.start] - 1], steps[part]])
            stack = [np.concatenate([share[part][:1], share[part]]) for share in shares]
            colours = [placeholder(hue[name]) for name in names]
            chosen = [thin(x, layer) for layer in stack]
            axes.stackplot(
                chosen[0][0], [c[1] for c in chosen], colors=colours, alpha=0.35, linewidth=0
            )
        planned = planned_shares(run, names)
        for at, levels in planned:
            for level in levels[:-1]:
                if level.max() < 0.001 or level.min() > 0.999:
                    continue  # between domains that this phase does not read
                axes.plot(at, level, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        _frame(axes, run, shade=False)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(visible=False)
        axes.set_ylabel("share of sequences")
        figure.canvas.draw()
        last = np.cumsum([share[-1] for share in shares])
        middles = last - np.array([share[-1] for share in shares]) / 2
        end_labels(
            axes,
            [(m, n, placeholder(hue[n])) for m, n in zip(middles, names, strict=True)],
            size=10,
        )

    return draw(
        _WIDTH,
        2.9,
        paint,
        f"Share of sequences of {run.label} by domain over steps, consumed and planned",
    )


def planned_shares(run: Run, names: list[str]) -> list[tuple[Floats, Floats]]:
    """For each phase: (finished steps, cumulative planned shares [domains, steps])."""
    out = []
    for phase in run.phases:
        curves = phase["curves"]
        at = np.array(curves["share_steps"], dtype=np.float64)
        per_domain = np.zeros((len(names), len(at)))
        for stream, shares in zip(phase["streams"], curves["shares"], strict=True):
            if stream["domain"] in names:
                per_domain[names.index(stream["domain"])] += shares
        x = np.concatenate(
            [[at[0]], at + 1]
        )  # step s (from 0) lies between s and s + 1 finished steps
        out.append((x, np.concatenate([per_domain[:, :1], per_domain], axis=1).cumsum(axis=0)))
    return out


def small_figures(run: Run) -> list[tuple[str, str]]:
    """(caption, SVG) of rate, batch size, gradient norm, throughput, MFU, memory, FP8's drift: what the run has of them."""
    train = run.train
    sizes = train["batch_size"]
    moving = len(np.unique(sizes[np.isfinite(sizes)])) > 1
    keys = ["learning_rate", *(["batch_size"] if moving else []), "grad_norm", "tokens_per_second"]
    keys += ["mfu" if train.has("mfu") else "tflops_per_device", "memory_gb", "drift"]
    return [(TITLES[key], _small(run, key)) for key in keys if train.has(key)]


def _small(run: Run, key: str) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps, values = run.train["step"], run.train[key]
        if key == "drift":
            known = np.isfinite(values)
            axes.axhline(0, color=FAINT, linewidth=0.8)
            dots(axes, steps[known], values[known], INK, 4.5)
        elif key in NOISY:
            line = smooth(values, run.train)
            axes.plot(*envelope(steps, values), color=INK, alpha=0.22, linewidth=0.7)
            curve(axes, steps, line, color=INK, linewidth=1.5)
        else:
            style = "steps-pre" if key == "batch_size" else "default"
            curve(axes, steps, values, color=INK, linewidth=1.5, drawstyle=style)
        finite = values[np.isfinite(values)]
        positive = bool((finite > 0).all())
        if key == "drift":
            reach = 1.2 * float(np.abs(finite).max()) or 0.001
            axes.set_ylim(-reach, reach)
        elif key == "grad_norm" and positive and finite.max() > 20 * np.median(finite):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(
                lambda value, _: f"{value:g}"
            )  # the scale's own writes formulas
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.08 * float(finite.max()) or 1)
        if axes.get_yscale() == "linear":
            number_axis(axes, FORMS.get(key, lambda value: f"{value:g}"))
        _frame(axes, run, many=5, labels=False)

    return draw(_HALF, 2.1, paint, f"{TITLES[key]} of {run.label} over steps")


def _frame(axes: Axes, run: Run, many: int = 10, labels: bool = True, shade: bool = True) -> None:
    phase_bands(axes, bands(run), labels, shade)
    axes.set_xlim(0, run.steps_done)
    count_axis(axes, "steps", many)
