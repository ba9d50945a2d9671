"""A run's plan as plain data: what `megacode plan --json` prints, and the curves that
the report draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megacode.errors import UserError
from megacode.plan import estimate
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.streams import StreamPlan
from megacode.recipe.schema import Recipe

POINTS = 200
"""Steps per phase at which shares, rate and batch size are written down."""


def plan_summary(plan: Plan, vocab_size: int | None = None) -> dict[str, Any]:
    """`plan_as_dict` with, in every phase, `curves`: `steps` (the run's, from 0, at most `POINTS`,
    first and last among them) and at these `learning_rate`, `batch_size` and `shares` (one list a
    stream, in the order of `streams`).

    Args:
        vocab_size: for the model's parameter count and the run's FLOPs; default: the tokenizer's,
            where that is at hand.
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
    points = np.linspace(phase.first_step, phase.last_step, min(phase.steps, POINTS)).round()
    steps = share_steps = np.unique(points.astype(np.int64))
    shares = phase.weights_at(steps)
    if (shares == shares[0]).all():  # a constant mixture needs no more than its ends
        share_steps, shares = steps[[0, -1]], shares[[0, -1]]
    return {
        "steps": steps.tolist(),
        "learning_rate": [float(f"{phase.learning_rate(int(step)):.6g}") for step in steps],
        "batch_size": [phase.batch_size(int(step)) for step in steps],
        "share_steps": share_steps.tolist(),
        "shares": [[round(float(share), 7) for share in column] for column in shares.T],
    }


def vocabulary(recipe: Recipe) -> int | None:
    """Size of the vocabulary: `model.vocab_size`, else the tokenizer's where it is on
    disk, else None."""
    if recipe.model.vocab_size:
        return recipe.model.vocab_size
    if recipe.tokenizer and Path(recipe.tokenizer.path).exists():
        from megacode.tokenizer.tokenizer import load_tokenizer

        return load_tokenizer(recipe.tokenizer).vocab_size
    return None


def plan_as_dict(plan: Plan, vocab_size: int | None = None) -> dict[str, Any]:
    """The plan as plain data (JSON): what `plan.json` in a run's folder holds."""
    model = plan.recipe.model
    length = max(phase.sequence_length for phase in plan.phases)
    out: dict[str, Any] = {
        "name": plan.recipe.name,
        "steps": plan.total_steps,
        "samples": plan.total_samples,
        "tokens": plan.total_tokens,
        "checkpoints": list(plan.checkpoints()),
        "kept_checkpoints": sorted(plan.kept_checkpoints()),
        "phases": [_phase_as_dict(phase) for phase in plan.phases],
    }
    if vocab_size is not None:
        out["vocab_size"] = vocab_size
        out["parameters"] = estimate.parameter_count(model, vocab_size, length)
        out["flops"] = estimate.run_flops(plan, vocab_size)
    return out


def _phase_as_dict(phase: PhasePlan) -> dict[str, Any]:
    first, last = phase.first_step, phase.last_step
    rates = [phase.learning_rate(first), phase.rate.peak, phase.learning_rate(last)]
    shares = phase.weights_at(np.array([first, last])).T.tolist()
    streams = zip(phase.streams, shares, strict=True)
    return {
        **_attributes(phase, "name first_step steps samples tokens sequence_length"),
        "batch_size": [phase.batch_size(first), phase.batch_size(last)],
        "learning_rate": rates,
        **_attributes(phase, "fresh_optimizer reset_at_eod"),
        "domains": domain_shares(phase),
        "streams": [_stream_as_dict(stream, share) for stream, share in streams],
        **({"samples_without_clipping": list(phase.asked)} if phase.asked else {}),
    }


def _stream_as_dict(stream: StreamPlan, share: list[float]) -> dict[str, Any]:
    return {
        **_attributes(stream, "source label domain"),
        "subset": [stream.low, stream.high],
        "share": share,
        **_attributes(stream, "fim_rate fim_level packing estimated samples tokens epochs"),
        **_attributes(stream, "epochs_after cursor window first_window windows loss_weight"),
        **({"sample_bounds": list(stream.bounds)} if stream.bounds else {}),
    }


def _attributes(part: PhasePlan | StreamPlan, names: str) -> dict[str, Any]:
    return {name: getattr(part, name) for name in names.split()}


def domain_shares(phase: PhasePlan) -> dict[str, float]:
    """Share of the phase's samples by domain."""
    shares: dict[str, float] = {}
    for stream in phase.streams:
        share = stream.samples / max(phase.samples, 1)
        shares[stream.domain] = shares.get(stream.domain, 0.0) + share
    return shares
