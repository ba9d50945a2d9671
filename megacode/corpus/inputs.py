"""Paths, folders and globs -> the files of a corpus in order, with their form and compression."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megacode.errors import UserError
from megacode.files import leaves

Form = Literal["jsonl", "json", "parquet", "file"]
Compression = Literal["gz", "zst"]
FORMATS = ("auto", "jsonl", "parquet", "files")

_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_FORMS: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus: JSON lines, a JSON array, parquet, or a plain file that is one
    document."""

    path: Path
    form: Form
    compression: Compression | None
    size: int
    """Bytes on disk."""
    modified_ns: int
    base: Path = Path()
    """The input it was found through: its folder, or the file's own."""


def find_inputs(
    inputs: Sequence[str | Path],
    format: str = "auto",
    include: Sequence[str] = (),
    every: tuple[int, int] = (0, 1),
    *,
    on_link: Callable[[Path], None],
) -> list[InputFile]:
    """Files of the inputs in the order given; inside a folder or a glob sorted by path; each file
    once. `@FILE` stands for the inputs that FILE lists, one a line.

    `auto` goes by endings. A folder whose bytes are mostly JSONL or parquet is read for those only
    (dataset downloads come with a README); any other is a tree of plain files, each one document.
    Links that stay in the folder are followed, but not to a folder that is read anyway; links that
    lead nowhere, out of it, or out of the fixed start of a glob are not (a repository may link to
    anything), and `on_link` hears of each. An input that is itself a link is followed. Hidden files
    and empty folders are passed over. `include`: shell patterns on the name or on the path in the
    folder (`*.py`). `every` (i, n): of the files found, number i, i + n, i + 2n ... (from 0).
    Raises UserError for an input that is not there or must not be read, and for none at all.
    """
    links = 0

    def skip(link: Path) -> None:
        nonlocal links
        links += 1
        on_link(link)

    found: dict[Path, InputFile] = {}
    for given in _listed(inputs):
        path = Path(given).expanduser()
        if path.name in ("", ".."):  # the folder's name may be wanted (file.repository)
            path = Path(os.path.abspath(path))
        if path.is_dir():
            files = _folder(path, format, include, skip)
        elif path.is_file():
            files = [_file(path, path.parent, format, explicit=True)]
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(given) else []
            files = []
            for match in map(Path, matches):
                if leaves(match, _fixed_start(path)) or not match.exists():
                    skip(match)
                    continue
                files += (
                    _folder(match, format, include, skip)
                    if match.is_dir()
                    else [_file(match, match.parent, format, explicit=True)]
                )
        if not files:
            what = "matches no file" if glob.has_magic(given) else "no such file or folder"
            if path.is_dir():
                what = "no file in this folder" + (
                    f" that matches {' or '.join(include)}" if include else ""
                )
            if links:
                what += (
                    f" ({links:,} links lead out of it or nowhere, and are not followed: "
                    "name what they lead to)"
                )
            raise UserError(
                f"{given}: {what}; give JSONL, parquet or plain files, folders of them, or globs"
            )
        for file in files:
            found.setdefault(file.path, file)
    if not found:
        raise UserError("no input; give JSONL, parquet or plain files, folders of them, or globs")
    first, step = every
    chosen = list(found.values())[first::step]
    if not chosen:
        raise UserError(
            f"--files {first}/{step}: there are only {len(found)} files, so no number {first}"
        )
    return chosen


def _listed(inputs: Sequence[str | Path]) -> Iterator[str]:
    """The inputs, with `@FILE` as the lines of FILE; relative to the working directory."""
    for given in map(str, inputs):
        if not given.strip():
            raise UserError(
                "an input is blank; name a file or folder (the working directory is `.`)"
            )
        if not given.startswith("@") or os.path.exists(given):
            yield given
            continue
        try:
            lines = Path(given[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{given}: cannot read this list of inputs ({error}); "
                "give a text file, one input a line"
            ) from None
        yield from (line.strip() for line in lines if line.strip())


def _fixed_start(pattern: Path) -> Path:
    """The folder that a glob names before its first wildcard."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    return Path(*fixed)


def _folder(
    folder: Path, format: str, include: Sequence[str], skip: Callable[[Path], None]
) -> list[InputFile]:
    paths = [p for p in _walk(folder, skip) if not include or _included(p, folder, include)]
    if format == "files":
        return [_file(p, folder, "files") for p in paths]
    records = [_file(p, folder, format) for p in paths if _form(p) not in ("file", None)]
    if format in ("jsonl", "parquet"):
        return [file for file in records if file.form.removesuffix("l") == format.removesuffix("l")]
    # A .json is as often one pretty-printed value as JSON lines: it makes no folder of records.
    records = [file for file in records if not file.path.name.endswith(".json")]
    whole = sum(os.path.getsize(p) for p in paths)
    if 2 * sum(file.size for file in records) > whole:
        return records
    return [_file(p, folder, "files") for p in paths]


def _walk(folder: Path, skip: Callable[[Path], None]) -> Iterator[Path]:
    """Files in order. A linked folder is read where its link is, unless it is read anyway."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); "
            "change its rights, or name others"
        )

    root = os.path.realpath(folder)
    followed: list[str] = []

    def is_read(path: Path) -> bool:
        if not path.is_symlink():
            return True
        if leaves(path, folder):
            skip(path)
            return False
        target = os.path.realpath(path)
        hidden = any(
            name.startswith(".") and name != "."
            for name in os.path.relpath(target, root).split(os.sep)
        )
        if not hidden or any(
            f"{target}{os.sep}".startswith(f"{other}{os.sep}") for other in followed
        ):
            return False
        followed.append(target)
        return True

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and is_read(Path(here, name))
        ]
        for name in sorted(names):
            path = Path(here, name)
            if name.startswith("."):
                continue
            if path.is_symlink() and (leaves(path, folder) or not path.exists()):
                skip(path)
            elif path.is_file():
                yield path


def _included(path: Path, folder: Path, include: Sequence[str]) -> bool:
    inside = path.relative_to(folder).as_posix()
    return any(
        fnmatch.fnmatch(path.name, pattern) or fnmatch.fnmatch(inside, pattern)
        for pattern in include
    )


def _form(path: Path) -> Form:
    plain = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return _FORMS.get(plain.suffix.lower(), "file")


def _file(path: Path, base: Path, format: str, explicit: bool = False) -> InputFile:
    form: Form = _form(path)
    if format == "files":
        form = "file"
    elif explicit and format in ("jsonl", "parquet"):
        form = "jsonl" if format == "jsonl" else "parquet"
    compression = _COMPRESSIONS.get(path.suffix) if form != "parquet" else None
    status = path.stat()
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: this file cannot be read; change its rights, or name others")
    if form == "jsonl" and path.suffix == ".json" and _is_array(path):
        form = "json"
    return InputFile(path, form, compression, status.st_size, status.st_mtime_ns, base)


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
