"""One part of a corpus -> token files (see `part_files`). What a worker process of `megacode preprocess` does."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.conditions import Condition, parse_condition
from megacode.corpus.preprocess.counts import Counts, Group, GroupCounts
from megacode.corpus.preprocess.fields import field_value
from megacode.corpus.preprocess.finished_parts import GroupFiles, file_checksum, part_file
from megacode.corpus.preprocess.layout import Lay
from megacode.corpus.preprocess.quarantine import write_bad
from megacode.corpus.preprocess.splitting import CorpusPart, chunk_path
from megacode.corpus.readers import BadRecord, Item, TextDocument, read_input
from megacode.data.indexed import token_dtype
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.recipe import schema
from megacode.tokenizer.fast import FastEncoder, check_sample, load_fast
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer, well_formed

BATCH_BYTES, BATCH_DOCUMENTS = 8 << 20, 1 << 16
"""Tokenized at a time. The fast backend begins each batch with an empty cache: with 2 MiB a sixth slower, with 16 no faster."""
EXACT_BATCH_BYTES = 1 << 20
CHECKED_SHARE = 1 / 1000
"""Of the documents, and at least one in a batch, whose ids are compared with the reference library's; it costs about a
hundredth of the time."""
_LONGEST_CHECKED = 1 << 17
MAX_VALUES = 1000
"""Datasets that `--split-by` may make: more is a field that is no category."""


@dataclass(frozen=True)
class Job:
    """What every part needs to know."""

    files: tuple[InputFile, ...]
    tokenizer: schema.TokenizerSection
    text_field: str
    validation: float
    """Share of documents held out, by hash of the text."""
    folder: Path
    """Where the parts' results go."""
    where: str | None = None
    split_by: str | None = None
    deduplicate: bool = False
    repository: str | None = None
    """Field that names a file's repository: documents are files with their path in front, to be put together."""
    path: str | None = None
    """Field with the file's path in its repository."""
    max_document: int = 32 << 20
    exact: bool = False
    """Tokenize with the reference library alone."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields to be read beside the text."""
        fields = [
            self.split_by,
            self.repository,
            self.path,
            *(parse_condition(self.where).fields if self.where else ()),
        ]
        return tuple(dict.fromkeys(field for field in fields if field))


@dataclass(frozen=True)
class PartProgress:
    """Growth since the last one."""

    input_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    bad: int = 0
    laid: str = ""
    """The part whose tokens are laid now."""


# --------------------------------------------------------------------------------------------------------- the worker


def part_worker(job: Job) -> Callable[[CorpusPart | Lay], Iterator[PartProgress]]:
    """Loads the tokenizer; the function it gives tokenizes one part and writes its files, or lays a finished one."""
    alone = multiprocessing.parent_process() is not None
    if alone:
        _keep_memory()
    tokenizer = load_tokenizer(job.tokenizer)
    fast = "asked for (--exact)" if job.exact else load_fast(tokenizer)
    encoder = (
        _Encoder(tokenizer, None, fast) if isinstance(fast, str) else _Encoder(tokenizer, fast)
    )
    condition = parse_condition(job.where) if job.where else None
    if (
        alone
    ):  # thousands of records at a time, none of them in a cycle: looking for cycles is wasted
        gc.freeze()
        gc.disable()

    def work(task: CorpusPart | Lay) -> Iterator[PartProgress]:
        if isinstance(task, Lay):
            task.copy()
            yield PartProgress(laid=task.part)
        else:
            yield from tokenize_part(job, encoder, condition, task)

    return work


def _keep_memory() -> None:
    """Ask the C library to keep buffers of tens of MB that batches use again and again, instead of giving them back to
    the kernel each time, which then clears their pages anew: 5 to 10 % of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    fast: FastEncoder | None
    reason: str = ""
    """Why there is no fast one."""

    def encode(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of documents one after another [tokens], and where each begins [n + 1]."""
        if self.fast:
            return self.fast.encode_documents(texts)
        lists = self.tokenizer.encode_batch([text.decode() for text in texts])
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return np.fromiter((i for ids in lists for i in ids), np.uint32, offsets[-1]), offsets


