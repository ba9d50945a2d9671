"""Whether an IndexedDataset is whole: its index, its tokens, its checksums.

Every byte is read once, in order, in pieces of a few megabytes, so memory stays the same whatever
the size. What is wrong becomes sentences, with the number of the document and the place in it;
documents count through all shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacode.corpus.inspect import manifest_of, nothing, shards_at, tokenizer_of
from megacode.data.indexed import CHUNK, LOSS_ENDINGS, Shard, chunks, open_shard, with_ending
from megacode.data.loss_marks import MARKS, loss_prefix
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer

_KEPT = 10
"""Problems of one kind that are told; all are counted."""


@dataclass(frozen=True)
class Verification:
    """`problems` are sentences, the first of each kind; `count` is how many there are in all.
    `unchecked` says what was not looked at, and why. `highest` is the largest token id (-1 if there
    is none)."""

    problems: tuple[str, ...]
    count: int
    unchecked: tuple[str, ...]
    highest: int
    documents: int
    tokens: int


class _Findings:
    """Problems by kind, each a sentence."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}
        self.count = 0

    def add(self, kind: str, positions: NDArray[Any], sentence: Callable[[int], str]) -> None:
        self.count += len(positions)
        kept = self.kinds.setdefault(kind, [])
        kept += [sentence(at) for at in positions[: _KEPT - len(kept)].tolist()]

    def say(self, kind: str, sentence: str) -> None:
        self.add(kind, np.zeros(1, dtype=np.int64), lambda _: sentence)

    def first(self, most: int) -> tuple[str, ...]:
        """Sentences of every kind, as many of each as there is room for."""
        kept = list(self.kinds.values())
        fair = sorted((at, kind) for kind, own in enumerate(kept) for at in range(len(own)))
        return tuple(kept[kind][at] for kind, at in sorted((k, at) for at, k in fair[:most]))


def bytes_at(prefix: Path) -> int:
    """Bytes that `verify` reads, as it counts them: all .bin and .idx files that are there."""
    shards = shards_at(prefix)
    endings = (".bin", ".idx", *LOSS_ENDINGS)
    files = [with_ending(shard, ending) for shard in shards for ending in endings]
    return sum(file.stat().st_size for file in files if file.is_file())


def verify(
    prefix: Path,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    on_bytes: Callable[[int], None] = nothing,
) -> Verification:
    """Read every byte of a dataset and compare it with what its index, its manifest and its
    tokenizer promise.

    Args:
        tokenizer: None: the one that the manifest names, where its file is there.
        vocab_size: ids must be below this. None: that of `tokenizer` if given, else the manifest's.
    """
    findings, unchecked = _Findings(), []
    manifest = manifest_of(prefix)
    if manifest is None:
        there = with_ending(prefix, ".json").exists()
        why = "not a manifest of megacode" if there else "not there"
        unchecked.append(f"checksums: {prefix.name}.json is {why}")
    limit = vocab_size or (
        tokenizer.vocab_size if tokenizer else (manifest or {}).get("vocab_size")
    )
    if limit is None:
        unchecked.append(
            "vocabulary: nothing says its size; give --tokenizer FILE or --vocab-size N"
        )
    eod = None
    try:
        if manifest is None:
            raise UserError("no manifest says whether there is one")
        if "chat template" not in manifest:  # else the template decides how a conversation ends
            if not manifest.get("tokenizer", {}).get("eod"):
                raise UserError("the manifest says that there is none")
            eod = (tokenizer or tokenizer_of(prefix, manifest)).eod_id
    except UserError as error:
        unchecked.append(f"EOD at the ends of documents: {error}")
    documents = tokens = 0
    highest = -1
    for one in shards_at(prefix):
        own = manifest_of(one)
        if own is None and manifest is not None:
            findings.say("manifest", f"{one}: its manifest ({one.name}.json) is missing or damaged")
        try:
            shard = open_shard(one)
        except UserError as error:
            findings.say("file", str(error))
            documents += (own or {}).get("documents", 0)
            tokens += (own or {}).get("tokens", 0)
            continue
        if own:
            _check_manifest(shard, own, findings)
        highest = max(
            highest, _check_shard(shard, own, documents, limit, eod, findings, unchecked, on_bytes)
        )
        if "chat template" in (manifest or {}):
            _check_marks(shard, own, documents, findings, unchecked, on_bytes)
        documents, tokens = documents + shard.documents, tokens + shard.tokens
    if manifest and "shards" in manifest:
        for key, found in (("documents", documents), ("tokens", tokens)):
            if manifest.get(key, found) != found:
                findings.say(
                    "manifest",
                    f"{prefix}.json says {manifest[key]:,} {key}; its shards hold {found:,}",
                )
    return Verification(
        findings.first(10), findings.count, tuple(unchecked), highest, documents, tokens
    )


