"""A corpus -> Megatron-Core IndexedDatasets, on all cores, resumable, the same bytes on every machine.

The path: find the input files; cut them into parts by their sizes alone; tokenize parts on worker processes, each into
files of its own (`OUTPUT.parts/`); then lay the parts end to end, in order, as OUTPUT.bin/.idx; write the manifests.
Killed at any moment, the next run takes the finished parts as they are. Order of documents: that of the input.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacode.data import indexed
from megacode.data.files import replace_file, write_json
from megacode.data.inputs import InputFile, find_inputs
from megacode.data.preprocess_part import (
    Counts,
    Job,
    Progress,
    finished_part,
    part_file,
    part_worker,
    plan_parts,
)
from megacode.data.readers import BadRecord, read_input
from megacode.data.tokenizer import Tokenizer, load_tokenizer
from megacode.data.workers import readable, run_tasks
from megacode.errors import UserError
from megacode.recipe import schema

FORMAT = 1
"""Of the output: raised when equal settings would give other bytes."""


@dataclass(frozen=True)
class Request:
    """What to tokenize, and how. Everything here but `overwrite` decides the output."""

    inputs: tuple[str, ...]
    tokenizer: schema.Tokenizer
    output: Path
    """Prefix of the dataset: OUTPUT.bin, OUTPUT.idx, OUTPUT.json (manifest), OUTPUT.quarantine.jsonl (bad records)."""
    validation: float = 0.0
    """Share of documents held out by hash of their text, into a dataset of its own."""
    validation_output: Path | None = None
    """Default: OUTPUT_validation."""
    text_field: str = "text"
    format: str = "auto"
    include: tuple[str, ...] = ()
    overwrite: bool = False
    """Replace a dataset of that name that was made otherwise."""

    @property
    def outputs(self) -> dict[str, Path]:
        if not self.validation:
            return {"train": self.output}
        other = self.validation_output or self.output.with_name(self.output.name + "_validation")
        return {"train": self.output, "validation": other}


@dataclass(frozen=True)
class Result:
    """`kept`: the datasets were already there, made with the same settings from the same files."""

    outputs: dict[str, Path]
    counts: Counts
    kept: bool
    parts: int
    parts_kept: int
    quarantine: Path | None

    @property
    def bad_share(self) -> float:
        return self.counts.bad.total() / max(self.counts.records, 1)


def preprocess(
    request: Request,
    workers: int = 1,
    on_start: Callable[[int, int], None] = lambda total_bytes, done_bytes: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Make the datasets, or find them made. UserError on mistakes; bad records are set aside and counted, never raised.

    `on_start` hears the input's bytes on disk and how many of them finished parts already cover.
    """
    tokenizer = load_tokenizer(request.tokenizer)
    if request.tokenizer.bos:
        _ = tokenizer.bos_id
    if request.tokenizer.eod:
        _ = tokenizer.eod_id
    files = find_inputs(request.inputs, request.format, request.include)
    settings = _settings(request, tokenizer, files)
    made = _made_before(request, settings)
    if made:
        return made
    _check_text_field(files, request.text_field)
    folder = indexed.with_ending(request.output, ".parts")
    with _locked(folder):
        _open_parts(folder, settings)
        job = Job(tuple(files), request.tokenizer, request.text_field, request.validation, folder)
        parts = plan_parts(files)
        finished = {part.index: counts for part in parts if (counts := finished_part(folder, part.index))}
        waiting = [part for part in parts if part.index not in finished]
        total = sum(file.size for file in files)
        share = {p.index: (p.span[1] - p.span[0]) if p.span else sum(files[n].size for n in p.files) for p in parts}
        on_start(total, total - sum(share[part.index] for part in waiting))
        for progress in run_tasks(part_worker, job, waiting, max(1, min(workers, len(waiting)))):
            on_progress(progress)
        counts = Counts()
        for part in parts:
            one = finished_part(folder, part.index)
            assert one is not None
            counts.add(one)
        if not counts.splits["train"].documents:
            reasons = ", ".join(f"{n} {reason}" for reason, n in (counts.bad + counts.passed_over).most_common(3))
            shutil.rmtree(folder)
            raise UserError(
                f"{', '.join(request.inputs)}: no document for {request.output} ({reasons or 'no records'})"
            )
        try:
            quarantine = _assemble(request, settings, tokenizer, job=job, parts=len(parts), counts=counts)
        except OSError as error:
            raise readable(error) from None
        shutil.rmtree(folder)
    outputs = {name: path for name, path in request.outputs.items() if counts.splits[name].documents}
    return Result(outputs, counts, False, len(parts), len(finished), quarantine)


# ------------------------------------------------------------------------------------------- what was there before


