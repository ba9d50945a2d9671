"""What a run tells while it trains: losses by source gathered over the ranks, one line for people, records for machines.

The device is not asked for numbers every step: sums stay there until `logging.every` steps are gathered in one exchange,
and what that gave is read a step later, when it has long arrived. So the host never waits for the device to tell of a step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megacode.data.loader import StepBatch
from megacode.evaluate.validation import by_domain
from megacode.megatron.distributed import World
from megacode.plan.devices import peak_flops
from megacode.plan.estimate import flops_per_token
from megacode.plan.hardware import Hardware
from megacode.plan.overlap import OverlapDecision
from megacode.plan.past import Change
from megacode.plan.plan import PhasePlan, Plan
from megacode.run.metrics import MetricsWriter
from megacode.train.progress import Progress


@dataclass(frozen=True)
class _Pending:
    """A finished step whose numbers are still on the device."""

    step: int
    phase: PhasePlan
    sums: torch.Tensor
    norm: Any
    digest: int
    seconds: float
    reference: torch.Tensor | None = None
    """The same sums, had the step been forward in bf16 (`precision.compare_every`)."""


@dataclass(frozen=True)
class _Gathered:
    """Steps whose numbers are on their way to the host."""

    pending: list[_Pending]
    totals: torch.Tensor
    """float64 `[steps, 2, 2, streams]`: as trained and as in bf16; sums and counts."""
    digests: torch.Tensor


@dataclass
class StepReports:
    """Gathers, writes and shows the numbers of finished steps. Every rank has one; rank 0's speaks and writes."""

    plan: Plan
    world: World
    flops: dict[int, float]
    peak: float | None
    writer: MetricsWriter | None
    progress: Progress | None
    _pending: list[_Pending] = field(default_factory=list)
    _gathered: _Gathered | None = None
    _arrived: Any = None
    """CUDA event after the copy of what is gathered."""

    @classmethod
    def open(
        cls, plan: Plan, run: Path, world: World, first_step: int, vocab_size: int
    ) -> StepReports:
        recipe = plan.recipe
        cuda = world.device.type == "cuda"
        device = torch.cuda.get_device_name() if cuda else "cpu"
        lengths = {phase.sequence_length for phase in plan.phases}
        return cls(
            plan=plan,
            world=world,
            flops={length: flops_per_token(recipe.model, vocab_size, length) for length in lengths},
            peak=peak_flops(
                device, "fp8" if recipe.precision.compute == "fp8" else recipe.precision.compute
            ),
            writer=MetricsWriter(run, recipe.logging.tensorboard, first_step)
            if world.is_main
            else None,
            progress=Progress.open(run, plan, first_step, device) if world.is_main else None,
            _arrived=torch.cuda.Event() if cuda else None,
        )

    def __enter__(self) -> StepReports:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.progress:
            self.progress.close()
        if self.writer:
            self.writer.__exit__(*exc)

    # ------------------------------------------------------------------------------------------------- steps

    def step(
        self,
        step: int,
        sums: torch.Tensor,
        norm: Any,
        batch: StepBatch,
        seconds: float,
        reference: torch.Tensor | None = None,
    ) -> None:
        """Take in a finished step; gather every `logging.every` steps and at the end of a phase. Collective."""
        self._show()
        phase = self.plan.phase_at(step)
        self._pending.append(_Pending(step, phase, sums, norm, batch.digest, seconds, reference))
        if step == phase.last_step:
            self.flush()
        elif (step + 1) % self.plan.recipe.logging.every == 0:
            self._gather()

    def flush(self) -> None:
        """Gather what is pending over all ranks; rank 0 writes and shows it, now. Collective."""
        self._gather()
        self._show()

    def _gather(self) -> None:
        """Sum what is pending over all ranks, and send it to the host without waiting for it."""
        self._show()
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        totals = torch.stack(
            [torch.stack([p.sums, p.sums if p.reference is None else p.reference]) for p in pending]
        )
        digests = torch.tensor([_signed(p.digest) for p in pending])
        if self.world.device.type == "cuda":
            digests = digests.pin_memory().to(self.world.device, non_blocking=True)
        if self.world.tensor_rank or not self.world.is_last_stage:
            totals.zero_()  # tensor-parallel ranks hold the same sums, and only the last stage sees the loss
        if self.world.tensor_rank or not self.world.is_first_stage or self.world.context_rank:
            digests.zero_()  # one rank speaks for each share of the batch
        torch.distributed.all_reduce(totals)
        torch.distributed.all_reduce(digests)
        self._gathered = _Gathered(pending, totals, digests)
        if self.writer and self.world.device.type == "cuda":
            self._gathered = _Gathered(pending, _to_host(totals), _to_host(digests))
            self._arrived.record()

    def _show(self) -> None:
        """Write and show what was gathered."""
        gathered, self._gathered = self._gathered, None
        if gathered and self.writer and self.progress:
            if self.world.device.type == "cuda":
                self._arrived.synchronize()
            numbers = zip(
                gathered.pending, gathered.totals.tolist(), gathered.digests.tolist(), strict=True
            )
            records = [self._record(*one) for one in numbers]
            for record in records:
                self.writer.write(record)
            self.progress.steps(records)

    def sync(self) -> None:
        """Gather what is pending and put it on the disk for good, before a checkpoint says that these steps happened: else a
        machine that dies could leave a checkpoint ahead of its metrics. Collective."""
        self.flush()
        if self.writer:
            self.writer.flush()

    def _record(
        self, pending: _Pending, totals: list[list[list[float]]], digest: int
    ) -> dict[str, Any]:
        phase, step = pending.phase, pending.step
        (losses, tokens), (bf16, _) = totals
        batch_size = phase.batch_size(step)
        seen = batch_size * phase.sequence_length
        flops = seen * self.flops[phase.sequence_length] / pending.seconds / self.world.size
        sources = [stream.source for stream in phase.streams]
        domains = [stream.domain for stream in phase.streams]
        counts = phase.counts(step).tolist()
        memory = (
            torch.cuda.max_memory_allocated() / 1e9 if self.world.device.type == "cuda" else None
        )
        samples, tokens_by_source = self._read(step + 1)
        compared = {}
        if pending.reference is not None:
            compared = {
                "loss_bf16": _ratio(sum(bf16), sum(tokens)),
                "drift": _ratio(sum(losses), sum(bf16)) - 1,
            }
        return {
            "kind": "train",
            "step": step + 1,
            "phase": phase.name,
            "loss": _ratio(sum(losses), sum(tokens)),
            **compared,
            "grad_norm": float("nan") if pending.norm is None else float(pending.norm),
            "learning_rate": phase.learning_rate(step),
            "batch_size": batch_size,
            "tokens": self.plan.tokens_before(step + 1),
            "seconds": pending.seconds,
            "tokens_per_second": seen / pending.seconds,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "memory_gb": memory,
            "loss_by_source": _means(sources, losses, tokens),
            "loss_by_domain": _means(domains, losses, tokens),
            "samples_by_source": samples,
            "ratio_by_domain": {d: n / batch_size for d, n in _sums(domains, counts).items()},
            "batch": f"{digest % 2**64:016x}",
            "tokens_by_source": tokens_by_source,
        }

    def _read(self, done: int) -> tuple[dict[str, int], dict[str, int]]:
        """Samples and tokens of each source in the first `done` steps of the run."""
        samples: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for phase in self.plan.phases:
            if phase.first_step < done:
                taken = phase.counts_before(min(done, phase.first_step + phase.steps)).tolist()
                for stream, count in zip(phase.streams, taken, strict=True):
                    samples[stream.source] += count
                    tokens[stream.source] += count * phase.sequence_length
        return dict(samples), dict(tokens)

    # ------------------------------------------------------------------------------------------------- events

    def say(self, line: str) -> None:
        if self.progress:
            self.progress.say(line)

    def _event(self, step: int, event: str, line: str | None, **more: Any) -> None:
        if self.writer and self.progress:
            self.writer.write({"kind": "event", "step": step, "event": event, **more})
            if line:
                self.progress.say(line)

    def machine(
        self, hardware: Hardware, adam: str, overlaps: Mapping[str, OverlapDecision]
    ) -> None:
        """What this start computes with: device, layers, Adam, precision, overlap and fusion."""
        precision = self.plan.recipe.precision
        computes = (
            f"fp8 ({precision.fp8_recipe})" if precision.compute == "fp8" else precision.compute
        )
        engine = hardware.engine
        layers = (
            f"layers of Transformer Engine {'.'.join(map(str, engine))}"
            if engine
            else "Megatron-Core's local layers"
        )
        on = [one.key.rsplit(".")[-1] for one in overlaps.values() if one.on]
        self.say(
            f"{hardware.name}: {layers}, {adam}, {computes}"
            + (f"; on: {', '.join(on)}" if on else "")
        )

    def started(self) -> None:
        recipe, world = self.plan.recipe, self.world
        self._event(
            0, "start",
            f"starting {recipe.name}: {self.plan.total_steps:,} steps, {self.plan.total_tokens:,} tokens, "
            f"{world.size} process{'es' * (world.size > 1)}",
            world_size=world.size,
        )  # fmt: skip

    def initialized(self, checkpoint: Path) -> None:
        self.started()
        self._event(0, "initialize", f"weights from {checkpoint}", checkpoint=str(checkpoint))

    def resumed(self, checkpoint: Path, step: int, note: str | None = None) -> None:
        if note:
            self.say(note)
        line = f"continuing from {checkpoint}: step {step:,} of {self.plan.total_steps:,}"
        self._event(step, "resume", line, checkpoint=str(checkpoint), world_size=self.world.size)

    def accepted(self, done: int, changes: Sequence[Change]) -> None:
        """Changes of the past with which the run goes on after `done` steps."""
        for change in changes:
            # Of the first step that has it: a start again at `done` drops it, and it is written again.
            self._event(done + 1, "accepted change", f"accepted: {change}", **asdict(change))

    def phase(self, phase: PhasePlan) -> None:
        if self.progress:
            self.progress.phase(phase)
            # Of its first step, not of the last one before it: a resume at the boundary drops it, and it is written again.
            self._event(phase.first_step + 1, "phase", None, phase=phase.name)

    def checkpoint(self, step: int, path: Path) -> None:
        self._event(step, "checkpoint", f"checkpoint {path.name}", path=path.name)

    def validated(self, done: int, losses: dict[str, tuple[float, int]]) -> None:
        if self.writer and self.progress:
            record = {
                "kind": "validation",
                "step": done,
                "phase": self.plan.phase_at(max(done - 1, 0)).name,
                "loss_by_source": {name: loss for name, (loss, _) in losses.items()},
                "loss_by_domain": by_domain(self.plan.recipe, losses),
                "samples": self.plan.recipe.evaluation.samples,
            }
            self.writer.write(record)
            self.progress.validation(record)

    def stopped(self, done: int, signal_number: int) -> None:
        self.flush()
        self._event(
            done,
            "stop",
            f"stopped by signal {signal_number} after step {done:,}; saved, run again to go on",
        )

    def paused(self, done: int) -> None:
        """Trained as far as was asked."""
        self.flush()
        phase = self.plan.phase_at(done - 1).name
        line = f"{phase} is finished: step {done:,} of {self.plan.total_steps:,}"
        self._event(done, "phase end", line, phase=phase, at=time.time())

    def finished(self) -> None:
        self.flush()
        self._event(self.plan.total_steps, "end", None, at=time.time())
        if self.progress:
            self.progress.finished()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, under way."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )


def _signed(value: int) -> int:
    """A uint64 as the int64 of the same bits: sums of either agree modulo 2^64."""
    return value - 2**64 if value >= 2**63 else value


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _sums(names: list[str], values: list[Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        out[name] = out.get(name, 0) + value
    return out


def _means(names: list[str], totals: list[float], counts: list[float]) -> dict[str, float]:
    """Mean loss of each name that has tokens in this step."""
    count = _sums(names, counts)
    return {
        name: total / count[name] for name, total in _sums(names, totals).items() if count[name]
    }