def _check_shard(
    shard: Shard,
    manifest: Mapping[str, Any] | None,
    first: int,
    limit: int | None,
    eod: int | None,
    findings: _Findings,
    unchecked: list[str],
    on_bytes: Callable[[int], None],
) -> int:
    """Index, checksums and tokens of one pair. `first`: number of its first document. The largest
    id."""
    index_is_whole = _check_index(shard, first, findings, on_bytes)
    segments = _checksums(shard, manifest, findings, unchecked)
    if eod is not None and index_is_whole:
        _check_no_document_is_empty(shard, first, findings)
    elif eod is not None:
        unchecked.append(
            f"EOD at the ends of documents of {shard.prefix.name}: its index does not say where "
            "they end"
        )
    reader = _TokenCheck(shard, first if index_is_whole else None, limit, eod, findings)
    for position, piece in _pieces(shard):
        segments.update(piece)
        reader.check(position, piece)
        on_bytes(piece.nbytes)
    return reader.highest


def _check_marks(
    shard: Shard,
    manifest: Mapping[str, Any] | None,
    first: int,
    findings: _Findings,
    unchecked: list[str],
    on_bytes: Callable[[int], None],
) -> None:
    """The loss marks of a shard of conversations: one a token, of the same documents."""
    try:
        marks = open_shard(loss_prefix(shard.prefix))
    except UserError as error:
        findings.say("file", str(error))
        return
    given = (manifest or {}).get("checksums")
    own = {"bin": given["loss.bin"], "idx": given["loss.idx"]} if given else {}
    checksums = {"checksums": {**given, **own}} if given else None
    _check_shard(marks, checksums, first, MARKS, None, findings, unchecked, on_bytes)
    if (marks.tokens, marks.documents) != (shard.tokens, shard.documents) or any(
        not np.array_equal(ours, theirs)
        for ours, theirs in zip(shard.document_lengths(), marks.document_lengths(), strict=True)
    ):
        findings.say(
            "marks", f"{marks.idx_path}: its documents are not those of {shard.idx_path.name}"
        )


def _check_index(
    shard: Shard, first: int, findings: _Findings, on_bytes: Callable[[int], None]
) -> bool:
    """Boundaries from 0 to the last sequence and never back; sequences of one token or more that
    tile the .bin. Whether all of it holds. `first`: number of the shard's first document."""
    idx, before, sequences = shard.idx_path, findings.count, shard.sequences
    last = 0
    for start, stop in chunks(shard.boundaries):
        edges = np.append(last, shard.document_boundaries(start, stop))
        number = first + start - 1

        def backwards(at: int, edges: NDArray[np.int64] = edges, number: int = number) -> str:
            return (
                f"{idx}: document {number + at:,} begins at sequence {edges[at]:,} and ends before "
                f"it, at {edges[at + 1]:,}"
            )

        findings.add("boundaries", np.flatnonzero(edges[1:] < edges[:-1]), backwards)
        last = int(edges[-1])
        on_bytes(8 * (stop - start))
    boundaries = None
    if findings.count == before:
        boundaries = shard.document_boundaries(0, shard.boundaries)

    def place(sequence: int) -> str:
        if boundaries is None:
            return f"{idx}: sequence {sequence:,}"
        document = int(np.searchsorted(boundaries, sequence, side="right")) - 1
        return f"{idx}: sequence {sequence:,} (document {first + document:,})"

    end, size = 0, shard.tokens * shard.dtype.itemsize
    for start, stop in chunks(sequences):
        lengths, offsets = shard.sequence_lengths(start, stop), shard.sequence_offsets(start, stop)
        ends = np.append(end, offsets + lengths.astype(np.int64) * shard.dtype.itemsize)

        def length(at: int, lengths: NDArray[np.int32] = lengths, start: int = start) -> str:
            return f"{place(start + at)} has a length of {lengths[at]:,}; expected 1 or more"

        def gap(at: int, offsets: Any = offsets, ends: Any = ends, start: int = start) -> str:
            return (
                f"{place(start + at)} begins at byte {offsets[at]:,} of the .bin; the one before "
                f"it ends at {ends[at]:,} (of {size:,})"
            )

        findings.add("length", np.flatnonzero(lengths <= 0), length)
        findings.add("offset", np.flatnonzero(offsets != ends[:-1]), gap)
        end = int(ends[-1])
        on_bytes(12 * (stop - start))
    return findings.count == before