def tokenize_part(
    job: Job, encoder: _Encoder, condition: Condition | None, part: CorpusPart
) -> Iterator[PartProgress]:
    """Write the files of one part, reporting on the way."""
    tokenizer = encoder.tokenizer
    counts = Counts(exact=encoder.reason)
    before = [tokenizer.bos_id] if job.tokenizer.bos else []
    after = [tokenizer.eod_id] if job.tokenizer.eod else []
    if job.repository:  # BOS and EOD go around the whole repository
        before, after = [tokenizer.token_id("<filename>")], []
    choose = np.random.default_rng(part.unit * 100_003 + (part.chunk or 0))
    read_bytes = bad_records = lines = 0

    def on_bytes(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count

    def on_lines(count: int) -> None:
        nonlocal lines
        lines = count if part.span or part.chunk is not None else 0

    with ExitStack() as stack:
        writer = _Writer(job, part, token_dtype(tokenizer.vocab_size), stack)
        quarantine = stack.enter_context(
            replace_file(part_file(job.folder, part, "bad.jsonl"), durable=False)
        )

        def good() -> Iterator[tuple[int, TextDocument]]:
            nonlocal bad_records
            for number in part.files:
                for item in _read(job, part, number, on_bytes, on_lines):
                    counts.records += 1
                    if isinstance(item, BadRecord):
                        (counts.passed_over if item.harmless else counts.bad)[item.reason] += 1
                        bad_records += not item.harmless
                        write_bad(quarantine, job.files[number].path, item)
                    elif condition and not condition(
                        _fields(job.files[number], item, condition.fields)
                    ):
                        counts.passed_over["not wanted (--where)"] += 1
                    else:
                        counts.repaired += item.repaired
                        yield number, item

        for documents in _batches(good(), BATCH_BYTES if encoder.fast else EXACT_BATCH_BYTES):
            batch = _encode(job, encoder, documents)
            if encoder.fast:
                counts.checked += _check(job, tokenizer, batch, choose)
            if not batch.lengths.all():
                for number, document in batch.without_tokens():
                    counts.passed_over["no tokens"] += 1
                    bad = BadRecord("no tokens", document.record, document.raw, True)
                    write_bad(quarantine, job.files[number].path, bad)
                batch = batch.with_tokens()
            growth = (
                writer.add(batch, *_framed(batch, before, after, writer.dtype))
                if batch.documents
                else Counts()
            )
            counts.add(growth)
            total = growth.total
            yield PartProgress(read_bytes, total.bytes, total.tokens, total.documents, bad_records)
            read_bytes = bad_records = 0
        groups = writer.finish()
    summary = {
        "lines": lines,
        "groups": {str(group): value for group, value in groups.items()},
        "inputs": _input_checksums(job, part),
        "counts": counts.to_json(),
    }
    write_json(part_file(job.folder, part, "json"), summary, durable=False)
    if part.chunk is not None:
        chunk_path(job.folder, part).unlink(missing_ok=True)
        read_bytes = part.chunk_bytes
    yield PartProgress(input_bytes=read_bytes, bad=bad_records)
    gc.collect()


def _input_checksums(job: Job, part: CorpusPart) -> list[tuple[int, int, str]]:
    """Of the files, or of the span of bytes, that this part has just read; a file of many parts has one in its first."""
    found = []
    for number in part.files:
        file = job.files[number]
        start, size = 0, file.size
        if part.span and file.form == "jsonl":
            start, size = part.span[0], part.span[1] - part.span[0]
        elif (part.span and part.span[0]) or part.chunk:
            continue
        try:
            found.append((number, size, file_checksum(file.path, start, size)))
        except OSError:  # it could not be read either: a bad record says why
            found.append((number, size, ""))
    return found


def _read(
    job: Job,
    part: CorpusPart,
    number: int,
    on_bytes: Callable[[int], None],
    on_lines: Callable[[int], None],
) -> Iterator[Item]:
    file, last = job.files[number], 0
    report: Callable[[int], None] | None = on_bytes
    if part.chunk is not None:  # its bytes are reported at its end, as those of the compressed file
        chunk = chunk_path(job.folder, part)
        file, report = replace(file, path=chunk, compression=None, size=chunk.stat().st_size), None
    records = read_input(
        file,
        job.text_field,
        part.span,
        report,
        columns=job.columns,
        max_document=job.max_document,
        on_lines=on_lines,
    )
    for item in records:
        last = item.record
        yield item
    if part.broken:
        yield BadRecord(f"broken .{job.files[number].compression}: {part.broken}", last + 1)


def _fields(file: InputFile, document: TextDocument, names: Sequence[str]) -> dict[str, Any]:
    return {name: field_value(file, document, name) for name in names}


def _place(job: Job, file: InputFile, document: TextDocument) -> tuple[str, str]:
    """Repository and path in it. A file without a repository stands alone."""
    assert job.repository and job.path
    repository, path = (
        field_value(file, document, job.repository),
        field_value(file, document, job.path),
    )
    alone = f"{file.path}:{document.record}"
    repository = str(repository) if repository is not None else alone
    return well_formed(repository), well_formed(str(path)) if path is not None else ""


def _batches(
    items: Iterator[tuple[int, TextDocument]], limit: int
) -> Iterator[list[tuple[int, TextDocument]]]:
    batch: list[tuple[int, TextDocument]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1].raw)
        if size >= limit or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Batch:
    documents: list[tuple[int, TextDocument]]
    """With the number of the input file."""
    texts: list[bytes]
    """What was tokenized."""
    places: list[tuple[str, str]]
    """Repository and path, where they are wanted."""
    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    """Ids of each document, which lie one after another in `ids`."""

    def without_tokens(self) -> list[tuple[int, TextDocument]]:
        return [self.documents[i] for i in np.flatnonzero(self.lengths == 0)]

    def with_tokens(self) -> _Batch:
        kept = np.flatnonzero(self.lengths).tolist()
        return _Batch(
            [self.documents[i] for i in kept],
            [self.texts[i] for i in kept],
            [self.places[i] for i in kept] if self.places else [],
            self.ids,
            self.lengths[kept],
        )


