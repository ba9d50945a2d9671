"""One part of a corpus -> token files. What a worker process of `megacode.data.preprocess` does.

A part is a list of files, or a span of one. It is the unit of parallel work and of resuming: its results lie in the
job's folder under the part's number, and its `.json`, written last, says that they are complete.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacode.data.files import replace_file, write_json
from megacode.data.indexed import TokenFile, token_dtype
from megacode.data.inputs import InputFile
from megacode.data.readers import BadRecord, Document, read_input
from megacode.data.tokenizer import Tokenizer, load_tokenizer, well_formed
from megacode.recipe import schema

BATCH_CHARACTERS = 1 << 19
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Job:
    """What every part needs to know."""

    files: tuple[InputFile, ...]
    tokenizer: schema.Tokenizer
    text_field: str
    validation: float
    """Share of documents held out, by hash of the text."""
    folder: Path
    """Where the parts' results go."""


@dataclass(frozen=True)
class Part:
    index: int
    files: tuple[int, ...]
    """Numbers in Job.files."""
    span: tuple[int, int] | None = None
    """Of the only file: see `read_input`."""
    hash_files: bool = True
    """Whether this part's worker also hashes its files (the first part of each does)."""


@dataclass(frozen=True)
class Progress:
    """Growth since the last one."""

    input_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    bad: int = 0


@dataclass
class SplitCounts:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text."""
    longest: int = 0
    """Tokens of the longest document."""

    def add(self, other: SplitCounts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.longest = max(self.longest, other.longest)


@dataclass
class Counts:
    """What was read and written: of one part, or of all."""

    splits: dict[str, SplitCounts] = field(default_factory=lambda: {name: SplitCounts() for name in SPLITS})
    records: int = 0
    """Documents, bad ones and harmless ones."""
    bad: Counter[str] = field(default_factory=Counter)
    """By reason."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Empty documents and binary files, by reason."""
    repaired: int = 0
    """Documents with lone surrogates, which became U+FFFD."""
    hashes: dict[int, str] = field(default_factory=dict)
    """SHA-256 of input files, by number."""

    def add(self, other: Counts) -> None:
        for name, split in other.splits.items():
            self.splits[name].add(split)
        self.records += other.records
        self.bad += other.bad
        self.passed_over += other.passed_over
        self.repaired += other.repaired
        self.hashes.update(other.hashes)

    def to_json(self) -> dict[str, object]:
        splits = {name: vars(split) for name, split in self.splits.items()}
        return {**vars(self), "splits": splits, "hashes": sorted(self.hashes.items())}

    @staticmethod
    def from_json(value: dict) -> Counts:
        return Counts(
            splits={name: SplitCounts(**split) for name, split in value["splits"].items()},
            records=value["records"],
            bad=Counter(value["bad"]),
            passed_over=Counter(value["passed_over"]),
            repaired=value["repaired"],
            hashes=dict(map(tuple, value["hashes"])),
        )


def part_file(folder: Path, index: int, ending: str) -> Path:
    return folder / f"{index:06d}.{ending}"


def finished_part(folder: Path, index: int) -> Counts | None:
    """Counts of a part whose results are complete."""
    path = part_file(folder, index, "json")
    return Counts.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def in_validation(text: bytes, share: float) -> bool:
    """Whether a document is held out: its hash as a fraction of 1 is below `share`. Equal texts always go together, and
    a larger share keeps what a smaller one held out."""
    key = hashlib.blake2b(text, digest_size=8, person=b"validation").digest()
    return int.from_bytes(key, "little") < int(share * 2**64)


def part_worker(job: Job) -> Callable[[Part], Iterator[Progress]]:
    """Loads the tokenizer; the function it gives tokenizes one part and writes its files."""
    tokenizer = load_tokenizer(job.tokenizer)
    return lambda part: tokenize_part(job, tokenizer, part)


