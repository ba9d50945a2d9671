"""One shard on disk: a Megatron-Core IndexedDataset, opened without reading it.

`PREFIX.bin` holds tokens and nothing else; `PREFIX.idx` says where sequences and documents begin (little-endian, after
`_IndexWriter` in `megatron.core.datasets.indexed_dataset`):

    9 bytes  "MMIDIDX" 0 0
    uint64   version, 1
    uint8    code of the token type
    uint64   n, sequences
    uint64   d, document boundaries
    int32    [n] tokens of each sequence
    int64    [n] byte offset of each sequence in the .bin
    int64    [d] boundaries of documents, as sequence numbers: d - 1 documents
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_DTYPE_NAMES = {6: "float64", 7: "float32"}


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair. `tokens` and `sequences` count; `boundaries` is d, one more than the documents."""

    prefix: Path
    dtype: np.dtype[Any]
    tokens: int
    sequences: int
    boundaries: int

    @cached_property
    def bin_path(self) -> Path:
        return _ending(self.prefix, ".bin")

    @cached_property
    def idx_path(self) -> Path:
        return _ending(self.prefix, ".idx")

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """Byte offset of each sequence, int64 [sequences], mapped from the index."""
        return np.memmap(self.idx_path, "<i8", "r", _HEADER.size + 4 * self.sequences, (self.sequences,))

    @cached_property
    def _boundaries(self) -> NDArray[np.int64]:
        """First sequence of each document and the end, int64 [boundaries]."""
        return np.memmap(self.idx_path, "<i8", "r", _HEADER.size + 12 * self.sequences, (self.boundaries,))

    def document_at(self, token: int) -> tuple[int, int, int]:
        """(document, its first token, tokens in it) of the document that holds token number `token` of this shard."""
        sequence = int(np.searchsorted(self._offsets, token * self.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(self._boundaries, sequence, side="right")) - 1
        first, after = (int(i) for i in self._boundaries[document : document + 2])
        start = int(self._offsets[first]) // self.dtype.itemsize
        end = int(self._offsets[after]) // self.dtype.itemsize if after < self.sequences else self.tokens
        return document, start, end - start

    def spans(self, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and length of documents [first, stop): int64 each, in O(stop - first)."""
        sequences = np.asarray(self._boundaries[first : stop + 1])
        edges = np.full(len(sequences), self.tokens, dtype=np.int64)
        inside = sequences < self.sequences
        edges[inside] = self._offsets[sequences[inside]] // self.dtype.itemsize
        return edges[:-1], np.diff(edges)

    @property
    def documents(self) -> int:
        return max(0, self.boundaries - 1)


def open_shard(prefix: Path, label: str = "dataset") -> Shard:
    """Read the header and the last entries of one index and check them against both files' sizes: O(1).

    UserError, beginning with `label`, if the pair is incomplete or damaged.
    """
    idx, data = _ending(prefix, ".idx"), _ending(prefix, ".bin")
    for path, other in ((data, idx), (idx, data)):
        if not path.is_file():
            raise UserError(f"{label}: {path} is missing beside {other.name}; tokenize the source again")
    with open(idx, "rb") as file:
        header = file.read(_HEADER.size)
        if header[:9] != _MAGIC:
            raise UserError(
                f"{label}: {idx} is not the index of a Megatron-Core IndexedDataset (MMIDIDX); tokenize the source"
            )
        if len(header) < _HEADER.size:
            raise UserError(f"{label}: {idx} is cut short; tokenize the source again")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{label}: {idx} has format version {version}; only version 1 can be read")
        if code not in _DTYPES:
            found = _DTYPE_NAMES.get(code, f"unknown (code {code})")
            raise UserError(f"{label}: {idx} holds numbers of type {found}; tokens are integers")
        # Multimodal datasets append one byte a sequence, which text does not need.
        size, expected = os.fstat(file.fileno()).st_size, _HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{label}: {idx} has {size:,} bytes where its header says {expected:,}; tokenize the source again"
            )
        dtype, end = np.dtype(_DTYPES[code]).newbyteorder("<"), 0
        if sequences:
            file.seek(_HEADER.size + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
            (offset,) = struct.unpack("<q", file.read(8))
            end = offset + length * dtype.itemsize
    there = data.stat().st_size
    if there != end:
        raise UserError(
            f"{label}: {data} has {there:,} bytes where its index says {end:,}: one of the two is from another run or "
            "cut short; tokenize the source again"
        )
    return Shard(prefix, dtype, end // dtype.itemsize, sequences, boundaries)


def _ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)
