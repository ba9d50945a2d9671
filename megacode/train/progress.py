"""One line a person can read: a live bar on a terminal, plain lines elsewhere; all that is said also goes to RUN/log.txt."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from megacode.plan.devices import peak_flops
from megacode.plan.plan import PhasePlan, Plan
from megacode.terminal import count

_BAR_WIDTH = 16
_RECENT = 30
"""Reports that the time left is computed from: long enough to hold an evaluation or a checkpoint among them."""
_DROPPED_FIRST = ("memory", "norm", "tflops", "mfu", "rate", "speed")
"""What a narrow terminal does without, in this order."""


class _TimeLeft(ProgressColumn):
    """Counts down between reports, so that long steps do not look like a standstill."""

    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        return Text("" if end is None else f"{duration(max(end - time.monotonic(), 0))} left")


@dataclass
class Progress:
    """What rank 0 says (the other ranks have none). `steps` and `validation` take the records of metrics.jsonl."""

    plan: Plan
    device: str
    console: Console
    log: TextIO
    bar: Bar | None = None
    task: TaskID | None = None
    started: float = field(default_factory=time.monotonic)
    _first_step: int = 0
    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _validated: dict[str, float] = field(default_factory=dict)
    _last: Mapping[str, Any] | None = None

    @classmethod
    def open(
        cls, run: Path, plan: Plan, first_step: int, device: str, console: Console | None = None
    ) -> Progress:
        """Begin after `first_step` finished steps.

        Args:
            device: as CUDA names it, or `cpu`.
            console: where to speak; default: standard output.
        """
        run.mkdir(parents=True, exist_ok=True)
        console = console or Console(highlight=False)
        log = (run / "log.txt").open("a", buffering=1, encoding="utf-8")
        progress = cls(plan, device, console, log, _first_step=first_step)
        if console.is_terminal:
            columns = (
                BarColumn(bar_width=_BAR_WIDTH),
                TextColumn("{task.fields[line]}", markup=False),
                _TimeLeft(),
            )
            progress.bar = Bar(*columns, console=console, refresh_per_second=2)
            line = "waiting for the first step"
            progress.task = progress.bar.add_task(
                "", total=plan.total_steps, completed=first_step, line=line, end=None
            )
            progress.bar.start()
        return progress

    # ------------------------------------------------------------------------------------------------- saying

    def say(self, text: str) -> None:
        """A line (or several) above the bar, and in the log."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._write(text)

    def phase(self, phase: PhasePlan) -> None:
        """Announce a phase that begins."""
        self.say(phase_line(phase, len(self.plan.phases)))

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take in the records of steps that have just finished; show the last of them."""
        last = records[-1]
        if self._last is None and last.get("mfu") is not None:
            self._say_what_mfu_is()
        self._last = last
        for record in records:
            if record.get("drift") is not None:
                self.say(
                    f"step {record['step']:,}: the loss in FP8 differs from bf16's by {record['drift']:+.3%}"
                )
        left = self._seconds_left(records)
        if self.bar is not None and self.task is not None:
            line = self.line(last, left=None, width=self.console.width - _BAR_WIDTH - 15)
            self.bar.update(
                self.task, completed=last["step"], line=line, end=time.monotonic() + left
            )
            self.bar.refresh()
        line = self.line(last, left)
        if self.bar is None:
            self.console.print(line, markup=False, soft_wrap=True)
        self._write(line)

    def line(
        self, record: Mapping[str, Any], left: float | None = None, width: int | None = None
    ) -> str:
        """`step 120/300  second  loss 4.213  rate 1.2e-03  norm 0.81  2,310 tok/s  0.052 TFLOP/s/device  2:10 left`

        Args:
            left: seconds to the end, if it is to be said.
            width: characters there are; what matters least goes first.
        """
        total = f"{self.plan.total_steps:,}"
        parts = {
            "step": f"step {record['step']:>{len(total)},}/{total}",
            "phase": str(record["phase"]),
            "loss": f"loss {_number(record['loss'], '.3f')}",
            "rate": f"rate {_number(record['learning_rate'], '.2e')}",
            "norm": f"norm {_number(record['grad_norm'], '.2f')}",
            "speed": f"{record['tokens_per_second']:,.0f} tok/s",
            "tflops": f"{record['tflops_per_device']:.{3 if record['tflops_per_device'] < 1 else 0}f} TFLOP/s/device",
        }
        if record.get("mfu") is not None:
            parts["mfu"] = f"MFU {record['mfu']:.1%}"
        if record.get("memory_gb") is not None:
            parts["memory"] = f"{record['memory_gb']:.1f} GB"
        if left is not None:
            parts["left"] = f"{duration(left)} left"
        for name in _DROPPED_FIRST:
            if width is None or len("  ".join(parts.values())) <= width:
                break
            parts.pop(name, None)
        return "  ".join(parts.values())

    def validation(self, record: Mapping[str, Any]) -> None:
        """Validation losses by source as one small table, with the change since the last time."""
        sources = self.plan.recipe.sources
        losses = {name: loss for name, loss in record["loss_by_source"].items() if loss is not None}
        rows = [("domain", "source", "loss", "change")]
        for name, loss in sorted(losses.items(), key=lambda item: list(sources).index(item[0])):
            rows.append(
                (sources[name].domain, name, _number(loss, ".4f"), self._change(name, loss))
            )
        for domain, loss in record["loss_by_domain"].items():
            if loss is not None and sum(sources[name].domain == domain for name in losses) > 1:
                rows.append(
                    (domain, "(all)", _number(loss, ".4f"), self._change(f"{domain}/", loss))
                )
        if not any(row[3] for row in rows[1:]):
            rows = [(*row[:3], "") for row in rows]
        widths = [max(len(row[n]) for row in rows) for n in range(4)]
        lines = [
            f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip()
            for a, b, c, d in rows
        ]
        samples = f", {record['samples']} sequences a source" if "samples" in record else ""
        self.say(
            "\n".join(
                [f"validation after step {record['step']:,} ({record['phase']}){samples}", *lines]
            )
        )

    def _change(self, key: str, loss: float) -> str:
        before, self._validated[key] = self._validated.get(key), loss
        return "" if before is None else _number(loss - before, "+.4f")

    def finished(self) -> None:
        """The end of the run: what it came to."""
        last = self._last
        seconds = max(time.monotonic() - self.started, 1e-9)
        text = f"finished: {self.plan.total_steps:,} steps, {count(self.plan.total_tokens)} tokens"
        if last is not None:
            here = self.plan.tokens_before(last["step"]) - self.plan.tokens_before(self._first_step)
            share = (
                ""
                if self._first_step == 0
                else f", {last['step'] - self._first_step:,} of the steps"
            )
            text += f"; this start took {duration(seconds)}{share} ({here / seconds:,.0f} tok/s with everything)"
        self.say(text)

    def close(self) -> None:
        """Take the bar away. Safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.log.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _write(self, text: str) -> None:
        if not self.log.closed:
            self.log.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}  " + text.replace("\n", f"\n{'':21}") + "\n"
            )

    def _say_what_mfu_is(self) -> None:
        precision = self.plan.recipe.precision.compute
        peak = peak_flops(self.device, precision)
        if peak:
            self.say(
                f"MFU is the share of {peak / 1e12:,.0f} TFLOP/s, the dense {precision} peak of {self.device}; "
                "causal attention counted in full, recomputation not counted"
            )

    def _seconds_left(self, records: Sequence[Mapping[str, Any]]) -> float:
        """From the tokens of the recent past by the clock, so that evaluations and checkpoints count; the first step of a
        start, which warms everything up, does not."""
        now, last = time.monotonic(), records[-1]
        if not self._seen:
            self._seen.append(
                (now - sum(record["seconds"] for record in records[1:]), records[0]["tokens"])
            )
        if last["tokens"] > self._seen[-1][1]:
            self._seen.append((now, last["tokens"]))
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        rate = (after - before) / (end - start) if end > start else last["tokens_per_second"]
        return (self.plan.total_tokens - last["tokens"]) / rate if rate > 0 else 0.0


