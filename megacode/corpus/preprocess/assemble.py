"""Blocks of documents -> a dataset: one shard or several, each .bin/.idx/.records.npy, whole or not at all.

`PREFIX.records.npy`, int64 [documents, 2], says where every document came from: number of the input file, record in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacode.corpus.preprocess.copying import copy_range
from megacode.corpus.preprocess.counts import GroupCounts
from megacode.corpus.preprocess.finished_parts import file_checksum
from megacode.corpus.preprocess.order import Block
from megacode.data import indexed
from megacode.files import replace_file, sync_folder

_PIECE = 64 << 20
"""Bytes of a .bin that one checksum covers, where they are not those of a part."""


@dataclass(frozen=True)
class WrittenShard:
    prefix: Path
    documents: int
    tokens: int
    checksums: dict[str, Any]
    """As the manifest has them: of the .bin piece by piece, so that they can be made and verified in parallel."""


@dataclass(frozen=True)
class WrittenDataset:
    shards: list[WrittenShard]
    counts: GroupCounts


def write_dataset(
    prefix: Path,
    blocks: Iterator[Block],
    dtype: np.dtype[Any],
    shard_size: int | None,
    on_bytes: Callable[[int], None],
    laid: Path | None = None,
) -> WrittenDataset:
    """Write PREFIX, or shards PREFIX-00000, PREFIX-00001, ... of at most `shard_size` bytes (or one document) each.

    `laid`: a file on the same disk that holds the blocks' tokens already, one after another; it becomes the only shard's.
    """
    shards: list[WrittenShard] = []
    counts = GroupCounts()
    with ExitStack() as stack:
        current: _Shard | None = None
        for block in blocks:
            counts.add(
                GroupCounts(
                    len(block.lengths),
                    int(block.lengths.sum()),
                    block.bytes,
                    int(block.lengths.max()),
                )
            )
            ends = np.cumsum(block.lengths, dtype=np.int64) * dtype.itemsize
            first = 0
            while first < len(ends):
                if current is None:
                    name = (
                        prefix
                        if shard_size is None
                        else indexed.with_ending(prefix, f"-{len(shards):05d}")
                    )
                    current = _Shard(name, dtype, stack, laid)
                done = int(ends[first - 1]) if first else 0
                last = len(ends)
                if shard_size is not None:
                    last = int(
                        np.searchsorted(ends, done + shard_size - current.size, side="right")
                    )
                    if last == first and current.size == 0:
                        last = first + 1  # longer than a shard: a shard of its own
                if last > first:
                    current.add(
                        _documents(block, first, last, ends, dtype), int(ends[last - 1]) - done
                    )
                    on_bytes(int(ends[last - 1]) - done)
                    first = last
                else:
                    shards.append(current.close())
                    stack.close()
                    current = None
        if current:
            shards.append(current.close())
    for shard in shards:
        _write_index(shard.prefix, dtype)
        shard.checksums["idx"] = file_checksum(indexed.with_ending(shard.prefix, ".idx"))
    return WrittenDataset(shards, counts)


def _documents(
    block: Block, first: int, last: int, ends: NDArray[np.int64], dtype: np.dtype[Any]
) -> Block:
    """Documents [first, last) of a block; `ends` in bytes."""
    if (first, last) == (0, len(ends)):
        return block
    begin = int(ends[first - 1]) // dtype.itemsize if first else 0
    tokens = block.load(dtype, begin, int(ends[last - 1]) // dtype.itemsize - begin)
    return Block(block.lengths[first:last], block.records[first:last], 0, tokens)


class _Shard:
    """One open shard. Lengths and records are kept beside it on disk until the index is written."""

    def __init__(
        self, prefix: Path, dtype: np.dtype[Any], stack: ExitStack, laid: Path | None = None
    ) -> None:
        self.prefix, self.dtype, self.laid = prefix, dtype, laid
        if laid is None:
            self.bin: BinaryIO = stack.enter_context(
                replace_file(indexed.with_ending(prefix, ".bin"))
            )
        self.lengths: BinaryIO = stack.enter_context(open(_side(prefix, "lengths"), "wb"))  # noqa: SIM115
        self.records: BinaryIO = stack.enter_context(open(_side(prefix, "records"), "wb"))  # noqa: SIM115
        self.size = self.documents = 0
        self.pool = stack.enter_context(ThreadPoolExecutor(2))
        self.copies: list[Future[None]] = []
        self.pieces: list[tuple[int, str]] = []
        self.open_piece, self.open_bytes = xxhash.xxh3_128(), 0

    def add(self, block: Block, size: int) -> None:
        if block.file:
            self._end_piece()
            if self.laid is None:
                self.bin.flush()
                self.copies.append(
                    self.pool.submit(
                        copy_range, block.file, block.start, self.bin.fileno(), self.size, size
                    )
                )
                self.bin.seek(size, os.SEEK_CUR)
            self.pieces.append((size, block.checksum))
            if len(self.copies) > 64:
                self._wait()
        else:
            assert block.tokens is not None
            data = np.ascontiguousarray(block.tokens).data
            self.bin.write(data)
            self.open_piece.update(data)
            self.open_bytes += size
            if self.open_bytes >= _PIECE:
                self._end_piece()
        self.lengths.write(block.lengths.astype("<i4").tobytes())
        self.records.write(np.ascontiguousarray(block.records, dtype="<i8").tobytes())
        self.size += size
        self.documents += len(block.lengths)

    def _wait(self) -> None:
        for copy in self.copies:
            copy.result()
        self.copies.clear()

    def _end_piece(self) -> None:
        if self.open_bytes:
            self.pieces.append((self.open_bytes, self.open_piece.hexdigest()))
            self.open_piece, self.open_bytes = xxhash.xxh3_128(), 0

    def close(self) -> WrittenShard:
        self._end_piece()
        self._wait()
        if self.laid is not None:
            _adopt(self.laid, indexed.with_ending(self.prefix, ".bin"))
        checksums = {"algorithm": "xxh3_128", "bin": [list(piece) for piece in self.pieces]}
        return WrittenShard(
            self.prefix, self.documents, self.size // self.dtype.itemsize, checksums
        )


def _adopt(laid: Path, target: Path) -> None:
    """Give a file its final name, whole and there after a power cut; the old name stays until the run is over."""
    with open(laid, "rb") as file:
        os.fsync(file.fileno())
    partial = target.with_name(f".{target.name}.laid.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(laid, partial)
    except OSError:  # a file system without hard links
        os.replace(laid, partial)
    os.replace(partial, target)
    sync_folder(target.parent)


def _side(prefix: Path, name: str) -> Path:
    return prefix.with_name(f".{prefix.name}.{name}.partial")


def _write_index(prefix: Path, dtype: np.dtype[Any]) -> None:
    """The .idx and .records.npy from what was kept beside the shard."""
    lengths = np.memmap(_side(prefix, "lengths"), dtype="<i4", mode="r")
    indexed.write_index(indexed.with_ending(prefix, ".idx"), lengths, dtype)
    with replace_file(indexed.with_ending(prefix, ".records.npy")) as out:
        header = {"descr": "<i8", "fortran_order": False, "shape": (len(lengths), 2)}
        np.lib.format.write_array_header_1_0(out, header)
        out.flush()
        copy_range(_side(prefix, "records"), 0, out.fileno(), out.tell(), 16 * len(lengths))
    del lengths
    for name in ("lengths", "records"):
        _side(prefix, name).unlink()
