"""One part of a corpus -> token files (see `finished_parts`). What a worker process of `megacode
preprocess` does."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.chat import TOO_LONG, ConversationTokenizer, SetAside
from megacode.corpus.preprocess.conditions import Condition, field_value, parse_condition
from megacode.corpus.preprocess.counts import Counts, Group, GroupCounts
from megacode.corpus.preprocess.finished_parts import (
    HASH,
    PartFiles,
    input_checksums,
    part_file,
)
from megacode.corpus.preprocess.pairs import PairTokenizer
from megacode.corpus.preprocess.quarantine import write_bad
from megacode.corpus.preprocess.request import Request
from megacode.corpus.preprocess.splitting import CorpusPart, chunk_path, read_part
from megacode.corpus.readers import BadRecord, Item, TextDocument
from megacode.data import indexed
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.tokenizer.fast import FastEncoder, check_sample, load_fast
from megacode.tokenizer.tokenizer import (
    Tokenizer,
    UnencodableError,
    load_tokenizer,
    well_formed,
)

BATCH_BYTES, BATCH_DOCUMENTS = 8 << 20, 1 << 16
"""Tokenized at a time. The fast backend begins each batch with an empty cache: with 2 MiB it is a
sixth slower, with 16 no faster."""
EXACT_BATCH_BYTES = 1 << 20
CHECKED_SHARE = 1 / 1000
"""Of the documents, and at least one in a batch, whose ids are compared with the reference
library's; it costs about a hundredth of the time."""
_LONGEST_CHECKED = 1 << 17
MAX_VALUES = 1000
"""Datasets that `--split-by` may make: more is a field that is no category."""


@dataclass(frozen=True)
class Job:
    """What every part needs to know."""

    request: Request
    files: tuple[InputFile, ...]

    @property
    def folder(self) -> Path:
        """Where the parts' files go."""
        return indexed.with_ending(self.request.name, ".parts")


@dataclass(frozen=True)
class PartProgress:
    """Growth since the last one."""

    input_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    bad: int = 0


_Records = ConversationTokenizer | PairTokenizer


def part_worker(job: Job) -> Callable[[CorpusPart], Iterator[PartProgress]]:
    """Load the tokenizer. The function that is returned tokenizes one part and writes its files."""
    alone = multiprocessing.parent_process() is not None
    if alone:
        _keep_memory()
    tokenizer = load_tokenizer(job.request.tokenizer)
    fast = "asked for (--exact)" if job.request.exact else load_fast(tokenizer)
    encoder = None if isinstance(fast, str) else fast
    records: _Records | None = None
    if job.request.conversations:
        records = ConversationTokenizer(job.request, tokenizer, encoder)
    elif job.request.pairs:
        records = PairTokenizer(job.request, tokenizer, encoder)
    condition = parse_condition(job.request.where) if job.request.where else None
    if (
        alone
    ):  # thousands of records at a time, none of them in a cycle: looking for cycles is wasted
        gc.freeze()
        gc.disable()
    return lambda part: _Part(job, tokenizer, fast, records, condition, part).run()


