"""Megatron-Core's IndexedDataset: `PREFIX.bin`, `PREFIX.idx`, and our manifest `PREFIX.json`.

`PREFIX.bin` holds tokens and nothing else. `PREFIX.idx` says where sequences and documents begin
(little-endian, after `_IndexWriter` in `megatron.core.datasets.indexed_dataset`):

    9 bytes  "MMIDIDX" 0 0
    uint64   version, 1
    uint8    code of the token type
    uint64   n, sequences
    uint64   d, document boundaries
    int32    [n] tokens of each sequence
    int64    [n] byte offset of each sequence in the .bin
    int64    [d] boundaries of documents, as sequence numbers: d - 1 documents

Megacode writes one sequence a document, byte for byte as Megatron-Core's builder does.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.files import inside, replace_file, write_json

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(kind): code for code, kind in _DTYPES.items()}
CHUNK = 1 << 20
"""Documents, sequences or tokens looked at together."""


def with_ending(prefix: Path, ending: str) -> Path:
    """`corpus/train` + `.idx` -> `corpus/train.idx`; unlike Path.with_suffix it keeps dots."""
    return prefix.with_name(prefix.name + ending)


def chunks(total: int, size: int = 0) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive runs of `size` (CHUNK)."""
    size = size or CHUNK
    return ((start, min(start + size, total)) for start in range(0, total, size))


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair. `tokens`, `sequences` and `boundaries` (documents + 1) are counts."""

    prefix: Path
    dtype: np.dtype[Any]
    tokens: int
    sequences: int
    boundaries: int

    @cached_property
    def bin_path(self) -> Path:
        return with_ending(self.prefix, ".bin")

    @cached_property
    def idx_path(self) -> Path:
        return with_ending(self.prefix, ".idx")

    @property
    def documents(self) -> int:
        return max(0, self.boundaries - 1)

    def _mapped(self, kind: str, offset: int, start: int, stop: int) -> NDArray[Any]:
        """Part of the .idx. It is unmapped with the array, so that it does not stay in memory."""
        if stop <= start:
            return np.zeros(0, dtype=kind)
        offset += _HEADER.size + start * np.dtype(kind).itemsize
        return np.memmap(self.idx_path, kind, "r", offset, (stop - start,))

    def sequence_lengths(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens of sequences [start, stop)."""
        return self._mapped("<i4", 0, start, stop)

    def sequence_offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        """Byte offsets of sequences [start, stop)."""
        return self._mapped("<i8", 4 * self.sequences, start, stop)

    def document_boundaries(self, start: int, stop: int) -> NDArray[np.int64]:
        """Boundaries [start, stop): document d is the sequences from boundary d to d + 1."""
        return self._mapped("<i8", 12 * self.sequences, start, stop)

    @cached_property
    def _whole_index(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All sequence offsets and document boundaries, for searches."""
        return (
            self.sequence_offsets(0, self.sequences),
            self.document_boundaries(0, self.boundaries),
        )

    def document_at(self, token: int) -> tuple[int, int, int]:
        """(number, first token, length) of the document that holds token number `token`."""
        offsets, boundaries = self._whole_index
        sequence = int(np.searchsorted(offsets, token * self.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(boundaries, sequence, side="right")) - 1
        first, after = (int(boundary) for boundary in boundaries[document : document + 2])
        start = int(offsets[first]) // self.dtype.itemsize
        if after == self.sequences:
            return document, start, self.tokens - start
        return document, start, int(offsets[after]) // self.dtype.itemsize - start

    def token_edges(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token at which each of documents [start, stop) begins, and at which the last one ends.

        int64 [stop - start + 1]. UserError if the index is damaged.
        """
        sequences = np.asarray(self.document_boundaries(start, stop + 1))
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or high > self.sequences:
            raise self._damaged()
        offsets = self.sequence_offsets(low, min(high + 1, self.sequences))
        edges = np.append(offsets // self.dtype.itemsize, self.tokens)[sequences - low]
        if (edges[1:] < edges[:-1]).any() or edges[0] < 0 or edges[-1] > self.tokens:
            raise self._damaged()
        return edges

    def document_lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document in order, some at a time. UserError if the index is damaged."""
        size = max(1, min(CHUNK, CHUNK * self.documents // max(self.sequences, 1)))
        for start, stop in chunks(self.documents, size):
            yield np.diff(self.token_edges(start, stop))

    def _damaged(self) -> UserError:
        return UserError(f"{self.idx_path} is damaged; `megacode inspect --verify` says where")


def open_shard(prefix: Path, label: str = "dataset") -> Shard:
    """Read the header and the last entries of an index and check them against both files' sizes.

    O(1). UserError, beginning with `label`, if the pair is incomplete or damaged.
    """
    idx, data = with_ending(prefix, ".idx"), with_ending(prefix, ".bin")
    for path, other in ((data, idx), (idx, data)):
        if not path.is_file():
            raise UserError(
                f"{label}: {path} is missing beside {other.name}; tokenize the source again"
            )
    with open(idx, "rb") as file:
        header = file.read(_HEADER.size)
        if header[:9] != _MAGIC:
            raise UserError(
                f"{label}: {idx} is not the index of a Megatron-Core IndexedDataset (MMIDIDX); "
                "tokenize the source"
            )
        if len(header) < _HEADER.size:
            raise UserError(f"{label}: {idx} is cut short; tokenize the source again")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1:
            raise UserError(
                f"{label}: {idx} has format version {version}; only version 1 can be read"
            )
        dtype = np.dtype(_DTYPES.get(code, "V1"))
        if dtype.kind not in "iu":
            found = dtype.name if code in _DTYPES else f"unknown (code {code})"
            raise UserError(f"{label}: {idx} holds numbers of type {found}; tokens are integers")
        size = os.fstat(file.fileno()).st_size
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        # Multimodal datasets append one byte a sequence, which text does not need.
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{label}: {idx} has {size:,} bytes where its header says {expected:,}; "
                "tokenize the source again"
            )
        end = 0
        if sequences:
            file.seek(_HEADER.size + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
            (offset,) = struct.unpack("<q", file.read(8))
            end = offset + length * dtype.itemsize
        first, last = -1, -1
        if boundaries:
            file.seek(_HEADER.size + 12 * sequences)
            (first,) = struct.unpack("<q", file.read(8))
            file.seek(_HEADER.size + 12 * sequences + 8 * (boundaries - 1))
            (last,) = struct.unpack("<q", file.read(8))
        if (first, last) != (0, sequences):
            found = f"begin at {first} and end at {last:,}" if boundaries else "are missing"
            raise UserError(
                f"{label}: {idx}: its document boundaries {found}, where its {sequences:,} "
                "sequences want 0 and their number; tokenize the source again"
            )
    there = data.stat().st_size
    if there != end:
        raise UserError(
            f"{label}: {data} has {there:,} bytes where its index says {end:,}: one of the two is "
            "from another run or cut short; tokenize the source again"
        )
    return Shard(prefix, dtype, end // dtype.itemsize, sequences, boundaries)


# ----------------------------------------------------------------------------------------- writing


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron-Core picks: uint16 for vocabularies below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """Write the .idx of documents of `lengths` tokens (int32 [n]), whole or not at all.

    Holds no second array of n in memory.
    """
    with replace_file(path) as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[np.dtype(dtype)], len(lengths), len(lengths) + 1))
        lengths.astype("<i4", copy=False).tofile(file)
        offset = 0
        for start, stop in chunks(len(lengths)):
            ends = offset + dtype.itemsize * np.cumsum(lengths[start:stop], dtype=np.int64)
            np.append(offset, ends[:-1]).astype("<i8", copy=False).tofile(file)
            offset = int(ends[-1])
        for start, stop in chunks(len(lengths) + 1):
            np.arange(start, stop, dtype="<i8").tofile(file)


# -------------------------------------------------------------------------- datasets and manifests


ENDINGS = (".json", ".idx", ".bin", ".records.npy")
LOSS_ENDINGS = (".loss.idx", ".loss.bin")
"""Of the loss marks of conversations."""


def files_of(prefix: Path) -> list[Path]:
    """The files of a dataset that is one shard, there or not; the manifest first."""
    return [with_ending(prefix, ending) for ending in (*ENDINGS, *LOSS_ENDINGS)]


def shards_beside(prefix: Path) -> list[Path]:
    """Prefixes PREFIX-00000 ... that have tokens, listed by a manifest or not."""
    numbered = re.compile(re.escape(prefix.name) + r"-\d{5,}")
    found = (path.with_suffix("") for path in prefix.parent.glob("*.bin"))
    return sorted(shard for shard in found if numbered.fullmatch(shard.name))


def remove_dataset(prefix: Path) -> None:
    """Remove a dataset with all its shards, the manifest first: what has a manifest is complete."""
    for one in (prefix, *shards_beside(prefix)):
        for path in files_of(one):
            path.unlink(missing_ok=True)


def listed_shards(prefix: Path) -> list[Path]:
    """The shards that the manifest of a dataset lists, in order; none for one shard or no manifest.

    Raises:
        UserError: a name leads out of the folder of the dataset.
    """
    path = with_ending(prefix, ".json")
    try:
        names = list(json.loads(path.read_text(encoding="utf-8")).get("shards", []))
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    shards = [inside(prefix.parent, name, f"{path}, `shards`") for name in names]
    for name in names:
        for ending in (".bin", ".idx"):
            inside(prefix.parent, name + ending, f"{path}, `shards`")
    return shards


def is_complete(prefix: Path) -> bool:
    """Whether a dataset of this tool, with all its shards, is there."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return False
    endings = ENDINGS + (LOSS_ENDINGS if "chat template" in manifest else ())
    prefixes = listed_shards(prefix) or [prefix]
    return all(with_ending(one, ending).exists() for one in prefixes for ending in endings)


def write_manifest(prefix: Path, manifest: Mapping[str, Any]) -> None:
    """`PREFIX.json`: written last, so that a dataset with a manifest is complete."""
    write_json(with_ending(prefix, ".json"), dict(manifest))


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset, if any. UserError if the file is something else."""
    path = with_ending(prefix, ".json")
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] not in ("megacode dataset", "megacode corpus"):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: in the way: not the manifest of a dataset; choose another output prefix"
        ) from None
    return manifest
