"""What stands where a run will write: its own earlier output, which goes, and everything else, which stays.

A run's own are the datasets that its manifest lists and whose manifests name its settings, and those that it, or a
killed run of the same output, had begun to write.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.counts import SPLITS, Group
from megacode.corpus.preprocess.folder import begin, begun
from megacode.corpus.preprocess.request import Request, file_name
from megacode.data import indexed
from megacode.errors import UserError

SPLIT_GROUPS = tuple(Group(split) for split in SPLITS)
"""The groups of a run that makes no dataset for each value."""
TABLE_ENDING = ".files.tsv"
_BESIDE = (".json", ".quarantine.jsonl", TABLE_ENDING, ".lengths.png")
"""What is written for a run as a whole."""


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Of a run's settings; each of its datasets' manifests holds it."""
    return xxhash.xxh3_64_hexdigest(
        json.dumps(settings, sort_keys=True).encode(errors="surrogateescape")
    )


def datasets_of(request: Request, manifest: Mapping[str, Any]) -> dict[Group, Path]:
    """Prefixes of the datasets that the manifest of this output lists. UserError: see `_within`."""
    listed = manifest.get("run", {}).get("datasets", {})
    where = f"{indexed.with_ending(request.name, '.json')}, `datasets`"
    return {Group.parse(group): _within(request, path, where) for group, path in listed.items()}


def _within(request: Request, path: object, where: str) -> Path:
    """The prefix that a file of this output names, which this run may delete.

    Raises:
        UserError: it is in neither of the two folders that the request itself writes into.
    """
    folders = list(dict.fromkeys(request.prefix(group).parent for group in SPLIT_GROUPS))
    prefix = request.name.parent / path if isinstance(path, str) else None
    if prefix is None or os.path.abspath(prefix.parent) not in map(os.path.abspath, folders):
        raise UserError(
            f"{where}: {path!r} is not in {' or '.join(map(str, folders))}, where this command writes; nothing was deleted: give "
            " --validation-output as it was, choose another --output, or remove that file yourself"
        )
    return prefix


def is_of(prefix: Path, run: Mapping[str, Any]) -> bool:
    """Whether the dataset at `prefix` was made by that run, and not since by another."""
    manifest = indexed.read_manifest(prefix)
    return manifest is not None and manifest.get("settings") == settings_digest(run["settings"])


def check_inputs_stay(request: Request, files: Sequence[InputFile]) -> None:
    """UserError if a file that is read has a name that may be written, whatever the values of `split_by`."""
    value = "{value}" if request.split_by else ""
    groups = [Group(split, value) for split in SPLITS[: 2 if request.validation else 1]]
    of_dataset = (*indexed.ENDINGS, TABLE_ENDING)
    for prefix, endings in (
        (request.name, _BESIDE),
        *((request.prefix(group), of_dataset) for group in groups),
    ):
        name = re.escape(prefix.name)
        if value and prefix != request.name:
            name = name.replace(re.escape(file_name(value)), ".+")
        written = re.compile(name + r"(-\d{5,})?(" + "|".join(map(re.escape, endings)) + ")")
        folder = os.path.realpath(prefix.parent)
        for file in files:
            if written.fullmatch(file.path.name) and os.path.realpath(file.path.parent) == folder:
                raise UserError(
                    f"{file.path}: is an input, and the output may get a file of this name; choose an --output in another "
                    "folder"
                )


def _own(request: Request) -> set[Path]:
    """Prefixes of datasets that this output's runs made or began, and nobody made anew since."""
    folder = indexed.with_ending(request.name, ".parts")
    own = {_within(request, path, str(folder)) for path in begun(folder)}
    manifest = indexed.read_manifest(request.name)
    if manifest and "run" in manifest:
        own.add(request.name)
        own |= {
            prefix
            for prefix in datasets_of(request, manifest).values()
            if indexed.read_manifest(prefix) is None or is_of(prefix, manifest["run"])
        }
    return own


def check_free(request: Request, groups: Sequence[Group]) -> None:
    """UserError if a dataset that is not this output's stands where one is to be written, or has the run's own name;
    `overwrite` allows datasets, and nothing else."""
    own = {os.path.abspath(prefix) for prefix in _own(request)}
    for prefix in dict.fromkeys((request.name, *map(request.prefix, groups))):
        if os.path.abspath(prefix) in own:
            continue
        manifest = indexed.read_manifest(
            prefix
        )  # a file of that name which is no manifest is an error of its own
        names = [prefix, *indexed.shards_beside(prefix)]
        there = [path for one in names for path in indexed.files_of(one) if path.exists()]
        if there and not request.overwrite:
            made = "is a dataset that another run made" if manifest else "was not made by this tool"
            raise UserError(
                f"{there[0]}: already there: {made}; choose another --output or give --overwrite"
            )


def remove_old(request: Request, groups: Sequence[Group]) -> None:
    """Datasets of these names, of an earlier run or of one that was killed while it wrote them. `check_free` comes first."""
    prefixes = sorted({request.name, *map(request.prefix, groups), *_own(request)})
    folder = indexed.with_ending(request.name, ".parts")
    begin(folder, [os.path.relpath(prefix, request.name.parent) for prefix in prefixes])
    for prefix in prefixes:
        indexed.remove_dataset(prefix)
        name = glob.escape(prefix.name)
        for left_over in (
            *prefix.parent.glob(f".{name}.*.partial"),
            *prefix.parent.glob(f".{name}-[0-9]*.partial"),
        ):
            left_over.unlink()