def phase_line(phase: PhasePlan, phases: int) -> str:
    """`phase 2 of 3, ramp: steps 61 to 190, batch 16 x 256 tokens, code 5 → 63 %, text 95 → 37 %, FIM 0.9, rate 1.5e-3 ...`"""
    first, last = phase.weights(phase.first_step), phase.weights(phase.last_step)
    shares: dict[str, list[float]] = {}
    for stream, a, b in zip(phase.streams, first.tolist(), last.tolist(), strict=True):
        ends = shares.setdefault(stream.domain, [0.0, 0.0])
        ends[0], ends[1] = ends[0] + 100 * a, ends[1] + 100 * b
    sizes = _move(
        f"{phase.batch_size(phase.first_step):,}", f"{phase.batch_size(phase.last_step):,}"
    )
    parts = [
        f"steps {phase.first_step + 1:,} to {phase.last_step + 1:,}",
        f"batch {sizes} × {phase.sequence_length:,} tokens",
        *(f"{name} {_move(f'{a:.3g}', f'{b:.3g}')} %" for name, (a, b) in shares.items()),
    ]
    if fim := sorted({stream.fim_rate for stream in phase.streams if stream.fim_rate}):
        parts.append(f"FIM {_move(f'{fim[0]:g}', f'{fim[-1]:g}')}")
    parts.append(f"rate up to {phase.rate.peak:g}")
    if phase.fresh_optimizer and phase.first_step:
        parts.append("optimizer state fresh")
    return f"phase {phase.index + 1} of {phases}, {phase.name}: {', '.join(parts)}"


def _move(first: str, last: str) -> str:
    return first if first == last else f"{first} → {last}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:04:10`, `2 d 5 h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
