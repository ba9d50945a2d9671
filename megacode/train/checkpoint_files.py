"""The folders of checkpoints: which there are, which is the latest, what one says of itself. Needs no torch.

How they are written and read stands in `megacode.train.checkpoint`.
"""

from __future__ import annotations

import json
import re
import shutil
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
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.match(path.name)
        if match and (path / INFO).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` names, or None where there is none.

    Raises:
        UserError: `latest` names a folder that is not there or not complete.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip()
    if not (path / INFO).is_file():
        raise UserError(
            f"{pointer}: names {path.name}, which is not a complete checkpoint; write the name of one of "
            f"{', '.join(p.name for _, p in complete_checkpoints(folder)) or 'none'} into it, or remove it to start over"
        )
    return path


def remove_unfinished(folder: Path) -> None:
    """Clear away what a killed run was writing or removing. Only while no other process trains in this folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.match(path.name):
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from a checkpoint's, a run's or a checkpoints folder's path.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if (folder / LATEST).is_file():
            found = latest_checkpoint(folder)
            if found:
                return found
    raise UserError(f"{path}: no complete checkpoint here; give a run folder or a checkpoints/step_* folder")


def read_info(checkpoint: Path) -> dict[str, Any]:
    """What `megacode.json` says: step, layout, fingerprint, recipe name, versions."""
    try:
        return json.loads((checkpoint / INFO).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{checkpoint / INFO}: cannot be read ({error}); the checkpoint is not complete") from error
