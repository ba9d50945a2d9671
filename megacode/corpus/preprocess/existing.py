"""What is there where a run will write: its own earlier output goes, everything else stays.

A run's own are the datasets that its manifest lists and whose manifests name its settings, and
those that it, or a killed run of the same output, had begun to write.
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
from megacode.corpus.preprocess.chat import template_of
from megacode.corpus.preprocess.counts import SPLITS, Counts, Group
from megacode.corpus.preprocess.folder import begin, begun, open_folder, remove_folder
from megacode.corpus.preprocess.request import Request, Result, file_name
from megacode.data import indexed
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer

SPLIT_GROUPS = tuple(Group(split) for split in SPLITS)
"""The groups of a run that makes no dataset for each value."""
TABLE_ENDING = ".files.tsv"
_BESIDE = (".json", ".quarantine.jsonl", TABLE_ENDING, ".lengths.png")
"""What is written for a run as a whole."""


FORMAT = 3
"""Of the output: raised when equal settings would give other bytes."""


def inputs_digest(files: Sequence[InputFile]) -> str:
    """Of the input files' paths, sizes and times of change."""
    listing = json.dumps(
        [
            [
                str(f.path.resolve()),
                f.path.relative_to(f.base).as_posix(),
                f.base.name,
                f.form,
                f.size,
                f.modified_ns,
            ]
            for f in files
        ]
    )
    return xxhash.xxh3_128_hexdigest(listing.encode(errors="surrogateescape"))


def run_settings(
    request: Request, tokenizer: Tokenizer, files: Sequence[InputFile]
) -> dict[str, Any]:
    """Everything that decides the output, as JSON; input files by path, size and time of change."""
    held_out = request.validation_output
    return {
        "format": FORMAT,
        "input files": inputs_digest(files),
        "input format": request.format,
        "include": list(request.include),
        "text field": request.text_field,
        "where": request.where,
        "split by": request.split_by,
        "deduplicate": request.deduplicate,
        "shuffle": request.shuffle,
        "repository": request.repository,
        "path": request.path,
        "tokenizer": tokenizer.fingerprint(),
        "bos": request.tokenizer.bos,
        "eod": request.tokenizer.eod,
        "validation": request.validation,
        "validation output": os.path.relpath(held_out, request.name.parent)
        if held_out and request.validation
        else None,
        "shard size": request.shard_size,
        "max document": request.max_document,
        **(_of_conversations(request, tokenizer) if request.conversations else {}),
        **({"pairs": request.pairs, **_limits(request)} if request.pairs else {}),
    }


def _of_conversations(request: Request, tokenizer: Tokenizer) -> dict[str, Any]:
    template = template_of(request, tokenizer)
    return {
        "chat template": xxhash.xxh3_128_hexdigest(template.text.encode()),
        "tokens of templates": dict(sorted(template.variables.items())),
        **_limits(request),
    }


def _limits(request: Request) -> dict[str, Any]:
    return {
        "max tokens": request.max_tokens,
        "too long": request.too_long if request.max_tokens else None,
    }


def made_before(request: Request, settings: dict[str, Any]) -> Result | None:
    folder = indexed.with_ending(request.name, ".parts")
    manifest = indexed.read_manifest(request.name)
    if manifest is None:
        return None
    if "run" not in manifest:
        raise UserError(
            f"{request.name}: already there, as one dataset of a larger run; "
            "choose another --output or remove it"
        )
    made = manifest["run"]
    different = [key for key in settings if settings[key] != made["settings"].get(key)]
    if different:
        if request.overwrite:
            return None
        raise UserError(
            f"{request.name}: already there, made from other settings "
            f"({', '.join(different)} differ); choose another --output or give --overwrite"
        )
    outputs = datasets_of(request, manifest)
    if any(
        not indexed.is_complete(prefix) or not is_of(prefix, made) for prefix in outputs.values()
    ):
        return None
    if folder.exists():  # a run was killed while it cleaned up
        with open_folder(folder, settings, None):
            remove_folder(folder)
    return Result(outputs, Counts.from_json(made["counts"]), True, 0, 0, quarantine_of(request))


def quarantine_of(request: Request) -> Path | None:
    """The file of records that were set aside, if there were any."""
    path = indexed.with_ending(request.name, ".quarantine.jsonl")
    return path if path.exists() else None


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
            f"{where}: {path!r} is not in {' or '.join(map(str, folders))}, where this command "
            "writes; nothing was deleted: give --validation-output as it was, choose another "
            "--output, or remove that file yourself"
        )
    return prefix


def is_of(prefix: Path, run: Mapping[str, Any]) -> bool:
    """Whether the dataset at `prefix` was made by that run, and not since by another."""
    manifest = indexed.read_manifest(prefix)
    return manifest is not None and manifest.get("settings") == settings_digest(run["settings"])


def check_inputs_stay(request: Request, files: Sequence[InputFile]) -> None:
    """UserError if an input has a name that may be written, whatever the values of `split_by`."""
    value = "{value}" if request.split_by else ""
    groups = [Group(split, value) for split in SPLITS[: 2 if request.validation else 1]]
    of_dataset = (*indexed.ENDINGS, *indexed.LOSS_ENDINGS, TABLE_ENDING)
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
                    f"{file.path}: is an input, and the output may get a file of this name; "
                    "choose an --output in another folder"
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
    """UserError if a dataset that is not this output's stands where one is to be written, or has
    the run's own name; `overwrite` allows datasets, and nothing else."""
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
    """Datasets of these names, of an earlier run or of one that was killed while it wrote them.
    `check_free` comes first."""
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
