"""What the tests on devices share: how to train from one, and a rate at which roundings can be compared."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import megacode

PHASES = ("phases.first", "phases.second")
LOW_RATE = tuple(f"{phase}.learning_rate.peak=3e-4" for phase in PHASES)
"""At the small recipe's own rate, far too high for the widths here, any two ways to round part after some ten steps: by 1.7 %
of the loss for bf16 against fp32, by 2 to 8 % for FP8 as defined (emulated on a CPU). At this one they stay within 0.02 %
and 0.06 %, and over a hundred steps FP8's means of ten within 0.2 % of bf16's."""


def train(recipe: Path, run: Path, *changes: str, **environment: str) -> None:
    """`megacode train` in a process of its own; `changes` are `key=value`."""
    megacode("train", recipe, "--run", run, *(p for c in changes for p in ("--set", c)), **environment)