def _check_no_document_is_empty(shard: Shard, first: int, findings: _Findings) -> None:
    """Where documents end with EOD, none is without a token."""
    for start, stop in chunks(shard.documents):
        edges = shard.document_boundaries(start, stop + 1)
        findings.add(
            "empty",
            first + start + np.flatnonzero(edges[1:] == edges[:-1]),
            lambda number: (
                f"{shard.idx_path}: document {number:,} is empty; it should end with EOD"
            ),
        )


def _check_manifest(shard: Shard, manifest: Mapping[str, Any], findings: _Findings) -> None:
    """Numbers that the manifest of one pair repeats."""
    numbers = {"documents": shard.documents, "tokens": shard.tokens, "token type": shard.dtype.name}
    for key, found in numbers.items():
        if manifest.get(key, found) != found:
            findings.say(
                "manifest",
                f"{shard.prefix}.json says {key} {manifest[key]}; the index says {found}",
            )


class _Segments:
    """Compares the .bin with the checksums of its consecutive segments as it is read."""

    def __init__(
        self, shard: Shard, expected: Sequence[tuple[int, str]], findings: _Findings
    ) -> None:
        self.shard, self.findings = shard, findings
        self.expected = iter(expected)
        self.start = self.left = 0
        self.digest: Any = None
        self.wanted = ""

    def update(self, piece: NDArray[Any]) -> None:
        """Hash the tokens that follow those of the last call."""
        data = memoryview(piece.data).cast("B")
        while len(data):
            if not self.left:
                size, self.wanted = next(self.expected, (0, ""))
                if not size:
                    return
                self.left, self.end, self.digest = size, self.start + size, xxhash.xxh3_128()
            part = data[: self.left]
            self.digest.update(part)
            self.left -= len(part)
            data = data[len(part) :]
            if not self.left:
                if self.digest.hexdigest() != self.wanted:
                    self.findings.say(
                        "checksum",
                        f"{self.shard.bin_path}: bytes {self.start:,} to {self.end:,} are not "
                        "those that were written (their checksum differs from the manifest's)",
                    )
                self.start = self.end


