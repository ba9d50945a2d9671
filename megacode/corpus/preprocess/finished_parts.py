"""The files that a part leaves in the job's folder, and whether they are complete.

They lie under the part's name; its `.json`, written last, says that they are complete, and holds their checksums. For
every group of documents (split, value of `--split-by`), numbered G:

    NAME.G.bin       the documents' tokens, one after another
    NAME.G.lengths   int32 [n]
    NAME.G.records   int64 [n, 2]: number of the input file; record in it
    NAME.G.hashes    24 bytes a document, where duplicates are to be found: hash of the text, and its bytes
    NAME.G.places    one JSON line a document, [repository, path], where those are put together
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacode.corpus.preprocess.counts import Counts, Group
from megacode.corpus.preprocess.splitting import CorpusPart
from megacode.errors import UserError
from megacode.files import replace_file

_WRITE = 1 << 17
"""Bytes a system call: with a megabyte, Linux was measured to write new files at 0.5 GB/s, with this at 3.5."""


@dataclass(frozen=True)
class Finished:
    """A complete part. `lines`: read from a span or chunk of a file, so that the next one's can be numbered."""

    counts: Counts
    lines: int
    groups: dict[Group, dict[str, Any]]
    """Of each group: its number G, bytes of the .bin, checksums of its files."""
    inputs: list[tuple[int, int, str]]
    """What was read: number of the input file, bytes, XXH3-128 of them."""


def part_file(folder: Path, part: CorpusPart, ending: str) -> Path:
    return folder / f"{part.name}.{ending}"


def finished_part(folder: Path, part: CorpusPart) -> Finished | None:
    path = part_file(folder, part, "json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        groups = {
            Group.parse(name): {**group, "number": int(group["number"])}
            for name, group in value["groups"].items()
        }
        return Finished(Counts.from_json(value["counts"]), value["lines"], groups, value["inputs"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); remove it, and its part is tokenized again"
        ) from None


def file_checksum(path: Path, start: int = 0, size: int | None = None) -> str:
    """XXH3-128 of a file or of `size` bytes of it, hex."""
    digest = xxhash.xxh3_128()
    left = path.stat().st_size - start if size is None else size
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left > 0 and (chunk := file.read(min(1 << 20, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


class GroupFiles:
    """The files of one group in one part. `more`: `hashes`, `places`, where they are wanted."""

    def __init__(
        self, folder: Path, part: CorpusPart, number: int, more: Sequence[str], stack: ExitStack
    ) -> None:
        endings = ["bin", "lengths", "records", *more]
        self.number = number
        self.files: Mapping[str, BinaryIO] = {
            ending: stack.enter_context(
                replace_file(part_file(folder, part, f"{number}.{ending}"), durable=False)
            )
            for ending in endings
        }
        self.checksums = {ending: xxhash.xxh3_128() for ending in endings}

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        records: NDArray[np.int64],
        hashes: bytes,
        places: Sequence[tuple[str, str]],
    ) -> None:
        self._write("bin", tokens.data)
        self._write("lengths", lengths.astype("<i4").data)
        self._write("records", np.ascontiguousarray(records).data)
        if hashes:
            self._write("hashes", hashes)
        if places:
            self._write("places", "".join(json.dumps(place) + "\n" for place in places).encode())

    def _write(self, ending: str, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _WRITE):
            self.files[ending].write(view[start : start + _WRITE])
        self.checksums[ending].update(view)

    def finish(self) -> dict[str, Any]:
        checksums = {ending: digest.hexdigest() for ending, digest in self.checksums.items()}
        return {"number": self.number, "bytes": self.files["bin"].tell(), "checksums": checksums}
