"""The order of the steps: what was made before, parts on worker processes, then the datasets and their manifests.

Finished parts lie in OUTPUT.parts/ until the datasets are whole; killed at any moment, the next run takes them as they
are. Several machines that share the folder each do a share of the parts; the last one to finish puts them together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megacode.corpus.inputs import InputFile, find_inputs
from megacode.corpus.preprocess.assemble import WrittenDataset, write_dataset
from megacode.corpus.preprocess.checks import check_fields, check_tokens
from megacode.corpus.preprocess.counts import Counts, Group
from megacode.corpus.preprocess.existing import (
    SPLIT_GROUPS,
    check_free,
    check_inputs_stay,
    datasets_of,
    is_of,
    remove_old,
)
from megacode.corpus.preprocess.finished_parts import Finished, finished_part
from megacode.corpus.preprocess.folder import open_folder, remove_folder
from megacode.corpus.preprocess.layout import Lay, Layout
from megacode.corpus.preprocess.manifest import write_manifests, write_quarantine
from megacode.corpus.preprocess.order import (
    Block,
    Parts,
    Repositories,
    blocks_as_read,
    by_repository,
    find_duplicates,
    shuffled,
)
from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.splitting import CorpusPart, Unit, plan_units, unit_parts, unpack
from megacode.corpus.preprocess.tokenize import Job, PartProgress, part_worker
from megacode.corpus.workers import readable_errors, run_tasks
from megacode.data import indexed
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

FORMAT = 3
"""Of the output: raised when equal settings would give other bytes."""


@readable_errors()
def preprocess(
    request: Request,
    workers: int = 1,
    share: tuple[int, int] | None = None,
    on_stage: Callable[[str, int, int], None] = lambda stage, total, done: None,
    on_progress: Callable[[PartProgress], None] = lambda progress: None,
) -> Result:
    """Make the datasets, or find them made. UserError on mistakes; bad records are set aside and counted, never raised.

    `share` (i, n): do only the i-th of n shares of the work (from 0); whoever does the last missing part also writes the
    datasets. `on_stage` hears what begins ("tokenizing", "writing"), of how many bytes, and how many are done already.
    """
    tokenizer = load_tokenizer(request.tokenizer)
    check_tokens(request, tokenizer)
    links: list[Path] = []
    files = find_inputs(
        request.inputs, request.format, request.include, request.every, on_link=links.append
    )
    settings = _settings(request, tokenizer, files)
    made = _made_before(request, settings)
    if made:
        return made
    check_inputs_stay(request, files)
    check_free(
        request, () if request.split_by else SPLIT_GROUPS[: 2 if request.validation else 1]
    )  # values come later
    job = Job(
        files=tuple(files),
        tokenizer=request.tokenizer,
        text_field=request.text_field,
        validation=request.validation,
        folder=indexed.with_ending(request.name, ".parts"),
        where=request.where,
        split_by=request.split_by,
        deduplicate=request.deduplicate,
        repository=request.repository,
        path=request.path,
        max_document=request.max_document,
        exact=request.exact,
    )
    check_fields(files, request.text_field, job.columns)
    units = plan_units(files)
    with open_folder(job.folder, settings, share) as whole:
        layout = Layout(job.folder, units)
        kept = _tokenize(job, layout, request.as_read, workers, share, on_stage, on_progress)
        parts = _all_finished(job.folder, units)
        if parts is None or not whole():
            return Result({}, Counts(), False, len(units), kept, None)
        outputs, counts = _write(
            request, settings, tokenizer, job, layout, parts, len(links), on_stage, on_progress
        )
        remove_folder(job.folder)
    return Result(outputs, counts, False, len(parts), kept, _quarantine_of(request))


def _tokenize(
    job: Job,
    layout: Layout,
    lay: bool,
    workers: int,
    share: tuple[int, int] | None,
    on_stage: Callable[[str, int, int], None],
    on_progress: Callable[[PartProgress], None],
) -> int:
    """Do what is missing of this share of the units. How many parts were there before."""
    number, of = share or (0, 1)
    kept = 0

    def finished(part: CorpusPart) -> bool:
        nonlocal kept
        there = finished_part(job.folder, part)
        if there is None:
            return False
        if layout.undamaged(part, there):
            kept += 1
            return True
        layout.forget(part)
        return False

    mine = layout.units[number::of]
    waiting = []
    for unit in mine:
        parts = unit_parts(job.folder, unit)
        if parts is None or not all(finished(part) for part in parts):
            waiting.append(unit)
    on_stage(
        "tokenizing",
        sum(u.size for u in mine),
        sum(u.size for u in mine) - sum(u.size for u in waiting),
    )

    lay = lay and share is None

    def tasks() -> Iterator[CorpusPart | Lay]:
        for unit in waiting:
            unpacked = unit.chunk_size and unpack(
                job.folder, unit, job.files[unit.part.files[0]], finished
            )
            for part in unpacked or [unit.part]:
                yield from layout.ready() if lay else ()
                yield part

    most = len(waiting) if not any(unit.chunk_size for unit in waiting) else workers
    for progress in run_tasks(part_worker, job, tasks(), max(1, min(workers, most))):
        on_progress(progress)
        if progress.laid:
            layout.done(progress.laid)
    if lay:
        layout.finish()
    return kept


def _all_finished(folder: Path, units: Sequence[Unit]) -> list[tuple[CorpusPart, Finished]] | None:
    """Every part in the order of the input; None while some are missing."""
    found = []
    for unit in units:
        parts = unit_parts(folder, unit)
        if parts is None:
            return None
        for part in parts:
            if (finished := finished_part(folder, part)) is None:
                return None
            found.append((part, finished))
    return found


# ------------------------------------------------------------------------------------------- what was there before


def _settings(request: Request, tokenizer: Tokenizer, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that decides the output, as JSON; input files by path, size and time of change."""
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
    held_out = request.validation_output
    return {
        "format": FORMAT,
        "input files": xxhash.xxh3_128_hexdigest(listing.encode(errors="surrogateescape")),
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
    }


