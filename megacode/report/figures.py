"""The plots of one run, and small ones of one or several; None if there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from megacode.report.curves import (
    FAINTLY,
    curve,
    dots,
    draw_losses,
    drawn_values,
    end_labels,
    readable_limits,
    smooth,
)
from megacode.report.drawing import (
    DASHES,
    MARKERS,
    across,
    frame,
    new_figure,
    number_axis,
    run_look,
    short,
    styled,
)
from megacode.report.palette import FAINT, INK
from megacode.report.run_data import Floats, Run

TITLES = {
    "learning_rate": "Learning rate",
    "batch_size": "Batch size, sequences",
    "grad_norm": "Gradient norm, before clipping",
    "contrastive": "Contrastive loss",
    "contrastive_accuracy": "Queries whose nearest candidate is equivalent",
    "weighted_tokens": "Loss of weighted tokens",
    "tokens_per_second": "Throughput, tokens/s of the whole run",
    "mfu": "Model FLOPs utilisation (MFU)",
    "tflops_per_device": "TFLOP/s per device",
    "memory_gb": "Peak memory of rank 0's device, GB",
    "drift": "Loss in FP8 against bf16, same weights and batch",
}
_NOISY = (
    *("grad_norm", "contrastive", "contrastive_accuracy", "weighted_tokens"),
    *("tokens_per_second", "mfu", "tflops_per_device"),
)


_FORMS = {
    "mfu": "{:.0%}".format,
    "contrastive_accuracy": "{:.0%}".format,
    "tokens_per_second": short,
    "drift": "{:+.2%}".format,
}


@styled
def loss_by_domain(run: Run, colours: dict[str, str]) -> Figure | None:
    """Training loss of every domain, raw and smoothed, with validation losses as points."""
    losses = run.train.loss_by_domain
    if not losses:
        return None
    figure = new_figure(10, 4.3, f"Loss of {run.label} by domain over steps")
    axes = figure.subplots()
    labels = []
    for name in run.domains:
        points, style = {"markersize": 6.5}, {"color": colours[name], "linewidth": 1.9}
        labels += draw_losses(axes, run, "loss_by_domain", name, "step", points, **style)
    readable_limits(axes)
    for name, raw in losses.items():
        axes.plot(run.train["step"], raw, color=colours[name], **FAINTLY)
    frame(axes, [run], 10)
    axes.set_ylabel("loss, nats per token")
    end_labels(axes, labels, 10)
    looks: list[Any] = [{"linewidth": 1.9}, {"marker": "o", "linestyle": ""}]
    marks = [Line2D([], [], color=FAINT, **look) for look in looks]
    texts = ["training, smoothed (each step faint)", "validation"]
    axes.legend(marks, texts, loc="upper right", labelcolor=FAINT, fontsize=8.5)
    return figure


@styled
def loss_by_source(run: Run, colours: dict[str, str]) -> Figure | None:
    """A panel a domain, a line a source; None where no domain has two sources."""
    read: dict[str, list[str]] = {domain: [] for domain in run.domains}
    for name in run.train.loss_by_source:
        read[run.recipe.sources[name].domain].append(name)
    read = {domain: names for domain, names in read.items() if names}
    if max(map(len, read.values()), default=0) < 2:
        return None
    figure = new_figure(10, 3.1, f"Loss of {run.label} by source over steps")
    panels = figure.subplots(1, len(read), squeeze=False)[0]
    for axes, (domain, names) in zip(panels, read.items(), strict=True):
        labels = []
        for index, name in enumerate(names):
            style = {"color": colours[domain], "linewidth": 1.4, "linestyle": DASHES[index % 5]}
            points = {"markersize": 4.5}
            labels += draw_losses(axes, run, "loss_by_source", name, "step", points, **style)
        readable_limits(axes)
        frame(axes, [run], 4, labels=False)
        axes.set_title(domain, color=colours[domain])
        end_labels(axes, labels, 8)
    panels[0].set_ylabel("loss, nats per token")
    return figure


@styled
def mixture(run: Run, colours: dict[str, str]) -> Figure | None:
    """Consumed shares of sequences as areas, planned ones as lines."""
    train = run.train
    names = [name for name in run.domains if name in train.ratio_by_domain]
    if not names:
        return None
    description = f"Share of sequences of {run.label} by domain over steps, consumed and planned"
    figure = new_figure(10, 2.9, description)
    axes = figure.subplots()
    shares = np.array([smooth(train.ratio_by_domain[n], train, train["batch_size"]) for n in names])
    shown = [colours[name] for name in names]
    for part in train.phase_slices():
        # Matplotlib does not simplify areas: about 900 points each.
        at = np.unique(np.linspace(part.start, part.stop - 1, 900).round().astype(int))
        steps = np.append(train["step"][part.start] - 1, train["step"][at])
        levels = shares[:, np.append(part.start, at)]
        axes.stackplot(steps, levels, colors=shown, alpha=0.35, linewidth=0)
    for phase in run.phases:
        steps, planned = planned_shares(phase, names)
        for level in planned.cumsum(axis=0)[:-1]:
            if level.max() > 0.001 and level.min() < 0.999:  # borders within the picture
                axes.plot(steps, level, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    frame(axes, [run], 10, shade=False)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False)
    axes.set_ylabel("share of sequences")
    last = shares[:, -1]
    end_labels(axes, list(zip(last.cumsum() - last / 2, names, shown, strict=True)), 10)
    return figure


@styled
def scores(run: Run, colours: dict[str, str]) -> Figure | None:
    """Bits per byte by domain, and a panel a task: its accuracy, groups faint; over tokens."""
    bits = {domain: run.over_tokens("bits_per_byte_by_domain", domain) for domain in run.domains}
    bits = {domain: curve for domain, curve in bits.items() if len(curve[0])}
    names = list(dict.fromkeys(name for record in run.scores for name in record.get("tasks", {})))
    panels = ["bits per byte"] * bool(bits) + names
    if not panels:
        return None
    rows, columns = -(-len(panels) // 3), min(len(panels), 3)
    description = f"Bits per byte and accuracy in tasks of {run.label} over tokens"
    figure = new_figure(10, 2.6 * rows + 0.3, description)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(panel, pad=16)  # above the phases' names
        labels = []
        if panel == "bits per byte" and bits:
            for domain, (at, values) in bits.items():
                curve(axes, at, values, color=colours[domain], linewidth=1.7)
                labels.append((float(values[-1]), domain, colours[domain]))
        else:
            if (chance := run.chance(panel)) is not None:
                axes.axhline(chance, color=FAINT, linewidth=1, linestyle=":")
            for group, (at, values) in run.task(panel).items():
                look: Any = {"linewidth": 1.9} if not group else {"linewidth": 0.9, "alpha": 0.55}
                curve(axes, at, values, color=INK if not group else FAINT, **look)
                if group:
                    labels.append((float(values[-1]), group, FAINT))
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        frame(axes, [run], 4, number="tokens")
        end_labels(axes, labels, 8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return figure


def planned_shares(phase: dict[str, Any], names: Sequence[str]) -> tuple[Floats, Floats]:
    """(finished steps, shares of the domains `names` [domains, steps]) of a phase of the plan."""
    at = np.array(phase["curves"]["share_steps"], dtype=np.float64)
    shares = np.zeros((len(names), len(at)))
    for stream, share in zip(phase["streams"], phase["curves"]["shares"], strict=True):
        if stream["domain"] in names:
            shares[names.index(stream["domain"])] += share
    # Step s, counted from 0, lies between s and s + 1 finished steps.
    return np.append(at[0], at + 1), np.column_stack([shares[:, 0], shares])


def small_figures(runs: list[Run]) -> list[tuple[str, Figure]]:
    """(title, figure) of learning rate, batch size, gradient norm, losses of pairs, speed, memory,
    FP8's drift."""
    shown = {key for key in TITLES if any(run.train.has(key) for run in runs)}
    if "mfu" in shown:
        shown -= {"tflops_per_device"}
    if len(np.unique(np.concatenate([run.train["batch_size"] for run in runs]))) == 1:
        shown -= {"batch_size"}
    return [(TITLES[key], _small_figure(runs, key)) for key in TITLES if key in shown]


