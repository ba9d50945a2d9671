"""What a plan costs, as tables: overlap and fusion, memory, time and money, disk, other layouts."""

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
from megacode.recipe.schema import Recompute
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


def print_costs(plan: Plan, vocab_size: int | None, machine: Machine, console: Console) -> None:
    """Overlap and fusion, memory, time and disk; without a vocabulary only the first."""
    print_table(console, _overlap_table(plan, machine))
    if vocab_size is not None:
        print_table(console, _memory_table(plan, vocab_size, machine))
        print_table(console, _cost_table(plan, vocab_size, machine))


def _model_parallel(plan: Plan) -> int:
    parallel = plan.recipe.parallel
    return parallel.tensor * parallel.pipeline * parallel.context


def _overlap_table(plan: Plan, machine: Machine) -> Table:
    """What of Megatron-Core's overlap and fusion is on for this layout and device."""
    precision, hardware = plan.recipe.precision, assumed(machine.device)
    data = machine.devices // _model_parallel(plan) if machine.devices else 2
    table = table_of(f"Overlap and fusion on {machine.device}", "", "", "", left=3, prose=True)
    for one in decide_overlaps(plan.recipe, hardware, data).values():
        why = Text(one.why, style="" if one.on else "dim")
        table.add_row("on" if one.on else "off", one.key, why)
    many = "; more than one data-parallel rank assumed (--gpus N says how many)"
    table.caption = Text(
        "with CUDA, Transformer Engine and Apex"
        f"{'' if machine.devices else many}; `false` turns one off"
    )
    if precision.compute == "fp8" and (refusal := fp8_refusal(precision.fp8_recipe, hardware)):
        text = f"precision: fp8 cannot run on {machine.device}: {refusal}"
        table.caption = Text(text, style="bold red")
    return table


def _memory_table(plan: Plan, vocab_size: int, machine: Machine) -> Table:
    stages = plan.recipe.parallel.pipeline
    world = machine.devices or _model_parallel(plan)
    columns = ("parameters", "weights", "gradients", "optimizer", "activations", "sum")
    table = table_of(f"Memory of a rank, of {world:,}", "pipeline stage", *columns)
    most, gathered = 0.0, 0.0
    for stage in sorted({0, stages - 1}):
        memory = stage_memory(plan.recipe, vocab_size, world, stage)
        most = max(most, memory.total)
        gathered = max(gathered, gathered_bytes(plan.recipe, memory.parameters, world))
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        sizes = [gigabytes(size) for size in (*parts, memory.total)]
        table.add_row(f"{stage + 1} of {stages}", count(memory.parameters), *sizes)
    peak = machine.peak
    fits = most <= peak.usable
    host = f"; a save takes {gigabytes(gathered)} of host memory in each process"
    table.caption = Text(
        f"{'fits' if fits else 'does NOT fit'} {machine.device} ({peak.memory} GiB, of which "
        f"{gigabytes(peak.usable)} usable beside CUDA, NCCL and fragmentation); with "
        f"flash attention (Transformer Engine){host if gathered else ''}",
        style="" if fits else "bold red",
    )
    return table


def _cost_table(plan: Plan, vocab_size: int, machine: Machine) -> Table:
    flops = estimate.run_flops(plan, vocab_size)
    table = table_of("Costs", "", "", left=2, prose=True)
    counted = "forward and backward; causal attention counted in full"
    table.add_row("compute", f"{flops:.4g} FLOPs, {counted}")
    if machine.devices:
        peak = machine.peak.sixteen_bit
        days = estimate.days(flops, machine.devices, peak * 1e12, machine.mfu)
        hours = days * 24 * machine.devices
        table.add_row(
            "time",
            f"{duration(days)} on {machine.devices:,} {machine.device} at MFU {machine.mfu:g} of "
            f"{peak:,.0f} TFLOP/s (dense, 16 bit); {hours:,.0f} device hours",
        )
        if machine.price is not None:
            total = f"{hours * machine.price:,.0f} at {machine.price:g} a device hour"
            table.add_row("price", total)
    else:
        table.add_row("time", "give --gpus N (and --device, --mfu, --price)")
    each = gigabytes(checkpoint_bytes(plan.recipe, vocab_size))
    table.add_row(
        "disk",
        f"corpora {gigabytes(corpus_bytes(plan, vocab_size))} ({2 if vocab_size < 65500 else 4} "
        f"bytes a token, without indexes); a checkpoint {each}, two while one is written",
    )
    return table


def print_suggestions(
    proposals: Sequence[Proposal],
    machine: Machine,
    recipe: str,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Layouts that fit, fastest first, what was assumed, and the command that plans the first.

    Args:
        overrides: `key=value` settings of the recipe that the layouts are for.
    """
    sizes = ("tensor", "pipeline", "chunks", "data", "micro-batch", "a step", "recompute")
    speeds = ("memory", "s/step", "tokens/s/device", "MFU")
    on = f"{machine.devices:,} {machine.device}"
    table = table_of(f"Layouts for {on}, fastest first", "", *sizes, *speeds)
    for number, proposal in enumerate(proposals, 1):
        p = proposal.parallel
        layout = (p.tensor, p.pipeline, p.virtual_pipeline or "", proposal.data, p.micro_batch_size)
        table.add_row(
            *map(str, (number, *layout)),
            f"x {proposal.micro_batches:,}",
            _recomputed(p.recompute),
            gigabytes(proposal.memory.total),
            f"{proposal.seconds:.2f}",
            f"{proposal.tokens_per_second:,.0f}",
            f"{proposal.mfu:.3f}",
        )
    print_table(console, table)
    console.print(Padding(Text(f"Assumed: {ASSUMPTIONS}.", style="dim"), (0, 2)))
    settings = [*overrides, *proposals[0].settings()]
    command = ["megacode", "plan", recipe, "--gpus", str(machine.devices)]
    command += ["--device", machine.device]
    command += [part for setting in settings for part in ("--set", setting)]
    console.print("\nThe first:", markup=False)
    console.print(f"  {shlex.join(command)}\n", soft_wrap=True, markup=False)


def _recomputed(recompute: Recompute) -> str:
    if recompute.granularity == "none":
        return "none"
    return f"{recompute.layers} layers" if recompute.method == "block" else "every layer"
