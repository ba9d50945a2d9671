"""A run's plan as plain data: what `megacode plan --json` prints, and the curves that the report draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from megacode.errors import UserError
from megacode.recipe.plan import PhasePlan, Plan
from megacode.recipe.plan_command import vocabulary
from megacode.recipe.show import plan_as_dict

POINTS = 200
"""Steps per phase at which shares, rate and batch size are written down."""


def plan_summary(plan: Plan, vocab_size: int | None = None) -> dict[str, Any]:
    """`plan_as_dict` with, in every phase, `curves`: `steps` (the run's, from 0, at most `POINTS`, first and last among them) and
    at these `learning_rate`, `batch_size` and `shares` (one list a stream, in the order of `streams`).

    Args:
        vocab_size: for the model's parameter count and the run's FLOPs; default: the tokenizer's, where that is at hand.
    """
    if vocab_size is None:
        try:
            vocab_size = vocabulary(plan.recipe)
        except UserError:  # a tokenizer that cannot be read matters to training, not to a summary
            vocab_size = None
    summary = plan_as_dict(plan, vocab_size)
    for data, phase in zip(summary["phases"], plan.phases, strict=True):
        data["curves"] = _curves(phase)
    return summary


def _curves(phase: PhasePlan) -> dict[str, Any]:
    steps = np.unique(np.linspace(phase.first_step, phase.last_step, min(phase.steps, POINTS)).round().astype(np.int64))
    shares = phase.weights_at(steps)
    if (shares == shares[0]).all():  # a constant mixture needs no more than its ends
        share_steps, shares = steps[[0, -1]], shares[[0, -1]]
    else:
        share_steps = steps
    return {
        "steps": steps.tolist(),
        "learning_rate": [float(f"{phase.learning_rate(int(step)):.6g}") for step in steps],
        "batch_size": [phase.batch_size(int(step)) for step in steps],
        "share_steps": share_steps.tolist(),
        "shares": [[round(float(share), 7) for share in column] for column in shares.T],
    }
