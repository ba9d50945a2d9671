"""Which documents of the finished parts go into a dataset, and in which order. Memory: about 1 GiB, whatever the corpus.

As they were read; without the second and later copies of a text; shuffled; or a repository's files put together. The
last two are external sorts by a 64-bit key: documents are dealt out to buckets on disk by their keys' upper bits, then
one bucket after another is put in order in memory. No order depends on how the corpus was cut into parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.corpus.preprocess.counts import Group
from megacode.corpus.preprocess.finished_parts import Finished, part_file
from megacode.corpus.preprocess.layout import Layout
from megacode.corpus.preprocess.splitting import CorpusPart
from megacode.data.permute import make_key, uniform_bits
from megacode.tokenizer.tokenizer import Tokenizer

BUCKET_BYTES = 256 << 20
_MOST_BUCKETS = 4096
_SORTED_HASHES = 1 << 25
"""Hashes sorted at a time: about 1 GiB with what sorting needs."""
_DOCUMENT = np.dtype([("key", "<u8"), ("length", "<i8"), ("file", "<i8"), ("record", "<i8")])

Parts = Sequence[tuple[CorpusPart, Finished]]


@dataclass(frozen=True)
class Block:
    """Consecutive documents. Their tokens: an array, or a stretch of a file whose checksum is known."""

    lengths: NDArray[np.integer[Any]]
    """Tokens of each document [n]."""
    records: NDArray[np.int64]
    """Number of the input file, and record in it [n, 2]."""
    bytes: int
    """Of UTF-8 text."""
    tokens: NDArray[Any] | None = None
    file: Path | None = None
    start: int = 0
    """In the file, bytes."""
    checksum: str = ""
    places: Sequence[tuple[str, str]] = ()
    """Repository and path of each document, where they are to be put together."""

    def load(self, dtype: np.dtype[Any], first: int = 0, count: int | None = None) -> NDArray[Any]:
        """`count` of the block's tokens from number `first` on; without, all of them."""
        count = int(self.lengths.sum()) - first if count is None else count
        if self.file:
            return np.fromfile(
                self.file, dtype=dtype, offset=self.start + first * dtype.itemsize, count=count
            )
        assert self.tokens is not None
        return self.tokens[first : first + count]


@dataclass(frozen=True)
class Repositories:
    """How the files of a repository become one document: [bos] <reponame> name, (<filename> path text) ..., [eod]."""

    tokenizer: Tokenizer
    bos: bool
    eod: bool


def lines_before(parts: Parts) -> dict[str, int]:
    """For every part that counts lines from its own start (by name): lines of the file before it."""
    before: dict[str, int] = {}
    file, lines = -1, 0
    for part, finished in parts:
        if part.span is None and part.chunk is None:
            continue
        if part.files[0] != file:
            file, lines = part.files[0], 0
        before[part.name] = lines
        lines += finished.lines
    return before


def blocks_as_read(
    layout: Layout,
    parts: Parts,
    group: Group,
    dtype: np.dtype[Any],
    duplicates: Mapping[str, NDArray[np.bool_]] | None,
) -> Iterator[Block]:
    """A group's documents in the order of the input, but for `duplicates` (by part and number of the group)."""
    before = lines_before(parts)
    folder = layout.folder
    for part, finished in parts:
        if group not in finished.groups:
            continue
        here = finished.groups[group]
        number = here["number"]
        path, start = layout.place(part, finished, group)
        lengths = np.fromfile(part_file(folder, part, f"{number}.lengths"), dtype="<i4")
        records = np.fromfile(part_file(folder, part, f"{number}.records"), dtype="<i8").reshape(
            -1, 2
        )
        records[:, 1] += before.get(part.name, 0)
        size = finished.counts.groups[group].bytes
        places = _places(part_file(folder, part, f"{number}.places"))
        dropped = None if duplicates is None else duplicates[f"{part.name}.{number}"]
        if dropped is None or not dropped.any():
            yield Block(
                lengths,
                records,
                size,
                file=path,
                start=start,
                checksum=here["checksums"]["bin"],
                places=places,
            )
            continue
        kept = ~dropped
        if not kept.any():
            continue
        tokens = np.fromfile(path, dtype=dtype, offset=start, count=int(lengths.sum()))[
            np.repeat(kept, lengths)
        ]
        sizes = _hashes(folder, part, number)["size"]
        places = [place for place, keep in zip(places, kept, strict=True) if keep] if places else []
        yield Block(lengths[kept], records[kept], int(sizes[kept].sum()), tokens, places=places)


