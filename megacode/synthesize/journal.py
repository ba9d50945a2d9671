"""Every reply of a served model, in a SQLite file: what was paid for is found again by its request.

A reply is in the file before it is used, so that a run which is killed asks again only for what was
in flight. The API key is in no request's key and in no reply.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.lock import HeldError, take

_APPLICATION = 0x6D635371
"""In the header of a SQLite file: whose it is."""
_VERSION = 1
_TABLE = """CREATE TABLE replies (
    key TEXT PRIMARY KEY, text TEXT, finish TEXT, prompt INTEGER, completion INTEGER,
    estimated INTEGER, model TEXT, seconds REAL)"""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and of its reply.

    `estimated`: the server gave none, and a token counts as 4 characters."""

    prompt: int
    completion: int
    estimated: bool


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        finish: the server's reason: `stop`, `length`, `content_filter` ...
        model: the model's name in the reply, which may be more exact than that in the request.
        seconds: from the request that was answered to its reply.
    """

    text: str
    finish: str
    usage: Usage
    model: str
    seconds: float


def request_key(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, Any],
    sample: int,
) -> str:
    """The name of a request in the journal, which is the same at every endpoint.

    Args:
        sample: tells apart requests of which several replies are wanted.
    """
    request = [model, list(messages), dict(parameters), sample]
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=24).hexdigest()


class Journal:
    """The file, open for one process; a context manager that closes it.

    Args:
        say: gets a line when the lock of a killed process is taken over.

    Raises:
        UserError: another process has it open, or it is no journal or a damaged one.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = take(path.with_name(f"{path.name}.lock"), say=say)
        except HeldError as error:
            raise UserError(
                f"{path}: is in use by {error.owner}; wait for it, stop it, or choose another "
                "output"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written to ({error.strerror}); choose another output, or free "
                "this one"
            ) from None
        try:
            with self._errors_named():
                self._database = sqlite3.connect(path, isolation_level=None, timeout=0)
                self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let others open it. Safe to call twice."""
        if hasattr(self, "_database"):
            self._database.close()
        self._lock.release()

    def get(self, key: str) -> Reply | None:
        """The reply to a request, if there is one."""
        query = "SELECT * FROM replies WHERE key = ?"
        with self._errors_named():
            row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return None
        _, text, finish, prompt, completion, estimated, model, seconds = row
        return Reply(text, finish, Usage(prompt, completion, bool(estimated)), model, seconds)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is in the file when this returns. The first reply of a key stays."""
        tokens = (reply.usage.prompt, reply.usage.completion, reply.usage.estimated)
        row = (key, reply.text, reply.finish, *tokens, reply.model, reply.seconds)
        with self._errors_named():
            self._database.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row
            )

    def __len__(self) -> int:
        with self._errors_named():
            count: int = self._database.execute("SELECT count(*) FROM replies").fetchone()[0]
        return count

    def digest(self) -> str:
        """A hash of all keys and replies in the order of keys.

        When and how fast replies came does not count."""
        query = (
            "SELECT key, text, finish, prompt, completion, estimated, model FROM replies "
            "ORDER BY key"
        )
        whole = blake2b(digest_size=32)
        with self._errors_named():
            for row in self._database.execute(query):
                whole.update(json.dumps(row).encode() + b"\n")
        return whole.hexdigest()

    def _open(self) -> None:
        ask = self._database.execute
        # Set before anything is read: a write-ahead log then needs no memory that processes share,
        # which network file systems do not have.
        ask("PRAGMA locking_mode = EXCLUSIVE")
        application, version = (
            ask(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = ask("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if application != _APPLICATION and not (empty and application == 0):
            raise UserError(
                f"{self.path}: is a SQLite file of another program, not a journal of replies; move "
                "it away, or choose another output"
            )
        if not empty and version != _VERSION:
            raise UserError(
                f"{self.path}: is a journal of version {version}, expected {_VERSION}; continue "
                "with the release that wrote it, or choose another output"
            )
        ask("PRAGMA journal_mode = WAL")
        # A committed reply is in the system's memory, which outlives a process that is killed, kill
        # -9 included. A power cut can lose the last seconds of replies, but damages nothing.
        ask("PRAGMA synchronous = NORMAL")
        # The log goes into the file each 32 MiB, with a wait for the disk.
        ask("PRAGMA wal_autocheckpoint = 8192")
        if empty:
            ask("BEGIN")
            ask(_TABLE)
            ask(f"PRAGMA application_id = {_APPLICATION}")
            ask(f"PRAGMA user_version = {_VERSION}")
            ask("COMMIT")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: cannot be read or written as a journal of replies ({error}); free "
                "space if the disk is full, and close other programs that read it; if the file is "
                "damaged, put a copy back, or move it away and have its replies made again"
            ) from None
