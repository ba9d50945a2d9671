"""A plan as tables: the model, the phases and what they read, checkpoints, what packing loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacode.data.packing_report import PackingLosses
from megacode.plan import estimate
from megacode.plan.memory import checkpoint_bytes
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.streams import StreamPlan
from megacode.plan.summary import domain_shares
from megacode.recipe.schema import Model
from megacode.terminal import count, gigabytes, print_table, table_of


def print_plan(
    plan: Plan, vocab_size: int | None, console: Console, every_checkpoint: bool = False
) -> None:
    """The whole run as tables; `plan_costs.print_costs` shows what it costs.

    Args:
        vocab_size: None if neither the recipe nor a tokenizer says; what depends on it is left out.
        every_checkpoint: a line for each checkpoint instead of one for each phase.
    """
    recipe = plan.recipe
    console.print(Text(recipe.name, style="bold"), Text(recipe.description, style="dim"))
    phases = f"{len(plan.phases)} phase{'s' * (len(plan.phases) > 1)}"
    tokens = f"{count(plan.total_tokens)} tokens"
    console.print(f"{plan.total_steps:,} steps · {tokens} · {phases} · seed {recipe.seeds}\n")
    print_table(console, _model_table(plan, vocab_size))
    print_table(console, _phase_table(plan))
    for phase in plan.phases:
        print_table(console, _stream_table(phase))
    print_table(console, _checkpoint_table(plan, vocab_size, every_checkpoint))


def _model_table(plan: Plan, vocab_size: int | None) -> Table:
    model, parallel = plan.recipe.model, plan.recipe.parallel
    table = table_of("Model", "", "", left=2, prose=True)
    shared = model.kv_heads not in (None, model.heads)
    kv = f" ({model.kv_heads} for keys and values)" if shared else ""
    heads = f"{model.heads} heads{kv} of {model.resolved_head_dim}"
    table.add_row("shape", f"{model.layers} layers x {model.hidden_size}, {heads}")
    table.add_row("feed-forward", f"{model.resolved_ffn_size}, {model.activation}")
    if model.position_embedding == "rotary":
        table.add_row("rotary positions", _rotary(model))
    if model.sliding_window:
        windowed = f"{model.windowed_layers} of {model.layers} layers"
        table.add_row("attention", f"window of {model.sliding_window:,} tokens in {windowed}")
    length = max(phase.sequence_length for phase in plan.phases)
    if vocab_size is None:
        unknown = "the tokenizer is not there yet, and model.vocab_size does not say"
        table.add_row("vocabulary", f"not known: {unknown}")
        tied = model.model_copy(update={"tie_embeddings": True})
        bare = estimate.parameter_count(tied, 0, length)
        table.add_row("parameters", f"{bare:,} without embeddings")
    else:
        table.add_row("vocabulary", f"{vocab_size:,}{', tied' * model.tie_embeddings}")
        table.add_row("parameters", f"{estimate.parameter_count(model, vocab_size, length):,}")
    if model.mup:
        table.add_row(
            "muP",
            f"width {model.hidden_size} from {model.mup.base_hidden_size}: "
            f"matrices at {model.width_ratio:g} of the rate and std {model.hidden_init_std:.6g} "
            f"(residual {model.residual_init_std:.6g}), embeddings x {model.embedding_scale:g}, "
            f"logits x {model.logit_scale:g}, scores x {model.resolved_softmax_scale:.4g}",
        )
    for phase in plan.recipe.phases:
        if phase.rotary_base or phase.rotary_scaling:
            own = plan.recipe.model_in(phase.name)
            table.add_row(f"rotary positions in {phase.name}", _rotary(own))
    table.add_row(
        "layout",
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}, "
        f"micro-batch {parallel.micro_batch_size}, {plan.recipe.precision.compute}",
    )
    if model.megatron:
        keys = ", ".join(model.megatron)
        table.add_row("model.megatron", f"{keys}: not part of the estimates")
    return table


def _rotary(model: Model) -> str:
    scaling, every = model.rotary_scaling, model.no_rope_layer_interval
    text = f"base {model.rotary_base:,.10g}"
    if scaling:
        text += f", {scaling.kind} x {scaling.factor:g}"
        text += f" of {scaling.original_length:,}" if scaling.kind != "linear" else ""
    return text + (f", none in 1 of {every} layers" if every else "")


def _phase_table(plan: Plan) -> Table:
    columns = ("phase", "steps", "from step", "tokens", "batch", "length", "warm-up")
    rate = "rate: first, peak, last"
    table = table_of("Phases", *columns, rate, "schedule", "Adam")
    for phase in plan.phases:
        ends = (phase.first_step, phase.last_step)
        sizes = dict.fromkeys(f"{phase.batch_size(step):,}" for step in ends)
        first, last = map(phase.learning_rate, ends)
        adam = "fresh" if phase.fresh_optimizer else "kept"
        table.add_row(
            phase.name,
            f"{phase.steps:,}",
            f"{phase.first_step:,}",
            count(phase.tokens),
            " → ".join(sizes),
            f"{phase.sequence_length:,}",
            f"{phase.rate.warmup:,}",
            f"{first:.4g}, {phase.rate.peak:.4g}, {last:.4g}",
            phase.rate.schedule,
            adam if phase.index else "",
        )
    asked = [
        f"{phase.name}: {given.tokens:,} tokens asked for, {phase.tokens:,} in whole steps"
        for phase, given in zip(plan.phases, plan.recipe.phases, strict=True)
        if given.tokens and given.tokens != phase.tokens
    ]
    table.caption = "\n".join(asked) or None
    return table


def _stream_table(phase: PhasePlan) -> Table:
    """Weights as the recipe gives them, shares of samples, and how often each source is read.

    Weights are not normalised; inside domains they are the domain's ratio times the share within.
    """
    columns = (
        "source",
        "domain",
        "weight",
        "share",
        "samples",
        "tokens",
        "epochs",
        "so far",
        "FIM",
    )
    kinds = [_kind(stream) for stream in phase.streams]
    bounded = any(stream.bounds for stream in phase.streams)
    more = [*["samples: least, most", "so far, at most"] * bounded, *["read as"] * any(kinds)]
    table = table_of(f"{phase.name}: what it reads", *columns, *more, left=2)
    shares = phase.weights_at(np.array([phase.first_step, phase.last_step]))
    ends = [0, phase.steps - 1] if phase.quota.weights.settled else [0]
    given = phase.quota.weights.at(np.array(ends))
    for number, stream in enumerate(phase.streams):
        first, last = shares[:, number]
        steady = abs(first - last) < 5e-7
        by_document = " document" * (stream.fim_level == "document")
        table.add_row(
            stream.label,
            stream.domain,
            " → ".join(f"{weight:.4g}" for weight in given[:, number]),
            _percent(first) if steady else f"{_percent(first)} → {_percent(last)}",
            f"{stream.samples:,}",
            count(stream.tokens),
            f"{stream.epochs:.3g}",
            Text(f"{stream.epochs_after:.3g}", style="yellow" if stream.epochs_after > 4 else ""),
            f"{stream.fim_rate:g}{by_document}" if stream.fim_rate else "",
            *_bounds(stream) * bounded,
            *[kinds[number]] * any(kinds),
        )
    table.add_section()
    total = " → ".join(f"{weight:.6g}" for weight in given.sum(axis=1))
    sums = (total, _percent(1.0), f"{phase.samples:,}", count(phase.tokens))
    table.add_row("sum", "", *sums, style="dim")
    domains = domain_shares(phase)
    captions = []
    if len(domains) > 1:
        captions = [" · ".join(f"{name} {_percent(share)}" for name, share in domains.items())]
    captions += [
        f"{stream.label}: clipped to {stream.epochs_after:.3g} epochs (max_epochs), "
        f"{asked - stream.samples:,} of {asked:,} samples go to other sources"
        for stream, asked in zip(phase.streams, phase.asked or (), strict=False)
        if asked > stream.samples
    ]
    if bounded:
        captions += ["shares are decided while training: the table holds the last known ones"]
    table.caption = "\n".join(captions) or None
    return table


def _bounds(stream: StreamPlan) -> list[str]:
    """What is certain of a stream whose share is decided while training."""
    fewest, most = stream.bounds or (stream.samples, stream.samples)
    return [f"{fewest:,}, {most:,}", f"{stream.most_after / stream.epoch_tokens:.3g}"]


def _kind(stream: StreamPlan) -> str:
    """How a source is read, where it is not as shuffled text."""
    trained = {
        "answers": "loss on answers",
        "last_answer": "loss on last answers",
        "query": "pairs, loss on queries",
        "equivalent": "pairs, loss on queries and what is equivalent",
    }
    order = "in file order" if stream.order == "file" else ""
    weight = f"loss x {stream.loss_weight:g}" if stream.loss_weight != 1 else ""
    return ", ".join(filter(None, (trained.get(stream.loss_on), order, weight)))


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _checkpoint_table(plan: Plan, vocab_size: int | None, every: bool) -> Table:
    saves, kept = plan.checkpoints(), plan.kept_checkpoints()
    size = checkpoint_bytes(plan.recipe, vocab_size) if vocab_size is not None else None
    each = gigabytes(size) if size else "not known"
    last = plan.recipe.checkpoints.keep_last
    if every:
        columns = ("name", "phase", "step of it", "tokens", "size", "kept")
        table = table_of("Checkpoints", *columns, left=2)
        for step in saves:
            phase = plan.phase_at(step - 1)
            place = (f"{step - phase.first_step:,}", count(plan.tokens_before(step)))
            fate = "for good" if step in kept else f"among the last {last}"
            table.add_row(f"step_{step:08d}", phase.name, *place, each, fate)
    else:
        columns = ("phase", "saves", "kept for good", "first", "last", "size of each")
        table = table_of("Checkpoints", *columns)
        for phase in plan.phases:
            own = [step for step in saves if plan.phase_at(step - 1) is phase]
            numbers = (f"{len(own):,}", f"{len(kept.intersection(own)):,}")
            ends = (f"step_{own[0]:08d}", f"step_{own[-1]:08d}", each) if own else ("", "", "")
            table.add_row(phase.name, *numbers, *ends)
    most = len(kept) + min(last, len(saves) - len(kept))
    disk = f", {gigabytes(size * most)} on disk at the end" if size else ""
    fates = f"{len(kept):,} kept for good and the last {last} of the others"
    table.caption = f"{len(saves):,} saves; {fates}{disk}"
    return table


def packing_table(plan: Plan, losses: Sequence[PackingLosses]) -> Table | None:
    """Both ways of packing for every source and length; None if nothing is known or estimated."""
    estimated = sorted({s.source for phase in plan.phases for s in phase.streams if s.estimated})
    if not losses and not estimated:
        return None
    columns = ("source", "length", "documents", "concatenate: cut", "lost")
    table = table_of("Packing", *columns, "best_fit: cut", "padding", "chosen")
    table.columns[-1].justify = "left"
    for one in losses:
        measured = f" ({one.measured:,} measured)" if one.measured < one.documents else ""
        shares = (one.cut["concatenate"], one.lost, one.cut["best_fit"], one.padding)
        table.add_row(
            one.source,
            f"{one.sequence_length:,}",
            f"{one.documents:,}{measured}",
            *(f"{100 * share:.3g} %" for share in shares),
            one.packing,
        )
    if estimated:
        how = "estimated from `tokens` as if full; counted once the data is there"
        table.caption = f"packs of {', '.join(estimated)}: {how}"
    return table
