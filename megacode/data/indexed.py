"""Writing Megatron-Core IndexedDatasets (`PREFIX.bin`, `PREFIX.idx`) with numpy alone, and the manifest `PREFIX.json`.

Byte for byte what megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder writes for the same documents, one
sequence a document. The .bin is every document's tokens, one after another. The .idx, little-endian:

    9 bytes  "MMIDIDX" 0 0
    uint64   version, 1
    uint8    code of the token type (8: uint16, 4: int32)
    uint64   n, number of sequences
    uint64   n + 1, number of document boundaries
    int32    [n] tokens of each sequence
    int64    [n] byte offset of each sequence in the .bin
    int64    [n + 1] document boundaries, as sequence numbers: 0 ... n
"""

from __future__ import annotations

import glob
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megacode.errors import UserError
from megacode.files import inside, replace_file, write_json

_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
_CHUNK = 1 << 20
_SHARD = re.compile(r"-\d{5,}")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron-Core picks: uint16 for vocabularies below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype[Any]) -> None:
    """The .idx of documents of `lengths` tokens (int32 [n]), whole or not at all. Holds no second array of n."""
    with replace_file(path) as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, _CODES[np.dtype(dtype)], len(lengths), len(lengths) + 1))
        lengths.astype("<i4", copy=False).tofile(file)
        offset = 0
        for start in range(0, len(lengths), _CHUNK):
            ends = np.cumsum(lengths[start : start + _CHUNK], dtype=np.int64) * dtype.itemsize + offset
            file.write(struct.pack("<q", offset))
            ends[:-1].astype("<i8", copy=False).tofile(file)
            offset = int(ends[-1])
        for start in range(0, len(lengths) + 1, _CHUNK):
            np.arange(start, min(start + _CHUNK, len(lengths) + 1), dtype="<i8").tofile(file)


class TokenFile:
    """Documents appended to an open .bin file, with the count of each. `file` is the caller's to open and close."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype = file, dtype
        self.lengths: list[int] = []
        self.tokens = 0

    def add(self, ids: list[int] | np.ndarray) -> None:
        """One document's ids; each must fit the token type (numpy raises OverflowError if not)."""
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.tokens += len(ids)


ENDINGS = (".json", ".idx", ".bin", ".records.npy")


def files_of(prefix: Path) -> list[Path]:
    """The files of a dataset that is one shard, there or not; the manifest first."""
    return [with_ending(prefix, ending) for ending in ENDINGS]


def shards_beside(prefix: Path) -> list[Path]:
    """Prefixes PREFIX-00000 ... that have tokens, listed by a manifest or not."""
    found = (path.with_suffix("") for path in prefix.parent.glob(f"{glob.escape(prefix.name)}-[0-9]*.bin"))
    return sorted(shard for shard in found if _SHARD.fullmatch(shard.name[len(prefix.name) :]))


def remove_dataset(prefix: Path) -> None:
    """Take a dataset with all its shards away, never leaving an index without its data or a manifest without its
    dataset."""
    shards = shards_beside(prefix)
    with_ending(prefix, ".json").unlink(missing_ok=True)
    for path in (path for one in (prefix, *shards) for path in files_of(one)):
        path.unlink(missing_ok=True)


def listed_shards(prefix: Path) -> list[Path]:
    """The shards that the manifest of a dataset lists, in order; none if it is one shard, or no manifest is there.

    Raises:
        UserError: a name leads out of the folder of the dataset.
    """
    path = with_ending(prefix, ".json")
    try:
        names = list(json.loads(path.read_text(encoding="utf-8")).get("shards", []))
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    for name in names:
        for ending in ("", ".bin", ".idx"):
            inside(prefix.parent, name + ending if isinstance(name, str) else name, f"{path}, `shards`")
    return [prefix.parent / name for name in names]


def is_complete(prefix: Path) -> bool:
    """Whether a dataset of this tool, with all its shards, is there."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return False
    prefixes = listed_shards(prefix) or [prefix]
    return all(path.exists() for one in prefixes for path in files_of(one))


def with_ending(prefix: Path, ending: str) -> Path:
    """`corpus/train` + `.idx` -> `corpus/train.idx`; dots in the name stay (unlike Path.with_suffix)."""
    return prefix.with_name(prefix.name + ending)


def write_manifest(prefix: Path, manifest: Mapping[str, Any]) -> None:
    """`PREFIX.json`: written last, so that a dataset with a manifest is complete."""
    write_json(with_ending(prefix, ".json"), dict(manifest))


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset; None if there is none. UserError if the file is something else."""
    path = with_ending(prefix, ".json")
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] not in ("megacode dataset", "megacode corpus"):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: in the way: not the manifest of a dataset; choose another output prefix") from None
    return manifest
