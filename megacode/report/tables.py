"""The report's tables and facts, as plain rows for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacode.report.run_data import Run
from megacode.terminal import count


@dataclass(frozen=True)
class Cell:
    """A number, and what small print stands beside it."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table; `domain` colours it, `part` sets it in under the line above."""

    name: str
    cells: tuple[Cell, ...]
    domain: str | None = None
    part: bool = False


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def facts(run: Run, parameters: int | None) -> list[tuple[str, str]]:
    """(name, value) pairs that stand on top of the page."""
    recipe, train, environment = run.recipe, run.train, run.environment
    model, parallel = recipe.model, recipe.parallel
    shape = f"{model.layers} layers × {model.hidden_size:,}, {model.heads} heads"
    if model.resolved_kv_heads != model.heads:
        shape += f" ({model.resolved_kv_heads} key/value)"
    planned = (run.plan or {}).get("steps")
    total = f" of {planned:,}" if planned else ""
    seconds = float(np.nansum(train["seconds"]))
    world = environment.get("world_size")
    layout = [
        f"{letter} {size}"
        for letter, size in zip(
            ("TP", "PP", "CP"), (parallel.tensor, parallel.pipeline, parallel.context), strict=True
        )
        if size > 1
    ]
    if world:
        layout.append(
            f"DP {max(1, world // (parallel.tensor * parallel.pipeline * parallel.context))}"
        )
    rows = [
        ("Model", f"{count(parameters)} parameters; {shape}" if parameters else shape),
        ("Trained", f"{run.steps_done:,}{total} steps, {count(float(train['tokens'][-1]))} tokens"),
        (
            "Time in steps",
            f"{clock(seconds)}, {np.nansum(_step_tokens(run)) / seconds:,.0f} tokens/s"
            if seconds
            else "–",
        ),
        ("Layout", f"{' × '.join(layout) or 'one process'}; {recipe.precision.compute}"),
    ]
    if environment:
        device = environment.get("device") or "cpu"
        named = device if device != "cpu" else f"CPU, {environment.get('cores')} cores"
        processes = f"{world} process{'es' if world != 1 else ''} on " if world else ""
        rows.append(("Machine", f"{processes}{environment.get('host', '')}: {named}"))
        versions = environment.get("versions") or {}
        known = [
            f"{name} {versions[name]}"
            for name in ("torch", "megatron-core", "transformer-engine")
            if versions.get(name)
        ]
        rows.append(
            ("Software", ", ".join([f"megacode {environment.get('megacode', '?')}", *known]))
        )
        rows.append(("Started", str(environment.get("started", "–"))))
    accepted = [
        f"{event['key']} from step {event['step']:,} on: {event['before']} → {event['now']}"
        for event in run.events
        if event.get("event") == "accepted change"
    ]
    if accepted:
        rows.append(("Changed on the way", "; ".join(accepted)))
    return [*rows, ("Seed", str(recipe.seed))]


def _step_tokens(run: Run) -> Any:
    return run.train["seconds"] * run.train["tokens_per_second"]


def phases(run: Run) -> Table | None:
    """What the plan says of each phase."""
    if not run.phases:
        return None
    rows = []
    for phase in run.phases:
        domains: dict[str, list[float]] = {}
        for stream in phase["streams"]:
            ends = domains.setdefault(stream["domain"], [0.0, 0.0])
            ends[0] += stream["share"][0]
            ends[1] += stream["share"][1]
        fim = {s["fim_rate"] for s in phase["streams"] if s["fim_rate"]}
        rows.append(
            Row(
                phase["name"],
                (
                    Cell(f"{phase['first_step'] + 1:,}–{phase['first_step'] + phase['steps']:,}"),
                    Cell(count(phase["tokens"])),
                    Cell(
                        f"{_move(phase['batch_size'][0], phase['batch_size'][1], '{:,}')} × {phase['sequence_length']:,}"
                    ),
                    Cell(
                        ", ".join(
                            f"{name} {_move(100 * a, 100 * b, '{:.3g}')} %"
                            for name, (a, b) in domains.items()
                        )
                    ),
                    Cell(
                        "–"
                        if not fim
                        else "–".join(f"{rate:g}" for rate in sorted({min(fim), max(fim)}))
                    ),
                    Cell(f"{phase['learning_rate'][1]:.3g} → {phase['learning_rate'][2]:.3g}"),
                    Cell("fresh" if phase["fresh_optimizer"] else "kept"),
                ),
            )
        )
    columns = (
        "phase",
        "steps",
        "tokens",
        "batch × length",
        "mixture",
        "FIM rate",
        "learning rate",
        "Adam's state",
    )
    return Table(columns, tuple(rows))


def _move(first: float, last: float, form: str) -> str:
    a, b = form.format(first), form.format(last)
    return a if a == b else f"{a} → {b}"


