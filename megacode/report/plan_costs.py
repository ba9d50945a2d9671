"""What a plan costs, as tables: checkpoints, memory of a rank, time and money, disk, and layouts to try."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megacode.plan import estimate
from megacode.plan.devices import DEVICES, Peak
from megacode.plan.hardware import assumed, fp8_refusal
from megacode.plan.memory import checkpoint_bytes, corpus_bytes, gathered_bytes, stage_memory
from megacode.plan.overlap import decide_overlaps
from megacode.plan.plan import Plan
from megacode.plan.suggest import ASSUMPTIONS, Proposal
from megacode.terminal import count, duration, gigabytes, print_table, table_of


@dataclass(frozen=True)
class Machine:
    """What a run is to be costed on. `devices` None: not said."""

    devices: int | None
    device: str
    mfu: float
    price: float | None = None
    """Of a device hour."""

    @property
    def peak(self) -> Peak:
        return DEVICES[self.device][1]


def print_costs(
    plan: Plan, vocab_size: int | None, machine: Machine, console: Console, every_checkpoint: bool
) -> None:
    """Checkpoints, memory, time and disk. Without a vocabulary only how many checkpoints there are."""
    print_table(console, checkpoint_table(plan, vocab_size, every_checkpoint))
    print_table(console, _speed_table(plan, machine))
    if vocab_size is None:
        return
    print_table(console, _memory_table(plan, vocab_size, machine))
    print_table(console, _cost_table(plan, vocab_size, machine))


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_table(plan: Plan, vocab_size: int | None, every: bool) -> Table:
    """A line a phase, or a line a checkpoint: name of the folder, step of the phase, tokens, size, kept or not."""
    saves, kept = plan.checkpoints(), plan.kept_checkpoints()
    size = checkpoint_bytes(plan.recipe, vocab_size) if vocab_size is not None else None
    each = gigabytes(size) if size else "not known"
    last = plan.recipe.checkpoints.keep_last
    if every:
        table = table_of(
            "Checkpoints", "name", "phase", "step of it", "tokens", "size", "kept", left=2
        )
        for step in saves:
            phase = plan.phase_at(step - 1)
            table.add_row(
                f"step_{step:08d}", phase.name, f"{step - phase.first_step:,}", count(plan.tokens_before(step)), each,
                "for good" if step in kept else f"among the last {last}",
            )  # fmt: skip
    else:
        table = table_of(
            "Checkpoints", "phase", "saves", "kept for good", "first", "last", "size of each"
        )
        for phase in plan.phases:
            own = [s for s in saves if phase.first_step < s <= phase.first_step + phase.steps]
            table.add_row(
                phase.name, f"{len(own):,}", f"{len(kept.intersection(own)):,}", *(
                    (f"step_{own[0]:08d}", f"step_{own[-1]:08d}", each) if own else ("", "", "")),
            )  # fmt: skip
    most = len(kept) + min(last, len(saves) - len(kept))
    disk = f", {gigabytes(size * most)} on disk at the end" if size else ""
    table.caption = (
        f"{len(saves):,} saves; {len(kept):,} kept for good and the last {last} of the others{disk}"
    )
    table.caption_justify = "left"
    return table


# ------------------------------------------------------------------------------------------------- overlap and fusion


def _speed_table(plan: Plan, machine: Machine) -> Table:
    """What of Megatron-Core's overlap and fusion is on for this layout, on the device that the plan is for."""
    recipe = plan.recipe
    parallel = recipe.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    data = machine.devices // replica if machine.devices else 2
    hardware = assumed(machine.device)
    table = table_of(f"Overlap and fusion on {machine.device}", "", "", "", left=3, prose=True)
    for one in decide_overlaps(recipe, hardware, data).values():
        table.add_row(
            "on" if one.on else "off", one.key, Text(one.why, style="" if one.on else "dim")
        )
    many = (
        ""
        if machine.devices
        else "; more than one data-parallel rank assumed (--gpus N says how many)"
    )
    table.caption = Text(f"with CUDA, Transformer Engine and Apex{many}; `false` turns one off")
    refusal = (
        fp8_refusal(recipe.precision.fp8_recipe, hardware)
        if recipe.precision.compute == "fp8"
        else None
    )
    if refusal:
        table.caption = Text(
            f"precision: fp8 cannot run on {machine.device}: {refusal}", style="bold red"
        )
    table.caption_justify = "left"
    return table


# -------------------------------------------------------------------------------------------------------------- memory


