"""A plan as a plot."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megacode.plan.plan import Plan
from megacode.plan.summary import plan_summary
from megacode.report.drawing import count_axis, new_figure, number_axis, save, styled
from megacode.report.figures import planned_shares
from megacode.report.palette import FAINT, GRID, INK, domain_colours
from megacode.terminal import count


def plot_plan(plan: Plan, path: Path) -> None:
    """Draw shares of the domains, learning rate, batch size and checkpoints over the run's steps.

    Raises:
        UserError: the file cannot be written; its ending is the format.
    """
    save(_plan_figure(plan), path)


@styled
def _plan_figure(plan: Plan) -> Figure:
    figure = new_figure(11, 7, f"Plan of {plan.recipe.name}")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[4, 3, 1, 0.5])
    mixture, rates, batches, saves = panels
    summary, total = plan_summary(plan), plan.total_steps
    domains = [stream["domain"] for phase in summary["phases"] for stream in phase["streams"]]
    colours = domain_colours(domains)
    areas = {"labels": list(colours), "colors": list(colours.values()), "alpha": 0.4}
    for phase in summary["phases"]:
        curves, width = phase["curves"], phase["steps"] / total
        mixture.stackplot(*planned_shares(phase, list(colours)), linewidth=0, **areas)
        areas["labels"] = ()
        rates.plot(curves["steps"], curves["learning_rate"], color=INK)
        batches.plot(curves["steps"], curves["batch_size"], color=INK, drawstyle="steps-post")
        for axes in panels:
            axes.axvline(phase["first_step"], color=GRID, linewidth=1)
        fim = sorted({f"{s['fim_rate']:g}" for s in phase["streams"] if s["fim_rate"]})
        note = f", FIM {', '.join(fim)}" if fim else ""
        if width > 0.04:
            middle = phase["first_step"] + phase["steps"] / 2
            text = f"{phase['name']}\n{count(phase['tokens'])} tokens{note}"
            turned = 90 if width < 0.15 else 0
            mixture.text(middle, 0.5, text, ha="center", va="center", rotation=turned)
    kept = plan.kept_checkpoints()
    others = [step for step in plan.checkpoints() if step not in kept]
    saves.vlines(others, 0, 1, color=FAINT, linewidth=0.5)
    saves.vlines(sorted(kept), 0, 1, color=INK, linewidth=0.8)
    saves.set(xlim=(0, total), ylim=(0, 1), yticks=[])
    saves.set_ylabel(f"{len(plan.checkpoints())} saves", rotation=0, ha="right", va="center")
    count_axis(saves, "steps", 8)
    mixture.set(ylabel="share of sequences", ylim=(0, 1))
    mixture.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    rates.set(ylabel="learning rate", ylim=(0, None))
    number_axis(rates)
    batches.set(ylabel="batch size", ylim=(0, None))
    ticks = [tick for tick in saves.get_xticks() if 0 <= tick <= total]
    tokens = mixture.secondary_xaxis("top")
    tokens.set_xticks(ticks, [count(plan.tokens_before(int(tick))) for tick in ticks])
    tokens.set_xlabel("tokens")
    figure.legend(loc="outside upper right", ncols=len(colours))
    figure.suptitle(plan.recipe.name, x=0.08, ha="left", fontweight="bold")
    return figure
