"""One line a person can read: a live bar on a terminal, plain lines in a log file; both also in RUN/log.txt."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from megacode.recipe.plan import PhasePlan, Plan

_SMOOTHING = 0.1
"""Weight of the newest step in the rate that the time left is computed from."""


@dataclass
class Progress:
    """What rank 0 says. `steps` takes the records of metrics.jsonl."""

    plan: Plan
    device: str
    console: Console
    log: TextIO
    bar: Bar | None
    task: TaskID | None
    finished_steps: int
    started: float = field(default_factory=time.monotonic)
    _seconds: float | None = None

    @classmethod
    def open(cls, run: Path, plan: Plan, first_step: int, device: str) -> Progress:
        run.mkdir(parents=True, exist_ok=True)
        console = Console(highlight=False)
        bar = task = None
        if console.is_terminal:
            bar = Bar(BarColumn(bar_width=24), TextColumn("{task.fields[line]}"), console=console, refresh_per_second=4)
            task = bar.add_task("", total=plan.total_steps, completed=first_step, line="")
            bar.start()
        return cls(plan, device, console, open(run / "log.txt", "a", buffering=1), bar, task, first_step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def phase(self, phase: PhasePlan) -> None:
        shares = phase.weights(phase.first_step)
        domains: dict[str, float] = {}
        for stream, share in zip(phase.streams, shares, strict=True):
            domains[stream.domain] = domains.get(stream.domain, 0.0) + float(share)
        mixture = ", ".join(f"{name} {share:.0%}" for name, share in domains.items())
        self.say(
            f"phase {phase.name}: steps {phase.first_step + 1:,} to {phase.first_step + phase.steps:,}, {mixture}"
            f"{', optimizer state fresh' if phase.fresh_optimizer and phase.first_step else ''}"
        )

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Show the last of the gathered records."""
        for record in records:
            seconds = record["seconds"]
            old = self._seconds
            self._seconds = seconds if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * seconds
        last = records[-1]
        self.finished_steps = last["step"]
        line = self.line(last)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=last["step"], line=line)
        else:
            self.console.print(line, markup=False, soft_wrap=True)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def line(self, record: dict[str, Any]) -> str:
        """`step 120/300  second  loss 4.213  rate 1.2e-03  norm 0.81  2,310 tok/s  0.05 TFLOP/s  2:10 left`"""
        total = self.plan.total_steps
        left = (total - record["step"]) * (self._seconds or 0.0)
        parts = [
            f"step {record['step']:>{len(f'{total:,}')},}/{total:,}",
            record["phase"],
            f"loss {record['loss']:.3f}",
            f"rate {record['learning_rate']:.2e}",
            f"norm {record['grad_norm']:.2f}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"{record['tflops_per_device']:.{3 if record['tflops_per_device'] < 1 else 0}f} TFLOP/s",
        ]
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if record["memory_gb"] is not None:
            parts.append(f"{record['memory_gb']:.1f} GB")
        parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def validation(self, record: dict[str, Any]) -> None:
        """Validation losses as one small table."""
        self.console.print(f"validation after step {record['step']:,}, {record['samples']} sequences a source:", markup=False)
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("source")
        table.add_column("domain")
        table.add_column("loss", justify="right")
        table.add_column("perplexity", justify="right")
        for name, loss in record["loss_by_source"].items():
            table.add_row(name, self.plan.recipe.sources[name].domain, f"{loss:.3f}", f"{math.exp(min(loss, 700)):,.1f}")
        self.console.print(table)
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in record["loss_by_source"].items())
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  validation after step {record['step']}: {losses}\n")

    def finished(self) -> None:
        self.say(f"finished: {self.plan.total_steps:,} steps, {duration(time.monotonic() - self.started)} in this start")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.log.close()


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:04:10`, `2 d 5 h`."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
