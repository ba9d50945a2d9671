"""A plan as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megacode.plan.plan import Plan
from megacode.report.palette import css, hues
from megacode.terminal import count


def plot_plan(plan: Plan, path: Path) -> None:
    """Share of each domain, learning rate, batch size and checkpoints over the run (format by the file's ending).

    Above, what the model reads and how often it sees it anew; the upper axis counts tokens.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, and half the import
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, middle, bottom, saved = figure.subplots(4, 1, sharex=True, height_ratios=[4, 3, 1, 0.5])
    domains = list(
        dict.fromkeys(stream.domain for phase in plan.phases for stream in phase.streams)
    )
    schemes = css()["light"]
    colours = [schemes[f"hue{hue}"] for hue in hues(domains).values()]
    total = plan.total_steps
    for phase in plan.phases:
        steps = np.unique(
            np.linspace(phase.first_step, phase.last_step, min(phase.steps, 600)).astype(np.int64)
        )
        weights = phase.weights_at(steps)
        edges = np.append(steps, phase.last_step + 1)
        bands = [
            sum(
                (weights[:, n] for n, s in enumerate(phase.streams) if s.domain == domain),
                np.zeros(len(steps)),
            )
            for domain in domains
        ]
        bands = [np.append(band, band[-1]) for band in bands]
        top.stackplot(
            edges,
            bands,
            colors=colours,
            labels=domains if phase.index == 0 else (),
            alpha=0.85,
            step="post",
        )
        middle.plot(
            steps, [phase.learning_rate(int(step)) for step in steps], color="black", linewidth=1.2
        )
        sizes = phase.quota.batch.at(steps - phase.first_step)
        bottom.plot(
            edges, np.append(sizes, sizes[-1]), color="black", linewidth=1.2, drawstyle="steps-post"
        )
        for axes in (top, middle, bottom, saved):
            axes.axvline(phase.first_step, color="grey", linewidth=0.6, linestyle=":")
        fim = {s.fim_rate for s in phase.streams if s.fim_rate}
        note = f", FIM {', '.join(f'{rate:g}' for rate in sorted(fim))}" if fim else ""
        if phase.steps / total > 0.04:
            top.text(
                phase.first_step + phase.steps / 2, 0.5, f"{phase.name}\n{count(phase.tokens)} tokens{note}", fontsize=9,
                color="white", ha="center", va="center", rotation=90 if phase.steps / total < 0.15 else 0,
            )  # fmt: skip
    saves, kept = plan.checkpoints(), plan.kept_checkpoints()
    saved.vlines([s for s in saves if s not in kept], 0, 1, color="grey", linewidth=0.5)
    saved.vlines(sorted(kept), 0, 1, color="black", linewidth=0.8)
    saved.set(ylim=(0, 1), yticks=[], xlabel="step")
    saved.set_ylabel(f"{len(saves)} saves", rotation=0, ha="right", va="center")
    top.set(ylabel="share of sequences", ylim=(0, 1), xlim=(0, total))
    figure.legend(
        *top.get_legend_handles_labels(), loc="outside upper right", ncols=len(domains), fontsize=9
    )
    middle.set(ylabel="learning rate")
    middle.set_ylim(bottom=0)
    middle.grid(alpha=0.3)
    bottom.set(ylabel="batch")
    bottom.set_ylim(bottom=0)
    for axes in (bottom, saved):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    tokens = top.secondary_xaxis("top")
    ticks = [tick for tick in saved.get_xticks() if 0 <= tick <= total]
    tokens.set_xticks(
        ticks,
        [f"{count(plan.tokens_before(int(tick)))}" if tick else "0" for tick in ticks],
        fontsize=8,
    )
    tokens.set_xlabel("tokens", fontsize=9)
    figure.suptitle(plan.recipe.name, x=0.08, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130)