def _settings(request: Request, tokenizer: Tokenizer, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that decides the output, as JSON; input files by path, size and time of change."""
    listing = json.dumps([[str(f.path.resolve()), f.form, f.size, f.modified_ns] for f in files])
    return {
        "format": FORMAT,
        "input files": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
        "input format": request.format,
        "include": list(request.include),
        "text field": request.text_field,
        "tokenizer": tokenizer.fingerprint(),
        "bos": request.tokenizer.bos,
        "eod": request.tokenizer.eod,
        "validation": request.validation,
        "validation output": str(request.outputs["validation"].name) if request.validation else None,
    }


def _made_before(request: Request, settings: dict[str, Any]) -> Result | None:
    manifest = indexed.read_manifest(request.output)
    if manifest is None:
        folder = indexed.with_ending(request.output, ".parts")
        data = indexed.with_ending(request.output, ".bin")
        if data.exists() and not request.overwrite and not folder.exists():
            raise UserError(
                f"{data}: already there, not made by this tool; choose another --output or give --overwrite"
            )
        return None
    different = [key for key in settings if settings[key] != manifest["settings"].get(key)]
    made = {"train": request.output}
    counts = Counts.from_json(manifest["counts"])
    if counts.splits["validation"].documents:
        made["validation"] = request.outputs.get("validation", request.output)
    if not different:
        missing = [
            p for p in made.values() for e in (".bin", ".idx", ".json") if not indexed.with_ending(p, e).exists()
        ]
        if not missing:
            quarantine = indexed.with_ending(request.output, ".quarantine.jsonl")
            parts = indexed.with_ending(request.output, ".parts")
            if parts.exists():  # a run was killed while it cleaned up
                with _locked(parts):
                    shutil.rmtree(parts)
            return Result(made, counts, True, 0, 0, quarantine if quarantine.exists() else None)
    elif not request.overwrite:
        raise UserError(
            f"{request.output}: already there, made from other settings ({', '.join(different)} differ); "
            "choose another --output or give --overwrite"
        )
    return None


def _open_parts(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run with these settings; throw away those of any other."""
    path = folder / "settings.json"
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        same = False
    if not same:
        for old in folder.iterdir():
            if old.name != "lock":
                old.unlink()
        write_json(path, settings)
    for left_over in folder.glob(".*.partial"):  # of a run that was killed
        left_over.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time writes an output; the lock goes with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another run is writing this output; wait for it, or choose another --output"
            ) from None
        yield


def _check_text_field(files: Sequence[InputFile], field: str) -> None:
    """A wrong --text-field makes every record bad: say so from the first hundred, before any work."""
    first: BadRecord | None = None
    records = [file for file in files if file.form != "file"][:3]
    for file in records:
        for _, item in zip(range(100), read_input(file, field), strict=False):
            if not isinstance(item, BadRecord):
                return
            if first is None:
                first, source = item, file
                if file.form == "jsonl" and item.raw.strip() in (b"[", b"{"):
                    raise UserError(
                        f"{file.path}: not JSON lines but one JSON value over many lines; write one object a line"
                    )
            if item.reason != f"no field {field!r}":
                return
    if first:
        raise UserError(f"{source.path}: no field {field!r} in its records{_fields(source, first)}; give --text-field")


def _fields(file: InputFile, bad: BadRecord) -> str:
    if file.form == "parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.ParquetFile(file.path).schema_arrow.names
    else:
        record = json.loads(bad.raw)
        names = list(record) if isinstance(record, dict) else []
    return f" (they have {', '.join(map(str, names[:12]))})" if names else ""


# ------------------------------------------------------------------------------------------------------- the output


def _assemble(
    request: Request, settings: dict[str, Any], tokenizer: Tokenizer, *, job: Job, parts: int, counts: Counts
) -> Path | None:
    """Lay the parts end to end. A dataset that was there goes first, whole: never an old index beside new data."""
    folder, dtype = job.folder, indexed.token_dtype(tokenizer.vocab_size)
    manifests: list[tuple[Path, dict[str, Any]]] = []
    for prefix in request.outputs.values():
        indexed.remove_dataset(prefix)
        for left_over in prefix.parent.glob(f".{glob.escape(prefix.name)}.*.partial"):  # of a run that was killed here
            left_over.unlink()
    for split, prefix in request.outputs.items():
        if not counts.splits[split].documents:
            continue
        digest = hashlib.sha256()
        with replace_file(indexed.with_ending(prefix, ".bin")) as out:
            for index in range(parts):
                with open(part_file(folder, index, f"{split}.bin"), "rb") as file:
                    while chunk := file.read(1 << 22):
                        digest.update(chunk)
                        out.write(chunk)
        lengths = [np.fromfile(part_file(folder, i, f"{split}.lengths"), dtype="<i4") for i in range(parts)]
        indexed.write_index(indexed.with_ending(prefix, ".idx"), np.concatenate(lengths), dtype)
        numbers = counts.splits[split]
        manifest = {
            "kind": "megacode dataset",
            "split": split,
            **vars(numbers),
            "token type": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256 of .bin": digest.hexdigest(),
            "tokenizer": {**request.tokenizer.model_dump(), "fingerprint": settings["tokenizer"]},
            "inputs": list(request.inputs),
            "settings": settings,
            "counts": {**counts.to_json(), "hashes": []},
            "input files": _input_table(job.files, counts),
        }
        manifests.append((prefix, manifest))
    quarantine = indexed.with_ending(request.output, ".quarantine.jsonl")
    if counts.bad or counts.passed_over:
        with replace_file(quarantine) as out:
            for index in range(parts):
                with open(part_file(folder, index, "bad.jsonl"), "rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
    else:
        quarantine.unlink(missing_ok=True)
    # The manifest of `output` is what a later run looks for: last.
    for prefix, manifest in reversed(manifests):
        indexed.write_manifest(prefix, manifest)
    return quarantine if counts.bad or counts.passed_over else None


def _input_table(files: Sequence[InputFile], counts: Counts) -> list[dict[str, Any]]:
    """Input files with size and SHA-256; beyond 1000 of them, one line for all with a hash over their hashes."""
    rows = [{"path": str(f.path), "bytes": f.size, "sha256": counts.hashes.get(i, "")} for i, f in enumerate(files)]
    if len(rows) <= 1000:
        return rows
    digest = hashlib.sha256("".join(f"{r['sha256']}  {r['path']}\n" for r in rows).encode(errors="surrogateescape"))
    size = sum(file.size for file in files)
    return [{"path": f"{len(rows)} files", "bytes": size, "sha256 of `sha256  path` lines": digest.hexdigest()}]
