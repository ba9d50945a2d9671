"""Which input file and record a document of a dataset was made from, where the dataset says so.

`PREFIX.records.npy` is int64 [documents, 2]: number of the input file, from 0, and number of the
record in it, from 1 (of a JSONL file: the line). The files are the list "input files" of the
dataset's manifest (`path` of each). Where there are very many they are lines of the file that its
"input files table" names (path, and more after a tab). The manifest of a shard names its "dataset".
`megacode preprocess` writes all of it; datasets of other tools have none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.indexed import with_ending
from megacode.errors import UserError
from megacode.files import inside


@dataclass(frozen=True, eq=False)
class InputRecords:
    """`records`: int64 [documents, 2], mapped from `path`; `files`: paths as given."""

    path: Path
    records: NDArray[np.int64]
    files: tuple[str, ...]

    def origin(self, document: int) -> tuple[str, int]:
        """(input file, record in it) of a document. UserError if the tables do not have it."""
        wrong = f"has {len(self.records):,} documents and number {document:,} was asked for"
        if document < len(self.records):
            file, record = self.records[document].tolist()
            if 0 <= file < len(self.files):
                return self.files[file], record
            wrong = f"names input file {file:,} of {len(self.files):,}"
        raise UserError(
            f"{self.path}: {wrong}; it is of another dataset: tokenize the source again, or "
            "remove the file"
        )


def read_records(prefix: Path) -> InputRecords | None:
    """The tables of a dataset; None if it has none. UserError if they are damaged."""
    path = with_ending(prefix, ".records.npy")
    if not path.exists():
        return None
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if records.ndim != 2 or records.shape[1] != 2 or records.dtype.kind != "i":
            raise ValueError(f"an array of {records.dtype} {records.shape}")
        return InputRecords(path, records, input_files(prefix))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read together with the dataset's manifest ({error}); tokenize the "
            "source again, or remove the file"
        ) from error


def input_files(prefix: Path) -> tuple[str, ...]:
    """Paths of the files that a dataset was made of; KeyError where its manifest has none.

    Raises:
        UserError: a name in the manifest leads out of its folder.
    """
    path, manifest = _manifest(prefix)
    if "dataset" in manifest:
        path, manifest = _manifest(inside(path.parent, manifest["dataset"], f"{path}, `dataset`"))
    if "input files table" in manifest:
        where = f"{path}, `input files table`"
        return _table(inside(path.parent, manifest["input files table"], where))
    return tuple(str(file["path"]) for file in manifest["input files"])


def text_bytes(prefix: Path) -> int | None:
    """Bytes of the text that a dataset was made of; None where no manifest says so."""
    try:
        return int(_manifest(prefix)[1]["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest(prefix: Path) -> tuple[Path, dict[str, Any]]:
    path = with_ending(prefix, ".json")
    return path, json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _table(path: Path) -> tuple[str, ...]:
    """First column of a table: shards of one dataset share it, and it may be large."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return tuple(line.split("\t")[0] for line in lines if line)
