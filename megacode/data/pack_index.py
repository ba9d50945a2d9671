"""A shard's packs on disk: made once, by one process, and read by all through a memory map.

The file is PREFIX.pack-S beside the shard (S: sequence length), or in the folder `data.pack_cache`;
PREFIX.rows-S where a pack is one document. Little-endian:

    for each block of documents:
    int64 [pieces], int32 [pieces], uint32 [packs + 1]
                                 first token and length of each piece, first piece of each pack
    int64 [blocks, 3]            of each block: its byte offset, packs, pieces
    JSON                         `_identity`, and documents, tokens and documents that were cut
    uint64, uint64, 8 bytes      blocks, bytes of JSON, "MEGAPACK"

Written whole or not at all, and made again where its identity is not that of the shard at hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megacode.data.best_fit import BLOCK, pack_documents
from megacode.data.indexed import Shard
from megacode.errors import UserError
from megacode.files import replace_file
from megacode.lock import take
from megacode.plan.streams import PACKING_ALGORITHM
from megacode.recipe.schema import Packing

_TRAILER = struct.Struct("<QQ8s")
_MAGIC = b"MEGAPACK"
_MANY = 5_000_000
"""Documents that take seconds, which a line on stderr explains."""


@dataclass(frozen=True, eq=False)
class PackIndex:
    """An open index.

    Attributes:
        table: int64 [blocks, 3], as in the file.
        documents, tokens: how many.
        cut: documents longer than a pack.
    """

    path: Path
    table: NDArray[np.int64]
    documents: int
    tokens: int
    cut: int

    @cached_property
    def ends(self) -> list[int]:
        """Packs up to the end of each block."""
        return self.table[:, 1].cumsum().tolist()

    @property
    def packs(self) -> int:
        return self.ends[-1] if self.ends else 0

    @cached_property
    def _map(self) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))

    def pieces(self, pack: int) -> tuple[list[int], list[int]]:
        """First token (in the shard) and length of each piece of a pack, in the shard's order."""
        if not 0 <= pack < self.packs:
            raise IndexError(f"{self.path}: pack {pack} is outside [0, {self.packs})")
        block = bisect_right(self.ends, pack)
        offset, packs, pieces = self.table[block].tolist()
        row = pack - (self.ends[block] - packs)
        lengths, firsts = offset + 8 * pieces, offset + 12 * pieces
        first, stop = self._map[firsts + 4 * row :][:8].view("<u4").tolist()
        starts = self._map[offset + 8 * first : offset + 8 * stop].view("<i8")
        tokens = self._map[lengths + 4 * first : lengths + 4 * stop].view("<i4")
        return starts.tolist(), tokens.tolist()


def open_pack_index(
    shard: Shard,
    sequence_length: int,
    cache: Path | None = None,
    packing: Packing = "best_fit",
) -> PackIndex:
    """The index of a shard's packs of `sequence_length` + 1 tokens, made if none fits.

    Of several processes that ask for it at once, one makes it and the others wait. UserError if it
    cannot be written.
    """
    path = index_path(shard, sequence_length, cache, packing)
    identity = _identity(shard, sequence_length, packing)
    try:
        if found := _read(path, identity):
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f"{path.name}.building")
        # Where the lock is lost, two processes write the same file, each whole.
        with take(building, wait=math.inf, on_lost=lambda _: None):
            if found := _read(path, identity):  # made while this process waited
                return found
            if shard.documents > _MANY:
                line = f"packing {shard.documents:,} documents of {shard.prefix} into {path}"
                print(line, file=sys.stderr, flush=True)
            with replace_file(path) as file:
                file.writelines(_contents(shard, identity))
        found = _read(path, identity)
    except OSError as error:
        raise UserError(
            f"data.packing: cannot write the pack index {path} ({error.strerror or error}); set "
            "`data.pack_cache` to a folder that can be written and that every node sees"
        ) from error
    if found is None or identity != _identity(shard, sequence_length, packing):
        raise UserError(
            f"{shard.idx_path}: changed while it was packed; start again when it is finished"
        )
    return found


def index_path(
    shard: Shard, sequence_length: int, cache: Path | None, packing: Packing = "best_fit"
) -> Path:
    """Beside the shard, or in the folder `cache` under a name of its own."""
    name = shard.prefix.name
    if cache is not None:
        folder = str(shard.prefix.absolute()).encode()
        name += "-" + hashlib.blake2b(folder, digest_size=4).hexdigest()
    kind = "pack" if packing == "best_fit" else "rows"
    return (cache or shard.prefix.parent) / f"{name}.{kind}-{sequence_length}"


