"""A plan as tables for people, as plain data for programs, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacode.recipe import estimate
from megacode.recipe.plan import PhasePlan, Plan, StreamPlan


def count(number: float) -> str:
    """1,234 or 344.8 B: whole numbers below a million, else four digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size * 0.9999:
            scaled = number / size
            return f"{scaled:,.{3 if scaled < 10 else 2 if scaled < 100 else 1}f} {suffix}"
    return f"{number:,.0f}"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    if days * 24 >= 2:
        return f"{days * 24:.1f} hours"
    return f"{days * 1440:.1f} minutes"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, header_style="dim")
    table.show_header = any(columns)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=number < left)
    return table


# ---------------------------------------------------------------------------------------------------------- tables


def print_plan(plan: Plan, vocab_size: int | None, console: Console, gpus: int | None, device: str, mfu: float) -> None:
    """The whole run as tables.

    Args:
        vocab_size: None where neither the recipe nor a tokenizer says: then what depends on it is left out.
        gpus: devices for the estimate of memory and time; None leaves them out.
        mfu: assumed share of the device's peak.
    """
    recipe = plan.recipe
    console.print(Text(recipe.name, style="bold"), Text(recipe.description, style="dim"))
    console.print(
        f"{plan.total_steps:,} steps · {count(plan.total_tokens)} tokens · {len(plan.phases)} phase"
        f"{'s' if len(plan.phases) > 1 else ''} · seed {recipe.seed}\n"
    )
    console.print(_model_table(plan, vocab_size))
    console.print(_phase_table(plan))
    for phase in plan.phases:
        console.print(_stream_table(phase))
    console.print(_checkpoint_line(plan))
    if vocab_size is not None:
        console.print(_estimate_table(plan, vocab_size, gpus, device, mfu))


def _model_table(plan: Plan, vocab_size: int | None) -> Table:
    model = plan.recipe.model
    table = _table("Model", "", "", left=2)
    kv = f" ({model.kv_heads} for keys and values)" if model.kv_heads not in (None, model.heads) else ""
    heads = f"{model.heads} heads{kv} of {model.resolved_head_dim}"
    table.add_row("shape", f"{model.layers} layers x {model.hidden_size}, {heads}")
    table.add_row("feed-forward", f"{model.resolved_ffn_size}, {model.activation}")
    length = max(phase.sequence_length for phase in plan.phases)
    if vocab_size is None:
        table.add_row("vocabulary", "not known: the tokenizer is not there yet, and model.vocab_size does not say")
        bare = estimate.parameter_count(model.model_copy(update={"tie_embeddings": True}), 0, length)
        table.add_row("parameters", f"{bare:,} without embeddings")
    else:
        table.add_row("vocabulary", f"{vocab_size:,}{', tied' if model.tie_embeddings else ''}")
        table.add_row("parameters", f"{estimate.parameter_count(model, vocab_size, length):,}")
    parallel = plan.recipe.parallel
    table.add_row(
        "layout",
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}, micro-batch "
        f"{parallel.micro_batch_size}, {plan.recipe.precision.compute}",
    )
    if model.megatron:
        table.add_row("", f"model.megatron ({', '.join(model.megatron)}) is not part of the counts and estimates")
    return table


def _phase_table(plan: Plan) -> Table:
    columns = (
        "phase",
        "steps",
        "from step",
        "tokens",
        "batch",
        "length",
        "rate: first, peak, last",
        "schedule",
        "Adam",
    )
    table = _table("Phases", *columns)
    for phase in plan.phases:
        first, last = phase.batch_size(phase.first_step), phase.batch_size(phase.last_step)
        rates = (phase.learning_rate(phase.first_step), phase.rate.peak, phase.learning_rate(phase.last_step))
        table.add_row(
            phase.name,
            f"{phase.steps:,}",
            f"{phase.first_step:,}",
            count(phase.tokens),
            f"{first:,}" if first == last else f"{first:,} → {last:,}",
            f"{phase.sequence_length:,}",
            ", ".join(f"{rate:.4g}" for rate in rates),
            phase.rate.schedule,
            "fresh" if phase.fresh_optimizer and phase.index else "kept" if phase.index else "",
        )
    return table


