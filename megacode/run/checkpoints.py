"""The folders of checkpoints: which there are, which is the latest, what one says of itself. Needs no torch.

How they are written and read stands in `megacode.megatron.checkpoint`.
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
_NAME = re.compile(r"^step_(\d{8,})$")
_UNFINISHED = re.compile(r"^\.step_\d{8,}\.([\w-]+\.)?(tmp|old)$")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` finished steps."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, path), oldest first."""
    return [(step, path) for step, path in _step_folders(folder) if (path / INFO).is_file()]


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (int(match[1]), path)
        for path in paths
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` names, else the newest complete one (`latest_note` says why), else None.

    Raises:
        UserError: there are checkpoints and none is complete, or `latest` names one that is not complete and older than others.
    """
    return _latest(folder)[0]


def latest_note(folder: Path) -> str | None:
    """Why the latest checkpoint is not the one that `folder/latest` names; None where it is. Errors as `latest_checkpoint`."""
    return _latest(folder)[1]


def _latest(folder: Path) -> tuple[Path | None, str | None]:
    pointer, there = folder / LATEST, dict(complete_checkpoints(folder))
    try:
        name: str | None = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        name = None
    except OSError as error:
        raise UserError(
            f"{pointer}: cannot be read ({error.strerror}); write the name of a checkpoint into it"
        ) from error
    match = _NAME.fullmatch(name or "")
    step = int(match[1]) if match else None
    if step in there and there[step].name == name:
        return there[step], None
    if not there:
        if name is None and not _step_folders(folder):
            return None, None
        raise UserError(
            f"{folder}: has no complete checkpoint (one has a file {INFO}); copy one here from where the run was, or start over "
            "with --restart, which puts this run aside"
        )
    newest = max(there)
    what = (
        "is not there"
        if name is None
        else f"names {name[:40]!r}, which is not a complete checkpoint here"
    )
    if step is not None and step < newest:
        names = ", ".join(path.name for path in list(there.values())[-5:])
        raise UserError(
            f"{pointer}: {what}, and there are later ones; write the name of one into it: {names}"
        )
    return there[
        newest
    ], f"{pointer} {what}; going on from the newest complete one, {there[newest].name}"


def remove_unfinished(folder: Path) -> None:
    """Clear away what a killed run was writing or removing. Only while no other process trains in this folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.match(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def find_checkpoint(path: str | Path, say: Callable[[str], None] = _tell) -> Path:
    """A checkpoint folder from a checkpoint's, a run's or a checkpoints folder's path.

    Args:
        say: told where `latest` does not name the one that is taken.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := latest_checkpoint(folder):
            if note := latest_note(folder):
                say(note)
            return found
    raise UserError(
        f"{path}: no complete checkpoint here; give a run folder or a checkpoints/step_* folder"
    )


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
