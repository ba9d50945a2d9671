"""What rank 0 tells people: a live line under a bar on a terminal, plain lines elsewhere.

All of it also goes to RUN/log.txt.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from megacode.plan.plan import PhasePlan, Plan
from megacode.terminal import count

_BAR_WIDTH = 16
_RECENT = 30
"""Reports that the time left is computed from: enough to hold evaluations and checkpoints, too."""
_OF_PAIRS = ("contrastive", "contrastive_accuracy", "weighted_tokens")
_DROPPED_FIRST = ("memory", "norm", "tflops", "mfu", *_OF_PAIRS[::-1], "rate", "speed", "left")
"""Parts of the live line that a narrow terminal goes without, in this order."""


class Progress:
    """Says and logs what happens in a run that goes on after `first_step` finished steps.

    Args:
        console: default: standard output.
    """

    def __init__(
        self, run: Path, plan: Plan, first_step: int, console: Console | None = None
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self.console = console or Console(highlight=False)
        self._log = (run / "log.txt").open("a", buffering=1, encoding="utf-8")
        self._started, self._first_step, self._done = time.monotonic(), first_step, first_step
        self._reports: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        """Seconds by the clock and tokens at each report."""
        self._validated: dict[str, float] = {}
        columns = BarColumn(bar_width=_BAR_WIDTH), TextColumn("{task.description}", markup=False)
        self._bar = Bar(*columns, console=self.console, refresh_per_second=2)
        self._task = self._bar.add_task(
            "waiting for the first step", total=plan.total_steps, completed=first_step
        )
        if self.console.is_terminal:
            self._bar.start()

    def say(self, text: str) -> None:
        """A line (or several) above the bar, and in the log."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._write(text)

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take in the records of steps that have just finished; show the last of them."""
        for record in records:
            if record.get("drift") is not None:
                drift = f"the loss in FP8 differs from bf16's by {record['drift']:+.3%}"
                self.say(f"step {record['step']:,}: {drift}")
        last, left = records[-1], self._seconds_left(records)
        self._done = last["step"]
        line = self.line(last, left)
        if self.console.is_terminal:
            short = self.line(last, left, self.console.width - _BAR_WIDTH - 1)
            self._bar.update(self._task, completed=self._done, description=short)
            self._bar.refresh()
        else:
            self.console.print(line, markup=False, soft_wrap=True)
        self._write(line)

    def line(self, record: Mapping[str, Any], left: float, width: int | None = None) -> str:
        """`step 120/300  second  loss 4.213  rate 1.20e-03  norm 0.81  2,310 tok/s  ...  2:10 left`

        Args:
            left: seconds to the end of the run.
            width: characters there are; what matters least is left out.
        """
        total = f"{self.plan.total_steps:,}"
        tflops = record["tflops_per_device"]
        parts = {
            "step": f"step {record['step']:>{len(total)},}/{total}",
            "phase": str(record["phase"]),
            "loss": f"loss {_number(record['loss'], '.3f')}",
            **{
                name: f"{name.replace('_', ' ')} {record[name]:.3f}"
                for name in _OF_PAIRS
                if name in record
            },
            "rate": f"rate {_number(record['learning_rate'], '.2e')}",
            "norm": f"norm {_number(record['grad_norm'], '.2f')}",
            "speed": f"{record['tokens_per_second']:,.0f} tok/s",
            "tflops": f"{tflops:.{3 if tflops < 1 else 0}f} TFLOP/s/device",
        }
        if record.get("mfu") is not None:
            parts["mfu"] = f"MFU {record['mfu']:.1%}"
        if record.get("memory_gb") is not None:
            parts["memory"] = f"{record['memory_gb']:.1f} GB"
        parts["left"] = f"{duration(left)} left"
        for name in _DROPPED_FIRST:
            if width is None or len("  ".join(parts.values())) <= width:
                break
            parts.pop(name, None)
        return "  ".join(parts.values())

    def validation(self, record: Mapping[str, Any]) -> None:
        """Validation losses by source as a small table, with the change since the last time."""
        sources = self.plan.recipe.sources
        by_source = record["loss_by_source"]
        names = [name for name in sources if by_source.get(name) is not None]
        bits = record.get("bits_per_byte_by_source", {})
        all_bits = record.get("bits_per_byte_by_domain", {})
        changed = "change" if self._validated else ""
        rows = [("domain", "source", "loss", changed, "bits/byte" if bits else "")]
        rows += [
            (sources[n].domain, n, *self._change(n, by_source[n]), _number(bits.get(n), ".4f", ""))
            for n in names
        ]
        for domain, loss in record["loss_by_domain"].items():
            if loss is not None and sum(sources[name].domain == domain for name in names) > 1:
                more = _number(all_bits.get(domain), ".4f", "")
                rows.append((domain, "(all)", *self._change(f"{domain}/", loss), more))
        samples = f", {record['samples']} sequences a source" if "samples" in record else ""
        title = f"validation after step {record['step']:,} ({record['phase']}){samples}"
        self.say(_aligned(title, rows))

    def scores(self, record: Mapping[str, Any]) -> None:
        """Scores of tasks as a small table."""
        rows = [("task", "items", "score", "")]
        for name, numbers in record["tasks"].items():
            first = "accuracy" if "accuracy" in numbers else next(iter(numbers))
            groups = numbers.get("groups", {})
            parts = [f"{group} {_number(value, '.3f')}" for group, value in groups.items()]
            parts += [f"cut {numbers['cut']:,}"] if numbers.get("cut") else []
            items = f"{numbers['items']:,}" if "items" in numbers else ""
            rows.append((name, items, _number(numbers[first], ".4f"), ", ".join(parts)))
        title = f"tasks after step {record['step']:,} ({record['phase']})"
        self.say(_aligned(title, rows, left=(0, 3)))

    def _change(self, key: str, loss: float) -> tuple[str, str]:
        """A loss, and its change since the last time."""
        before, self._validated[key] = self._validated.get(key), loss
        return _number(loss, ".4f"), "" if before is None else _number(loss - before, "+.4f")

    def finished(self) -> None:
        """Sum up the run at its end."""
        plan, first, done = self.plan, self._first_step, self._done
        text = f"finished: {plan.total_steps:,} steps, {count(plan.total_tokens)} tokens"
        if done > first:
            seconds = time.monotonic() - self._started
            speed = (plan.tokens_before(done) - plan.tokens_before(first)) / seconds
            share = f", {done - first:,} of the steps" if first else ""
            text += (
                f"; this start took {duration(seconds)}{share} ({speed:,.0f} tok/s with everything)"
            )
        self.say(text)

    def close(self) -> None:
        if self.console.is_terminal:
            self._bar.stop()
        self._log.close()

    def _write(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(f"{now}  " + text.replace("\n", f"\n{'':21}") + "\n")

    def _seconds_left(self, records: Sequence[Mapping[str, Any]]) -> float:
        """From the tokens of the recent past by the clock, evaluations and checkpoints included.

        The first step of a start, which warms everything up, does not count.
        """
        now, last = time.monotonic(), records[-1]
        if not self._reports:
            begun = now - sum(record["seconds"] for record in records[1:])
            self._reports.append((begun, records[0]["tokens"]))
        if last["tokens"] > self._reports[-1][1]:
            self._reports.append((now, last["tokens"]))
        (start, before), (end, after) = self._reports[0], self._reports[-1]
        rate = (after - before) / (end - start) if end > start else last["tokens_per_second"]
        return (self.plan.total_tokens - last["tokens"]) / rate if rate > 0 else 0.0


def phase_line(phase: PhasePlan, phases: int) -> str:
    """`phase 2 of 3, ramp: steps 61 to 190, batch 16 × 256 tokens, code 5 → 63 % ...`"""
    first, last = phase.first_step, phase.last_step
    shares: dict[str, tuple[float, float]] = {}
    weights = phase.weights(first).tolist(), phase.weights(last).tolist()
    for stream, low, high in zip(phase.streams, *weights, strict=True):
        a, b = shares.get(stream.domain, (0.0, 0.0))
        shares[stream.domain] = a + 100 * low, b + 100 * high
    sizes = _move(phase.batch_size(first), phase.batch_size(last), ",")
    parts = [
        f"steps {first + 1:,} to {last + 1:,}",
        f"batch {sizes} × {phase.sequence_length:,} tokens",
        *(f"{name} {_move(a, b, '.3g')} %" for name, (a, b) in shares.items()),
    ]
    if fim := sorted({stream.fim_rate for stream in phase.streams if stream.fim_rate}):
        parts.append(f"FIM {_move(fim[0], fim[-1], 'g')}")
    parts.append(f"rate up to {phase.rate.peak:g}")
    if phase.fresh_optimizer and first:
        parts.append("optimizer state fresh")
    return f"phase {phase.index + 1} of {phases}, {phase.name}: {', '.join(parts)}"


def _move(first: float, last: float, form: str) -> str:
    a, b = format(first, form), format(last, form)
    return a if a == b else f"{a} → {b}"


def _number(value: float | None, form: str, absent: str = "not finite") -> str:
    return absent if value is None or not math.isfinite(value) else format(value, form)


def _aligned(title: str, rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 1)) -> str:
    """Rows below a title, columns of one width; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:04:10`, `2 d 5 h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
