"""A run is a folder that explains itself: recipe, plan, environment, metrics, checkpoints, log, report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megacode import __version__
from megacode.data.files import write_text
from megacode.errors import UserError
from megacode.recipe.fingerprint import differences, fingerprint
from megacode.recipe.load import dump_recipe
from megacode.recipe.plan import Plan
from megacode.runtime.distributed import World
from megacode.train.checkpoint import latest_checkpoint, read_info

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
    """Put an earlier run in this folder aside as `RUN.before-N`, and say where; nothing is deleted."""
    if not run.exists():
        return None
    number = 1
    while (aside := run.with_name(f"{run.name}.before-{number}")).exists():
        number += 1
    shutil.move(str(run), str(aside))
    return aside


def write_start(run: Path, plan: Plan, world: World, vocab_size: int) -> None:
    """Recipe, plan and environment of this start (rank 0)."""
    from megacode.report.plan_summary import plan_summary

    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / "recipe.yaml", dump_recipe(plan.recipe))
    write_text(run / "plan.json", json.dumps(plan_summary(plan, vocab_size), indent=1))
    write_text(run / "environment.json", json.dumps(environment(world), indent=1))
