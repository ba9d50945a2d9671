"""A run is a folder that explains itself: recipe, plan, environment, metrics, checkpoints, log, report."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import write_text
from megacode.lock import HeldError, Lock, take
from megacode.plan.past import Change, check_accepted
from megacode.plan.plan import Plan
from megacode.recipe.load import dump_recipe
from megacode.run.checkpoints import latest_checkpoint, latest_note, read_info
from megacode.run.history import acceptable, is_accepted, past_changes
from megacode.run.metrics import FILE as METRICS
from megacode.run.metrics import read_metrics
from megacode.version import __version__

LOCK = "lock"
_VERSIONS = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "tiktoken",
)


def environment(world_size: int) -> dict[str, Any]:
    """Machine, versions and layout of this start, as JSON-able data."""
    import torch

    versions: dict[str, str | None] = {}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "megacode": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


@dataclass(frozen=True)
class Resume:
    """What a run goes on from.

    Attributes:
        info: the checkpoint's megacode.json.
        step: finished steps.
        changes: of the past, against the recipe that made the checkpoint, accepted by the user.
        note: why this is not the checkpoint that `latest` names; None where it is.
    """

    checkpoint: Path
    info: dict[str, Any]
    step: int
    changes: tuple[Change, ...] = ()
    note: str | None = None


def checkpoint_to_resume(run: Path, plan: Plan, accept: Sequence[str] = ()) -> Resume | None:
    """The checkpoint a run goes on from, or None for a new run.

    Args:
        accept: keys of the recipe whose change the user accepts (`--accept-change`).

    Raises:
        UserError: the checkpoint's past differs from what this recipe would have done, naming every difference; or the run had
            checkpoints and has none.
    """
    check_accepted(accept)
    folder = run / "checkpoints"
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        _refuse_lost_checkpoints(run)
        return None
    info = read_info(checkpoint)
    step = int(info["step"])
    if step > plan.total_steps:
        raise UserError(
            f"{run}: has {step} finished steps and the recipe ends after {plan.total_steps}; lengthen the last phase, add one, "
            "or choose another --run"
        )
    keys = (*accept, *_accepted_by_fork(run, step))
    batches, others = past_changes(checkpoint, info, plan)
    refused = [*batches, *(str(change) for change in others if not is_accepted(change, keys))]
    if refused:
        shown = "; ".join(refused[:6]) + (
            f"; and {len(refused) - 6} more" if len(refused) > 6 else ""
        )
        go_on = " ".join(f"--accept-change {change.key}" for change in others if acceptable(change))
        remedy = (
            ""
            if batches or not all(map(acceptable, others))
            else f", go on from here with the change ({go_on})"
        )
        raise UserError(
            f"{run}: its first {step} steps were not trained as this recipe says: {shown}; undo the change{remedy}, or choose "
            "another --run (with `initialize_from` to start from these weights)"
        )
    return Resume(checkpoint, info, step, tuple(others), latest_note(folder))


def _accepted_by_fork(run: Path, step: int) -> list[str]:
    """What a fork changes on purpose: accepted where its own steps begin."""
    try:
        facts = json.loads((run / "fork.json").read_text(encoding="utf-8"))
        return list(facts.get("accepted", [])) if facts["step"] == step else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _refuse_lost_checkpoints(run: Path) -> None:
    """UserError if the metrics tell of checkpoints, and there are none: to begin at step 0 would end the run's history."""
    if not (run / METRICS).is_file():
        return
    saved = [
        r["step"]
        for r in read_metrics(run)
        if r["kind"] == "event" and r.get("event") == "checkpoint"
    ]
    if saved:
        raise UserError(
            f"{run / 'checkpoints'}: is empty, and {METRICS} tells of a checkpoint at step {max(saved):,}; copy it here from "
            "where it is, or start over with --restart, which puts this run aside"
        )


def lock_run(run: Path) -> Lock:
    """Make the folder if need be and take its lock: one start trains in it at a time.

    Raises:
        UserError: another process trains in this folder, or it cannot be made or written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        return take(run / LOCK)
    except HeldError as error:
        raise UserError(
            f"{run / LOCK}: this run is being trained by {error.owner}; wait for it, stop it "
            "(scancel, Ctrl-C), or choose another --run"
        ) from None
    except OSError as error:
        raise UserError(
            f"--run {run}: cannot be made or written to ({error.strerror}: {error.filename}); "
            "choose another, or free this one"
        ) from error


def start_over(run: Path) -> Path | None:
    """Put an earlier run in this folder aside as `RUN.before-N`, and say where; nothing is deleted.

    The caller holds the folder's lock, which stays in place.
    """
    if not any(path.name not in (LOCK, "logs") for path in run.iterdir()):
        return None
    number = 1
    while (aside := run.with_name(f"{run.name}.before-{number}")).exists():
        number += 1
    os.rename(run, aside)
    run.mkdir()
    try:
        os.link(aside / LOCK, run / LOCK)
    except FileExistsError:
        raise UserError(
            f"{run}: another process began here while the earlier run was put aside as {aside}"
        ) from None
    (aside / LOCK).unlink()
    return aside


def nothing_to_do(
    run: Path, plan: Plan, phase: str | None = None, accept: Sequence[str] = ()
) -> str | None:
    """A line that says so if the run, or its part up to the end of `phase`, is finished. Reads a few small files.

    Raises:
        UserError: as `checkpoint_to_resume`.
    """
    checkpoint = latest_checkpoint(run / "checkpoints")
    end = plan.phase_end(phase)
    if checkpoint is None or int(read_info(checkpoint)["step"]) < end:
        return None
    checkpoint_to_resume(run, plan, accept)
    if end == plan.total_steps:
        return f"nothing to do: {checkpoint} is the end of this run (step {end:,}); --restart starts over"
    return f"nothing to do: {phase} ends at step {end:,}, and {checkpoint} is there or further"


def write_start(run: Path, plan: Plan, world_size: int, vocab_size: int) -> None:
    """Recipe, plan and environment of this start (rank 0)."""
    from megacode.plan.summary import plan_summary

    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / "recipe.yaml", dump_recipe(plan.recipe))
    write_text(run / "plan.json", json.dumps(plan_summary(plan, vocab_size), indent=1))
    write_text(run / "environment.json", json.dumps(environment(world_size), indent=1))
