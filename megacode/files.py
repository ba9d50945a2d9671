"""Files written whole or not at all, and names read from files that must stay in a folder."""

from __future__ import annotations

import glob
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megacode.errors import UserError


@contextmanager
def replace_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file under a temporary name, renamed to `path` unless the block raises.

    `durable`: survives a power cut. Without it the file is whole after a killed process, but has to
    be checked after a power cut; much faster for many files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{_node()}-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def remove_left_over(path: Path) -> None:
    """Remove temporary files that killed processes of this machine left beside `path`.

    Those of other machines stay, because their processes may live.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(_node())}-*.partial"):
        number = partial.name.split(".")[-2].rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            partial.unlink(missing_ok=True)


def _node() -> str:
    return platform.node().partition(".")[0] or "local"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def leaves(path: Path, folder: Path) -> bool:
    """Whether `path` leads out of `folder` once links are followed.

    In a Hugging Face cache, links from `models--NAME/snapshots/REVISION` to `models--NAME/blobs`
    do not.
    """
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    roots = [root]
    for snapshots in (
        one for one in (root, *root.parents) if one.name == "snapshots" and "--" in one.parent.name
    ):
        roots.append(snapshots.parent / "blobs")
    return not any(target.is_relative_to(one) for one in roots)


def inside(folder: Path, name: object, where: str) -> Path:
    """`folder / name`, for a name read from the file `where`; it may have parts (`shards/a.bin`).

    Raises:
        UserError: it is no name, is absolute, has `..`, or leads out of `folder` through a link.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{where}: {name!r} is not the name of a file; make that file anew")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(
            f"{where}: the name {name!r} leads out of {folder}; make that file anew, with names "
            "of its own folder"
        )
    if leaves(folder / name, folder):
        raise UserError(
            f"{where}: {name!r} is a link that leads out of {folder}, to "
            f"{os.path.realpath(folder / name)}, and is not followed; put the file itself there"
        )
    return folder / name


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of each line that is not blank.

    Args:
        what: the file's content, for errors.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {what}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: is no JSON object; {what}")
        yield number, record


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """`value` as indented JSON, whole or not at all."""
    with replace_file(path, durable) as file:
        file.write(
            (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
                errors="backslashreplace"
            )
        )


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all, and there after a power cut."""
    with replace_file(path) as file:
        file.write(text.encode())
