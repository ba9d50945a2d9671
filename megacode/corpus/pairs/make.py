"""A corpus -> a file of pairs, on all cores, resumable, the same bytes everywhere.

1. Workers make drafts of the parts of the corpus (`drafts.py`; parts as in `corpus.preprocess`).
2. The index of all drafts is put in order. Workers add to each draft what takes other drafts
   (another solution, another problem's function), drawn from all drafts of the language and split.
3. The parts become the output. The note NAME.json comes last; then the parts go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacode.corpus import inspect
from megacode.corpus.inputs import InputFile, find_inputs
from megacode.corpus.pairs.corruptions import tokens
from megacode.corpus.pairs.drafts import Draft, PairJob, draft_worker, proven
from megacode.corpus.pairs.records import Candidate
from megacode.corpus.pairs.request import PairCounts, PairRequest, PairResult, reasons
from megacode.corpus.preprocess.counts import Counts
from megacode.corpus.preprocess.existing import inputs_digest
from megacode.corpus.preprocess.finished_parts import (
    PARTS_FORMAT,
    Finished,
    file_checksum,
    finished_parts,
    part_file,
    unfinished,
)
from megacode.corpus.preprocess.folder import begin, begun, open_folder, remove_folder
from megacode.corpus.preprocess.manifest import input_rows, write_quarantine
from megacode.corpus.preprocess.splitting import CorpusPart, Unit, plan_units
from megacode.corpus.workers import Workers, readable_errors
from megacode.data.indexed import with_ending
from megacode.data.permute import make_key, uniform_below, uniform_bits
from megacode.errors import UserError
from megacode.files import replace_file, write_json

FORMAT = 1
"""Of the output: raised when equal settings would give other bytes."""
_TOGETHER = 64
_DRAWS = 16
"""Other drafts that are looked at for one that fits."""
_DATASET_PART = 16 << 20


@readable_errors()
def make_pairs(
    request: PairRequest,
    workers: int = 1,
    on_stage: Callable[[str, int], None] = lambda stage, size: None,
    on_progress: Callable[[int], None] = lambda size: None,
) -> PairResult:
    """Make the pairs, or find them made. `on_stage` hears what begins, and its bytes.

    Raises:
        UserError: a mistake in the request, an output that is in the way, or no pair at all.
    """
    links: list[Path] = []
    files, datasets, units = _inputs(request, links)
    folder = with_ending(request.name, ".parts")
    settings = _settings(request, files)
    if made := _made_before(request, settings, folder):
        return made
    _check_free(request, folder, files)
    job = PairJob(request, tuple(files), datasets, folder)
    with (
        open_folder(folder, {**settings, "parts format": PARTS_FORMAT}, None),
        Workers(workers) as pool,
    ):
        waiting, missing, kept = unfinished(folder, files, units)
        on_stage("functions", sum(unit.size for unit in waiting))
        for size in pool.run(draft_worker, job, missing):
            on_progress(size)
        parts = finished_parts(folder, units)
        assert parts is not None
        found = _completed(job, parts, pool, on_stage, on_progress)
        if links:
            found.left_out["links that lead out of the input or nowhere"] = len(links)
        if not found.records["train"]:
            remove_folder(folder)
            told = reasons(found.left_out.most_common())
            raise UserError(f"{', '.join(request.inputs)}: no pair for {request.output} ({told})")
        _write(job, settings, parts, found)
        remove_folder(folder)
    return PairResult(found, False, len(parts), len(kept), _quarantine(request))


# ------------------------------------------------------------------------------- what is asked for


def _inputs(request: PairRequest, links: list[Path]) -> tuple[list[InputFile], int, list[Unit]]:
    """Input files, the number of the first that is a dataset's shard, and the units of all."""
    prefixes = [one for one in request.inputs if with_ending(Path(one), ".idx").exists()]
    others = [one for one in request.inputs if one not in prefixes]
    files: list[InputFile] = []
    if others or not prefixes:
        files = find_inputs(others, request.format, request.include, on_link=links.append)
    units, datasets = plan_units(files), len(files)
    for prefix in prefixes:
        for shard in inspect.open_dataset(Path(prefix)).shards:
            path = with_ending(shard.prefix, ".bin")
            status = path.stat()
            parts = max(1, min(shard.documents, round(status.st_size / _DATASET_PART)))
            edges = [shard.documents * i // parts for i in range(parts + 1)]
            for first, end in pairwise(edges):
                part = CorpusPart(len(units), (len(files),), (first, end))
                units.append(Unit(part, status.st_size // parts))
            files.append(
                InputFile(path, "file", None, status.st_size, status.st_mtime_ns, path.parent)
            )
    return files, datasets, units


def _settings(request: PairRequest, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that decides the output, as JSON."""
    elsewhere = ("inputs", "output", "validation_output", "overwrite", "tokenizer")
    chosen = {
        field.name.replace("_", " "): getattr(request, field.name)
        for field in fields(request)
        if field.name not in elsewhere
    }
    tokenizer = request.tokenizer and file_checksum(Path(request.tokenizer.path))
    every = {
        "pairs format": FORMAT,
        "input files": inputs_digest(files),
        "tokenizer": tokenizer,
        "outputs": [path.name for path in request.outputs.values()],
        **chosen,
    }
    return dict(json.loads(json.dumps(every)))


def _made_before(request: PairRequest, settings: dict[str, Any], folder: Path) -> PairResult | None:
    try:
        note = json.loads(with_ending(request.name, ".json").read_text(encoding="utf-8"))
        made, sums = note["settings"], note["outputs"]
        counts = PairCounts.from_json(note["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    different = [key for key in settings if settings[key] != made.get(key)]
    if different and request.overwrite:
        return None
    if different:
        raise UserError(
            f"{request.output}: already there, made from other settings "
            f"({', '.join(different)} differ); choose another --out or give --overwrite"
        )
    for path in request.outputs.values():
        if not path.exists() or file_checksum(path) != sums.get(path.name):
            return None
    if folder.exists():  # a run was killed while it cleaned up
        with open_folder(folder, {**settings, "parts format": PARTS_FORMAT}, None):
            remove_folder(folder)
    return PairResult(counts, True, quarantine=_quarantine(request))


def _quarantine(request: PairRequest) -> Path | None:
    path = with_ending(request.name, ".quarantine.jsonl")
    return path if path.exists() else None


def _check_free(request: PairRequest, folder: Path, files: Sequence[InputFile]) -> None:
    note = with_ending(request.name, ".json")
    written = [*request.outputs.values(), note, with_ending(request.name, ".quarantine.jsonl")]
    if len({path.resolve() for path in written}) < len(written):
        raise UserError(
            f"--out {request.output}: two files of this run would have one name; end it in .jsonl"
        )
    inputs = {file.path.resolve() for file in files}
    for path in written:
        if path.resolve() in inputs:
            raise UserError(f"{path}: is an input, and would be overwritten; choose another --out")
        mine = path.name in begun(folder) or request.overwrite or note.exists()
        if path.exists() and not mine:
            raise UserError(
                f"{path}: already there, not made by this tool; choose another --out or give "
                "--overwrite"
            )


# ------------------------------------------------------------------------------------------- pass 2


@dataclass(frozen=True)
class _PairIndex:
    """Of all drafts, in the order of the input. Arrays of `index` [drafts, 5]: part, begin and
    size of the line, hash of the group, language and split. `order` [drafts]: drafts by language
    and split, then by group."""

    job: PairJob
    parts: tuple[CorpusPart, ...]
    firsts: tuple[int, ...]
    """Drafts before each part, and all of them."""


def _completed(
    job: PairJob,
    parts: Sequence[Finished],
    pool: Workers,
    on_stage: Callable[[str, int], None],
    on_progress: Callable[[int], None],
) -> PairCounts:
    """Write NAME.train and NAME.validation of every part."""
    paths = [part_file(job.folder, one.part, "index") for one in parts]
    rows = [np.fromfile(path, "<i8").reshape(-1, 4) for path in paths]
    firsts = np.cumsum([0, *map(len, rows)]).tolist()
    numbers = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
    index = np.column_stack([numbers, np.concatenate(rows)])
    np.save(job.folder / "index.npy", index)
    np.save(job.folder / "order.npy", np.lexsort((np.arange(len(index)), index[:, 3], index[:, 4])))
    context = _PairIndex(job, tuple(one.part for one in parts), tuple(firsts))
    on_stage("pairs", int(index[:, 2].sum()))
    found = PairCounts()
    for one in parts:
        found.left_out += one.counts.bad + one.counts.passed_over
    for message in pool.run(_completer, context, range(len(parts))):
        if isinstance(message, PairCounts):
            found.add(message)
        else:
            on_progress(message)
    return found


def _completer(context: _PairIndex) -> Callable[[int], Iterator[int | PairCounts]]:
    others = _Others(context)
    return lambda number: _complete(others, number)


class _Others:
    """Draws other drafts for a draft."""

    def __init__(self, context: _PairIndex) -> None:
        self.context, self.job = context, context.job
        self.index: NDArray[np.int64] = np.load(self.job.folder / "index.npy", mmap_mode="r")
        self.order: NDArray[np.int64] = np.load(self.job.folder / "order.npy", mmap_mode="r")
        self.kinds = np.asarray(self.index[self.order, 4])
        self.groups = np.asarray(self.index[self.order, 3])

    def draft(self, number: int) -> Draft:
        part, begin_, size = self.index[number, :3].tolist()
        with open(part_file(self.job.folder, self.context.parts[part], "drafts"), "rb") as file:
            file.seek(begin_)
            return Draft.parse(file.read(size))

    def candidates(self, number: int, draft: Draft) -> Iterator[Candidate | str]:
        """What takes other drafts; in its place the reason why it is not possible."""
        request, record = self.job.request, draft.record
        group, kind = self.index[number, 3:5].tolist()
        first, end = np.searchsorted(self.kinds, [kind, kind + 1]).tolist()
        own = self.groups[first:end]
        low = first + int(np.searchsorted(own, group))
        high = first + int(np.searchsorted(own, group, side="right"))
        for what, among in (
            ("solution", [(low, high)]),
            ("other-problem", [(first, low), (high, end)]),
        ):
            if what in request.kinds and (what != "solution" or request.problem_field):
                key = make_key(request.seed, record.id, record.query, what)
                text = self._drawn(key, among, draft)
                yield f"{what}: none" if text is None else Candidate(what, what == "solution", text)

    def _drawn(self, key: int, among: list[tuple[int, int]], draft: Draft) -> str | None:
        """The text of a draft at these places of the order that has other tokens."""
        total = sum(end - first for first, end in among)
        if not total:
            return None
        own = tokens(draft.record.query, draft.record.language)
        for place in uniform_below(uniform_bits(key, np.arange(_DRAWS)), total).tolist():
            for first, end in among:
                if place < end - first:
                    text = self.draft(int(self.order[first + place])).record.query
                    if tokens(text, draft.record.language) != own:
                        return text
                    break
                place -= end - first  # noqa: PLW2901
        return None


def _complete(others: _Others, part: int) -> Iterator[int | PairCounts]:
    """Write the finished records of a part; yields bytes of drafts, and at the end the counts."""
    job, counts = others.job, PairCounts()
    request, name = job.request, others.context.parts[part]
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(
                replace_file(part_file(job.folder, name, split), durable=False)
            )
            for split in request.outputs
        }
        with open(part_file(job.folder, name, "drafts"), "rb") as lines:
            numbers = count(others.context.firsts[part])
            for some in _in_lots(zip(numbers, lines, strict=False)):
                drafts = [(number, Draft.parse(line)) for number, line in some]
                for number, draft in _with_others(others, drafts, counts):
                    split = "validation" if others.index[number, 4] % 2 else "train"
                    line = _finished(draft, split, request, counts)
                    files[split].write(line)
                yield sum(len(line) for _, line in some)
    yield counts


def _in_lots(lines: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    lot: list[tuple[int, bytes]] = []
    for one in lines:
        lot.append(one)
        if len(lot) == _TOGETHER:
            yield lot
            lot = []
    if lot:
        yield lot


def _with_others(
    others: _Others, drafts: list[tuple[int, Draft]], counts: PairCounts
) -> list[tuple[int, Draft]]:
    """The drafts with candidates of other drafts, which are run where there is a generator."""
    added = []
    for number, draft in drafts:
        found = list(others.candidates(number, draft))
        counts.left_out.update(one for one in found if isinstance(one, str))
        own = tuple(one for one in found if isinstance(one, Candidate))
        added.append(replace(draft, record=replace(draft.record, candidates=own)))
    run = proven(added, others.job.request.unproven, counts.left_out)
    out = []
    for (number, draft), more in zip(drafts, run, strict=True):
        candidates = draft.record.candidates + more.record.candidates
        out.append((number, replace(draft, record=replace(draft.record, candidates=candidates))))
    return out


def _finished(draft: Draft, split: str, request: PairRequest, counts: PairCounts) -> bytes:
    """The record's line; nothing if it has no equivalent or no other candidate."""
    kept = tuple(
        one for one in draft.record.candidates
        if split != "train" or one.kind not in request.hold_out
    )  # fmt: skip
    for equivalent, what in ((True, "equivalent"), (False, "non-equivalent")):
        if not any(one.equivalent == equivalent for one in kept):
            counts.left_out[f"functions without a candidate that is {what}"] += 1
            return b""
    counts.records[split] += 1
    for one in kept:
        counts.candidates[f"{split} {one.kind}"] += 1
        if one.proof:
            counts.candidates[f"{split} {one.kind} {one.proof}"] += 1
    return replace(draft.record, candidates=kept).line()


# ------------------------------------------------------------------------------------------- output


def _write(
    job: PairJob, settings: dict[str, Any], parts: Sequence[Finished], found: PairCounts
) -> None:
    request = job.request
    note = with_ending(request.name, ".json")
    quarantine = with_ending(request.name, ".quarantine.jsonl")
    paths = [*request.outputs.values(), quarantine, note]
    begin(job.folder, [path.name for path in paths])
    note.unlink(missing_ok=True)
    sums = {}
    for split, path in request.outputs.items():
        digest = xxhash.xxh3_128()
        with replace_file(path) as out:
            for one in parts:
                with open(part_file(job.folder, one.part, split), "rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
                        out.write(piece)
        sums[path.name] = digest.hexdigest()
    write_quarantine(job.folder, quarantine, parts)
    total = Counts()
    for one in parts:
        total.add(one.counts)
    write_json(
        note,
        {
            "kind": "megacode pairs",
            "settings": settings,
            "documents": total.records,
            "counts": found.to_json(),
            "outputs": sums,
            "input files": input_rows(job.files, parts),
        },
    )
