"""Documents out of JSONL, parquet and plain files, as they are, plain or .gz or .zst. Memory: one record (or 256 rows).

Reading never raises for bad data. What cannot be read comes out as a BadRecord with its reason, place and bytes, in the
order of the file, and the good records around it are all there.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megacode.data.inputs import InputFile

BINARY_PROBE = 8192
"""A plain file with a NUL among its first bytes is taken for binary (as grep and git do) and is no document."""


@dataclass(frozen=True)
class Document:
    text: str
    file: Path
    record: int
    """Line (from 1) of a JSONL file, row (from 0) of a parquet file, 0 for a plain file. In a byte range of a JSONL
    file: counted from the range's first line."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document. `harmless`: empty text or a binary file, no sign that the corpus is damaged."""

    reason: str
    file: Path
    record: int
    raw: bytes = b""
    harmless: bool = False


Item = Document | BadRecord


def read_input(
    file: InputFile,
    text_field: str = "text",
    span: tuple[int, int] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Item]:
    """Records of one file, in order.

    `span`: bytes [start, end) of an uncompressed JSONL file (the lines that begin in it) or row groups of a parquet
    file; spans that tile a file give every record exactly once. `on_bytes` is told now and then how many bytes on disk
    have been read since the last time.
    """
    counter = _Counter(on_bytes)
    try:
        if file.form == "parquet":
            yield from _read_parquet(file, text_field, span, counter)
        elif file.form == "jsonl":
            yield from _read_jsonl(file, text_field, span, counter)
        else:
            yield from _read_plain(file, counter)
    except OSError as error:
        yield BadRecord(f"cannot read the file: {error.strerror or error}", file.path, 0)


class _Counter:
    """Reports growth of a file position."""

    def __init__(self, report: Callable[[int], None] | None) -> None:
        self.report, self.last = report, 0

    def at(self, position: int) -> None:
        if self.report and position > self.last:
            self.report(position - self.last)
            self.last = position


# ------------------------------------------------------------------------------------------------------------- records


def record_text(record: Any, field: str) -> str:
    """The text of a JSON value. `field`: a key, or keys joined by dots. LookupError or TypeError tell a reason."""
    if isinstance(record, dict) and field in record:
        value = record[field]
    else:
        value = record
        for key in field.split("."):
            if not isinstance(value, dict):
                raise TypeError("the record is not an object" if value is record else f"no field {field!r}")
            if key not in value:
                raise LookupError(f"no field {field!r}")
            value = value[key]
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError(f"field {field!r} is {_json_type(value)}, not text")
    return value


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _read_jsonl(file: InputFile, field: str, span: tuple[int, int] | None, counter: _Counter) -> Iterator[Item]:
    start, end = span or (0, None)
    line_number = 0
    with open(file.path, "rb", buffering=1 << 20) as disk:
        stream = _decompressed(disk, file.compression)
        position = start
        if start:
            stream.seek(start - 1)
            position += len(stream.readline()) - 1
            counter.last = start
        while end is None or position < end:
            try:
                line = stream.readline()
            except _Broken as error:
                yield BadRecord(f"broken .{file.compression}: {error}", file.path, line_number + 1)
                return
            if not line:
                break
            position += len(line)
            line_number += 1
            counter.at(disk.tell() if file.compression else position)
            if line.isspace():
                continue
            yield _parse(line, field, file.path, line_number)
        counter.at(file.size if end is None else end)


def _parse(line: bytes, field: str, path: Path, number: int) -> Item:
    try:
        text = record_text(json.loads(line.decode()), field)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason})", path, number, line)
    except ValueError as error:
        return BadRecord(f"not JSON ({_without_place(error)})", path, number, line)
    except (LookupError, TypeError) as error:
        return BadRecord(str(error.args[0]), path, number, line)
    except RecursionError:
        return BadRecord("not JSON that can be read (nested too deeply)", path, number, line)
    if not text:
        return BadRecord("empty text", path, number, line, harmless=True)
    return Document(text, path, number)


def _without_place(error: ValueError) -> str:
    """Reasons are counted by their wording, so without line and column."""
    return getattr(error, "msg", None) or str(error)[:80]


def _read_parquet(file: InputFile, field: str, span: tuple[int, int] | None, counter: _Counter) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        groups = range(*(span or (0, table.num_row_groups)))
        names = set(table.schema_arrow.names)
        column = field if field in names else field.partition(".")[0]
        row = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
        share = file.size // max(table.num_row_groups, 1)
        if column not in names:
            for number in range(row, row + sum(table.metadata.row_group(i).num_rows for i in groups)):
                yield BadRecord(f"no field {field!r}", file.path, number)
            return
        for done, group in enumerate(groups, start=1):
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    yield _parse_value(value, column, field, file.path, row)
                    row += 1
            counter.at(done * share)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        yield BadRecord(f"broken parquet: {str(error).splitlines()[0][:120]}", file.path, row)


def _parse_value(value: Any, column: str, field: str, path: Path, row: int) -> Item:
    try:
        text = record_text({column: value.as_py()}, field)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason})", path, row, value.as_buffer().to_pybytes())
    except (LookupError, TypeError) as error:
        return BadRecord(str(error.args[0]), path, row, repr(value.as_py()).encode(errors="backslashreplace"))
    return Document(text, path, row) if text else BadRecord("empty text", path, row, harmless=True)


def _read_plain(file: InputFile, counter: _Counter) -> Iterator[Item]:
    with open(file.path, "rb") as disk:
        stream = _decompressed(disk, file.compression)
        try:
            raw = stream.read(BINARY_PROBE)
            if b"\0" in raw:
                yield BadRecord("binary file", file.path, 0, harmless=True)
                counter.at(file.size)
                return
            raw += stream.read()
        except _Broken as error:
            yield BadRecord(f"broken .{file.compression}: {error}", file.path, 0)
            return
    counter.at(file.size)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        yield BadRecord(f"not UTF-8 ({error.reason})", file.path, 0, raw)
        return
    yield Document(text, file.path, 0) if text else BadRecord("empty text", file.path, 0, harmless=True)


# --------------------------------------------------------------------------------------------------------- compression


class _Broken(Exception):
    """A compressed stream that ends early or is damaged."""


def _decompressed(disk: BinaryIO, compression: str | None) -> BinaryIO:
    return io.BufferedReader(_Frames(disk, compression), 1 << 20) if compression else disk  # type: ignore[return-value]


class _Frames(io.RawIOBase):
    """The members of a .gz or the frames of a .zst file, one after another.

    Why not the libraries' own readers: zstandard's takes a truncated frame for the end of the file, and gzip's, read
    through a buffer, drops what it could still read before the damage.
    """

    def __init__(self, disk: BinaryIO, compression: str) -> None:
        self._disk, self._frame, self._ready = disk, None, memoryview(b"")
        self._padding = b""
        if compression == "gz":
            self._new, self._error = (lambda: zlib.decompressobj(wbits=31)), zlib.error
            self._padding = b"\0"  # tapes and block devices fill up with zeros after the last member
        else:
            import zstandard

            self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
            self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._disk.read(1 << 16)
            if self._frame is not None and self._frame.eof:
                chunk, self._frame = (self._frame.unused_data + chunk).lstrip(self._padding), None
                if not chunk:
                    continue
            if not chunk:
                if self._frame is not None:
                    raise _Broken("the file ends before its data does")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise _Broken(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