def _encode(job: Job, encoder: _Encoder, documents: list[tuple[int, TextDocument]]) -> _Batch:
    texts = [document.raw for _, document in documents]
    places = []
    if job.repository:
        places = [_place(job, job.files[number], document) for number, document in documents]
        texts = [
            path.encode() + b"\n" + text for (_, path), text in zip(places, texts, strict=True)
        ]
    ids, offsets = encoder.encode(texts)
    return _Batch(documents, texts, places, ids, np.diff(offsets))


def _check(job: Job, tokenizer: Tokenizer, batch: _Batch, choose: np.random.Generator) -> int:
    """Compare a random sample of the batch with the reference library. How many were compared."""
    short = [i for i, text in enumerate(batch.texts) if len(text) <= _LONGEST_CHECKED]
    # One of every batch at least, so that no run goes unchecked.
    count = min(len(short), max(1, int(choose.binomial(len(short), CHECKED_SHARE))))
    ends = np.cumsum(batch.lengths)
    for i in choose.choice(short, count, replace=False).tolist() if short else ():
        number, document = batch.documents[i]
        name = f"{job.files[number].path}, record {document.record}"
        check_sample(
            tokenizer, name, batch.texts[i], batch.ids[ends[i] - batch.lengths[i] : ends[i]]
        )
    return count