def _places(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as lines:
            return [tuple(json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []


# ----------------------------------------------------------------------------------------------------------- duplicates


def _hashes(folder: Path, part: CorpusPart, number: int) -> NDArray[Any]:
    kind = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<i8")])
    return np.fromfile(part_file(folder, part, f"{number}.hashes"), dtype=kind)


def find_duplicates(folder: Path, parts: Parts) -> dict[str, NDArray[np.bool_]]:
    """By part and number of the group (`NAME.G`): which documents repeat one that was read before, bool [n].

    The marks lie in a file. Hashes are compared whole (128 bits), a range of them at a time where there are too many.
    """
    parts = [(part, finished) for part, finished in parts if finished.groups]
    groups = {
        part.name: sorted(group["number"] for group in finished.groups.values())
        for part, finished in parts
    }
    sizes = [
        sum(group.documents for group in finished.counts.groups.values()) for _, finished in parts
    ]
    starts = list(itertools.accumulate(sizes, initial=0))
    total = starts[-1]
    marks = np.memmap(folder / "duplicates", dtype=np.bool_, mode="w+", shape=(max(total, 1),))
    passes = -(-total // _SORTED_HASHES) or 1
    edges = [(i << 64) // passes for i in range(passes + 1)]
    for low, high in itertools.pairwise(edges):
        chosen = []
        for (part, _), size, start in zip(parts, sizes, starts, strict=False):
            hashes = np.concatenate([_hashes(folder, part, number) for number in groups[part.name]])
            order = _as_read(folder, part, groups[part.name])
            places = (
                np.arange(size)
                if passes == 1
                else np.flatnonzero((hashes["high"] >= low) & (hashes["high"] <= high - 1))
            )
            chosen.append((hashes["high"][places], hashes["low"][places], order[places] + start))
        first, second, place = (np.concatenate(arrays) for arrays in zip(*chosen, strict=True))
        order = np.lexsort((place, second, first))
        first, second, place = first[order], second[order], place[order]
        again = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
        marks[place[1:][again]] = True
    found = {}
    for (part, finished), start, end in zip(parts, starts, starts[1:], strict=False):
        marks[start:end] = marks[start:end][_as_read(folder, part, groups[part.name])]
        counts = {
            group["number"]: finished.counts.groups[name].documents
            for name, group in finished.groups.items()
        }
        at = start
        for number in groups[part.name]:
            found[f"{part.name}.{number}"] = marks[at : at + counts[number]]
            at += counts[number]
    return found


def _as_read(folder: Path, part: CorpusPart, groups: Sequence[int]) -> NDArray[np.int64]:
    """For the documents of a part, one group after another: each one's place in the order of the input, int64 [n]."""
    records = [
        np.fromfile(part_file(folder, part, f"{number}.records"), dtype="<i8").reshape(-1, 2)
        for number in groups
    ]
    file, record = np.concatenate(records).T
    return np.lexsort((record, file)).argsort()


# ------------------------------------------------------------------------------------------------------- external sort


def shuffled(
    blocks: Iterator[Block], folder: Path, size: int, dtype: np.dtype[Any], seed: int
) -> Iterator[Block]:
    """Documents in a random order that depends on `seed` and each one's place in the input. `size`: bytes of tokens."""
    key = make_key(seed, "order of documents")

    def keys(block: Block) -> NDArray[np.uint64]:
        file, record = block.records.astype(np.uint64).T
        return uniform_bits(key, (file << np.uint64(40)) + record)

    for bucket in _buckets(blocks, keys, folder, size, dtype):
        order = np.lexsort(
            (bucket.documents["record"], bucket.documents["file"], bucket.documents["key"])
        )
        yield bucket.block([[i] for i in order.tolist()])


def by_repository(
    blocks: Iterator[Block],
    how: Repositories,
    folder: Path,
    size: int,
    dtype: np.dtype[Any],
    seed: int,
) -> Iterator[Block]:
    """One document a repository, its files by path; repositories in a random order that depends on `seed`."""
    tokenizer = how.tokenizer
    start = [tokenizer.bos_id] if how.bos else []
    end = np.array([tokenizer.eod_id] if how.eod else [], dtype=dtype)
    salt = make_key(seed, "order of repositories").to_bytes(8, "little")

    def keys(block: Block) -> NDArray[np.uint64]:
        names = (name.encode(errors="surrogateescape") for name, _ in block.places)
        digests = b"".join(
            hashlib.blake2b(name, digest_size=8, salt=salt).digest() for name in names
        )
        return np.frombuffer(digests, dtype="<u8")

    for bucket in _buckets(blocks, keys, folder, size, dtype):
        documents, places = bucket.documents, bucket.places
        rank = np.lexsort((documents["record"], documents["file"])).argsort()
        order = sorted(
            range(len(documents)), key=lambda i: (int(documents["key"][i]), places[i], int(rank[i]))
        )
        groups = [list(files) for _, files in itertools.groupby(order, key=lambda i: places[i][0])]
        heads = [
            np.array(
                [*start, tokenizer.token_id("<reponame>"), *tokenizer.encode(places[files[0]][0])],
                dtype=dtype,
            )
            for files in groups
        ]
        yield bucket.block(groups, heads, end)


@dataclass(frozen=True)
class _Bucket:
    documents: NDArray[Any]
    """_DOCUMENT [n]."""
    tokens: NDArray[Any]
    places: Sequence[tuple[str, str]]
    bytes: int

    def block(
        self,
        groups: Sequence[Sequence[int]],
        heads: Sequence[NDArray[Any]] | None = None,
        end: NDArray[Any] | None = None,
    ) -> Block:
        """Documents made of the groups' members, each with its head before and `end` after it."""
        lengths = self.documents["length"]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        pieces: list[NDArray[Any]] = []
        out_lengths = []
        for number, members in enumerate(groups):
            first = len(pieces)
            if heads is not None:
                pieces.append(heads[number])
            pieces += [self.tokens[starts[i] : ends[i]] for i in members]
            if end is not None:
                pieces.append(end)
            out_lengths.append(sum(map(len, pieces[first:])))
        leaders = [members[0] for members in groups]
        records = np.stack(
            [self.documents["file"][leaders], self.documents["record"][leaders]], axis=1
        )
        return Block(
            np.array(out_lengths, dtype=np.int64), records, self.bytes, np.concatenate(pieces)
        )


def _buckets(
    blocks: Iterator[Block],
    keys: Callable[[Block], NDArray[np.uint64]],
    folder: Path,
    size: int,
    dtype: np.dtype[Any],
) -> Iterator[_Bucket]:
    """Deal documents out to buckets on disk by the upper bits of their keys, then load one after another."""
    count = min(_MOST_BUCKETS, max(1, -(-size // BUCKET_BYTES)))
    work = folder / "buckets"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    text_bytes = 0
    for block in blocks:
        text_bytes += block.bytes
        tokens = block.load(dtype)
        documents = np.empty(len(block.lengths), dtype=_DOCUMENT)
        documents["key"], documents["length"] = keys(block), block.lengths
        documents["file"], documents["record"] = block.records.T
        bucket = ((documents["key"] >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(documents["length"])
        starts = ends - documents["length"]
        for number, members in itertools.groupby(order.tolist(), key=lambda i: int(bucket[i])):
            chosen = list(members)
            with open(work / f"{number}.tokens", "ab") as file:
                for i in chosen:
                    file.write(tokens[starts[i] : ends[i]].data)
            with open(work / f"{number}.documents", "ab") as file:
                file.write(documents[chosen].tobytes())
            if block.places:
                with open(work / f"{number}.places", "a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(block.places[i]) + "\n" for i in chosen)
    for number in range(count):
        if not (work / f"{number}.documents").exists():
            continue
        documents = np.fromfile(work / f"{number}.documents", dtype=_DOCUMENT)
        places = _places(work / f"{number}.places")
        # The bytes of text belong to all buckets together; the first one carries them.
        yield _Bucket(
            documents, np.fromfile(work / f"{number}.tokens", dtype=dtype), places, text_bytes
        )
        text_bytes = 0
        for ending in ("tokens", "documents", "places"):
            (work / f"{number}.{ending}").unlink(missing_ok=True)
    shutil.rmtree(work)
