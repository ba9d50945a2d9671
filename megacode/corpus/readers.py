"""Documents out of JSONL, parquet and plain files, as they are, plain or .gz or .zst. Memory: one
record.

Reading never raises for bad data. What cannot be read comes out as a BadRecord with its reason,
place and bytes, in the order of the file, and the good records around it are all there. A record
longer than the limit is bad too: its bytes come in pieces, so that it is never held in memory as a
whole.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import orjson

from megacode.corpus.inputs import InputFile
from megacode.tokenizer.tokenizer import well_formed

BINARY_PROBE = 8192
"""A plain file with a NUL among its first bytes is taken for binary (as grep and git do) and is no
document."""
MAX_DOCUMENT = 32 << 20
"""Bytes of a record (a line, a plain file, a cell of parquet) beyond which it is set aside, if
nothing else is asked."""
_PIECE = 1 << 20
_BOM = b"\xef\xbb\xbf"


class TextDocument(NamedTuple):
    raw: bytes
    """The text as well-formed UTF-8."""
    record: int
    """Line (from 1) of a JSONL file, row (from 0) of a parquet file, place (from 0) in a JSON
    array, 0 for a plain file. In a byte range of a JSONL file: counted from the range's first
    line."""
    values: Mapping[str, Any] = {}
    """The whole JSON object, or the columns asked for."""
    repaired: bool = False
    """It had lone surrogates, which JSON can spell and UTF-8 cannot; they became U+FFFD."""

    @property
    def text(self) -> str:
        return self.raw.decode()


class BadRecord(NamedTuple):
    """A record that is no document. `harmless`: empty text or a binary file, no sign that the
    corpus is damaged."""

    reason: str
    record: int
    raw: bytes = b""
    harmless: bool = False
    rest: Iterator[bytes] | None = None
    """More of it, in pieces; to be read before the next record is asked for."""


Item = TextDocument | BadRecord


def read_input(
    file: InputFile,
    text_field: str = "text",
    span: tuple[int, int] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    *,
    columns: Sequence[str] = (),
    max_document: int = MAX_DOCUMENT,
    on_lines: Callable[[int], None] | None = None,
) -> Iterator[Item]:
    """Records of one file, in order. An empty `text_field` stands for the whole record, as JSON.

    `span`: bytes [start, end) of an uncompressed JSONL file (the lines that begin in it) or row
    groups of a parquet file; spans that tile a file give every record exactly once. `on_bytes` is
    told now and then how many bytes on disk have been read since the last time. `columns`: what
    else to read of a parquet file. `on_lines` is told at the end how many lines a JSONL file (or
    its span) has.
    """
    how = _How(text_field, columns, span, max_document, _Counter(on_bytes), on_lines)
    read = {
        "parquet": _read_parquet,
        "jsonl": _read_jsonl,
        "json": _read_json,
        "file": _read_plain,
    }[file.form]
    try:
        yield from read(file, how)
    except OSError as error:
        yield BadRecord(f"cannot read the file: {error.strerror or error}", 0)


class _Counter:
    """Reports growth of a file position."""

    def __init__(self, report: Callable[[int], None] | None) -> None:
        self.report, self.last = report, 0

    def at(self, position: int) -> None:
        if self.report and position > self.last:
            self.report(position - self.last)
            self.last = position


class _How(NamedTuple):
    """What `read_input` was asked for."""

    field: str
    columns: Sequence[str]
    span: tuple[int, int] | None
    limit: int
    counter: _Counter
    on_lines: Callable[[int], None] | None


def _too_long(limit: int) -> str:
    return f"longer than {limit / 2**20:g} MiB (--max-document)"


# ------------------------------------------------------------------------------------------ records


def lookup(record: Any, field: str) -> Any:
    """The value of `field` in a JSON value: a key, or keys joined by dots. LookupError or TypeError
    tell a reason."""
    if isinstance(record, dict) and field in record:  # also a key with a dot in its name
        return record[field]
    value = record
    for key in field.split("."):
        if not isinstance(value, dict):
            raise TypeError(
                "the record is not an object" if value is record else f"no field {field!r}"
            )
        if key not in value:
            raise LookupError(f"no field {field!r}")
        value = value[key]
    return value


def record_text(record: Any, field: str) -> tuple[bytes, bool]:
    """The text of a JSON value as UTF-8, and whether it had to be repaired. LookupError or
    TypeError tell a reason."""
    value = lookup(record, field)
    if isinstance(value, bytes):
        value.decode()
        return value, False
    if not isinstance(value, str):
        name = _JSON_TYPES.get(type(value), type(value).__name__)
        raise TypeError(f"field {field!r} is {name}, not text")
    try:
        return value.encode(), False
    except UnicodeEncodeError:
        return well_formed(value).encode(), True


_JSON_TYPES = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _read_jsonl(file: InputFile, how: _How) -> Iterator[Item]:
    counter, field, number = how.counter, how.field, 0
    start, end = how.span or (0, None)
    with open(file.path, "rb", buffering=1 << 20) as disk:
        contents = decompressed(disk, file.compression)
        position = start
        if start:
            contents.seek(start - 1)
            position += sum(map(len, _rest_of_line(contents))) - 1
            counter.last = start
        while end is None or position < end:
            try:
                line = contents.readline(how.limit + 1)
            except BrokenStream as error:
                yield BadRecord(f"broken .{file.compression}: {error}", number + 1)
                return
            if not line:
                break
            number += 1
            position += len(line)
            if len(line) > how.limit and not line.endswith(b"\n"):
                rest = _Rest(contents, file.compression)
                yield BadRecord(_too_long(how.limit), number, line, rest=iter(rest))
                position += rest.finish()
                counter.at(disk.tell() if file.compression else position)
                if rest.broken:
                    yield BadRecord(rest.broken, number)
                    return
                continue
            counter.at(disk.tell() if file.compression else position)
            try:
                record = orjson.loads(line)
            except ValueError:
                if not line.isspace():
                    first = number == 1 and not start
                    yield _parse(line.removeprefix(_BOM) if first else line, field, number)
            else:
                yield _take(record, field, number, line)
        counter.at(file.size if end is None else end)
        if how.on_lines:
            how.on_lines(number)


def _rest_of_line(contents: BinaryIO) -> Iterator[bytes]:
    while piece := contents.readline(_PIECE):
        yield piece
        if piece.endswith(b"\n"):
            return


class _Rest:
    """What is left of a line that is too long, in pieces, and how many bytes that were."""

    def __init__(self, contents: BinaryIO, compression: str | None) -> None:
        self.pieces, self.compression = _rest_of_line(contents), compression
        self.bytes, self.broken = 0, ""

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self.pieces:
                self.bytes += len(piece)
                yield piece
        except BrokenStream as error:
            self.broken = f"broken .{self.compression}: {error}"

    def finish(self) -> int:
        """Pass over what nobody has read."""
        for _ in self:
            pass
        return self.bytes


def _parse(line: bytes, field: str, number: int) -> Item:
    """A line that the fast parser refuses (it takes no lone surrogates, no NaN): the standard
    library's verdict."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason})", number, line)
    except ValueError as error:
        # Reasons are counted by their wording, so without line and column.
        reason = getattr(error, "msg", None) or str(error)[:80]
        return BadRecord(f"not JSON ({reason})", number, line)
    except RecursionError:
        return BadRecord("not JSON that can be read (nested too deeply)", number, line)
    return _take(record, field, number, line)


