"""What a run says while it trains: numbers of finished steps gathered over the ranks, and events.

Sums of losses stay on the device until `logging.every` steps are gathered in one exchange. Its
result is read a step later, when it has long arrived, so the host never waits for the device.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.evaluate.validation import BitsPerByte, by_domain
from megacode.megatron.distributed import World
from megacode.plan.devices import peak_flops
from megacode.plan.estimate import flops_per_token
from megacode.plan.hardware import Hardware
from megacode.plan.overlap import OverlapDecision
from megacode.plan.plan import PhasePlan, Plan
from megacode.run.loggers import check_loggers, open_loggers
from megacode.run.metrics import MetricsWriter
from megacode.train.progress import Progress, phase_line


@dataclass(frozen=True)
class FinishedStep:
    """A finished step whose numbers are still on the device.

    Attributes:
        sums: float64 `[2, streams + numbers]`, of this rank; see `forward_backward`.
        digest: of this rank's tokens.
        bf16_sums: float64 `[2, streams]`, had the step been forward in bf16
            (`precision.compare_every`).
    """

    step: int
    sums: Tensor
    norm: float | None
    digest: int
    seconds: float
    bf16_sums: Tensor | None = None


class StepReports(AbstractContextManager["StepReports"]):
    """Gathers, writes and shows the numbers of finished steps. Every rank has one; rank 0's writes.

    A context manager.
    """

    def __init__(
        self, plan: Plan, run: Path, world: World, first_step: int, vocab_size: int
    ) -> None:
        self.plan, self.world = plan, world
        self.cuda = world.device.type == "cuda"
        self.device = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.peak = peak_flops(self.device, plan.recipe.precision.compute)
        check_loggers(plan.recipe.logging)
        self.writer: MetricsWriter | None = None
        self.progress: Progress | None = None
        if world.is_main:
            self.progress = Progress(run, plan, first_step)
            self.writer = MetricsWriter(
                run,
                plan.recipe.logging.tensorboard,
                first_step,
                open_loggers(run, plan.recipe, self.say),
            )
        self._flops = {
            phase.sequence_length: flops_per_token(
                plan.recipe.model, vocab_size, phase.sequence_length
            )
            for phase in plan.phases
        }
        self._pending: list[FinishedStep] = []
        self._gathered: tuple[list[FinishedStep], Tensor, Tensor] | None = None
        self._arrived = torch.cuda.Event() if self.cuda else None

    def __exit__(self, *error: object) -> None:
        if self.progress and self.writer:
            self.writer.close()
            self.progress.close()

    # --------------------------------------------------------------------------------------- steps

    def step(self, finished: FinishedStep) -> None:
        """Take in a step; gather every `logging.every` steps and at a phase's end. Collective."""
        self._show()
        self._pending.append(finished)
        if finished.step == self.plan.phase_at(finished.step).last_step:
            self.flush()
        elif (finished.step + 1) % self.plan.recipe.logging.every == 0:
            self._gather()

    def flush(self) -> None:
        """Gather what is pending over all ranks; rank 0 writes and shows it now. Collective."""
        self._gather()
        self._show()

    def sync(self) -> None:
        """`flush`, and sync the disk, so that no checkpoint is ahead of its metrics. Collective."""
        self.flush()
        if self.writer:
            self.writer.flush()

    def _gather(self) -> None:
        """Sum what is pending over all ranks, and start its copy to the host.

        Totals are float64 `[steps, 2, 2, streams + numbers]`: as trained and as in bf16; losses
        and tokens.
        """
        self._show()
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        totals = torch.stack([torch.stack([one.sums, _bf16_sums(one)]) for one in steps])
        digests = torch.tensor([_signed(s.digest) for s in steps])
        if self.cuda:
            digests = digests.pin_memory().to(self.world.device, non_blocking=True)
        # Tensor-parallel ranks hold the same sums, and only the last stage sees the loss.
        if self.world.tensor_rank or not self.world.is_last_stage:
            totals.zero_()
        # One rank speaks for each share of the batch.
        if self.world.tensor_rank or not self.world.is_first_stage or self.world.context_rank:
            digests.zero_()
        torch.distributed.all_reduce(totals)
        torch.distributed.all_reduce(digests)
        if self._arrived and self.writer:
            totals, digests = _to_host(totals), _to_host(digests)
            self._arrived.record()
        self._gathered = steps, totals, digests

    def _show(self) -> None:
        """Write and show what was gathered."""
        gathered, self._gathered = self._gathered, None
        if gathered and self.writer and self.progress:
            if self._arrived:
                self._arrived.synchronize()
            steps, totals, digests = gathered
            numbers = zip(steps, totals.tolist(), digests.tolist(), strict=True)
            records = [self._record(*one) for one in numbers]
            for record in records:
                self.writer.write(record)
            self.progress.steps(records)

    def _record(
        self, one: FinishedStep, totals: list[list[list[float]]], digest: int
    ) -> dict[str, Any]:
        step, phase = one.step, self.plan.phase_at(one.step)
        streams = len(phase.streams)
        (losses, tokens), (bf16, _) = ([row[:streams] for row in one] for one in totals)
        names = phase.objective.numbers if phase.objective else ()
        numbers = zip(names, *(row[streams:] for row in totals[0]), strict=True)
        objective = {name: total / count for name, total, count in numbers if count}
        batch_size = phase.batch_size(step)
        seen = batch_size * phase.sequence_length
        flops = seen * self._flops[phase.sequence_length] / one.seconds / self.world.size
        sources = [stream.source for stream in phase.streams]
        domains = [stream.domain for stream in phase.streams]
        counts = _sums(domains, phase.counts(step).tolist())
        samples, tokens_by_source = self._read_by_source(step + 1)
        compared = {}
        if one.bf16_sums is not None:
            compared["loss_bf16"] = _ratio(sum(bf16), sum(tokens))
            compared["drift"] = _ratio(sum(losses), sum(bf16)) - 1
        return {
            "kind": "train",
            "step": step + 1,
            "phase": phase.name,
            "loss": _ratio(sum(losses), sum(tokens)),
            **compared,
            **objective,
            "grad_norm": float("nan") if one.norm is None else one.norm,
            "learning_rate": phase.learning_rate(step),
            "batch_size": batch_size,
            "tokens": self.plan.tokens_before(step + 1),
            "seconds": one.seconds,
            "tokens_per_second": seen / one.seconds,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None,
            "loss_by_source": _means(sources, losses, tokens),
            "loss_by_domain": _means(domains, losses, tokens),
            "samples_by_source": samples,
            "ratio_by_domain": {name: n / batch_size for name, n in counts.items()},
            "batch": f"{digest % 2**64:016x}",
            "tokens_by_source": tokens_by_source,
        }

    def _read_by_source(self, done: int) -> tuple[dict[str, int], dict[str, int]]:
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

    # -------------------------------------------------------------------------------------- events

    def say(self, line: str) -> None:
        if self.progress:
            self.progress.say(line)

    def event(self, step: int, event: str, line: str = "", **facts: Any) -> None:
        """Write an event after `step` finished steps; say the line, if there is one."""
        if self.writer:
            self.writer.event(step, event, **facts)
        if line:
            self.say(line)

    def machine(
        self, hardware: Hardware, adam: str, overlaps: Mapping[str, OverlapDecision]
    ) -> None:
        """Say what this start computes with: device, layers, Adam, precision, overlap, fusion."""
        precision = self.plan.recipe.precision
        kind = f"fp8 ({precision.fp8_recipe})" if precision.compute == "fp8" else precision.compute
        engine = f"layers of Transformer Engine {'.'.join(map(str, hardware.engine or ()))}"
        layers = engine if hardware.engine else "Megatron-Core's local layers"
        on = ", ".join(one.key.rsplit(".")[-1] for one in overlaps.values() if one.on)
        self.say(f"{hardware.name}: {layers}, {adam}, {kind}" + (f"; on: {on}" if on else ""))
        if self.peak:
            self.say(
                f"MFU is the share of {self.peak / 1e12:,.0f} TFLOP/s, the dense "
                f"{precision.compute} peak of {self.device}; causal attention counted in full, "
                "recomputation not counted"
            )

    def phase(self, phase: PhasePlan) -> None:
        # Of the phase's first step: a resume at the boundary drops it, and it is written again.
        line = phase_line(phase, len(self.plan.phases))
        self.event(phase.first_step + 1, "phase", line, phase=phase.name)

    def checkpoint(self, step: int, path: Path) -> None:
        self.event(step, "checkpoint", f"checkpoint {path.name}", path=path.name)

    def validated(
        self, done: int, losses: Mapping[str, tuple[float, int]], bits: BitsPerByte
    ) -> None:
        """Write and show validation losses: source -> (nats a token, tokens)."""
        if self.writer and self.progress:
            record = {
                "kind": "validation",
                "step": done,
                "phase": self.plan.phase_at(max(done - 1, 0)).name,
                "loss_by_source": {name: loss for name, (loss, _) in losses.items()},
                "loss_by_domain": by_domain(self.plan.recipe, losses),
                "bits_per_byte_by_source": bits.by_source,
                "bits_per_byte_by_domain": bits.by_domain,
                "samples": self.plan.recipe.evaluation.samples,
            }
            self.writer.write(record)
            self.progress.validation(record)

    def scored(self, done: int, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Write and show scores: task -> its numbers."""
        if self.writer and self.progress:
            record = {
                "kind": "tasks",
                "step": done,
                "phase": self.plan.phase_at(max(done - 1, 0)).name,
                "tokens": self.plan.tokens_before(done),
                "tasks": tasks,
            }
            self.writer.write(record)
            self.progress.scores(record)

    def end(self, done: int, stopped_by: int) -> None:
        """The end of the run, or of as much as was asked for, or a stop by a signal. Collective."""
        self.flush()
        total = self.plan.total_steps
        if stopped_by:
            line = f"stopped by signal {stopped_by} after step {done:,}; saved, run again to go on"
            self.event(done, "stop", line)
        elif done < total:
            name = self.plan.phase_at(done - 1).name
            line = f"{name} is finished: step {done:,} of {total:,}"
            self.event(done, "phase end", line, phase=name, at=time.time())
        else:
            self.event(total, "end", at=time.time())
            if self.progress:
                self.progress.finished()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, under way."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _signed(value: int) -> int:
    """A uint64 as the int64 of the same bits: sums of either agree modulo 2^64."""
    return value - 2**64 if value >= 2**63 else value


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _sums(names: Iterable[str], values: Sequence[float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        out[name] = out.get(name, 0) + value
    return out


def _means(names: list[str], totals: list[float], counts: list[float]) -> dict[str, float]:
    """Mean loss of each name that has tokens in this step."""
    total, count = _sums(names, totals), _sums(names, counts)
    return {name: total[name] / count[name] for name in total if count[name]}


def _bf16_sums(one: FinishedStep) -> Tensor:
    """As wide as the step's sums; those themselves where the step was not compared."""
    if one.bf16_sums is None:
        return one.sums
    return torch.nn.functional.pad(one.bf16_sums, (0, one.sums.shape[1] - one.bf16_sums.shape[1]))