def _made_before(request: Request, settings: dict[str, Any]) -> Result | None:
    folder = indexed.with_ending(request.name, ".parts")
    manifest = indexed.read_manifest(request.name)
    if manifest is None:
        return None
    if "run" not in manifest:
        raise UserError(
            f"{request.name}: already there, as one dataset of a larger run; choose another --output or remove it"
        )
    made = manifest["run"]
    different = [key for key in settings if settings[key] != made["settings"].get(key)]
    if different:
        if request.overwrite:
            return None
        raise UserError(
            f"{request.name}: already there, made from other settings ({', '.join(different)} differ); "
            "choose another --output or give --overwrite"
        )
    outputs = datasets_of(request, manifest)
    if any(
        not indexed.is_complete(prefix) or not is_of(prefix, made) for prefix in outputs.values()
    ):
        return None
    if folder.exists():  # a run was killed while it cleaned up
        with open_folder(folder, settings, None):
            remove_folder(folder)
    return Result(outputs, Counts.from_json(made["counts"]), True, 0, 0, _quarantine_of(request))


def _quarantine_of(request: Request) -> Path | None:
    path = indexed.with_ending(request.name, ".quarantine.jsonl")
    return path if path.exists() else None


# ------------------------------------------------------------------------------------------------------- the output


def _write(
    request: Request,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    job: Job,
    layout: Layout,
    parts: Parts,
    links: int,
    on_stage: Callable[[str, int, int], None],
    on_progress: Callable[[PartProgress], None],
) -> tuple[dict[Group, Path], Counts]:
    """Lay the parts end to end. A dataset that was there goes first, whole: never an old index beside new data. `links` of the
    input were not followed."""
    counts = Counts()
    for _, finished in parts:
        counts.add(finished.counts)
    if links:
        counts.passed_over[
            "link that leads out of the input or nowhere (to have it, name what it leads to)"
        ] = links
    _check_documents(request, counts)
    check_free(request, list(counts.groups))
    dtype = indexed.token_dtype(tokenizer.vocab_size)
    size = {group: n.tokens * dtype.itemsize for group, n in counts.groups.items()}
    on_stage("writing", sum(size.values()), 0)
    remove_old(request, list(counts.groups))
    duplicates = find_duplicates(job.folder, parts) if request.deduplicate else None
    if duplicates:
        counts.passed_over["duplicate"] = sum(int(marks.sum()) for marks in duplicates.values())
    datasets: dict[Group, WrittenDataset] = {}

    def on_bytes(count: int) -> None:
        on_progress(PartProgress(input_bytes=count))

    for group in sorted(counts.groups):
        blocks: Iterator[Block] = blocks_as_read(layout, parts, group, dtype, duplicates)
        prefix = request.prefix(group)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        laid = (
            layout.whole(parts, group)
            if request.as_read and _one_disk(job.folder, prefix.parent)
            else None
        )
        if request.repository:
            how = Repositories(tokenizer, request.tokenizer.bos, request.tokenizer.eod)
            blocks = by_repository(
                blocks, how, job.folder, size[group], dtype, request.shuffle or 0
            )
        elif request.shuffle is not None:
            blocks = shuffled(blocks, job.folder, size[group], dtype, request.shuffle)
        dataset = write_dataset(prefix, blocks, dtype, request.shard_size, on_bytes, laid)
        if dataset.counts.documents:
            datasets[group] = dataset
    counts.groups = {group: dataset.counts for group, dataset in datasets.items()}
    write_quarantine(request, job, parts, counts)
    write_manifests(request, settings, tokenizer, job, parts, counts, datasets)
    return {group: request.prefix(group) for group in datasets}, counts


def _one_disk(*folders: Path) -> bool:
    return len({folder.stat().st_dev for folder in folders}) == 1


def _check_documents(request: Request, counts: Counts) -> None:
    if not counts.of("train").documents:
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in (counts.bad + counts.passed_over).most_common(3)
        )
        remove_folder(indexed.with_ending(request.name, ".parts"))
        raise UserError(
            f"{', '.join(request.inputs)}: no document for {request.output} ({reasons or 'no records'})"
        )
    names: dict[Path, Group] = {}
    for group in sorted(counts.groups):
        other = names.setdefault(request.prefix(group), group)
        if other != group:
            raise UserError(
                f"--split-by {request.split_by}: {other.value!r} and {group.value!r} would both be written to "
                f"{request.prefix(group)}; rename one in the corpus"
            )
