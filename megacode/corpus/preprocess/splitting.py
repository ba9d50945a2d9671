"""Which parts a corpus is cut into. A part is the unit of parallel work and of resuming.

A *unit* is a list of files, a span of a plain JSONL file, or row groups of a parquet file, cut by
sizes on disk alone, never by how many processes there are. Most units are one part. A large
compressed JSONL file is a unit of many parts: it can only be read from its beginning, so one thread
unpacks it and hands on chunks of whole lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from megacode.corpus.inputs import InputFile
from megacode.corpus.readers import BadRecord, BrokenStream, Item, decompressed, read_input
from megacode.data.prefetch import Prefetch
from megacode.files import replace_file

_PIECE = 1 << 20


@dataclass(frozen=True)
class CorpusPart:
    unit: int
    files: tuple[int, ...]
    """Numbers of the input files."""
    span: tuple[int, int] | None = None
    """Of the only file: see `read_input`."""
    chunk: int | None = None
    """Of the only file, compressed: the lines in `NAME.chunk`, unpacked."""
    broken: str = ""
    """Why the compressed file ends with this chunk before its data does."""
    chunk_bytes: int = 0
    """Bytes on disk that this chunk stands for."""

    @property
    def name(self) -> str:
        """Sorts in the order of the input."""
        return f"{self.unit:06d}" + ("" if self.chunk is None else f"-{self.chunk:05d}")


@dataclass(frozen=True)
class Unit:
    """`part` is the unit's only one, or what its chunks are derived from."""

    part: CorpusPart
    size: int
    """Bytes on disk."""
    chunk_size: int = 0
    """Of a compressed file: bytes of text, roughly, in each chunk; 0: the unit is one part."""


def plan_units(files: Sequence[InputFile]) -> list[Unit]:
    """Cut a corpus into units of about a 64th of it, 16 to 64 MiB on disk; of a small corpus, an
    eighth of it but no less than 1 MiB. Depends on the files only."""
    total = sum(file.size for file in files)
    size = max(min(max(total // 64, 16 << 20), total // 8, 64 << 20), 1 << 20)
    units: list[Unit] = []
    together: list[int] = []
    held = 0

    def flush() -> None:
        nonlocal held
        if together:
            units.append(Unit(CorpusPart(len(units), tuple(together)), held))
        together.clear()
        held = 0

    for number, file in enumerate(files):
        if file.size <= 1.5 * size:
            together.append(number)
            held += file.size
            if held >= size or len(together) == 10_000:
                flush()
            continue
        flush()
        if file.form == "jsonl" and file.compression:
            units.append(
                Unit(CorpusPart(len(units), (number,)), file.size, chunk_size=max(size, 8 << 20))
            )
        else:
            for span, share in _spans(file, size):
                units.append(Unit(CorpusPart(len(units), (number,), span), share))
    flush()
    return units


def _spans(file: InputFile, size: int) -> list[tuple[tuple[int, int] | None, int]]:
    """Spans of a large file, each with its bytes on disk."""
    if file.form == "jsonl":
        count = max(1, round(file.size / size))
        edges = [file.size * i // count for i in range(count + 1)]
        return [((a, b), b - a) for a, b in itertools.pairwise(edges)]
    if file.form != "parquet":
        return [(None, file.size)]
    import pyarrow
    import pyarrow.parquet

    try:
        groups = pyarrow.parquet.ParquetFile(file.path).num_row_groups
    except (pyarrow.ArrowException, OSError):
        return [(None, file.size)]  # read as a whole, where it becomes a bad record
    each = max(1, round(groups * size / file.size))
    spans = [(i, min(i + each, groups)) for i in range(0, groups, each)]
    return [(span, file.size * (span[1] - span[0]) // groups) for span in spans] or [
        (None, file.size)
    ]


# ---------------------------------------------------------------------------------- unpacked chunks


def chunk_path(folder: Path, part: CorpusPart) -> Path:
    return folder / f"{part.name}.chunk"


def unit_parts(folder: Path, unit: Unit) -> list[CorpusPart] | None:
    """The parts of a unit in order; None for a compressed file that nobody has unpacked to its
    end."""
    if not unit.chunk_size:
        return [unit.part]
    try:
        count = int((folder / f"{unit.part.name}.chunks").read_text())
    except FileNotFoundError:
        return None
    return [replace(unit.part, chunk=chunk) for chunk in range(count)]


def read_part(
    folder: Path,
    part: CorpusPart,
    file: InputFile,
    text_field: str,
    on_bytes: Callable[[int], None],
    **how: Any,
) -> Iterator[Item]:
    """`read_input` of what a part has of one of its files; of a chunk, whose bytes are those of
    the compressed file, `on_bytes` hears nothing."""
    source, tell, last = file, None if part.chunk is not None else on_bytes, 0
    if part.chunk is not None:
        chunk = chunk_path(folder, part)
        source = replace(file, path=chunk, compression=None, size=chunk.stat().st_size)
    for item in read_input(source, text_field, part.span, tell, **how):
        last = item.record
        yield item
    if part.broken:
        yield BadRecord(f"broken .{file.compression}: {part.broken}", last + 1)


def unpack(
    folder: Path, unit: Unit, file: InputFile, finished: Callable[[CorpusPart], bool]
) -> Iterator[CorpusPart]:
    """Chunks of a compressed JSONL file that are not `finished`, each written for the process that
    takes it.

    Unpacks on a thread, at most two chunks ahead of the caller.
    """
    with Prefetch(_write_chunks(folder, unit, file, finished), depth=2) as parts:
        yield from parts


def _write_chunks(
    folder: Path, unit: Unit, file: InputFile, finished: Callable[[CorpusPart], bool]
) -> Iterator[CorpusPart]:
    seen = 0
    with open(file.path, "rb") as disk:
        contents = decompressed(disk, file.compression)
        for chunk in itertools.count():
            part = replace(unit.part, chunk=chunk)
            broken = ""
            if finished(part):
                end, broken = _copy_lines(contents, None, unit.chunk_size)
            else:
                with replace_file(chunk_path(folder, part), durable=False) as out:
                    end, broken = _copy_lines(contents, out, unit.chunk_size)
                position = disk.tell()
                yield replace(part, broken=broken, chunk_bytes=position - seen)
                seen = position
            if end:
                break
    with replace_file(folder / f"{unit.part.name}.chunks") as out:
        out.write(b"%d" % (chunk + 1))


def _copy_lines(contents: BufferedReader, out: BinaryIO | None, size: int) -> tuple[bool, str]:
    """Copy about `size` bytes and then to the end of the line. Whether that was the end, and what
    is broken there."""
    done = 0
    try:
        while done < size:
            piece = contents.read1(
                min(_PIECE, size - done)
            )  # read() would lose what it has when the stream breaks
            if not piece:
                return True, ""
            done += len(piece)
            if out:
                out.write(piece)
        while piece := contents.readline(_PIECE):
            if out:
                out.write(piece)
            if piece.endswith(b"\n"):
                return False, ""
        return True, ""
    except BrokenStream as error:
        return True, str(error)