@styled
def _small_figure(runs: list[Run], key: str) -> Figure:
    x, names = across(runs), ", ".join(run.label for run in runs)
    figure = new_figure(5, 2.1, f"{TITLES[key]} of {names} over {x}")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        at, measured = run.train[x], run.train[key]
        look = {"color": INK, "linewidth": 1.5, **run_look(index)}
        if key == "drift":
            axes.axhline(0, color=FAINT, linewidth=0.8)
            known = np.isfinite(measured)
            points = {"markersize": 4.5, "marker": MARKERS[index % 5]}
            dots(axes, at[known], measured[known], color=INK, **points)
        elif key in _NOISY:
            if len(runs) == 1:
                axes.plot(at, measured, color=INK, **FAINTLY)
            curve(axes, at, smooth(measured, run.train), **look)
        else:
            steps = "steps-pre" if key == "batch_size" else "default"
            curve(axes, at, measured, drawstyle=steps, **look)
    values = drawn_values(axes)
    highest = float(np.abs(values).max()) or 0.001
    if key == "grad_norm" and values.min() > 0 and highest > 20 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the scale's own writes formulas
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(-1.08 * highest if key == "drift" else 0, 1.08 * highest)
        number_axis(axes, _FORMS.get(key, "{:g}".format))
    frame(axes, runs, 5, labels=False)
    return figure
