"""Which facts decide the batches of a run's first steps, and how two runs differ in them.

A resumed run compares the facts of the steps that were already taken: making the run longer, adding
phases, or another number of ranks leaves them equal; anything that would have changed a batch is
named.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.quota import CHUNK, BlockQuota
from megacode.plan.streams import PACKING_ALGORITHM


def fingerprint(plan: Plan, step: int) -> dict[str, Any]:
    """What decides the batches of all steps before `step`, as plain data (JSON round trip leaves it
    equal).

    Paths and names of phases are not in it: a corpus may move, and a phase may be renamed.
    """
    data = plan.recipe.data
    phases = [
        _phase(phase, min(step, phase.end)) for phase in plan.phases if phase.first_step < step
    ]
    fim = any(stream["fim_rate"] for phase in phases for stream in phase["streams"].values())
    return {
        "seed": plan.recipe.resolved_data_seed,
        "mask_eod_loss": data.mask_eod_loss,
        "fim": data.fim.model_dump(exclude={"level"}) if fim else None,
        "phases": phases,
    }


def _phase(phase: PhasePlan, stop: int) -> dict[str, Any]:
    steps, batch, quota = stop - phase.first_step, phase.quota.batch, phase.quota
    moves = isinstance(quota, BlockQuota) or quota.weights.settled > 1
    stairs = zip(batch.starts.tolist(), batch.sizes.tolist(), strict=True)
    counts = phase.counts_before(stop).tolist()
    shares = phase.weights(phase.first_step).tolist()
    streams = {
        stream.label: {
            "order": column,
            "fim_rate": stream.fim_rate,
            "window": stream.window,
            "first_window": stream.first_window,
            "windows": stream.windows,
            "cursor": stream.cursor,
            "first share": shares[column],
            "samples": counts[column],
        }
        for column, stream in enumerate(phase.streams)
    }
    # Absent where there was no choice yet when older checkpoints were written: they go on.
    for stream in phase.streams:
        if stream.fim_rate and stream.fim_level != "context":
            streams[stream.label]["fim_level"] = stream.fim_level
        if stream.packing != "concatenate":
            streams[stream.label]["packing"] = f"{stream.packing} {PACKING_ALGORITHM}"
        if stream.order != "shuffled":
            streams[stream.label]["sample order"] = stream.order
        if stream.loss_on != "all":
            streams[stream.label]["loss_on"] = stream.loss_on
        if stream.loss_weight != 1:
            streams[stream.label]["loss_weight"] = stream.loss_weight
    return {
        "first_step": phase.first_step,
        "steps": steps,
        "sequence_length": phase.sequence_length,
        "reset_at_eod": phase.reset_at_eod,
        "batch_size": [[start, size] for start, size in stairs if start < steps],
        "streams": streams,
        "counts of every step": _digest(phase, stop) if moves else None,
        **({"steps of a block": quota.every} if isinstance(quota, BlockQuota) else {}),
    }


def _digest(phase: PhasePlan, stop: int) -> str:
    """Digest of the counts of all steps of a phase before `stop`."""
    digest = hashlib.sha256()
    for start in range(phase.first_step, stop, CHUNK):
        counts = phase.counts_range(start, min(start + CHUNK, stop))[1:]
        digest.update(np.ascontiguousarray(counts, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Each fact that differs: `phases.1.streams.python.fim_rate: 0.9 before, 0.3 now`. Empty: the
    batches are the same."""
    old, new = _numbered(old), _numbered(new)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{key}: {_shown(old)} before, {_shown(new)} now"]
    return [
        line
        for name in dict.fromkeys([*old, *new])
        for line in differences(
            old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name
        )
    ]


_ABSENT = object()


def _numbered(value: Any) -> Any:
    """A list of mappings as a mapping by number, from 1."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value, 1)}
    return value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if isinstance(value, float):
        return f"{value:.9g}"
    return "present" if isinstance(value, dict) else repr(value)
