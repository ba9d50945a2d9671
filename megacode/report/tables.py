"""The report's tables and facts, as rows of text for the page and the model card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from megacode.report.run_data import Run
from megacode.terminal import count, duration


@dataclass(frozen=True)
class Row:
    """A line of a table; `domain` colours it, `part` sets it in under the line above."""

    name: str
    cells: tuple[str, ...]
    domain: str | None = None
    part: bool = False


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def lead(run: Run) -> str:
    """One sentence or two: how far the run is and what it reached."""
    days = float(np.nansum(run.train["seconds"])) / 86400
    text = f"{_steps(run)}, {count(run.train['tokens'][-1])} tokens in {duration(days)}."
    if losses := run.last_validation():
        named = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        text += f" Validation loss: {named}."
    if unknown := int(np.isnan(run.train["loss"]).sum()):
        text += f" In {unknown:,} step{'s' * (unknown > 1)} the loss was not a finite number."
    return text


def _steps(run: Run) -> str:
    planned = run.plan.get("steps", run.steps_done)
    return f"{run.steps_done:,}{f' of {planned:,}' * (planned != run.steps_done)} steps"


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) pairs that stand on top of the page."""
    model, parallel, train = run.recipe.model, run.recipe.parallel, run.train
    shape = f"{model.layers} layers × {model.hidden_size:,}, {model.heads} heads"
    if model.resolved_kv_heads != model.heads:
        shape += f" ({model.resolved_kv_heads} key/value)"
    if "parameters" in run.plan:
        shape = f"{count(run.plan['parameters'])} parameters; {shape}"
    seconds = train["seconds"]
    tokens, total = np.nansum(seconds * train["tokens_per_second"]), float(np.nansum(seconds))
    speed = f", {tokens / total:,.0f} tokens/s" if total else ""
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context}
    world = run.environment.get("world_size", 1)
    sizes["DP"] = world // (parallel.tensor * parallel.pipeline * parallel.context)
    layout = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    rows = {
        "Model": shape,
        "Trained": f"{_steps(run)}, {count(train['tokens'][-1])} tokens",
        "Time in steps": duration(total / 86400) + speed,
        "Layout": f"{layout or 'one process'}; {run.recipe.precision.compute}",
        **_machine(run),
    }
    accepted = [
        f"{event['key']} from step {event['step']:,} on: {event['before']} → {event['now']}"
        for event in run.events
        if event["event"] == "accepted change"
    ]
    if accepted:
        rows["Changed on the way"] = "; ".join(accepted)
    return [*rows.items(), ("Seed", run.recipe.seeds)]


def _machine(run: Run) -> dict[str, str]:
    environment = run.environment
    if not environment:
        return {}
    device, world = environment["device"], environment["world_size"]
    named = f"CPU, {environment['cores']} cores" if device == "cpu" else device
    return {
        "Machine": f"{world} process{'es' * (world > 1)} on {environment['host']}: {named}",
        "Software": ", ".join([f"megacode {environment['megacode']}", *versions(run)]),
        "Started": environment["started"],
    }


def versions(run: Run) -> list[str]:
    """Name and version of the libraries that compute."""
    known = run.environment.get("versions", {})
    names = ("torch", "megatron-core", "transformer-engine")
    return [f"{name} {known[name]}" for name in names if known.get(name)]


def phases(run: Run) -> Table | None:
    """What the plan says of each phase."""
    rows = []
    for phase in run.phases:
        first, last = phase["first_step"] + 1, phase["first_step"] + phase["steps"]
        shares: dict[str, np.ndarray] = {}
        for stream in phase["streams"]:
            shares[stream["domain"]] = shares.get(stream["domain"], 0) + np.array(stream["share"])
        mixture = [f"{name} {_change(100 * ends, '.3g')} %" for name, ends in shares.items()]
        rates = sorted({s["fim_rate"] for s in phase["streams"] if s["fim_rate"]})
        cells = (
            f"{first:,}–{last:,}",
            count(phase["tokens"]),
            f"{_change(phase['batch_size'], ',')} × {phase['sequence_length']:,}",
            ", ".join(mixture),
            "–".join(f"{rate:g}" for rate in dict.fromkeys((*rates[:1], *rates[-1:]))) or "–",
            f"{phase['learning_rate'][1]:.3g} → {phase['learning_rate'][2]:.3g}",
            "fresh" if phase["fresh_optimizer"] else "kept",
        )
        rows.append(Row(phase["name"], cells))
    columns = ("phase", "steps", "tokens", "batch × length", "mixture", "FIM rate")
    return Table((*columns, "learning rate", "Adam's state"), tuple(rows)) if rows else None


