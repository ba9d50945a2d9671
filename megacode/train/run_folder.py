"""A run is a folder that explains itself: recipe, plan, environment, metrics, checkpoints, log, report."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode import __version__
from megacode.data.files import write_text
from megacode.errors import UserError
from megacode.recipe.fingerprint import differences, fingerprint
from megacode.recipe.load import dump_recipe
from megacode.recipe.plan import Plan
from megacode.train.checkpoint_files import latest_checkpoint, read_info
from megacode.train.lock import FILE as LOCK

if TYPE_CHECKING:
    from megacode.runtime.distributed import World

_VERSIONS = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "sentencepiece", "tokenizers", "tiktoken")


def environment(world: World) -> dict[str, Any]:
    """Machine, versions and layout of this start, as JSON-able data."""
    import torch

    versions = {}
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
        "world_size": world.size,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def checkpoint_to_resume(run: Path, plan: Plan) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint a run goes on from, or None for a new run.

    Raises:
        UserError: the checkpoint's past differs from what this recipe would have done, naming every difference.
    """
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return None
    info = read_info(checkpoint)
    step = int(info["step"])
    if step > plan.total_steps:
        raise UserError(
            f"{run}: has {step} finished steps and the recipe ends after {plan.total_steps}; lengthen the last phase, add one, "
            "or choose another --run"
        )
    changed = differences(info["facts"], json.loads(json.dumps(fingerprint(plan, step))))
    if changed:
        shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
        raise UserError(
            f"{run}: its first {step} steps were not trained as this recipe says: {shown}; undo the change, or choose another "
            "--run (with `initialize_from` to start from these weights)"
        )
    return checkpoint, info


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
        raise UserError(f"{run}: another process began here while the earlier run was put aside as {aside}") from None
    (aside / LOCK).unlink()
    return aside


def nothing_to_do(run: Path, plan: Plan, phase: str | None = None) -> str | None:
    """A line that says so if the run, or its part up to the end of `phase`, is finished. Reads a few small files.

    Raises:
        UserError: as `checkpoint_to_resume`.
    """
    checkpoint = latest_checkpoint(run / "checkpoints")
    end = plan.phase_end(phase)
    if checkpoint is None or int(read_info(checkpoint)["step"]) < end:
        return None
    checkpoint_to_resume(run, plan)
    if end == plan.total_steps:
        return f"nothing to do: {checkpoint} is the end of this run (step {end:,}); --restart starts over"
    return f"nothing to do: {phase} ends at step {end:,}, and {checkpoint} is there or further"


def write_start(run: Path, plan: Plan, world: World, vocab_size: int) -> None:
    """Recipe, plan and environment of this start (rank 0)."""
    from megacode.report.plan_summary import plan_summary

    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / "recipe.yaml", dump_recipe(plan.recipe))
    write_text(run / "plan.json", json.dumps(plan_summary(plan, vocab_size), indent=1))
    write_text(run / "environment.json", json.dumps(environment(world), indent=1))
