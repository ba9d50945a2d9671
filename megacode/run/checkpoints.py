"""The folders of checkpoints: which there are, which is the latest, what one says of itself.

Needs no torch. How they are written and read stands in `megacode.megatron.checkpoint`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacode.errors import UserError

INFO = "megacode.json"
LATEST = "latest"
AVERAGES = "averages"
"""Folder of a run with means of its checkpoints: weights alone, nothing to resume from."""
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` finished steps."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in a `checkpoints` folder as (step, path), oldest first."""
    return sorted(
        (int(match[1]), info.parent)
        for info in folder.glob(f"step_*/{INFO}")
        if (match := _NAME.fullmatch(info.parent.name))
    )


def latest_checkpoint(folder: Path) -> tuple[Path | None, str]:
    """The checkpoint that `folder/latest` names, else the newest complete one, else None.

    Returns:
        (path, why it is not the one that `latest` names: empty where it is).

    Raises:
        UserError: there are checkpoints and none is complete, or `latest` names one that is not
            complete and older than others.
    """
    pointer, there = folder / LATEST, complete_checkpoints(folder)
    try:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        what = f"names {name[:40]!r}, which is not a complete checkpoint here"
    except OSError as error:
        name, what = "", f"cannot be read ({error.strerror})"
    for _, path in there:
        if path.name == name:
            return path, ""
    if not there:
        if not pointer.exists() and not any(folder.glob("step_*")):
            return None, ""
        raise UserError(
            f"{folder}: has no complete checkpoint (one has a file {INFO}); copy one here from "
            "where the run was, or start over with --restart, which puts this run aside"
        )
    newest_step, newest = there[-1]
    if (match := _NAME.fullmatch(name)) and int(match[1]) < newest_step:
        names = ", ".join(path.name for _, path in there[-5:])
        raise UserError(
            f"{pointer}: {what}, and there are later ones; write the name of one into it: {names}"
        )
    return newest, f"{pointer} {what}; going on from the newest complete one, {newest.name}"


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing or removing. Only while no other process trains here."""
    for ending in ("tmp", "old"):
        for path in folder.glob(f".step_*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr)


def find_checkpoint(
    path: str | Path,
    say: Callable[[str], None] = _print_error,
    expected: str = "a run folder or a checkpoints/step_* folder",
) -> Path:
    """A checkpoint's folder from its own path, a run's or a `checkpoints` folder's.

    Args:
        say: told where `latest` does not name the checkpoint that is taken.
        expected: what to give instead, for the error.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    for folder in (path / "checkpoints", path):
        found, note = latest_checkpoint(folder)
        if note:
            say(note)
        if found:
            return found
    raise UserError(f"{path}: no complete checkpoint here; give {expected}")


def read_info(checkpoint: Path) -> dict[str, Any]:
    """What `megacode.json` says: step, layout, fingerprint, recipe name, versions."""
    try:
        info = json.loads((checkpoint / INFO).read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not isinstance(info.get("step"), int):
            raise ValueError("it has no `step`")
        return info
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / INFO}: cannot be read ({error}); the checkpoint is not complete"
        ) from error