def _stream_table(phase: PhasePlan) -> Table:
    given, total = given_weights(phase)
    table = _table(
        f"{phase.name}: what it reads",
        *("source", "domain", "weight", "share", "samples", "tokens", "epochs", "so far", "FIM"),
        left=2,
    )
    shares = phase.weights_at(np.array([phase.first_step, phase.last_step]))
    for number, stream in enumerate(phase.streams):
        first, last = shares[:, number]
        table.add_row(
            stream.label,
            stream.domain,
            given[number],
            _percent(first) if abs(first - last) < 5e-7 else f"{_percent(first)} → {_percent(last)}",
            f"{stream.samples:,}",
            count(stream.tokens),
            f"{stream.epochs:.3g}",
            Text(f"{stream.epochs_after:.3g}", style="yellow" if stream.epochs_after > 4 else ""),
            f"{stream.fim_rate:g}{' document' * (stream.fim_level == 'document')}" if stream.fim_rate else "",
        )
    table.add_section()
    table.add_row("sum", "", total, _percent(1.0), f"{phase.samples:,}", count(phase.tokens), style="dim")
    domains = domain_shares(phase)
    if len(domains) > 1:
        table.caption = " · ".join(f"{name} {_percent(share)}" for name, share in domains.items())
        table.caption_justify = "left"
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def given_weights(phase: PhasePlan) -> tuple[list[str], str]:
    """Each stream's weight as the recipe gives it (before normalisation), and the sum, at the phase's first step.

    Inside domains: the ratio of the domain times the share within it.
    """
    weights = phase.quota.weights
    first = weights.at(np.zeros(1, dtype=np.int64))[0]
    if weights.settled:
        last = weights.at(np.array([phase.steps - 1]))[0]
        return [f"{a:.4g} → {b:.4g}" for a, b in zip(first, last, strict=True)], f"{first.sum():.6g} → {last.sum():.6g}"
    return [f"{weight:.4g}" for weight in first], f"{first.sum():.6g}"


def domain_shares(phase: PhasePlan) -> dict[str, float]:
    """Share of the phase's samples by domain."""
    shares: dict[str, float] = {}
    for stream in phase.streams:
        shares[stream.domain] = shares.get(stream.domain, 0.0) + stream.samples / max(phase.samples, 1)
    return shares


def _checkpoint_line(plan: Plan) -> Text:
    saves, ends = np.array(plan.checkpoints()), plan.phase_ends()
    parts = []
    start = 0
    for phase, end in zip(plan.phases, ends, strict=True):
        parts.append(f"{phase.name} {int(((saves > start) & (saves <= end)).sum())}")
        start = end
    kept, last = len(plan.kept_checkpoints()), plan.recipe.checkpoints.keep_last
    text = Text("Checkpoints  ", style="bold")
    line = f"{len(saves)} saves ({', '.join(parts)}); {kept} kept for good, and the last {last} of the others\n"
    text.append(line, style="not bold")
    return text


def _estimate_table(plan: Plan, vocab_size: int, gpus: int | None, device: str, mfu: float) -> Table:
    flops = estimate.run_flops(plan, vocab_size)
    table = _table("Estimate", "", "", left=2)
    table.add_row("compute", f"{flops:.4g} FLOPs, forward and backward; causal attention counted in full")
    parallel = plan.recipe.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    world = gpus or replica
    memory = estimate.memory_per_rank(plan.recipe, vocab_size, world)
    table.add_row(
        "memory a rank",
        f"{gigabytes(memory.total)} on the fullest of {world}: weights {gigabytes(memory.weights)}, gradients "
        f"{gigabytes(memory.gradients)}, optimizer {gigabytes(memory.optimizer)}, activations "
        f"{gigabytes(memory.activations)}",
    )
    if gpus:
        peak = estimate.PEAK_FLOPS[device]
        days = estimate.days(flops, gpus, peak, mfu)
        table.add_row(
            "time",
            f"{duration(days)} on {gpus:,} {device} at MFU {mfu:g} of {peak / 1e12:,.0f} TFLOP/s (dense, 16 bit); "
            f"{days * 24 * gpus:,.0f} device hours",
        )
    else:
        table.add_row("time", "give --gpus N (and --device, --mfu)")
    return table


# ------------------------------------------------------------------------------------------------------------ data


