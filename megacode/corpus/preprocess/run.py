"""The order of the steps: find what was made before, tokenize parts, write datasets and manifests.

Finished parts lie in OUTPUT.parts/ until the datasets are whole: a run that was killed at any
moment goes on with them. Several machines that share the folder each do a share of the parts; the
last one to finish writes the datasets.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megacode.corpus.inputs import find_inputs
from megacode.corpus.preprocess.chat import notes_on, template_of
from megacode.corpus.preprocess.checks import check_fields, check_records, check_tokens
from megacode.corpus.preprocess.counts import Counts, Group, GroupCounts
from megacode.corpus.preprocess.existing import (
    SPLIT_GROUPS,
    check_free,
    check_inputs_stay,
    made_before,
    quarantine_of,
    remove_old,
    run_settings,
)
from megacode.corpus.preprocess.finished_parts import (
    PARTS_FORMAT,
    Finished,
    finished_parts,
    unfinished,
)
from megacode.corpus.preprocess.folder import open_folder, remove_folder
from megacode.corpus.preprocess.manifest import write_manifests, write_quarantine
from megacode.corpus.preprocess.order import Order, as_read, reordered, without_duplicates
from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.shards import WrittenShard, write_datasets
from megacode.corpus.preprocess.splitting import Unit, plan_units
from megacode.corpus.preprocess.tokenize import Job, PartProgress, part_worker
from megacode.corpus.workers import Workers, readable_errors
from megacode.data import indexed
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import load_tokenizer


@readable_errors()
def preprocess(
    request: Request,
    workers: int = 1,
    share: tuple[int, int] | None = None,
    on_stage: Callable[[str, int, int], None] = lambda stage, total, done: None,
    on_progress: Callable[[PartProgress], None] = lambda progress: None,
) -> Result:
    """Make the datasets, or find them made. UserError on mistakes; bad records are set aside and
    counted, never raised.

    `share` (i, n): do only the i-th of n shares of the work (from 0); whoever does the last missing
    part also writes the datasets. `on_stage` hears what begins ("tokenizing", "writing"), of how
    many bytes, and how many are done already.
    """
    tokenizer = load_tokenizer(request.tokenizer)
    check_tokens(request, tokenizer)
    if request.marked:
        check_records(request, tokenizer)
    links: list[Path] = []
    files = find_inputs(
        request.inputs, request.format, request.include, request.every, on_link=links.append
    )
    settings = run_settings(request, tokenizer, files)
    made = made_before(request, settings)
    if made:
        return made
    check_inputs_stay(request, files)
    # The values of --split-by are not known yet.
    splits = SPLIT_GROUPS[: 2 if request.validation else 1]
    check_free(request, () if request.split_by else splits)
    check_fields(files, request)
    job = Job(request, tuple(files))
    units = plan_units(files)
    most = workers if any(unit.chunk_size for unit in units) else len(units)
    with (
        open_folder(job.folder, {**settings, "parts format": PARTS_FORMAT}, share) as whole,
        Workers(min(workers, most)) as pool,
    ):
        kept = _tokenize(job, units, pool, share, on_stage, on_progress)
        parts = finished_parts(job.folder, units)
        if parts is None or not whole():
            return Result({}, Counts(), False, len(units), kept, None)
        counts = _counts(request, parts, len(links))
        dtype = indexed.token_dtype(tokenizer.vocab_size)
        on_stage("writing", counts.total.tokens * dtype.itemsize, 0)
        # A dataset that was there goes first, whole: never an old index beside new data.
        remove_old(request, list(counts.groups))
        shards = _write(job, parts, counts, tokenizer.vocab_size, pool, on_progress)
        write_quarantine(job.folder, indexed.with_ending(request.name, ".quarantine.jsonl"), parts)
        write_manifests(job, settings, tokenizer, parts, counts, shards)
        _remove_parts(job.folder, pool)
        remove_folder(job.folder)
    outputs = {group: request.prefix(group) for group in shards}
    notes = notes_on(template_of(request, tokenizer)) if request.conversations else ()
    return Result(outputs, counts, False, len(parts), kept, quarantine_of(request), tuple(notes))


def _tokenize(
    job: Job,
    units: Sequence[Unit],
    workers: Workers,
    share: tuple[int, int] | None,
    on_stage: Callable[[str, int, int], None],
    on_progress: Callable[[PartProgress], None],
) -> int:
    """Do what is missing of this share of the units. How many parts were there before."""
    number, of = share or (0, 1)
    mine = units[number::of]
    waiting, parts, kept = unfinished(job.folder, job.files, mine)
    total = sum(unit.size for unit in mine)
    on_stage("tokenizing", total, total - sum(unit.size for unit in waiting))
    for progress in workers.run(part_worker, job, parts):
        on_progress(progress)
    return len(kept)


def _counts(request: Request, parts: Sequence[Finished], links: int) -> Counts:
    """Of all parts. `links` of the input were not followed. UserError if there is nothing to write,
    or no name for it."""
    counts = Counts()
    for finished in parts:
        counts.add(finished.counts)
    if links:
        reason = "link that leads out of the input or nowhere (to have it, name what it leads to)"
        counts.passed_over[reason] = links
    if not any(group.split == "train" for group in counts.groups):
        reasons = (counts.bad + counts.passed_over).most_common(3)
        shown = ", ".join(f"{n} {reason}" for reason, n in reasons) or "no records"
        remove_folder(indexed.with_ending(request.name, ".parts"))
        raise UserError(f"{', '.join(request.inputs)}: no document for {request.output} ({shown})")
    names: dict[Path, Group] = {}
    for group in sorted(counts.groups):
        other = names.setdefault(request.prefix(group), group)
        if other != group:
            raise UserError(
                f"--split-by {request.split_by}: {other.value!r} and {group.value!r} would both be "
                f"written to {request.prefix(group)}; rename one in the corpus"
            )
    check_free(request, list(counts.groups))
    return counts


def _write(
    job: Job,
    parts: Sequence[Finished],
    counts: Counts,
    vocab_size: int,
    workers: Workers,
    on_progress: Callable[[PartProgress], None],
) -> dict[Group, list[WrittenShard]]:
    """Write the datasets; `counts` becomes theirs."""
    request, dtype = job.request, job.request.part_dtype(vocab_size)
    work = job.folder / "order"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    blocks = as_read(job.folder, parts)
    if request.deduplicate:
        blocks = without_duplicates(work, job.folder, parts, blocks, dtype, workers)
        left = sum(block.counts.documents for own in blocks.values() for block in own)
        if counts.total.documents > left:
            counts.passed_over["duplicate"] = counts.total.documents - left
    if request.repository or request.shuffle is not None:
        framing = request.tokenizer if request.repository else None
        sizes = {group: n.tokens * dtype.itemsize for group, n in counts.groups.items()}
        blocks = reordered(
            work, blocks, sizes, Order(request.shuffle or 0, dtype, framing), workers
        )
    prefixes = {request.prefix(group): group for group in sorted(blocks) if blocks[group]}
    counts.groups = {group: GroupCounts() for group in prefixes.values()}
    for group, total in counts.groups.items():
        for block in blocks[group]:
            total.add(block.counts)
    shards = write_datasets(
        {prefix: blocks[group] for prefix, group in prefixes.items()},
        indexed.token_dtype(vocab_size),
        request.marked,
        request.shard_size,
        workers,
        lambda size: on_progress(PartProgress(input_bytes=size)),
    )
    return {group: shards[prefix] for prefix, group in prefixes.items()}


def _remove_parts(folder: Path, workers: Workers) -> None:
    """By the workers, as it takes a processor's time to free the memory of large files."""
    paths = list(folder.glob("[0-9]*"))
    for _ in workers.map(_remove, [(paths[i :: workers.count],) for i in range(workers.count)]):
        pass


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink()