def _keep_memory() -> None:
    """Ask the C library to keep buffers of tens of MB that batches use again and again, instead of
    giving them back to the kernel each time, which then clears their pages anew: 5 to 10 % of the
    time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


@dataclass(frozen=True)
class _Batch:
    documents: list[tuple[int, TextDocument]]
    """With the number of the input file."""
    texts: list[bytes]
    """What was tokenized."""
    places: list[tuple[str, str]]
    """Repository and path, with `--repository`."""
    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    """Ids of each document, which lie one after another in `ids`."""

    def chosen(self, documents: NDArray[np.intp]) -> _Batch:
        """Some of the documents; those left out have no ids."""
        numbers = documents.tolist()
        return _Batch(
            [self.documents[i] for i in numbers],
            [self.texts[i] for i in numbers],
            [self.places[i] for i in numbers] if self.places else [],
            self.ids,
            self.lengths[documents],
        )


class _Part:
    """Tokenizes one part. `fast`: the fast backend, or why there is none."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer,
        fast: FastEncoder | str,
        records: _Records | None,
        condition: Condition | None,
        part: CorpusPart,
    ) -> None:
        self.job, self.request, self.part = job, job.request, part
        self.tokenizer, self.fast, self.records = tokenizer, fast, records
        self.condition = condition
        self.dtype = self.request.part_dtype(tokenizer.vocab_size)
        self.counts = Counts(exact=fast if isinstance(fast, str) else "")
        self.groups: dict[Group, int] = {}
        """Number of each group in the names of files."""
        self.choose = np.random.default_rng(part.unit * 100_003 + (part.chunk or 0))
        self.read_bytes = self.bad = self.lines = 0
        """Not reported yet: bytes read and bad records. Lines read."""

    def run(self) -> Iterator[PartProgress]:
        """Write the part's files, reporting on the way."""
        job, part = self.job, self.part
        with ExitStack() as stack:
            self.files = PartFiles(job.folder, part, stack)
            quarantine = part_file(job.folder, part, "bad.jsonl")
            self.quarantine = stack.enter_context(replace_file(quarantine, durable=False))
            if self.request.deduplicate:
                self.files.write("hashes", b"")
            for documents in self._batches():
                growth = self._write(self._tokenize(documents))
                yield self._progress(growth.bytes, growth.tokens, growth.documents)
        summary = {
            "lines": self.lines,
            "groups": {str(group): number for group, number in self.groups.items()},
            "checksums": self.files.checksums(),
            "inputs": input_checksums(part, job.files),
            "counts": self.counts.to_json(),
        }
        write_json(part_file(job.folder, part, "json"), summary, durable=False)
        if part.chunk is not None:
            chunk_path(job.folder, part).unlink(missing_ok=True)
            self.read_bytes = part.chunk_bytes
        yield self._progress()
        gc.collect()

    def _progress(self, text_bytes: int = 0, tokens: int = 0, documents: int = 0) -> PartProgress:
        progress = PartProgress(self.read_bytes, text_bytes, tokens, documents, self.bad)
        self.read_bytes = self.bad = 0
        return progress

    # -------------------------------------------------------------------------------------- reading

    def _batches(self) -> Iterator[list[tuple[int, TextDocument]]]:
        limit = EXACT_BATCH_BYTES if isinstance(self.fast, str) else BATCH_BYTES
        batch: list[tuple[int, TextDocument]] = []
        size = 0
        for item in self._documents():
            batch.append(item)
            size += len(item[1].raw)
            if size >= limit or len(batch) == BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _documents(self) -> Iterator[tuple[int, TextDocument]]:
        """Documents that are wanted, with the number of their file; others are counted."""
        counts = self.counts
        for number in self.part.files:
            file = self.job.files[number]
            for item in self._read(file):
                counts.records += 1
                if isinstance(item, BadRecord):
                    (counts.passed_over if item.harmless else counts.bad)[item.reason] += 1
                    self.bad += not item.harmless
                    write_bad(self.quarantine, file.path, item)
                elif self._wanted(file, item):
                    counts.repaired += item.repaired
                    yield number, item
                else:
                    counts.passed_over["not wanted (--where)"] += 1

    def _wanted(self, file: InputFile, document: TextDocument) -> bool:
        if self.condition is None:
            return True
        fields = self.condition.fields
        return self.condition({name: field_value(file, document, name) for name in fields})

    def _read(self, file: InputFile) -> Iterator[Item]:
        items = read_part(
            self.job.folder,
            self.part,
            file,
            self.request.text_field,
            self._on_bytes,
            columns=self.request.columns,
            max_document=self.request.max_document,
            on_lines=self._on_lines,
        )
        return self.records.read(items, file.form == "parquet") if self.records else items

    def _on_bytes(self, count: int) -> None:
        self.read_bytes += count

    def _on_lines(self, count: int) -> None:
        self.lines = count if self.part.span or self.part.chunk is not None else 0

    # ----------------------------------------------------------------------------------- tokenizing

    def _tokenize(self, documents: list[tuple[int, TextDocument]]) -> _Batch:
        if self.records:
            return self._tokenize_records(self.records, documents)
        texts = [document.raw for _, document in documents]
        places: list[tuple[str, str]] = []
        if self.request.repository:
            places = [self._place(number, document) for number, document in documents]
            texts = [
                f"{path}\n".encode() + text for (_, path), text in zip(places, texts, strict=True)
            ]
        try:
            return self._encoded(documents, texts, places)
        except UnencodableError as error:
            for i, reason in error.reasons.items():
                self._set_aside(documents[i], reason, harmless=False)
            left = [one for i, one in enumerate(documents) if i not in error.reasons]
            return self._tokenize(left)

    def _encoded(
        self,
        documents: list[tuple[int, TextDocument]],
        texts: list[bytes],
        places: list[tuple[str, str]],
    ) -> _Batch:
        if isinstance(self.fast, str):
            lists = self.tokenizer.encode_batch([text.decode() for text in texts])
            lengths = np.array([len(ids) for ids in lists], dtype=np.int64)
            ids = np.fromiter((i for ids in lists for i in ids), np.uint32, int(lengths.sum()))
            batch = _Batch(documents, texts, places, ids, lengths)
        else:
            ids, offsets = self.fast.encode_documents(texts)
            batch = _Batch(documents, texts, places, ids, np.diff(offsets))
            self._check(batch)
        if batch.lengths.all():
            return batch
        for i in np.flatnonzero(batch.lengths == 0):
            self._set_aside(documents[i], "no tokens", harmless=True)
        return batch.chosen(np.flatnonzero(batch.lengths))

    def _tokenize_records(
        self, records: _Records, documents: list[tuple[int, TextDocument]]
    ) -> _Batch:
        kept, texts, ids = [], [], [np.zeros(0, np.uint32)]
        checked = records.checked
        encoded = records.documents([document.raw for _, document in documents])
        for document, found in zip(documents, encoded, strict=True):
            if not isinstance(found, SetAside):
                for text, own in found:
                    kept.append(document)
                    texts.append(text.encode())
                    ids.append(own)
                continue
            if found.reason == TOO_LONG and self.request.too_long == "error":
                raise UserError(
                    f"{self.job.files[document[0]].path}, record {document[1].record}: has more "
                    f"than {self.request.max_tokens:,} tokens (--max-tokens); say with --too-long "
                    "what becomes of such records: drop, left or right"
                )
            self._set_aside(document, *found)
        self.counts.checked += records.checked - checked
        lengths = np.array([len(own) for own in ids[1:]], dtype=np.int64)
        return _Batch(kept, texts, [], np.concatenate(ids), lengths)

    def _set_aside(self, document: tuple[int, TextDocument], reason: str, harmless: bool) -> None:
        (self.counts.passed_over if harmless else self.counts.bad)[reason] += 1
        self.bad += not harmless
        bad = BadRecord(reason, document[1].record, document[1].raw, harmless)
        write_bad(self.quarantine, self.job.files[document[0]].path, bad)

    def _place(self, number: int, document: TextDocument) -> tuple[str, str]:
        """Repository and path in it. A file without a repository stands alone."""
        file, request = self.job.files[number], self.request
        assert request.repository and request.path
        repository = field_value(file, document, request.repository)
        path = field_value(file, document, request.path)
        if repository is None:
            repository = f"{file.path}:{document.record}"
        return well_formed(str(repository)), well_formed(str(path)) if path is not None else ""

    def _check(self, batch: _Batch) -> None:
        """Compare a random sample of the batch with the reference library."""
        short = [i for i, text in enumerate(batch.texts) if len(text) <= _LONGEST_CHECKED]
        if not short:
            return
        # At least one of every batch, so that every run is checked.
        count = min(len(short), max(1, int(self.choose.binomial(len(short), CHECKED_SHARE))))
        ends = np.cumsum(batch.lengths)
        for i in self.choose.choice(short, count, replace=False).tolist():
            number, document = batch.documents[i]
            name = f"{self.job.files[number].path}, record {document.record}"
            ids = batch.ids[ends[i] - batch.lengths[i] : ends[i]]
            self.counts.checked += check_sample(self.tokenizer, name, batch.texts[i], ids)

    # -------------------------------------------------------------------------------------- writing

    def _write(self, batch: _Batch) -> GroupCounts:
        """Append the documents to the files of their groups. What was added."""
        if not batch.documents:
            return GroupCounts()
        tokens, lengths = self._framed(batch)
        records = np.array([(n, document.record) for n, document in batch.documents], dtype="<i8")
        texts = batch.texts if self.records else [document.raw for _, document in batch.documents]
        sizes = np.array([len(text) for text in texts])
        numbers = np.array([self._number(self._group(batch, i)) for i in range(len(sizes))])
        if self.request.deduplicate:
            self.files.write("hashes", _hashes(batch.documents, numbers).tobytes())
        added = Counts()
        for group, number in self.groups.items():
            own = numbers == number
            if not own.any():
                continue
            ids = tokens if own.all() else tokens[np.repeat(own, lengths)]
            self.files.write(f"{number}.bin", ids.tobytes())
            self.files.write(f"{number}.lengths", lengths[own].astype("<i4").tobytes())
            self.files.write(f"{number}.records", records[own].tobytes())
            if batch.places:
                places = itertools.compress(batch.places, own)
                lines = "".join(json.dumps(place) + "\n" for place in places)
                self.files.write(f"{number}.places", lines.encode())
            longest, text_bytes = int(lengths[own].max()), int(sizes[own].sum())
            added.groups[group] = GroupCounts(int(own.sum()), len(ids), text_bytes, longest)
        self.counts.add(added)
        return added.total

    def _framed(self, batch: _Batch) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The documents' ids with BOS before and EOD after each, and their lengths. With
        `--repository`: <filename> before each; BOS and EOD go around the whole repository."""
        tokenizer, section = self.tokenizer, self.request.tokenizer
        before = [tokenizer.bos_id] if section.bos and not self.records else []
        after = [tokenizer.eod_id] if section.eod and not self.records else []
        if self.request.repository:
            before, after = [tokenizer.token_id("<filename>")], []
        if not before and not after:
            return batch.ids.astype(self.dtype), batch.lengths
        lengths = batch.lengths + len(before) + len(after)
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]), dtype=self.dtype)
        text = np.ones(len(out), dtype=bool)
        for frame, places in ((before, ends - lengths), (after, ends - 1)):
            if frame:
                text[places] = False
                out[places] = frame[0]
        out[text] = batch.ids
        return out, lengths

    def _group(self, batch: _Batch, i: int) -> Group:
        """The split and the value of a document."""
        request = self.request
        number, document = batch.documents[i]
        split, value = "train", ""
        if request.validation:
            # A repository is held out as a whole, other documents by their own text.
            key = document.raw
            if batch.places:
                key = batch.places[i][0].encode(errors="surrogateescape")
            split = "validation" if in_validation(key, request.validation) else "train"
        if request.split_by:
            found = field_value(self.job.files[number], document, request.split_by)
            value = "(none)" if found is None else well_formed(str(found))
        return Group(split, value)

    def _number(self, group: Group) -> int:
        """The group's number; a new one gets the next."""
        if group not in self.groups:
            self.groups[group] = len(self.groups)
            if len({known.value for known in self.groups}) > MAX_VALUES:
                raise UserError(
                    f"--split-by {self.request.split_by}: more than {MAX_VALUES} different values; "
                    "give a field that is a category, such as the language"
                )
        return self.groups[group]


def _hashes(
    documents: Sequence[tuple[int, TextDocument]], groups: NDArray[np.integer[Any]]
) -> NDArray[Any]:
    """HASH [n] of documents with the numbers of their groups."""
    hashes = np.empty(len(documents), dtype=HASH)
    digests = (hashlib.blake2b(document.raw, digest_size=16).digest() for _, document in documents)
    both = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    hashes["high"], hashes["low"] = both.T
    hashes["size"] = [len(document.raw) for _, document in documents]
    hashes["group"] = groups
    return hashes


def in_validation(text: bytes, share: float) -> bool:
    """Whether a document is held out: its hash as a fraction of 1 is below `share`. Equal texts
    always go together, and a larger share keeps what a smaller one held out."""
    key = hashlib.blake2b(text, digest_size=8, person=b"validation").digest()
    return int.from_bytes(key, "little") < int(share * 2**64)