def _checksums(
    shard: Shard, manifest: Mapping[str, Any] | None, findings: _Findings, unchecked: list[str]
) -> _Segments:
    """Check the .idx against the manifest, and give what checks the .bin."""
    checksums = (manifest or {}).get("checksums")
    if manifest is not None and checksums is None:
        unchecked.append(f"checksums of {shard.prefix.name}: its manifest has none")
    elif checksums and checksums.get("algorithm") != "xxh3_128":
        unchecked.append(
            f"checksums of {shard.prefix.name}: unknown algorithm {checksums.get('algorithm')}"
        )
        checksums = None
    if not checksums:
        return _Segments(shard, (), findings)
    segments = [(int(size), str(digest)) for size, digest in checksums["bin"] if size]
    covered, size = sum(count for count, _ in segments), shard.tokens * shard.dtype.itemsize
    if covered != size:
        findings.say(
            "checksum",
            f"{shard.prefix}.json has checksums of {covered:,} bytes; "
            f"{shard.bin_path.name} has {size:,}",
        )
    digest = xxhash.xxh3_128()
    with open(shard.idx_path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    if digest.hexdigest() != checksums["idx"]:
        findings.say(
            "checksum",
            f"{shard.idx_path}: is not what was written (its checksum differs from the manifest's)",
        )
    return _Segments(shard, segments, findings)


def _pieces(shard: Shard) -> Iterator[tuple[int, NDArray[Any]]]:
    """(number of its first token, tokens) of pieces of the .bin, in order; each is overwritten by
    the next."""
    buffer = np.empty(CHUNK, dtype=shard.dtype)
    try:
        with open(shard.bin_path, "rb", buffering=0) as file:
            for start, stop in chunks(shard.tokens, CHUNK):
                piece = buffer[: stop - start]
                rest = memoryview(piece.data).cast("B")
                while len(rest):
                    got = file.readinto(rest)
                    if not got:
                        raise UserError(f"{shard.bin_path}: got shorter since it was opened")
                    rest = rest[got:]
                yield start, piece
    except OSError as error:
        raise UserError(f"{shard.bin_path}: cannot be read ({error.strerror or error})") from error


class _TokenCheck:
    """Looks at the tokens of one shard in order: ids below `limit`, EOD at the end of each document
    and nowhere else.

    `first` is the number of the shard's first document; None where its index cannot be relied on.
    """

    def __init__(
        self,
        shard: Shard,
        first: int | None,
        limit: int | None,
        eod: int | None,
        findings: _Findings,
    ) -> None:
        self.shard, self.first, self.limit, self.findings = shard, first, limit, findings
        self.eod = eod if first is not None else None
        self.highest = -1
        self.lengths = shard.document_lengths()
        self.ends = np.zeros(
            0, dtype=np.int64
        )  # of documents whose lengths are read and whose ends are to come
        self.last_end = 0

    def check(self, position: int, piece: NDArray[Any]) -> None:
        """`piece` begins at token `position` of the shard, where the last one ended."""
        low, high = int(piece.min()), int(piece.max())
        self.highest = max(self.highest, high)
        limit = self.limit if self.limit is not None else high + 1
        if low < 0 or high >= limit:
            wrong = np.flatnonzero((piece < 0) | (piece >= limit))
            size = f"the vocabulary of {limit:,}" if self.limit is not None else "any vocabulary"
            self.findings.add(
                "vocabulary",
                wrong,
                lambda at: f"{self._place(position + at)} is {int(piece[at]):,}, outside {size}",
            )
        if self.eod is None:
            return
        found = position + np.flatnonzero(piece == self.eod)
        expected = self._ends_up_to(position + len(piece)) - 1
        if np.array_equal(found, expected):
            return
        self.findings.add(
            "no EOD",
            np.setdiff1d(expected, found),
            lambda at: (
                f"{self._place(at)} is the last one and should be EOD ({self.eod}); "
                f"it is {piece[at - position]}"
            ),
        )
        self.findings.add(
            "early EOD",
            np.setdiff1d(found, expected),
            lambda at: f"{self._place(at)} is EOD ({self.eod}) before the document's end",
        )

    def _ends_up_to(self, position: int) -> NDArray[np.int64]:
        """Where those documents end that end after those of the last call and up to `position`;
        empty ones left out."""
        taken = []
        while True:
            count = int(np.searchsorted(self.ends, position, side="right"))
            taken.append(self.ends[:count])
            self.ends = self.ends[count:]
            if len(self.ends) or (lengths := next(self.lengths, None)) is None:
                return np.concatenate(taken)
            ends = self.last_end + np.cumsum(lengths, dtype=np.int64)
            self.last_end = int(ends[-1])
            self.ends = ends[lengths > 0]

    def _place(self, token: int) -> str:
        if self.first is None:
            return f"{self.shard.bin_path}: token {token:,} of the file"
        document, start, tokens = self.shard.document_at(token)
        number = self.first + document
        place = f"token {token - start:,} of document {number:,} ({tokens:,} tokens)"
        return f"{self.shard.bin_path}: {place}"
