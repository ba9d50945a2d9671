"""The folder of parts: made for one set of settings, and held against other runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megacode.errors import UserError
from megacode.files import write_json

_PATIENCE = 20.0
"""Seconds in which another machine has prepared the folder."""
_BEGUN = "datasets.json"


@contextmanager
def open_folder(
    folder: Path, settings: dict[str, Any], share: tuple[int, int] | None
) -> Iterator[Callable[[], bool]]:
    """The folder of parts, made for these settings and held against other runs; locks go with their process.

    A run of its own holds it alone. Shares hold it together, each its own number alone. Gives a function that says
    whether this process now holds the folder alone, and so may write the datasets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        alone = _lock(lock, fcntl.LOCK_EX)
        if not alone and (share is None or not _lock(lock, fcntl.LOCK_SH, _PATIENCE)):
            raise UserError(
                f"{folder}: another run is writing this output; wait for it, or choose another --output"
            )
        if not _is_there(lock, folder / "lock"):
            raise UserError(
                f"{folder}: another run has just finished this output; run again to see what it made"
            )
        if alone:
            _prepare(folder, settings)
        elif not _same_settings(folder, settings):
            raise UserError(
                f"{folder}: other machines are writing this output from other settings or files; give each --shard the "
                "same command, or choose another --output"
            )
        if share is None:
            yield lambda: True
            return
        _lock(lock, fcntl.LOCK_SH, _PATIENCE)
        with open(folder / f"lock-{share[0]}-of-{share[1]}", "a") as mine:
            if not _lock(mine, fcntl.LOCK_EX):
                raise UserError(
                    f"{folder}: --shard {share[0]}/{share[1]} is already running; give another number"
                )

            def whole() -> bool:
                _lock(lock, fcntl.LOCK_UN)
                return _lock(lock, fcntl.LOCK_EX)

            yield whole


def _lock(file: IO[str], how: int, patience: float = 0.0) -> bool:
    """Take the lock, or take it in another way, within `patience` seconds; the old one is lost meanwhile."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether that is still the file of this name: who held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def remove_folder(folder: Path) -> None:
    """Killed on the way it is still known as a run's: what says so goes last."""
    last = [folder / "settings.json", folder / "lock"]
    for path in [*(path for path in folder.iterdir() if path not in last), *last]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else the next run has begun in it
            raise


def _same_settings(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / "settings.json").read_text(encoding="utf-8")) == settings)
    except (OSError, ValueError):
        return False


def _is_of_a_run(folder: Path) -> bool:
    try:
        return "input files" in json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def begun(folder: Path) -> list[str]:
    """Datasets that runs with this folder began to write and may have left in pieces; relative to where it stands."""
    try:
        return list(json.loads((folder / _BEGUN).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return []


def begin(folder: Path, datasets: Sequence[str]) -> None:
    """To be called before the first of them is touched."""
    write_json(folder / _BEGUN, list(datasets))


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run with these settings; throw away those of any other. UserError for a folder of
    that name that no run made."""
    if not _same_settings(folder, settings):
        kept = {"settings.json", _BEGUN}
        found = [
            old for old in folder.iterdir() if not old.name.startswith(("lock", ".settings.json."))
        ]
        if found and not _is_of_a_run(folder):
            raise UserError(
                f"{folder}: in the way: not made by a run of this tool; move it, or choose another --output"
            )
        write_json(
            folder / "settings.json", {"input files": None}
        )  # killed from here on, nothing in it counts
        for old in found:
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name not in kept:
                old.unlink()
        write_json(folder / "settings.json", settings)
    for left_over in (
        *folder.glob(".*.partial"),
        *folder.glob("*.chunk"),
    ):  # of a run that was killed
        left_over.unlink()