def _change(ends: Iterable[float], form: str) -> str:
    return " → ".join(dict.fromkeys(format(end, form) for end in ends))


def validation(run: Run) -> Table | None:
    """Last validation loss of each phase by domain and source, and the change between phases."""
    last = {record["phase"]: record for record in run.validations}
    ends = {p["name"]: p["first_step"] + p["steps"] for p in run.phases}
    columns = []
    for phase, record in last.items():
        at_end = ends.get(phase, record["step"]) == record["step"]
        columns.append(phase if at_end else f"{phase} (step {record['step']:,})")
    rows = []
    for domain in run.domains:
        losses = [record["loss_by_domain"].get(domain) for record in last.values()]
        if not any(losses):
            continue
        rows.append(Row(domain, _losses(losses), domain))
        names = [n for n, s in run.recipe.sources.items() if s.domain == domain and s.validation]
        for name in names if len(names) > 1 else ():
            losses = [record["loss_by_source"].get(name) for record in last.values()]
            rows.append(Row(name, _losses(losses), part=True))
    return Table(("", *columns), tuple(rows)) if rows else None


def _losses(values: list[float | None]) -> tuple[str, ...]:
    cells, before = [], None
    for value in values:
        cells.append(_loss(value, before))
        before = before if value is None else value
    return tuple(cells)


def _loss(value: float | None, other: float | None) -> str:
    """0.1234 and in small print the difference from `other`, with a true minus."""
    if value is None:
        return "–"
    if other is None:
        return f"{value:.4f}"
    return _noted(f"{value:.4f}", f"{value - other:+.3f}".replace("-", "−"))


def _noted(text: str, note: str) -> str:
    return Markup("{}<small>{}</small>").format(text, note)


def sources(run: Run) -> Table:
    """Tokens and epochs of every source: planned for the whole run, and consumed so far."""
    rows = []
    for name, source in run.recipe.sources.items():
        streams = [s for phase in run.phases for s in phase["streams"] if s["source"] == name]
        taken = run.train.tokens_by_source.get(name)
        consumed = float(taken[-1]) if taken is not None else 0.0
        if not streams and not consumed:
            continue
        planned = sum(s["tokens"] for s in streams)
        # The subsets of one source are streams of their own, each with its own epochs.
        epochs = {s["label"]: s["epochs_after"] for s in streams}
        sizes = {s["label"]: s["windows"] * s["window"] for s in streams}
        size = max(sizes.values(), default=0)
        cells = (
            count(size) if size else "–",
            count(planned) if streams else "–",
            _noted(count(consumed), f"{consumed / planned:.0%}") if planned else count(consumed),
            ", ".join(f"{number:.3g}" for number in epochs.values()) or "–",
            f"{consumed / size:.3g}" if size and len(sizes) == 1 else "–",
        )
        label = name if source.loss_on == "all" else f"{name} (loss on {source.loss_on})"
        rows.append(Row(label, cells, source.domain))
    columns = ("source", "tokens in an epoch", "planned", "consumed")
    return Table((*columns, "epochs planned", "epochs consumed"), tuple(rows))


def comparison(runs: list[Run]) -> Table | None:
    """Last validation losses, a row a run, with differences from the first; the best is bold."""
    last = [run.last_validation() for run in runs]
    domains = list(dict.fromkeys(domain for losses in last for domain in losses))
    best = {d: min(losses[d] for losses in last if d in losses) for d in domains}
    rows = []
    for run, losses in zip(runs, last, strict=True):
        base = {} if run is runs[0] else last[0]
        step = run.validations[-1]["step"] if run.validations else None
        at = ("–", "–") if step is None else (f"{step:,}", count(float(run.at(step, "tokens"))))
        cells = {d: _loss(losses.get(d), base.get(d)) for d in domains}
        marked = [
            Markup("<b>{}</b>").format(cell) if losses.get(d) == best[d] else cell
            for d, cell in cells.items()
        ]
        rows.append(Row(run.label, (*at, *marked)))
    return Table(("run", "steps", "tokens", *domains), tuple(rows)) if domains else None