def plan_as_dict(plan: Plan, vocab_size: int | None = None) -> dict[str, Any]:
    """The plan as plain data (JSON): what `plan.json` in a run's folder holds."""
    model = plan.recipe.model
    length = max(phase.sequence_length for phase in plan.phases)
    out: dict[str, Any] = {
        "name": plan.recipe.name,
        "steps": plan.total_steps,
        "samples": plan.total_samples,
        "tokens": plan.total_tokens,
        "checkpoints": list(plan.checkpoints()),
        "kept_checkpoints": sorted(plan.kept_checkpoints()),
        "phases": [_phase_as_dict(phase) for phase in plan.phases],
    }
    if vocab_size is not None:
        out["vocab_size"] = vocab_size
        out["parameters"] = estimate.parameter_count(model, vocab_size, length)
        out["flops"] = estimate.run_flops(plan, vocab_size)
    return out


def _phase_as_dict(phase: PhasePlan) -> dict[str, Any]:
    ends = phase.weights_at(np.array([phase.first_step, phase.last_step]))
    return {
        "name": phase.name,
        "first_step": phase.first_step,
        "steps": phase.steps,
        "samples": phase.samples,
        "tokens": phase.tokens,
        "sequence_length": phase.sequence_length,
        "batch_size": [phase.batch_size(phase.first_step), phase.batch_size(phase.last_step)],
        "learning_rate": [phase.learning_rate(phase.first_step), phase.rate.peak, phase.learning_rate(phase.last_step)],
        "fresh_optimizer": phase.fresh_optimizer,
        "reset_at_eod": phase.reset_at_eod,
        "domains": domain_shares(phase),
        "streams": [_stream_as_dict(stream, *ends[:, n].tolist()) for n, stream in enumerate(phase.streams)],
    }


def _stream_as_dict(stream: StreamPlan, first: float, last: float) -> dict[str, Any]:
    return {
        "source": stream.source,
        "label": stream.label,
        "domain": stream.domain,
        "subset": [stream.low, stream.high],
        "share": [first, last],
        "fim_rate": stream.fim_rate,
        "fim_level": stream.fim_level,
        "packing": stream.packing,
        "estimated": stream.estimated,
        "samples": stream.samples,
        "tokens": stream.tokens,
        "epochs": stream.epochs,
        "epochs_after": stream.epochs_after,
        "cursor": stream.cursor,
        "window": stream.window,
        "first_window": stream.first_window,
        "windows": stream.windows,
    }


# --------------------------------------------------------------------------------------------------------- picture


def plot_plan(plan: Plan, path: Path) -> None:
    """Share of each domain, learning rate and batch size over the run, as an image (the format by the file's "
    "ending)."""
    from matplotlib.figure import Figure  # no pyplot: no global state, and half the import

    figure = Figure(figsize=(9, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    domains = list(dict.fromkeys(stream.domain for phase in plan.phases for stream in phase.streams))
    for phase in plan.phases:
        points = min(phase.steps, 600)
        steps = np.unique(np.linspace(phase.first_step, phase.last_step, points).astype(np.int64))
        weights = phase.weights_at(steps)
        edges = np.append(steps, phase.last_step + 1)
        bands = [
            sum((weights[:, n] for n, s in enumerate(phase.streams) if s.domain == domain), np.zeros(len(steps)))
            for domain in domains
        ]
        bands = [np.append(band, band[-1]) for band in bands]
        colours = [f"C{number}" for number in range(len(domains))]
        top.stackplot(edges, bands, colors=colours, labels=domains if phase.index == 0 else (), alpha=0.85, step="post")
        middle.plot(steps, [phase.learning_rate(int(step)) for step in steps], color="black", linewidth=1)
        sizes = phase.quota.batch.at(steps - phase.first_step)
        bottom.plot(edges, np.append(sizes, sizes[-1]), color="black", linewidth=1, drawstyle="steps-post")
        for axes in (top, middle, bottom):
            axes.axvline(phase.first_step, color="grey", linewidth=0.6, linestyle=":")
        top.text(phase.first_step, 1.02, f" {phase.name}", fontsize=8, color="grey")
    top.set(ylabel="share of sequences", ylim=(0, 1), xlim=(0, plan.total_steps))
    top.legend(loc="lower left", fontsize=8)
    middle.set(ylabel="learning rate")
    middle.set_ylim(bottom=0)
    bottom.set(ylabel="batch", xlabel="step")
    bottom.set_ylim(bottom=0)
    figure.suptitle(plan.recipe.name)
    figure.savefig(path, dpi=130)
