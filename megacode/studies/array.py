"""Submits the cells of a sweep as a Slurm job array; `slurm/sweep.sh` trains one of them."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megacode.errors import UserError
from megacode.files import write_text
from megacode.recipe.checks import check_files
from megacode.studies.state import unfinished
from megacode.studies.sweep import Cell, OpenSweep


def submit(sweep: OpenSweep, script: Path) -> list[str]:
    """Submit the unfinished cells as a job array; as several, one after the other, where cells go
    on from shared phases. Lines that say what was submitted.

    Raises:
        UserError: the script is not there, or Slurm refuses.
    """
    if not script.is_file():
        raise UserError(f"--sbatch {script}: there is no such script; slurm/sweep.sh is one")
    todo = {cell.name: cell for cell in unfinished(sweep)}
    for cell in todo.values():
        check_files(cell.recipe)
    levels: dict[int, list[str]] = {}
    for cell in todo.values():
        levels.setdefault(_depth(cell, todo), []).append(cell.name)
    said, before = [], ""
    for _, names in sorted(levels.items()):
        text = "".join(f"{name}\n" for name in names)
        listed = sweep.runs / f"array-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        write_text(listed, text)
        array = [
            f"--array=0-{len(names) - 1}",
            *([f"--dependency=afterany:{before}"] * bool(before)),
        ]
        before = _sbatch(script, [*array, str(script), str(sweep.path), str(listed)])
        said.append(f"job {before}: {len(names)} cell{'s' * (len(names) > 1)} of {listed}")
    return said or ["nothing to do: every cell is finished"]


def _depth(cell: Cell, todo: Mapping[str, Cell]) -> int:
    """How many cells that are yet to be trained it goes on from, one after the other."""
    parent = cell.parent
    begins = parent and parent.name in todo and not cell.folder.exists()
    return 1 + _depth(parent, todo) if parent and begins else 0


def _sbatch(script: Path, arguments: Sequence[str]) -> str:
    """Submit with the flags of the cluster.sh beside the script; the job's number."""
    line = (
        'sbatch_flags=() sweep_flags=(); [ ! -e "$0" ] || source "$0"; '
        'exec sbatch --parsable "${sbatch_flags[@]}" "${sweep_flags[@]}" "$@"'
    )
    command = ["bash", "-c", line, str(script.parent / "cluster.sh"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(f"sbatch: {told}") from None
    return done.stdout.strip().partition(";")[0]
