"""Blocks in the order of the input, without duplicates, shuffled, or one document a repository.

Shuffling and putting together are external sorts by a 64-bit key: documents are dealt out to
buckets on disk by the upper bits of their keys (`_deal`), then each bucket is sorted in memory
(`_sort`). No order depends on how the corpus was cut into parts. Memory: about 1 GiB a process,
whatever the corpus.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.corpus.preprocess.counts import Group
from megacode.corpus.preprocess.finished_parts import HASH, Finished, part_file
from megacode.corpus.preprocess.shards import Block, append_places, read_places, write_block
from megacode.corpus.workers import Workers
from megacode.data.permute import make_key, uniform_bits
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import load_tokenizer

BUCKET_BYTES = 256 << 20
_MOST_BUCKETS = 4096
_MOST_SORTING = 4
"""Processes that sort buckets at a time, so that memory stays bounded."""
_SORTED_HASHES = 1 << 25
"""Hashes sorted at a time: about 1 GiB with what sorting needs."""
_DOCUMENT = np.dtype([("key", "<u8"), ("length", "<i8"), ("file", "<i8"), ("record", "<i8")])

Blocks = dict[Group, list[Block]]


def lines_before(parts: Sequence[Finished]) -> dict[str, int]:
    """By name of each part that counts lines from its own start: lines of the file before it."""
    before: dict[str, int] = {}
    file, lines = -1, 0
    for finished in parts:
        part = finished.part
        if part.span is None and part.chunk is None:
            continue
        if part.files[0] != file:
            file, lines = part.files[0], 0
        before[part.name] = lines
        lines += finished.lines
    return before


def as_read(folder: Path, parts: Sequence[Finished]) -> Blocks:
    """The blocks of each group in the order of the input."""
    before = lines_before(parts)
    blocks: Blocks = {}
    for finished in parts:
        for group, number in finished.groups.items():
            block = Block(
                part_file(folder, finished.part, str(number)),
                finished.counts.groups[group],
                finished.checksums[f"{number}.bin"],
                before.get(finished.part.name, 0),
            )
            blocks.setdefault(group, []).append(block)
    return blocks


# --------------------------------------------------------------------------------------- duplicates


def without_duplicates(
    work: Path,
    folder: Path,
    parts: Sequence[Finished],
    blocks: Blocks,
    dtype: np.dtype[Any],
    workers: Workers,
) -> Blocks:
    """The blocks without the documents whose text was read before, in whatever group. `work`: a
    folder for files."""
    marks = _find_duplicates(work / "duplicates", folder, parts)
    first = 0
    tasks = {}
    for finished in parts:
        end = first + finished.counts.total.documents
        if marks[first:end].any():
            for number in finished.groups.values():
                path = part_file(folder, finished.part, str(number))
                hashes = part_file(folder, finished.part, "hashes")
                tasks[path] = (hashes, number, work / "duplicates", first, work / path.name, dtype)
        first = end
    changed = [(g, i) for g, own in blocks.items() for i, b in enumerate(own) if b.path in tasks]
    arguments = [(blocks[g][i], *tasks[blocks[g][i].path]) for g, i in changed]
    kept: dict[Group, list[Block | None]] = {group: [*own] for group, own in blocks.items()}
    for number, block in workers.map(_keep, arguments):
        group, i = changed[number]
        kept[group][i] = block
    return {group: [block for block in own if block] for group, own in kept.items()}


def _find_duplicates(path: Path, folder: Path, parts: Sequence[Finished]) -> NDArray[np.bool_]:
    """For every document in the order of the input, whether it repeats one before it: bool [n], in
    a file.

    Hashes are compared whole (128 bits), a range of them at a time where there are too many.
    """
    total = sum(finished.counts.total.documents for finished in parts)
    marks = np.memmap(path, dtype=np.bool_, mode="w+", shape=(total,))
    passes = -(-total // _SORTED_HASHES)
    edges = [(i << 64) // passes for i in range(passes + 1)]
    for low, high in itertools.pairwise(edges):
        chosen, places = [], []
        start = 0
        for finished in parts:
            if not finished.groups:
                continue
            hashes = np.fromfile(part_file(folder, finished.part, "hashes"), dtype=HASH)
            own = np.flatnonzero((hashes["high"] >= low) & (hashes["high"] <= high - 1))
            chosen.append(hashes[["high", "low"]][own])
            places.append(start + own)
            start += len(hashes)
        both, place = np.concatenate(chosen), np.concatenate(places)
        order = np.lexsort(
            (both["low"], both["high"])
        )  # stable: equal ones stay in the input's order
        both, place = both[order], place[order]
        marks[place[1:][both[1:] == both[:-1]]] = True
    return marks


def _keep(
    block: Block,
    hashes: Path,
    number: int,
    marks: Path,
    first: int,
    target: Path,
    dtype: np.dtype[Any],
) -> Block | None:
    """The documents of a block (group `number` of its part) that are not marked, in files of their
    own. `first`: the mark of the part's first document."""
    texts = np.fromfile(hashes, dtype=HASH)
    own = texts["group"] == number
    kept = ~np.fromfile(marks, np.bool_, len(texts), offset=first)[own]
    if kept.all() or not kept.any():
        return block if kept.all() else None
    lengths = block.lengths()
    return write_block(
        target,
        block.tokens(dtype)[np.repeat(kept, lengths)],
        lengths[kept],
        block.records()[kept],
        list(itertools.compress(block.places(), kept)),
        int(texts["size"][own][kept].sum(dtype=np.int64)),
    )


# ------------------------------------------------------------------------------------ external sort


