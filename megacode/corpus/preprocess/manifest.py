"""The files beside the datasets: manifests, table of input files, quarantined records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.chat import template_of
from megacode.corpus.preprocess.counts import Counts, Group
from megacode.corpus.preprocess.existing import TABLE_ENDING, settings_digest
from megacode.corpus.preprocess.finished_parts import Finished, part_file
from megacode.corpus.preprocess.order import lines_before
from megacode.corpus.preprocess.quarantine import append
from megacode.corpus.preprocess.request import Request
from megacode.corpus.preprocess.shards import WrittenShard
from megacode.corpus.preprocess.tokenize import Job
from megacode.data import indexed
from megacode.files import replace_file
from megacode.tokenizer.tokenizer import Tokenizer

LISTED_FILES = 1000
"""Input files that a manifest lists itself; more go into a table beside it."""


def write_quarantine(folder: Path, path: Path, parts: Sequence[Finished]) -> None:
    """The bad records of all parts; no file if there are none."""
    before = lines_before(parts)
    with replace_file(path) as out:
        for finished in parts:
            source = part_file(folder, finished.part, "bad.jsonl")
            append(out, source, before.get(finished.part.name, 0))
        empty = not out.tell()
    if empty:
        path.unlink()


def write_manifests(
    job: Job,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    parts: Sequence[Finished],
    counts: Counts,
    datasets: Mapping[Group, Sequence[WrittenShard]],
) -> None:
    """A manifest a dataset, and a shard if there are several. That of the run is what a later run
    looks for: last."""
    request = job.request
    rows = input_rows(job.files, parts)
    table: dict[str, Any] = {"input files": rows}
    tables = _table_paths(request, list(datasets))
    for path in tables.values():
        path.unlink(missing_ok=True)
        if len(rows) > LISTED_FILES:
            _write_table(path, rows)
    prefixes = {group: request.prefix(group) for group in datasets}
    run = {
        "run": {
            "datasets": {
                str(g): os.path.relpath(p, request.name.parent) for g, p in prefixes.items()
            },
            "counts": counts.to_json(),
            "settings": settings,
            "inputs": list(request.inputs),
        }
    }
    for group, prefix in reversed(prefixes.items()):
        shards = datasets[group]
        if len(rows) > LISTED_FILES:
            table = {"input files table": tables[prefix.parent].name, "input files": len(rows)}
        common: dict[str, Any] = {
            "kind": "megacode dataset",
            "split": group.split,
            **({"value": group.value} if request.split_by else {}),
            "token type": indexed.token_dtype(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {**request.tokenizer.model_dump(), "fingerprint": settings["tokenizer"]},
            "settings": settings_digest(settings),
        }
        if request.conversations:  # the template decides about BOS and EOD
            for key in ("bos", "eod"):
                common["tokenizer"].pop(key)
            common["chat template"] = template_of(request, tokenizer).text
        if request.pairs:
            common["pairs"] = request.pairs
        own: dict[str, Any] = {"checksums": shards[0].checksums}
        if request.shard_size is not None:
            own = {"shards": [shard.prefix.name for shard in shards]}
            for shard in shards:
                numbers = {
                    "documents": shard.documents,
                    "tokens": shard.tokens,
                    "checksums": shard.checksums,
                }
                indexed.write_manifest(shard.prefix, {**common, **numbers, "dataset": prefix.name})
        of_run = run if prefix == request.name else {}
        numbers = vars(counts.groups[group])
        indexed.write_manifest(prefix, {**common, **numbers, **own, **table, **of_run})
    if request.name not in prefixes.values():
        indexed.write_manifest(request.name, {"kind": "megacode corpus", **run})


def _table_paths(request: Request, groups: Sequence[Group]) -> dict[Path, Path]:
    """Where the table of input files goes, if it takes one: a file in every folder that has
    datasets, as a manifest names only what lies beside it."""
    paths = {request.name.parent: indexed.with_ending(request.name, TABLE_ENDING)}
    for prefix in map(request.prefix, groups):
        paths.setdefault(prefix.parent, indexed.with_ending(prefix, TABLE_ENDING))
    return paths


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replace_file(path) as out:
        for row in rows:
            digests = " ".join(f"{size}:{digest}" for size, digest in row["xxh3_128"])
            out.write(
                f"{row['path']}\t{row['bytes']}\t{digests}\n".encode(errors="surrogateescape")
            )


def input_rows(files: Sequence[InputFile], parts: Sequence[Finished]) -> list[dict[str, Any]]:
    """Input files with size and XXH3-128, of the file or of consecutive pieces of it."""
    digests: list[list[tuple[int, str]]] = [[] for _ in files]
    for finished in parts:
        for number, size, digest in finished.inputs:
            digests[number].append((size, digest))
    return [
        {"path": str(file.path), "bytes": file.size, "xxh3_128": pieces}
        for file, pieces in zip(files, digests, strict=True)
    ]
