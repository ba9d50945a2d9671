"""Blocks of documents -> datasets of one shard or several, each .bin/.idx/.records.npy, whole or
not at all.

1. `_cut` plans from the sizes of the blocks which documents go into which shard.
2. Workers copy the documents to their places in the shards, a piece at a time (`_fill`).
3. Workers write each shard's index and give its files their names (`_close`).

Tokens of conversations come joined with their loss marks; here they are parted into the dataset and
`PREFIX.loss` (see `megacode.data.loss_marks`).

`PREFIX.records.npy`, int64 [documents, 2], says where every document came from: number of the input
file, record in it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacode.corpus.preprocess.counts import GroupCounts
from megacode.corpus.preprocess.finished_parts import file_checksum
from megacode.corpus.workers import Workers
from megacode.data import indexed, loss_marks

_PIECE = 64 << 20
"""Bytes of a .bin that one checksum covers, where they are not those of a part."""
_RECORDS_HEADER = 128
"""Bytes of the header of a .records.npy."""
_COPY = 1 << 17


@dataclass(frozen=True)
class Block:
    """Consecutive documents in PATH.bin, PATH.lengths, PATH.records and PATH.places (see
    `finished_parts`)."""

    path: Path
    counts: GroupCounts
    checksum: str = ""
    """XXH3-128 of the .bin, where it is known."""
    lines_before: int = 0
    """To be added to the numbers of the records."""

    def lengths(self, first: int = 0, count: int = -1) -> NDArray[np.int32]:
        """Tokens of documents [first, first + count)."""
        return np.fromfile(_file(self.path, "lengths"), "<i4", count, offset=4 * first)

    def records(self, first: int = 0, count: int = -1) -> NDArray[np.int64]:
        """Input file and record of documents [first, first + count): [count, 2]."""
        flat = np.fromfile(_file(self.path, "records"), "<i8", 2 * count, offset=16 * first)
        return flat.reshape(-1, 2) + np.array([0, self.lines_before])

    def tokens(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.fromfile(_file(self.path, "bin"), dtype)

    def places(self) -> list[tuple[str, str]]:
        """Repository and path of each document; empty without `--repository`."""
        return read_places(_file(self.path, "places"))


def write_block(
    path: Path,
    tokens: NDArray[Any],
    lengths: NDArray[np.integer[Any]],
    records: NDArray[np.int64],
    places: Sequence[tuple[str, str]] = (),
    text_bytes: int = 0,
) -> Block:
    """Write the files of a block of one document or more."""
    tokens.tofile(_file(path, "bin"))
    lengths.astype("<i4").tofile(_file(path, "lengths"))
    records.astype("<i8").tofile(_file(path, "records"))
    if places:
        append_places(_file(path, "places"), places)
    counts = GroupCounts(len(lengths), len(tokens), text_bytes, int(lengths.max()))
    return Block(path, counts)


def read_places(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as lines:
        return [tuple(json.loads(line)) for line in lines]


def append_places(path: Path, places: Sequence[tuple[str, str]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(place) + "\n" for place in places)


def _file(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


# ----------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Fragment:
    """Documents [first, first + documents) of a block, which are its tokens
    [start, start + size)."""

    block: Block
    first: int
    documents: int
    start: int
    size: int
    whole: bool


@dataclass(frozen=True)
class Piece:
    """Fragments that one checksum covers. In the shard they begin at document `first`, token
    `start`."""

    prefix: Path
    first: int
    start: int
    fragments: tuple[Fragment, ...]

    @property
    def size(self) -> int:
        return sum(fragment.size for fragment in self.fragments)


@dataclass(frozen=True)
class WrittenShard:
    prefix: Path
    documents: int
    tokens: int
    checksums: dict[str, Any]
    """As the manifest has them: of the .bin piece by piece."""


def _cut(blocks: Sequence[Block], itemsize: int, shard_size: int | None) -> list[list[Fragment]]:
    """Fragments of each shard: as many documents as `shard_size` bytes hold, but one at least."""
    shards: list[list[Fragment]] = [[]]
    tokens = sum(block.counts.tokens for block in blocks)
    room = limit = tokens if shard_size is None else max(shard_size // itemsize, 1)
    for block in blocks:
        size = block.counts.tokens
        if size <= room:
            shards[-1].append(Fragment(block, 0, block.counts.documents, 0, size, True))
            room -= size
            continue
        edges = np.append(0, np.cumsum(block.lengths(), dtype=np.int64))
        first = 0
        while first < block.counts.documents:
            start = int(edges[first])
            last = int(np.searchsorted(edges, start + room, side="right")) - 1
            if last <= first and shards[-1]:
                shards.append([])
                room = limit
                continue
            last = max(last, first + 1)
            size = int(edges[last]) - start
            shards[-1].append(Fragment(block, first, last - first, start, size, False))
            room -= size
            first = last
    return shards


def _pieces(
    prefix: Path, fragments: Sequence[Fragment], dtype: np.dtype[Any], marked: bool
) -> list[Piece]:
    """A whole part is a piece; other fragments are joined until they have `_PIECE` bytes."""
    joined: list[list[Fragment]] = []
    room = 0
    for fragment in fragments:
        known = fragment.whole and fragment.block.checksum and not marked
        if known or room <= 0:
            joined.append([])
            room = 0 if known else _PIECE
        joined[-1].append(fragment)
        room -= fragment.size * dtype.itemsize
    pieces = []
    first = start = 0
    for own in joined:
        pieces.append(Piece(prefix, first, start, tuple(own)))
        first += sum(fragment.documents for fragment in own)
        start += pieces[-1].size
    return pieces


# ---------------------------------------------------------------------------------------- the files


def write_datasets(
    datasets: Mapping[Path, Sequence[Block]],
    dtype: np.dtype[Any],
    marked: bool,
    shard_size: int | None,
    workers: Workers,
    on_bytes: Callable[[int], None],
) -> dict[Path, list[WrittenShard]]:
    """Write a dataset under each prefix. With `shard_size`: shards PREFIX-00000, PREFIX-00001, ...
    of at most so many bytes (or one document) each. `marked`: the blocks hold loss marks too."""
    shards: list[tuple[Path, list[Piece]]] = []
    for prefix, blocks in datasets.items():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for number, fragments in enumerate(_cut(blocks, dtype.itemsize, shard_size)):
            ending = "" if shard_size is None else f"-{number:05d}"
            shard_prefix = indexed.with_ending(prefix, ending)
            shards.append((prefix, _pieces(shard_prefix, fragments, dtype, marked)))
    pieces = [piece for _, own in shards for piece in own]
    digests = {}
    for number, found in workers.map(_fill, [(piece, dtype, marked) for piece in pieces]):
        digests[pieces[number].prefix, pieces[number].start] = found
        on_bytes(pieces[number].size * dtype.itemsize)
    documents = [
        sum(fragment.documents for piece in own for fragment in piece.fragments)
        for _, own in shards
    ]
    closing = [
        (own[0].prefix, count, dtype, marked)
        for (_, own), count in zip(shards, documents, strict=True)
    ]
    indexes = dict(workers.map(_close, closing))
    written: dict[Path, list[WrittenShard]] = {}
    for number, (prefix, own) in enumerate(shards):
        checksums: dict[str, Any] = {"algorithm": "xxh3_128"}
        for at, (name, itemsize) in enumerate((("", dtype.itemsize), ("loss.", 1))[: 1 + marked]):
            checksums[f"{name}bin"] = [
                [piece.size * itemsize, digests[piece.prefix, piece.start][at]] for piece in own
            ]
            checksums[f"{name}idx"] = indexes[number][at]
        tokens = sum(piece.size for piece in own)
        shard = WrittenShard(own[0].prefix, documents[number], tokens, checksums)
        written.setdefault(prefix, []).append(shard)
    return written


def _partial(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f".{prefix.name}.{ending}.partial")


def _fill(piece: Piece, dtype: np.dtype[Any], marked: bool) -> list[str]:
    """Copy a piece's tokens, lengths and records to their places in the shard's partial files. The
    XXH3-128 of its tokens, and of its loss marks."""
    digests, known = [xxhash.xxh3_128() for _ in range(1 + marked)], ""
    with (
        _open(_partial(piece.prefix, "bin"), piece.start * dtype.itemsize) as tokens,
        _open(_partial(piece.prefix, "lengths"), 4 * piece.first) as lengths,
        _open(_partial(piece.prefix, "records.npy"), _RECORDS_HEADER + 16 * piece.first) as records,
    ):
        for fragment in piece.fragments:
            block = fragment.block
            if marked:
                _part_from_marks(piece, fragment, tokens, dtype, digests)
            else:
                known = block.checksum if fragment.whole else ""
                with open(_file(block.path, "bin"), "rb", buffering=0) as source:
                    source.seek(fragment.start * dtype.itemsize)
                    size = fragment.size * dtype.itemsize
                    _copy(source, tokens, size, None if known else digests[0])
            block.lengths(fragment.first, fragment.documents).tofile(lengths)
            block.records(fragment.first, fragment.documents).tofile(records)
    return [known] if known else [digest.hexdigest() for digest in digests]


def _part_from_marks(
    piece: Piece, fragment: Fragment, out: BinaryIO, dtype: np.dtype[Any], digests: Sequence[Any]
) -> None:
    """Write a fragment's ids to `out`, and its marks to the same tokens of the shard's .loss."""
    joined = np.fromfile(
        _file(fragment.block.path, "bin"), np.uint32, fragment.size, offset=4 * fragment.start
    )
    ids, marks = loss_marks.split(joined)
    with _open(_partial(piece.prefix, "loss.bin"), out.tell() // dtype.itemsize) as loss:
        for array, file, digest in zip(
            (ids.astype(dtype), marks), (out, loss), digests, strict=True
        ):
            array.tofile(file)
            digest.update(array.data)


def _open(path: Path, position: int) -> BinaryIO:
    """Open a file that other workers write too, at a position."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
    file.seek(position)
    return file