def _memory_table(plan: Plan, vocab_size: int, machine: Machine) -> Table:
    parallel = plan.recipe.parallel
    world = machine.devices or parallel.tensor * parallel.pipeline * parallel.context
    table = table_of(
        f"Memory of a rank, of {world:,}", "pipeline stage", "parameters", "weights", "gradients", "optimizer",
        "activations", "sum",
    )  # fmt: skip
    totals, gathered = [], 0.0
    for stage in sorted({0, parallel.pipeline - 1}):
        memory = stage_memory(plan.recipe, vocab_size, world, stage)
        totals.append(memory.total)
        gathered = max(gathered, gathered_bytes(plan.recipe, memory.parameters, world))
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.total,
        )
        table.add_row(
            f"{stage + 1} of {parallel.pipeline}",
            count(memory.parameters),
            *(gigabytes(p) for p in parts),
        )
    peak = machine.peak
    fits = max(totals) <= peak.usable
    verdict = f"fits {machine.device}" if fits else f"does NOT fit {machine.device}"
    table.caption = Text(
        f"{verdict} ({peak.memory} GiB, of which {gigabytes(peak.usable)} usable beside CUDA, NCCL and fragmentation); with "
        "flash attention (Transformer Engine)"
        + (
            f"; a save takes {gigabytes(gathered)} of host memory in each process"
            if gathered
            else ""
        ),
        style="" if fits else "bold red",
    )
    table.caption_justify = "left"
    return table


# ------------------------------------------------------------------------------------------------------ time and disk


def _cost_table(plan: Plan, vocab_size: int, machine: Machine) -> Table:
    flops = estimate.run_flops(plan, vocab_size)
    table = table_of("Costs", "", "", left=2, prose=True)
    table.add_row(
        "compute", f"{flops:.4g} FLOPs, forward and backward; causal attention counted in full"
    )
    if machine.devices:
        peak = machine.peak.sixteen_bit * 1e12
        days = estimate.days(flops, machine.devices, peak, machine.mfu)
        hours = days * 24 * machine.devices
        table.add_row(
            "time",
            f"{duration(days)} on {machine.devices:,} {machine.device} at MFU {machine.mfu:g} of {peak / 1e12:,.0f} TFLOP/s "
            f"(dense, 16 bit); {hours:,.0f} device hours",
        )
        if machine.price is not None:
            table.add_row(
                "price", f"{hours * machine.price:,.0f} at {machine.price:g} a device hour"
            )
    else:
        table.add_row("time", "give --gpus N (and --device, --mfu, --price)")
    each = checkpoint_bytes(plan.recipe, vocab_size)
    table.add_row(
        "disk",
        f"corpora {gigabytes(corpus_bytes(plan, vocab_size))} ({2 if vocab_size < 65500 else 4} bytes a token, without "
        f"indexes); a checkpoint {gigabytes(each)}, two while one is written",
    )
    return table


# --------------------------------------------------------------------------------------------------------- suggestions


def print_suggestions(
    proposals: Sequence[Proposal],
    machine: Machine,
    recipe: str,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Layouts that fit, fastest first, what was assumed, and how to take the first: after the `overrides` (`key=value`)
    that these are for."""
    columns = (
        "", "tensor", "pipeline", "chunks", "data", "micro-batch", "a step", "recompute", "memory", "s/step",
        "tokens/s/device", "MFU",
    )  # fmt: skip
    table = table_of(f"Layouts for {machine.devices:,} {machine.device}, fastest first", *columns)
    for number, proposal in enumerate(proposals, 1):
        p, r = proposal.parallel, proposal.parallel.recompute
        again = (
            "none"
            if r.granularity == "none"
            else f"{r.layers} layers"
            if r.method == "block"
            else "every layer"
        )
        table.add_row(
            str(number), str(p.tensor), str(p.pipeline), str(p.virtual_pipeline or ""), str(proposal.data),
            str(p.micro_batch_size), f"x {proposal.micro_batches:,}", again, gigabytes(proposal.memory.total),
            f"{proposal.seconds:.2f}", f"{proposal.tokens_per_second:,.0f}", f"{proposal.mfu:.3f}",
        )  # fmt: skip
    print_table(console, table)
    console.print(Padding(Text(f"Assumed: {ASSUMPTIONS}.", style="dim"), (0, 2)))
    settings = " ".join(
        f"--set {shlex.quote(setting)}" for setting in [*overrides, *proposals[0].settings()]
    )
    console.print("\nThe first:", markup=False)
    console.print(
        f"  megacode plan {shlex.quote(recipe)} --gpus {machine.devices} --device {machine.device} {settings}\n",
        soft_wrap=True, markup=False,
    )  # fmt: skip
