"""A run is a folder that explains itself: what it starts from, and earlier runs put aside."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import write_text
from megacode.lock import HeldError, Lock, take
from megacode.plan.plan import Plan
from megacode.plan.summary import plan_summary
from megacode.recipe.load import dump_recipe
from megacode.run.checkpoints import INFO, complete_checkpoints
from megacode.run.history import is_own
from megacode.run.metrics import FILE as METRICS
from megacode.version import __version__

LOCK = "lock"
_GRACE = 5.0
"""Seconds in which a process that was killed while it writes to a slow disk ends."""
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


def write_start(run: Path, plan: Plan, world_size: int, vocab_size: int) -> None:
    """Write recipe, plan and environment of this start (rank 0)."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / "recipe.yaml", dump_recipe(plan.recipe))
    write_text(run / "plan.json", json.dumps(plan_summary(plan, vocab_size), indent=1))
    write_text(run / "environment.json", json.dumps(_environment(world_size), indent=1))


def _environment(world_size: int) -> dict[str, Any]:
    """Machine, versions and layout of this start, as JSON-able data."""
    import torch

    return {
        "megacode": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _VERSIONS},
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lock_run(run: Path) -> Lock:
    """Make the folder if need be and take its lock: one start trains in it at a time.

    Raises:
        UserError: another process trains in this folder, it is a checkpoint's, or it cannot be made
            or written to.
    """
    if (run / INFO).is_file():
        raise UserError(
            f"--run {run}: is a checkpoint, not a run's folder; choose another --run, and start "
            "from its weights with `initialize_from`"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        return take(run / LOCK, wait=_GRACE)
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
    aside = _aside(run)
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


def put_other_futures_aside(
    run: Path, plan: Plan, done: int, accepted: Iterable[Mapping[str, Any]]
) -> str | None:
    """Move checkpoints after step `done` that this run would not come to, and a copy of the
    metrics, to `RUN/checkpoints.before-N`. Returns a line that says so."""
    later = [path for step, path in complete_checkpoints(run / "checkpoints") if step > done]
    others = [path for path in later if not is_own(path, plan, accepted)]
    if not others:
        return None
    aside = _aside(run / "checkpoints")
    aside.mkdir()
    if (run / METRICS).is_file():
        shutil.copy2(run / METRICS, aside / METRICS)
    for path in others:
        os.rename(path, aside / path.name)
    names = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
    return f"checkpoints of another future, put aside in {aside}: {names}"


def _aside(path: Path) -> Path:
    """The first free name of `PATH.before-1`, `PATH.before-2`, ..."""
    names = (path.with_name(f"{path.name}.before-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
