"""A sweep as tables on a terminal: what it costs, how far it is, what came out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from megacode.evaluate.statistics import Interval
from megacode.plan import estimate
from megacode.report.plan_costs import Machine
from megacode.studies.compare import ENOUGH, MetricResult
from megacode.studies.state import state_of
from megacode.studies.sweep import Cell, OpenSweep
from megacode.terminal import count, duration, print_table, table_of


def plan_rows(sweep: OpenSweep, machine: Machine) -> list[dict[str, Any]]:
    """What each cell's own steps cost, as plain data. `device_days` and `price` are None where the
    vocabulary or the price is not known."""
    rows = []
    for cell in sweep.all_cells:
        flops, days, price = cell.flops(), None, None
        if flops is not None:
            days = estimate.days(flops, 1, machine.peak.sixteen_bit * 1e12, machine.mfu)
            price = None if machine.price is None else days * 24 * machine.price
        rows.append(
            {
                "cell": cell.name,
                "steps": cell.end - cell.first,
                "after": cell.parent.name if cell.parent else None,
                "tokens": cell.tokens,
                "flops": flops,
                "device_days": days,
                "price": price,
            }
        )
    return rows


def print_plan(sweep: OpenSweep, machine: Machine, console: Console) -> None:
    """Tokens, time and price of each cell and of the whole."""
    rows = plan_rows(sweep, machine)
    columns = ("steps", "tokens", "FLOPs", "device time", "price")
    table = table_of(f"{sweep.sweep.name}: {len(sweep.cells)} cells", "cell", *columns)
    total: dict[str, Any] = {
        key: None if None in (values := [row[key] for row in rows]) else sum(values)
        for key in ("steps", "tokens", "flops", "device_days", "price")
    }
    for row in rows:
        table.add_row(row["cell"], *_costs(row))
    table.add_section()
    table.add_row("the whole", *_costs(total))
    print_table(console, table)
    if sweep.shared:
        console.print(
            f"{len(sweep.shared)} shared first phases are trained once and forked: "
            f"{sweep.steps_saved:,} steps less than each cell alone"
        )
    console.print(
        f"device time on one {machine.device} at MFU {machine.mfu:g} of "
        f"{machine.peak.sixteen_bit:,.0f} TFLOP/s (dense, 16 bit)"
    )
    if machine.devices and total["device_days"] is not None:
        days = total["device_days"] / machine.devices
        console.print(f"{duration(days)} with {machine.devices:,} of them in use all the time")
    if machine.price is None:
        console.print("price: give --price X, of a device hour")


def _costs(row: dict[str, Any]) -> tuple[str, ...]:
    flops, days, price = row["flops"], row["device_days"], row["price"]
    return (
        f"{row['steps']:,}",
        count(row["tokens"]),
        "vocabulary not known" if flops is None else f"{flops:.3g}",
        "" if days is None else duration(days),
        "" if price is None else f"{price:,.2f}" if price >= 1 else f"{price:.2g}",
    )


def print_states(sweep: OpenSweep, console: Console) -> None:
    """State, step and last loss of each cell; how the last start of a failed one failed."""
    states = [(cell, state_of(cell)) for cell in sweep.all_cells]
    table = table_of(
        f"{sweep.sweep.name}, in {sweep.runs}", "cell", "state", "step", "loss", left=2
    )
    for cell, state in states:
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        table.add_row(cell.name, state.kind, f"{state.step:,} of {cell.end:,}", loss)
    print_table(console, table)
    kinds = Counter(state.kind for _, state in states)
    console.print(", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    print_failures([cell for cell, state in states if state.kind == "failed"], console)


def print_failures(cells: Sequence[Cell], console: Console) -> None:
    for cell in cells:
        why = cell.failure.read_text(encoding="utf-8").strip()
        console.print(f"{cell.name}: {why} ({cell.log})", markup=False, soft_wrap=True)


def print_results(sweep: OpenSweep, metrics: Sequence[MetricResult], console: Console) -> None:
    """Means, intervals and differences of every metric."""
    for metric in metrics:
        columns = ("seeds", "mean", "95 % interval", "difference", "95 % interval")
        table = table_of(metric.name, sweep.axis, *columns)
        for series in metric.series:
            for arm in series.arms:
                label = f"{arm.label} ({series.name})" if series.name else arm.label
                differs = shown(arm.difference, signed=True) if arm.difference else ()
                table.add_row(label, str(arm.interval.seeds), *shown(arm.interval), *differs)
        print_table(console, table)
        for line in notes(sweep, metric):
            console.print(line, markup=False, soft_wrap=True)


def notes(sweep: OpenSweep, metric: MetricResult) -> list[str]:
    """What the numbers of a metric need to be read with: slopes, few seeds, missing cells."""
    lines = []
    for series in metric.series:
        if series.slope:
            of = f" ({series.name})" if series.name else ""
            mean, interval = shown(series.slope, signed=True)
            text = f"slope against {sweep.axis}{of}: {mean}, 95 % interval {interval}"
            if series.slope.p is not None:
                text += f", p = {series.slope.p:.2g}"
            if series.adjusted is not None:
                text += f", {series.adjusted:.2g} after Holm over the tasks"
            lines.append(text)
    if metric.seeds < ENOUGH:
        seeds = "one seed" if metric.seeds == 1 else f"{metric.seeds} seeds"
        lines.append(
            f"fewer than {ENOUGH} seeds: an arm here has only {seeds}, so no claim about a "
            "difference can be made"
        )
    if metric.missing:
        lines.append(f"{metric.missing} finished cells have not measured {metric.name}")
    if metric.early:
        lines.append(f"{metric.early} cells were last evaluated before their end")
    return lines


def shown(interval: Interval, signed: bool = False) -> tuple[str, str]:
    """A mean and its interval as text, with a true minus."""
    form = "+.4f" if signed else ".4f"
    ends = [interval.low, interval.high]
    known = all(map(math.isfinite, ends))
    text = f"{ends[0]:{form}} to {ends[1]:{form}}" if known else "none: one seed"
    return f"{interval.mean:{form}}".replace("-", "−"), text.replace("-", "−")