def _copy(source: BinaryIO, target: BinaryIO, size: int, digest: Any) -> None:
    """Copy from position to position; in the kernel, where it can, unless the bytes are to be
    hashed."""
    in_kernel = digest is None and hasattr(os, "copy_file_range")
    while size:
        copied = 0
        if in_kernel:
            try:
                copied = os.copy_file_range(source.fileno(), target.fileno(), size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
            in_kernel = copied > 0
        if not copied:
            data = source.read(min(_COPY, size))
            if not data:
                raise OSError(f"{source.name}: ends {size} bytes too early")
            copied = target.write(data)
            if digest is not None:
                digest.update(data[:copied])
            if copied < len(data):
                source.seek(copied - len(data), os.SEEK_CUR)
        size -= copied


def _close(prefix: Path, documents: int, dtype: np.dtype[Any], marked: bool) -> list[str]:
    """Write the index of a filled shard (and of its marks), and give its files their names.
    XXH3-128 of each index."""
    with open(_partial(prefix, "records.npy"), "r+b") as records:
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents, 2)}
        np.lib.format.write_array_header_1_0(records, header)
        assert records.tell() == _RECORDS_HEADER
    for ending in ("bin", "records.npy", *["loss.bin"] * marked):
        with open(_partial(prefix, ending), "rb") as file:
            os.fsync(file.fileno())
        os.replace(_partial(prefix, ending), _file(prefix, ending))
    lengths = np.memmap(_partial(prefix, "lengths"), dtype="<i4", mode="r")
    indexes = {indexed.with_ending(prefix, ".idx"): dtype}
    if marked:
        indexes[indexed.with_ending(prefix, ".loss.idx")] = np.dtype(np.uint8)
    for index, kind in indexes.items():
        indexed.write_index(index, lengths, kind)
    del lengths
    _partial(prefix, "lengths").unlink()
    return [file_checksum(index) for index in indexes]