@dataclass(frozen=True)
class Order:
    """A random order, of documents or of repositories. The latter become one document each, their
    files by path: [bos] <reponame> name, (<filename> path text) ..., [eod]."""

    seed: int
    dtype: np.dtype[Any]
    repositories: schema.TokenizerSection | None = None
    """The tokenizer for what stands around a repository's files; None: documents."""


def reordered(
    work: Path, blocks: Blocks, sizes: Mapping[Group, int], order: Order, workers: Workers
) -> Blocks:
    """The blocks in another order. `sizes`: bytes of tokens of each group. `work`: a folder for
    files."""
    dealing: list[tuple[Any, ...]] = []
    sorting: list[tuple[Any, ...]] = []
    groups: list[Group] = []
    for number, (group, own) in enumerate(blocks.items()):
        folder = work / f"group-{number}"
        folder.mkdir()
        buckets = min(_MOST_BUCKETS, max(1, -(-sizes[group] // BUCKET_BYTES)))
        stripes = min(workers.count, len(own))
        dealing += [(own[i::stripes], order, folder, i, buckets) for i in range(stripes)]
        sorting += [(order, folder, bucket, stripes) for bucket in range(buckets)]
        groups += [group] * buckets
    for _ in workers.map(_deal, dealing):
        pass
    made = dict(workers.map(_sort, sorting, _MOST_SORTING))
    found: Blocks = {}
    for number, group in enumerate(groups):
        if block := made[number]:
            found.setdefault(group, []).append(block)
    for group, own in found.items():  # the bytes of text belong to all buckets together
        own[0].counts.bytes = sum(block.counts.bytes for block in blocks[group])
    return found


def _deal(blocks: Sequence[Block], order: Order, folder: Path, stripe: int, buckets: int) -> None:
    """Append the documents to files of their buckets, FOLDER/BUCKET-STRIPE.*."""
    for block in blocks:
        tokens, records, places = block.tokens(order.dtype), block.records(), block.places()
        documents = np.empty(block.counts.documents, dtype=_DOCUMENT)
        documents["key"] = _keys(order, records, places)
        documents["length"] = block.lengths()
        documents["file"], documents["record"] = records.T
        bucket = ((documents["key"] >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
        ends = np.cumsum(documents["length"])
        starts = ends - documents["length"]
        by_bucket = np.argsort(bucket, kind="stable")
        for members in np.split(by_bucket, np.flatnonzero(np.diff(bucket[by_bucket])) + 1):
            path = folder / f"{bucket[members[0]]}-{stripe}"
            with open(path.with_suffix(".tokens"), "ab") as file:
                np.concatenate([tokens[starts[i] : ends[i]] for i in members]).tofile(file)
            with open(path.with_suffix(".documents"), "ab") as file:
                documents[members].tofile(file)
            if places:
                append_places(path.with_suffix(".places"), [places[i] for i in members])


def _keys(
    order: Order, records: NDArray[np.int64], places: Sequence[tuple[str, str]]
) -> NDArray[np.uint64]:
    """Of each document: random, or of its repository."""
    if order.repositories is None:
        file, record = records.astype(np.uint64).T
        key = make_key(order.seed, "order of documents")
        return uniform_bits(key, (file << np.uint64(40)) + record)
    salt = make_key(order.seed, "order of repositories").to_bytes(8, "little")
    names = (name.encode(errors="surrogateescape") for name, _ in places)
    digests = (hashlib.blake2b(name, digest_size=8, salt=salt).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _sort(order: Order, folder: Path, bucket: int, stripes: int) -> Block | None:
    """The documents of one bucket in order."""
    paths = [folder / f"{bucket}-{stripe}" for stripe in range(stripes)]
    paths = [path for path in paths if path.with_suffix(".documents").exists()]
    if not paths:
        return None
    documents = np.concatenate([np.fromfile(p.with_suffix(".documents"), _DOCUMENT) for p in paths])
    tokens = np.concatenate([np.fromfile(p.with_suffix(".tokens"), order.dtype) for p in paths])
    places = [place for path in paths for place in read_places(path.with_suffix(".places"))]
    for path in paths:
        for ending in (".tokens", ".documents", ".places"):
            path.with_suffix(ending).unlink(missing_ok=True)
    ends = np.cumsum(documents["length"])
    texts = np.split(tokens, ends[:-1])
    as_read = np.lexsort((documents["record"], documents["file"]))
    if order.repositories is None:
        first = as_read[np.argsort(documents["key"][as_read], kind="stable")].tolist()
        made = [texts[i] for i in first]
    else:
        keys = documents["key"].tolist()
        files = sorted(as_read.tolist(), key=lambda i: (keys[i], places[i]))
        first, made = _put_together(order, files, texts, places)
    return write_block(
        folder / f"{bucket}.sorted",
        np.concatenate(made),
        np.array([len(text) for text in made]),
        np.stack([documents["file"][first], documents["record"][first]], axis=1),
    )


def _put_together(
    order: Order,
    files: Sequence[int],
    texts: Sequence[NDArray[Any]],
    places: Sequence[tuple[str, str]],
) -> tuple[list[int], list[NDArray[Any]]]:
    """Of each repository of sorted `files`: its first file, and its document."""
    assert order.repositories is not None
    tokenizer = load_tokenizer(order.repositories)
    start = [tokenizer.bos_id] if order.repositories.bos else []
    end = np.array([tokenizer.eod_id] if order.repositories.eod else [], dtype=order.dtype)
    first, made = [], []
    for name, members in itertools.groupby(files, key=lambda i: places[i][0]):
        own = list(members)
        head = [*start, tokenizer.token_id("<reponame>"), *tokenizer.encode(name)]
        first.append(own[0])
        made.append(np.concatenate([np.array(head, order.dtype), *(texts[i] for i in own), end]))
    return first, made
