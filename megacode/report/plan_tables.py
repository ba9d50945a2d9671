"""A plan as tables for people."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacode.plan import estimate
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.summary import domain_shares
from megacode.terminal import count, print_table, table_of

# ---------------------------------------------------------------------------------------------------------- tables


def print_plan(plan: Plan, vocab_size: int | None, console: Console) -> None:
    """The whole run as tables; what it costs is in `show_costs`.

    Args:
        vocab_size: None where neither the recipe nor a tokenizer says: then what depends on it is left out.
    """
    recipe = plan.recipe
    console.print(Text(recipe.name, style="bold"), Text(recipe.description, style="dim"))
    console.print(
        f"{plan.total_steps:,} steps · {count(plan.total_tokens)} tokens · {len(plan.phases)} phase"
        f"{'s' if len(plan.phases) > 1 else ''} · seed {recipe.seed}\n"
    )
    print_table(console, _model_table(plan, vocab_size))
    print_table(console, _phase_table(plan))
    for phase in plan.phases:
        print_table(console, _stream_table(phase))


def _model_table(plan: Plan, vocab_size: int | None) -> Table:
    model = plan.recipe.model
    table = table_of("Model", "", "", left=2, prose=True)
    kv = (
        f" ({model.kv_heads} for keys and values)"
        if model.kv_heads not in (None, model.heads)
        else ""
    )
    heads = f"{model.heads} heads{kv} of {model.resolved_head_dim}"
    table.add_row("shape", f"{model.layers} layers x {model.hidden_size}, {heads}")
    table.add_row("feed-forward", f"{model.resolved_ffn_size}, {model.activation}")
    length = max(phase.sequence_length for phase in plan.phases)
    if vocab_size is None:
        table.add_row(
            "vocabulary",
            "not known: the tokenizer is not there yet, and model.vocab_size does not say",
        )
        bare = estimate.parameter_count(
            model.model_copy(update={"tie_embeddings": True}), 0, length
        )
        table.add_row("parameters", f"{bare:,} without embeddings")
    else:
        table.add_row("vocabulary", f"{vocab_size:,}{', tied' if model.tie_embeddings else ''}")
        table.add_row("parameters", f"{estimate.parameter_count(model, vocab_size, length):,}")
    if model.mup:
        table.add_row(
            "muP",
            f"width {model.hidden_size} from {model.mup.base_hidden_size}: matrices at {model.width_ratio:g} of the rate and "
            f"std {model.hidden_init_std:.6g} (residual {model.residual_init_std:.6g}), embeddings x {model.embedding_scale:g}, "
            f"logits x {model.logit_scale:g}, scores x {model.resolved_softmax_scale:.4g}",
        )
    parallel = plan.recipe.parallel
    table.add_row(
        "layout",
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}, micro-batch "
        f"{parallel.micro_batch_size}, {plan.recipe.precision.compute}",
    )
    if model.megatron:
        table.add_row(
            "",
            f"model.megatron ({', '.join(model.megatron)}) is not part of the counts and estimates",
        )
    return table


def _phase_table(plan: Plan) -> Table:
    columns = (
        "phase",
        "steps",
        "from step",
        "tokens",
        "batch",
        "length",
        "warm-up",
        "rate: first, peak, last",
        "schedule",
        "Adam",
    )
    table = table_of("Phases", *columns)
    for phase in plan.phases:
        first, last = phase.batch_size(phase.first_step), phase.batch_size(phase.last_step)
        rates = (
            phase.learning_rate(phase.first_step),
            phase.rate.peak,
            phase.learning_rate(phase.last_step),
        )
        table.add_row(
            phase.name,
            f"{phase.steps:,}",
            f"{phase.first_step:,}",
            count(phase.tokens),
            f"{first:,}" if first == last else f"{first:,} → {last:,}",
            f"{phase.sequence_length:,}",
            f"{phase.rate.warmup:,}",
            ", ".join(f"{rate:.4g}" for rate in rates),
            phase.rate.schedule,
            "fresh" if phase.fresh_optimizer and phase.index else "kept" if phase.index else "",
        )
    return table


def _stream_table(phase: PhasePlan) -> Table:
    given, total = given_weights(phase)
    table = table_of(
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
            _percent(first)
            if abs(first - last) < 5e-7
            else f"{_percent(first)} → {_percent(last)}",
            f"{stream.samples:,}",
            count(stream.tokens),
            f"{stream.epochs:.3g}",
            Text(f"{stream.epochs_after:.3g}", style="yellow" if stream.epochs_after > 4 else ""),
            f"{stream.fim_rate:g}{' document' * (stream.fim_level == 'document')}"
            if stream.fim_rate
            else "",
        )
    table.add_section()
    table.add_row(
        "sum", "", total, _percent(1.0), f"{phase.samples:,}", count(phase.tokens), style="dim"
    )
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
        return [
            f"{a:.4g} → {b:.4g}" for a, b in zip(first, last, strict=True)
        ], f"{first.sum():.6g} → {last.sum():.6g}"
    return [f"{weight:.4g}" for weight in first], f"{first.sum():.6g}"
