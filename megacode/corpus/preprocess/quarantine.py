"""Bad records, one line of JSON each: file, record number, reason, and the record itself.

    {"record": 17, "file": "a.jsonl", "reason": "not JSON (...)", "raw": "..."}

`raw_base64` instead of `raw` where the record is no UTF-8, or too long to be held. A part's reader
may count lines from its own start; `append` writes the true numbers when the parts are joined.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megacode.corpus.readers import BadRecord, BrokenStream

_PIECE = 3 << 18
"""A multiple of three: pieces in base64 join without padding."""
_RECORD = re.compile(rb'\{"record": (\d+)')


def write_bad(out: BinaryIO, file: Path, bad: BadRecord) -> None:
    """Append one record, reading the rest of it piece by piece."""
    head = json.dumps({"record": bad.record, "file": str(file), "reason": bad.reason})[:-1].encode()
    if bad.rest is None:
        try:
            out.write(
                head + b', "raw": ' + json.dumps(bad.raw.decode()).encode() if bad.raw else head
            )
        except UnicodeDecodeError:
            out.write(head + b', "raw_base64": "' + base64.b64encode(bad.raw) + b'"')
    else:
        out.write(head + b', "raw_base64": "')
        for piece in _in_threes(bad):
            out.write(base64.b64encode(piece))
        out.write(b'"')
    out.write(b"}\n")


def _in_threes(bad: BadRecord) -> Iterator[bytes | memoryview]:
    assert bad.rest is not None
    held = bad.raw
    try:
        for piece in bad.rest:
            held += piece
            if len(held) >= _PIECE:
                whole = len(held) - len(held) % 3
                yield memoryview(held)[:whole]
                held = held[whole:]
    except BrokenStream:
        pass  # the reader says so in a record of its own
    yield held


def append(out: BinaryIO, part: Path, before: int) -> None:
    """Copy the records of a part whose lines are counted from its start; `before`: lines of the
    file before it."""
    with open(part, "rb") as file:
        at_start = True
        while piece := file.readline(1 << 20):
            if at_start and before and (match := _RECORD.match(piece)):
                piece = b'{"record": %d' % (int(match[1]) + before) + piece[match.end() :]
            out.write(piece)
            at_start = piece.endswith(b"\n")
