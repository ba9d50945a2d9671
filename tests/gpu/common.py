"""What the tests on devices share: how to train from one, recipes of one step, and a rate at which roundings can be
compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacode.megatron.hardware import detect
from megacode.plan.hardware import fp8_refusal
from megacode.recipe.schema import LearningRate, Mixture, Model, Parallel, Phase, Precision, Recipe
from tests.e2e.conftest import megacode

VOCAB, LENGTH = 1000, 64
PHASES = ("phases.first", "phases.second")
LOW_RATE = tuple(f"{phase}.learning_rate.peak=3e-4" for phase in PHASES)
"""At the small recipe's own rate, far too high for the widths here, any two ways to round part after some ten steps: by 1.7 %
of the loss for bf16 against fp32, by 2 to 8 % for FP8 as defined (emulated on a CPU). At this one they stay within 0.02 %
and 0.06 %, and over a hundred steps FP8's means of ten within 0.2 % of bf16's."""
NARROW = ("model.hidden_size=128", "model.vocab_size=304", "model.ffn_size=256")
WIDE = ("model.hidden_size=256", "model.vocab_size=304", "model.ffn_size=512")


def train(recipe: Path, run: Path, *changes: str, **environment: str) -> None:
    """`megacode train` in a process of its own; `changes` are `key=value`."""
    megacode("train", recipe, "--run", run, *options(changes), **environment)


def options(changes: tuple[str, ...] | list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def engine_or_skip() -> None:
    if detect().engine is None:
        pytest.skip("needs Transformer Engine")


def fp8_or_skip(kind: str) -> None:
    if why := fp8_refusal(kind, detect()):
        pytest.skip(why)


def settings(model: Model, precision: Precision) -> Recipe:
    """Of one step: two micro-batches of two samples."""
    phase = Phase(
        name="p", steps=1, batch_size=4, sequence_length=LENGTH, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=1e-3),
    )  # fmt: skip
    return Recipe(
        name="t",
        model=model,
        sources={},
        phases=[phase],
        precision=precision,
        parallel=Parallel(micro_batch_size=2),
    )
