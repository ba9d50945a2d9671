"""The files of a tokenized part, and whether they are complete.

They lie in the run's folder under the part's name. NAME.json is written last: it says that the
others are complete, and holds their checksums. Documents of one split and value of `--split-by` are
a group, numbered G within the part.

    NAME.G.bin       tokens of the documents, one after another
    NAME.G.lengths   int32 [n], tokens of each document
    NAME.G.records   int64 [n, 2], number of the input file and record in it
    NAME.G.places    JSON lines [repository, path], with `--repository`
    NAME.hashes      HASH [documents of all groups, in the order of the input], with `--deduplicate`
    NAME.bad.jsonl   records that were set aside (see `quarantine`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.counts import Counts, Group
from megacode.corpus.preprocess.splitting import CorpusPart, Unit, unit_parts, unpack
from megacode.files import replace_file

PARTS_FORMAT = 4
"""Raised when the files of parts change: parts of another format are thrown away."""
HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<i4"), ("group", "<i4")])
"""BLAKE2b of a text (128 bits), its bytes, and the number of its group."""
_WRITE = 1 << 17
"""Bytes a system call: Linux was measured to write new files at 3.5 GB/s with this, and at 0.5 with
a megabyte."""


@dataclass(frozen=True)
class Finished:
    """A complete part."""

    part: CorpusPart
    counts: Counts
    lines: int
    """Lines read from a span or chunk of a file, so that the next one's can be numbered."""
    groups: dict[Group, int]
    """Number of each group."""
    checksums: dict[str, str]
    """XXH3-128 of each file, by what follows the part's name (`0.bin`)."""
    inputs: list[tuple[int, int, str]]
    """What was read: number of the input file, bytes, XXH3-128 of them."""


def part_file(folder: Path, part: CorpusPart, ending: str) -> Path:
    return folder / f"{part.name}.{ending}"


def finished_part(folder: Path, part: CorpusPart) -> Finished | None:
    """None if the part is not complete."""
    try:
        value = json.loads(part_file(folder, part, "json").read_text(encoding="utf-8"))
        return Finished(
            part=part,
            counts=Counts.from_json(value["counts"]),
            lines=value["lines"],
            groups={Group.parse(name): number for name, number in value["groups"].items()},
            checksums=value["checksums"],
            inputs=value["inputs"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or damaged by a power cut


def finished_parts(folder: Path, units: Sequence[Unit]) -> list[Finished] | None:
    """Every part in the order of the input; None while some are missing."""
    found = []
    for unit in units:
        parts = unit_parts(folder, unit)
        if parts is None:
            return None
        for part in parts:
            if (finished := finished_part(folder, part)) is None:
                return None
            found.append(finished)
    return found


def undamaged(folder: Path, finished: Finished) -> bool:
    """Whether the files are what their checksums say; they need not be after a power cut."""
    try:
        return all(
            file_checksum(part_file(folder, finished.part, ending)) == digest
            for ending, digest in finished.checksums.items()
        )
    except OSError:
        return False


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


def input_checksums(part: CorpusPart, files: Sequence[InputFile]) -> list[tuple[int, int, str]]:
    """Number, bytes and checksum of the files, or of the span of bytes, that a part has read; a
    file of many parts has one in its first."""
    found = []
    for number in part.files:
        file = files[number]
        start, size = 0, file.size
        if part.span and file.form == "jsonl":
            start, size = part.span[0], part.span[1] - part.span[0]
        elif (part.span and part.span[0]) or part.chunk:
            continue
        try:
            found.append((number, size, file_checksum(file.path, start, size)))
        except OSError:  # it could not be read either: a bad record says why
            found.append((number, size, ""))
    return found


def unfinished(
    folder: Path, files: Sequence[InputFile], units: Sequence[Unit]
) -> tuple[list[Unit], Iterator[CorpusPart], set[str]]:
    """Units that miss a part, their missing parts, and the names of the parts that are there, to
    which the iterator adds. A damaged part counts as missing."""
    kept: set[str] = set()

    def finished(part: CorpusPart) -> bool:
        there = finished_part(folder, part)
        if there and undamaged(folder, there):
            kept.add(part.name)
            return True
        part_file(folder, part, "json").unlink(missing_ok=True)
        return False

    waiting = []
    for unit in units:
        parts = unit_parts(folder, unit)
        if parts is None or not all(finished(part) for part in parts):
            waiting.append(unit)

    def missing() -> Iterator[CorpusPart]:
        for unit in waiting:
            if unit.chunk_size:
                yield from unpack(folder, unit, files[unit.part.files[0]], finished)
            else:
                yield unit.part

    return waiting, missing(), kept


class PartFiles:
    """Writes the files of one part; they get their names when `stack` closes."""

    def __init__(self, folder: Path, part: CorpusPart, stack: ExitStack) -> None:
        self.folder, self.part, self.stack = folder, part, stack
        self.files: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}

    def write(self, ending: str, data: bytes) -> None:
        """Append to NAME.ending."""
        if ending not in self.files:
            path = part_file(self.folder, self.part, ending)
            self.files[ending] = self.stack.enter_context(replace_file(path, durable=False))
            self.digests[ending] = xxhash.xxh3_128()
        for start in range(0, len(data), _WRITE):
            self.files[ending].write(memoryview(data)[start : start + _WRITE])
        self.digests[ending].update(data)

    def checksums(self) -> dict[str, str]:
        return {ending: digest.hexdigest() for ending, digest in self.digests.items()}