def _identity(shard: Shard, sequence_length: int, packing: Packing) -> dict[str, int | str]:
    """Everything that a shard's packs depend on.

    `index_digest` is of 16 stretches of the .idx, the header among them: another tokenization is
    another index, even of the same size.
    """
    status, digest = os.stat(shard.idx_path), hashlib.blake2b(digest_size=16)
    with open(shard.idx_path, "rb") as file:
        for at in np.linspace(0, max(status.st_size - 1024, 0), 16).astype(int).tolist():
            file.seek(at)
            digest.update(file.read(1024))
    return {
        "sequence_length": sequence_length,
        "algorithm": PACKING_ALGORITHM,
        "block": BLOCK,
        "index_bytes": status.st_size,
        "index_time": status.st_mtime_ns,
        "index_digest": digest.hexdigest(),
        **({} if packing == "best_fit" else {"packing": packing}),
    }


def _contents(shard: Shard, identity: dict[str, int | str]) -> Iterator[bytes]:
    """The parts of the file. One block is held at a time."""
    capacity = int(identity["sequence_length"]) + 1
    table, offset, tokens, cut = [], 0, 0, 0
    for number, first in enumerate(range(0, shard.documents, BLOCK)):
        edges = shard.token_edges(first, min(first + BLOCK, shard.documents))
        lengths = np.diff(edges)
        together = "packing" not in identity
        packs = pack_documents(edges[:-1], lengths, capacity, number, together=together)
        parts = (packs.start.astype("<i8"), packs.tokens.astype("<i4"), packs.first.astype("<u4"))
        raw = b"".join(part.tobytes() for part in parts)
        raw += bytes(-len(raw) % 8)
        yield raw
        table.append((offset, len(packs), len(packs.start)))
        offset, tokens = offset + len(raw), tokens + int(edges[-1] - edges[0])
        cut += int((lengths > capacity).sum())
    facts = {**identity, "documents": shard.documents, "tokens": tokens, "cut": cut}
    text = json.dumps(facts).encode()
    yield np.array(table, dtype="<i8").tobytes() + text
    yield _TRAILER.pack(len(table), len(text), _MAGIC)


def _read(path: Path, identity: dict[str, int | str]) -> PackIndex | None:
    """The index if it is there, whole, and of this identity."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _TRAILER.size, 0))
            blocks, length, magic = _TRAILER.unpack(file.read(_TRAILER.size))
            if magic != _MAGIC:
                return None
            file.seek(size - _TRAILER.size - length - 24 * blocks)
            table = np.frombuffer(file.read(24 * blocks), dtype="<i8").reshape(blocks, 3)
            facts = json.loads(file.read(length))
    except (FileNotFoundError, NotADirectoryError, ValueError, struct.error):
        return None
    counts = {key: facts.pop(key, None) for key in ("documents", "tokens", "cut")}
    return PackIndex(path, table, **counts) if facts == identity else None


@dataclass(frozen=True, eq=False)
class SourcePacks:
    """The packs of all shards of a source, numbered from the first shard's on."""

    indexes: tuple[PackIndex, ...]
    ends: list[int]
    """Packs up to the end of each shard."""
    first_tokens: list[int]
    """Of each shard: its first token's number in the source."""

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def cut(self) -> int:
        """Documents longer than a pack."""
        return sum(index.cut for index in self.indexes)

    def pieces(self, pack: int) -> list[tuple[int, int]]:
        """(first token in the source, tokens) of each piece of a pack, in order."""
        shard = bisect_right(self.ends, pack)
        index, before = self.indexes[shard], self.first_tokens[shard]
        starts, tokens = index.pieces(pack - (self.ends[shard] - index.packs))
        return [(before + start, count) for start, count in zip(starts, tokens, strict=True)]


def open_packs(
    shards: Sequence[Shard],
    sequence_length: int,
    cache: Path | None = None,
    packing: Packing = "best_fit",
) -> SourcePacks:
    """The packs of a source; UserError where an index cannot be made."""
    indexes = tuple(open_pack_index(shard, sequence_length, cache, packing) for shard in shards)
    ends = list(accumulate(index.packs for index in indexes))
    return SourcePacks(indexes, ends, list(accumulate((s.tokens for s in shards), initial=0)))