def tokenize_part(job: Job, tokenizer: Tokenizer, part: Part) -> Iterator[Progress]:
    """Write `NNNNNN.{train,validation}.{bin,lengths}`, `.bad.jsonl` and, last, `.json`, reporting on the way."""
    counts = Counts()
    dtype = token_dtype(tokenizer.vocab_size)
    before = [tokenizer.bos_id] if job.tokenizer.bos else []
    after = [tokenizer.eod_id] if job.tokenizer.eod else []
    read_bytes = 0

    def on_bytes(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count

    def items() -> Iterator[Document | BadRecord]:
        for number in part.files:
            file = job.files[number]
            yield from read_input(file, job.text_field, part.span, on_bytes)
            if part.hash_files:
                counts.hashes[number] = _file_hash(file.path)

    with ExitStack() as stack:
        names = SPLITS if job.validation else SPLITS[:1]
        out = {
            name: TokenFile(stack.enter_context(replace_file(part_file(job.folder, part.index, f"{name}.bin"))), dtype)
            for name in names
        }
        quarantine = stack.enter_context(replace_file(part_file(job.folder, part.index, "bad.jsonl")))

        def set_aside(bad: BadRecord) -> None:
            (counts.passed_over if bad.harmless else counts.bad)[bad.reason] += 1
            quarantine.write(_quarantined(bad, _place(bad, job, part)))

        for batch in _batches(items()):
            documents: list[Document] = []
            for item in batch:
                counts.records += 1
                if isinstance(item, Document):
                    documents.append(item)
                else:
                    set_aside(item)
            growth = Counts()
            for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
                if not ids:
                    set_aside(BadRecord("no tokens", document.file, document.record, document.text.encode(), True))
                    continue
                text = document.text
                if not text.isascii() and (mended := well_formed(text)) is not text:
                    counts.repaired += 1
                    text = mended
                raw = text.encode()
                name = "validation" if job.validation and in_validation(raw, job.validation) else "train"
                tokens = before + ids + after
                out[name].add(tokens)
                growth.splits[name].add(SplitCounts(1, len(tokens), len(raw), len(tokens)))
            counts.add(growth)
            total = list(growth.splits.values())
            yield Progress(
                input_bytes=read_bytes,
                text_bytes=sum(s.bytes for s in total),
                tokens=sum(s.tokens for s in total),
                documents=sum(s.documents for s in total),
                bad=sum(not isinstance(item, Document) and not item.harmless for item in batch),
            )
            read_bytes = 0
    for name, tokens_out in out.items():
        with replace_file(part_file(job.folder, part.index, f"{name}.lengths")) as file:
            file.write(np.asarray(tokens_out.lengths, dtype="<i4").tobytes())
    write_json(part_file(job.folder, part.index, "json"), counts.to_json())
    yield Progress(input_bytes=read_bytes)


def _batches(items: Iterator[Document | BadRecord]) -> Iterator[list[Document | BadRecord]]:
    """Runs of items with about half a million characters (or of 1024 items)."""
    batch: list[Document | BadRecord] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text) if isinstance(item, Document) else len(item.raw)
        if characters >= BATCH_CHARACTERS or len(batch) == 1024:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _quarantined(bad: BadRecord, record: int) -> bytes:
    """One line of the quarantine file; the record as text where it is UTF-8, else in base64."""
    line: dict[str, object] = {"file": str(bad.file), "record": record, "reason": bad.reason}
    if bad.raw:
        try:
            line["raw"] = bad.raw.decode()
        except UnicodeDecodeError:
            line["raw_base64"] = base64.b64encode(bad.raw).decode()
    return (json.dumps(line) + "\n").encode()


def _place(bad: BadRecord, job: Job, part: Part) -> int:
    """The record's number in its whole file: in a span of a JSONL file, readers count from the span's first line."""
    if part.span is None or job.files[part.files[0]].form != "jsonl" or not part.span[0]:
        return bad.record
    left, lines = part.span[0] - 1, 0
    with open(bad.file, "rb") as file:
        while left > 0:
            chunk = file.read(min(left, 1 << 20))
            if not chunk:
                break
            lines += chunk.count(b"\n")
            left -= len(chunk)
    # The line under the byte before the span belongs to the part before: it is line `lines` + 1.
    return lines + 1 + bad.record


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def plan_parts(files: Sequence[InputFile]) -> list[Part]:
    """Cut a corpus into parts of about a 64th of it, 1 to 64 MB on disk. Depends on the files only, not on the machine.

    Large plain JSONL files are cut by bytes and large parquet files by row groups; a compressed file is one part.
    """
    size = min(max(sum(file.size for file in files) // 64, 1 << 20), 64 << 20)
    parts: list[Part] = []
    together: list[int] = []
    held = 0

    def flush() -> None:
        nonlocal held
        if together:
            parts.append(Part(len(parts), tuple(together)))
        together.clear()
        held = 0

    for number, file in enumerate(files):
        spans = _spans(file, size) if file.size > 1.5 * size else []
        if not spans:
            together.append(number)
            held += file.size
            if held >= size or len(together) == 10_000:
                flush()
            continue
        flush()
        for i, span in enumerate(spans):
            parts.append(Part(len(parts), (number,), span, hash_files=i == 0))
    flush()
    return parts


def _spans(file: InputFile, size: int) -> list[tuple[int, int]]:
    if file.form == "jsonl" and file.compression is None:
        count = max(1, round(file.size / size))
        edges = [file.size * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))
    if file.form != "parquet":
        return []
    import pyarrow
    import pyarrow.parquet

    try:
        groups = pyarrow.parquet.ParquetFile(file.path).num_row_groups
    except (pyarrow.ArrowException, OSError):
        return []  # read as a whole, where it becomes a bad record
    each = max(1, round(groups * size / file.size))
    return [(i, min(i + each, groups)) for i in range(0, groups, each)]