def validation(run: Run) -> Table | None:
    """Validation loss at every phase's end, by domain and source, with the change since the phase before."""
    if not run.validations:
        return None
    columns, records = [], []
    if run.phases:
        for phase in run.phases:
            start, end = phase["first_step"], phase["first_step"] + phase["steps"]
            inside = [r for r in run.validations if start < r["step"] <= end]
            if inside:
                columns.append(
                    phase["name"]
                    if inside[-1]["step"] == end
                    else f"{phase['name']} (step {inside[-1]['step']:,})"
                )
                records.append(inside[-1])
    else:
        last = {record.get("phase", ""): record for record in run.validations}
        columns, records = list(last), list(last.values())
    rows = []
    for domain in run.domains:
        if any(domain in (r.get("loss_by_domain") or {}) for r in records):
            rows.append(
                Row(domain, _losses([r["loss_by_domain"].get(domain) for r in records]), domain)
            )
            names = [
                n for n, s in run.recipe.sources.items() if s.domain == domain and s.validation
            ]
            rows += [
                Row(
                    name,
                    _losses([(r.get("loss_by_source") or {}).get(name) for r in records]),
                    part=True,
                )
                for name in names
                if len(names) > 1
            ]
    return Table(("", *columns), tuple(rows)) if rows else None


def _losses(values: list[float | None]) -> tuple[Cell, ...]:
    cells, before = [], None
    for value in values:
        if value is None or not math.isfinite(value):
            cells.append(Cell("–"))
            continue
        cells.append(Cell(f"{value:.4f}", signed(value - before) if before is not None else ""))
        before = value
    return tuple(cells)


def signed(value: float) -> str:
    """+0.123 or −0.123, with a true minus."""
    return f"{'−' if value < 0 else '+'}{abs(value):.3f}"


def sources(run: Run) -> Table:
    """Tokens and epochs of every source: planned for the whole run, and consumed so far."""
    planned: dict[str, float] = {}
    epochs: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for phase in run.phases:
        for stream in phase["streams"]:
            name = stream["source"]
            planned[name] = planned.get(name, 0) + stream["tokens"]
            # The subsets of one source are streams of their own, each with its own epochs.
            epochs.setdefault(name, {})[stream["label"]] = stream["epochs_after"]
            sizes.setdefault(name, {})[stream["label"]] = stream["windows"] * stream["window"]
    rows = []
    for name, source in run.recipe.sources.items():
        taken = run.train.tokens_by_source.get(name)
        consumed = float(taken[-1]) if taken is not None else 0.0
        if not consumed and name not in planned:
            continue
        size = max(sizes[name].values()) if name in sizes else None
        cells = [
            Cell(count(size) if size else "–"),
            Cell(count(planned[name]) if name in planned else "–"),
            Cell(count(consumed), f"{consumed / planned[name]:.0%}" if planned.get(name) else ""),
            Cell(", ".join(f"{e:.3g}" for e in epochs[name].values()) if name in epochs else "–"),
            Cell(f"{consumed / size:.3g}" if size and len(sizes[name]) == 1 else "–"),
        ]
        rows.append(Row(name, tuple(cells), source.domain))
    columns = (
        "source",
        "tokens in an epoch",
        "planned",
        "consumed",
        "epochs planned",
        "epochs consumed",
    )
    return Table(columns, tuple(rows))


def history(run: Run) -> list[tuple[int, str]]:
    """(step, what happened): starts, resumes, phases, checkpoints, stops, the end."""
    out = []
    for event in run.events:
        more = {k: v for k, v in event.items() if k not in ("kind", "step", "event", "at")}
        detail = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in more.items())
        out.append(
            (int(event["step"]), f"{event.get('event', '?')}{': ' + detail if detail else ''}")
        )
    return out


def comparison(runs: list[Run]) -> Table | None:
    """Last validation loss of every domain, one run a row, the best of each domain marked, against the first run."""
    last = [run.validations[-1] if run.validations else None for run in runs]
    domains = list(
        dict.fromkeys(d for run in runs for d in run.domains if _final(run, d) is not None)
    )
    if not domains:
        return None
    best = {d: min(v for run in runs if (v := _final(run, d)) is not None) for d in domains}
    rows = []
    for run, record in zip(runs, last, strict=True):
        cells = [
            Cell(f"{record['step']:,}" if record else "–"),
            Cell(count(run.tokens_at(record["step"])) if record else "–"),
        ]
        for domain in domains:
            value, base = _final(run, domain), _final(runs[0], domain)
            note = (
                signed(value - base)
                if value is not None and base is not None and run is not runs[0]
                else ""
            )
            cells.append(
                Cell(
                    "–" if value is None else f"{value:.4f}",
                    note,
                    best=value is not None and value == best[domain],
                )
            )
        rows.append(Row(run.label, tuple(cells)))
    return Table(("run", "steps", "tokens", *domains), tuple(rows))


def _final(run: Run, domain: str) -> float | None:
    value = (
        (run.validations[-1].get("loss_by_domain") or {}).get(domain) if run.validations else None
    )
    return float(value) if value is not None and math.isfinite(value) else None


def clock(seconds: float) -> str:
    """48 s, 4 min 12 s, 3 h 04 min, 2 d 5 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