def _framed(
    batch: _Batch, before: list[int], after: list[int], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The documents' ids with those of `before` and `after` (one at most each) around every one, and their lengths."""
    if not before and not after:
        return batch.ids.astype(dtype), batch.lengths
    framed = batch.lengths + len(before) + len(after)
    ends = np.cumsum(framed)
    out = np.empty(int(ends[-1]), dtype=dtype)
    text = np.ones(len(out), dtype=bool)
    for frame, places in ((before, ends - framed), (after, ends - 1)):
        if frame:
            text[places] = False
            out[places] = frame[0]
    out[text] = batch.ids
    return out, framed


# --------------------------------------------------------------------------------------------------------- the writer


class _Writer:
    """The files of one part, a set for each group."""

    def __init__(self, job: Job, part: CorpusPart, dtype: np.dtype[Any], stack: ExitStack) -> None:
        self.job, self.part, self.dtype, self.stack = job, part, dtype, stack
        self.groups: dict[Group, GroupFiles] = {}

    def add(self, batch: _Batch, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> Counts:
        """Append the documents, each to its group, as `lengths` consecutive `tokens`. What was added."""
        documents, places = batch.documents, batch.places
        records = np.array(
            [(number, document.record) for number, document in documents], dtype="<i8"
        )
        sizes = np.array([len(document.raw) for _, document in documents], dtype=np.int64)
        hashes = (
            b"".join(_hash(document.raw) for _, document in documents)
            if self.job.deduplicate
            else b""
        )
        groups = self._groups(batch)
        growth = Counts()
        if groups is None:
            everything = slice(None)
            self._add(
                Group("train"), growth, everything, tokens, lengths, records, sizes, hashes, places
            )
            return growth
        ends = np.cumsum(lengths)
        for group in sorted(set(groups)):
            chosen = np.array([i for i, g in enumerate(groups) if g == group])
            own = np.concatenate([tokens[ends[i] - lengths[i] : ends[i]] for i in chosen])
            own_hashes = b"".join(hashes[24 * i : 24 * i + 24] for i in chosen)
            own_places = [places[i] for i in chosen] if places else []
            self._add(
                group,
                growth,
                chosen,
                own,
                lengths[chosen],
                records[chosen],
                sizes[chosen],
                own_hashes,
                own_places,
            )
        return growth

    def _groups(self, batch: _Batch) -> list[Group] | None:
        """The group of each document; None if there is only one for all."""
        job = self.job
        if not job.validation and not job.split_by:
            return None
        groups = []
        for i, (number, document) in enumerate(batch.documents):
            # A repository is held out as a whole, other documents by their own text.
            key = (
                batch.places[i][0].encode(errors="surrogateescape")
                if batch.places
                else document.raw
            )
            split = (
                "validation" if job.validation and in_validation(key, job.validation) else "train"
            )
            value = field_value(job.files[number], document, job.split_by) if job.split_by else ""
            groups.append(Group(split, "(none)" if value is None else well_formed(str(value))))
        return groups

    def _add(
        self,
        group: Group,
        growth: Counts,
        chosen: Any,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        records: NDArray[np.int64],
        sizes: NDArray[np.int64],
        hashes: bytes,
        places: Sequence[tuple[str, str]],
    ) -> None:
        if group not in self.groups:
            if len({g.value for g in (*self.groups, group)}) > MAX_VALUES:
                raise UserError(
                    f"--split-by {self.job.split_by}: more than {MAX_VALUES} different values; give a field that is a "
                    "category, such as the language"
                )
            more = ["hashes"] * self.job.deduplicate + ["places"] * bool(self.job.repository)
            self.groups[group] = GroupFiles(
                self.job.folder, self.part, len(self.groups), more, self.stack
            )
        self.groups[group].add(tokens, lengths, records, hashes, places)
        growth.groups[group] = GroupCounts(
            len(lengths), int(lengths.sum()), int(sizes.sum()), int(lengths.max())
        )

    def finish(self) -> dict[Group, dict[str, Any]]:
        return {group: files.finish() for group, files in self.groups.items()}


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest() + len(text).to_bytes(8, "little")


def in_validation(text: bytes, share: float) -> bool:
    """Whether a document is held out: its hash as a fraction of 1 is below `share`. Equal texts always go together, and
    a larger share keeps what a smaller one held out."""
    key = hashlib.blake2b(text, digest_size=8, person=b"validation").digest()
    return int.from_bytes(key, "little") < int(share * 2**64)
