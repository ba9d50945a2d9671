"""The folder of parts: made for one set of settings, and held against other runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import write_json
from megacode.lock import HeldError, Lock, take

_PATIENCE = 20.0
"""Seconds in which another machine has prepared the folder."""
_BEGUN = "datasets.json"


@contextmanager
def open_folder(
    folder: Path, settings: dict[str, Any], share: tuple[int, int] | None
) -> Iterator[Callable[[], bool]]:
    """The folder of parts, made for these settings and locked against other runs.

    `lock` belongs to whoever prepares the folder or writes the datasets: a run without `share`
    holds it from beginning to end. Share I of N holds `lock-I-of-N` while it works. Gives a
    function that says whether this process holds `lock` from now on, and so may write the datasets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    another = f"{folder}: another run is writing this output; wait for it, or choose another output"
    with ExitStack() as locks:
        locks.callback(_remove_if_empty, folder)
        writer = locks.enter_context(
            _take(folder / "lock", another, wait=_PATIENCE if share else 0.0)
        )
        if share is None:
            _refuse_running_shares(folder, another)
            _prepare(folder, settings)
            yield lambda: True
        else:
            name = f"lock-{share[0]}-of-{share[1]}"
            running = (
                f"{folder}: --shard {share[0]}/{share[1]} is already running; give another number"
            )
            others = any(path.name != name for path in folder.glob("lock-*"))
            if others and not _same_settings(folder, settings):
                _refuse_running_shares(
                    folder,
                    f"{folder}: other machines are writing this output from other settings or "
                    "files; give each --shard the same command, or choose another output",
                )
                others = False
            # Where this one is lost, two processes make the same parts, each whole.
            locks.enter_context(_take(folder / name, running, on_lost=lambda _: None))
            if not others:
                _prepare(folder, settings)
            writer.release()
            yield lambda: _take_if_free(folder / "lock", locks)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # the parts are still in it, or another run has begun
        folder.rmdir()


def _take(path: Path, refusal: str, **how: Any) -> Lock:
    try:
        return take(path, say=_say, **how)
    except HeldError:
        raise UserError(refusal) from None
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: another run has just finished this output; run again to see what "
            "it made"
        ) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _take_if_free(path: Path, locks: ExitStack) -> bool:
    """Take the lock if nobody has it and the folder is still there."""
    try:
        locks.enter_context(take(path, say=_say))
    except (HeldError, FileNotFoundError):
        return False
    return True


def _refuse_running_shares(folder: Path, refusal: str) -> None:
    """UserError where a share is at work; locks of dead ones go."""
    for path in folder.glob("lock-*"):
        _take(path, refusal).release()


def remove_folder(folder: Path) -> None:
    """Remove all but the lock, `settings.json` last: until then the folder is known as a run's."""
    last = folder / "settings.json"
    for path in [
        *(p for p in folder.iterdir() if p != last and not p.name.startswith("lock")),
        last,
    ]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    """Datasets that runs with this folder began to write, perhaps in part; relative to its
    parent."""
    try:
        return list(json.loads((folder / _BEGUN).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return []


def begin(folder: Path, datasets: Sequence[str]) -> None:
    """To be called before the first of them is touched."""
    write_json(folder / _BEGUN, list(datasets))


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run with these settings; throw away those of any other.
    UserError for a folder of that name that no run made."""
    if not _same_settings(folder, settings):
        kept = {"settings.json", _BEGUN}
        found = [
            old
            for old in folder.iterdir()
            if not old.name.startswith(("lock", ".lock", ".settings.json."))
        ]
        if found and not _is_of_a_run(folder):
            raise UserError(
                f"{folder}: in the way: not made by a run of this tool; "
                "move it, or choose another output"
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