def _take(record: Any, field: str, number: int, line: bytes) -> Item:
    if not field:
        if not isinstance(record, dict):
            return BadRecord("the record is not an object", number, line)
        return TextDocument(line, number, record)
    try:
        raw, repaired = record_text(record, field)
    except (LookupError, TypeError) as error:
        return BadRecord(str(error.args[0]), number, line)
    if not raw:
        return BadRecord("empty text", number, line, harmless=True)
    return TextDocument(raw, number, record, repaired)


def _read_json(file: InputFile, how: _How) -> Iterator[Item]:
    """A file that is one array of records."""
    with open(file.path, "rb") as disk:
        contents = disk.read().removeprefix(_BOM)
    how.counter.at(file.size)
    try:
        try:
            records = orjson.loads(contents)
        except ValueError:
            records = json.loads(contents.decode())
    except (ValueError, RecursionError) as error:
        yield BadRecord(f"not JSON ({getattr(error, 'msg', None) or str(error)[:80]})", 0)
        return
    for number, record in enumerate(records):
        line = json.dumps(record).encode()
        if len(line) > how.limit:
            yield BadRecord(_too_long(how.limit), number, line)
        else:
            yield _take(record, how.field, number, line)


def _read_parquet(file: InputFile, how: _How) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        groups = range(*(how.span or (0, table.num_row_groups)))
        names = set(table.schema_arrow.names)
        rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        row = sum(rows[: groups.start])
        # A column of structs has fields of dotted names.
        columns = how.columns if how.field else [*names, *how.columns]
        column, *more = (
            name if name in names else name.partition(".")[0]
            for name in ([how.field] if how.field else []) + [*columns]
        )
        if column not in names:
            for number in range(row, row + sum(rows[i] for i in groups)):
                yield BadRecord(f"no field {how.field!r}", number)
            return
        wanted = list(dict.fromkeys([column, *(name for name in more if name in names)]))
        for done, group in enumerate(groups, start=1):
            # About 16 MB of rows at a time, however large each is.
            each = table.metadata.row_group(group).total_byte_size // max(rows[group], 1)
            size = min(1024, max(1, (16 << 20) // max(each, 1)))
            for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=wanted):
                for values in _rows(batch, wanted):
                    yield _row(values, column, how, row)
                    row += 1
            how.counter.at(done * (file.size // table.num_row_groups))
    except (pyarrow.ArrowException, KeyError, OSError, EOFError) as error:
        yield BadRecord(f"broken parquet: {str(error).splitlines()[0][:120]}", row)


def _rows(batch: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows as dicts; a cell of text that is no UTF-8 comes as bytes."""
    lists = []
    for name in columns:
        column = batch.column(name)
        try:
            lists.append(column.to_pylist())
        except (ValueError, OverflowError):  # no UTF-8, or a time that Python cannot hold
            lists.append([_cell(value) for value in column])
    for values in zip(*lists, strict=True):
        yield dict(zip(columns, values, strict=True))


def _cell(value: Any) -> Any:
    import pyarrow

    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()
    except (ValueError, OverflowError):
        try:
            return value.cast(pyarrow.string()).as_py()
        except pyarrow.ArrowException:  # within a list or a struct
            return None


def _row(values: dict[str, Any], column: str, how: _How, row: int) -> Item:
    if not how.field:
        return TextDocument(json.dumps(values, default=str).encode(), row, values)
    try:
        raw, repaired = record_text(values, how.field)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason})", row, lookup(values, how.field))
    except (LookupError, TypeError) as error:
        shown = repr(values[column]).encode(errors="backslashreplace")
        return BadRecord(str(error.args[0]), row, shown)
    if len(raw) > how.limit:
        return BadRecord(_too_long(how.limit), row, raw)
    if not raw:
        return BadRecord("empty text", row, harmless=True)
    return TextDocument(raw, row, values, repaired)


def _read_plain(file: InputFile, how: _How) -> Iterator[Item]:
    with open(file.path, "rb") as disk:
        contents = decompressed(disk, file.compression)
        try:
            raw = contents.read(BINARY_PROBE)
            binary = b"\0" in raw
            if not binary:
                raw += contents.read(max(how.limit + 1 - len(raw), 0))
        except BrokenStream as error:
            yield BadRecord(f"broken .{file.compression}: {error}", 0)
            return
        if not binary and len(raw) > how.limit:
            rest = iter(lambda: contents.read(_PIECE), b"")
            yield BadRecord(_too_long(how.limit), 0, raw, rest=rest)
            how.counter.at(file.size)
            return
    how.counter.at(file.size)
    if binary:
        yield BadRecord("binary file", 0, harmless=True)
        return
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        yield BadRecord(f"not UTF-8 ({error.reason})", 0, raw)
        return
    yield TextDocument(raw, 0) if raw else BadRecord("empty text", 0, harmless=True)


# -------------------------------------------------------------------------------------- compression


class BrokenStream(Exception):
    """Compressed contents that end early or are damaged."""


def decompressed(disk: BinaryIO, compression: str | None) -> io.BufferedReader:
    """The contents of an open file. Reading raises BrokenStream where they are damaged."""
    if not compression:
        return disk  # type: ignore[return-value]
    return io.BufferedReader(_Frames(disk, compression), 1 << 20)


class _Frames(io.RawIOBase):
    """The members of a .gz or the frames of a .zst file, one after another.

    The libraries' own readers do not do: zstandard's takes a truncated frame for the end of the
    file, and gzip's, read through a buffer, drops what it could still read before the damage.
    """

    def __init__(self, disk: BinaryIO, compression: str) -> None:
        self._disk, self._ready = disk, memoryview(b"")
        self._frame: Any = None
        self._new: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)
        self._error: type[Exception] = zlib.error
        self._padding = b"\0"  # tapes and block devices fill up with zeros after the last member
        if compression == "zst":
            import zstandard

            self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
            self._error = zstandard.ZstdError
            self._padding = b""

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
                    raise BrokenStream("the file ends before its data does")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise BrokenStream(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
