"""The journal: what was put is found by another process after kill -9; others' files are refused; who asked when does not count."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.synthesize.journal import Journal, Reply, Usage, request_key

REPLY = Reply("an answer: ∀x, 🙂\0", "stop", Usage(12, 34, False), "served-1", 1.5)
PUTS = """
import itertools, sys
from pathlib import Path
from megacode.synthesize.journal import Journal, Reply, Usage
journal = Journal(Path(sys.argv[1]))
for number in itertools.count():
    journal.put(f"{number:08}", Reply("text " * number, "stop", Usage(1, number, False), "m", 0.1))
    print(number, flush=True)
"""


def test_a_reply_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "replies"
    with Journal(path) as journal:
        assert journal.get("a") is None
        journal.put("a", REPLY)
        assert journal.get("a") == REPLY
    with Journal(path) as journal:
        assert journal.get("a") == REPLY and len(journal) == 1
        journal.put("a", replace(REPLY, text="another"))
        assert journal.get("a") == REPLY, "the first one was used"
    assert [file.name for file in path.parent.iterdir()] == ["replies"]


def test_keys_tell_requests_apart_and_nothing_else() -> None:
    message = {"role": "user", "content": "½ \ud800"}
    key = request_key("m", [message], {"top_p": 0.9, "seed": 1}, 0)
    assert key == request_key("m", [dict(reversed(message.items()))], {"seed": 1, "top_p": 0.9}, 0)
    others = [
        request_key("n", [message], {"top_p": 0.9, "seed": 1}, 0),
        request_key("m", [message, message], {"top_p": 0.9, "seed": 1}, 0),
        request_key("m", [message], {"top_p": 0.8, "seed": 1}, 0),
        request_key("m", [message], {"top_p": 0.9, "seed": 1}, 1),
    ]
    assert len({key, *others}) == 5


def test_keys_do_not_change_with_releases() -> None:
    """A changed key would ask for every reply of every journal again."""
    key = request_key("m", [{"role": "user", "content": "½"}], {"top_p": 0.9}, 3)
    assert key == "03b9941ef6be8d9b1cbb1dd076a230cf0b9c577cd40e47e9"


def test_the_digest_is_of_replies_and_not_of_when_they_came(tmp_path: Path) -> None:
    digests = []
    for name, order in (("a", "xyz"), ("b", "zxy")):
        with Journal(tmp_path / name) as journal:
            for key in order:
                seconds = float(len(digests))
                journal.put(key, replace(REPLY, text=key, seconds=seconds))
            digests.append(journal.digest())
            journal.put("w", REPLY)
            assert journal.digest() != digests[-1]
    assert digests[0] == digests[1]
    with Journal(tmp_path / "c") as journal:
        for key in "xyz":
            journal.put(key, replace(REPLY, text=key + "."))
        assert journal.digest() != digests[0]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "replies") as journal:
        with pytest.raises(UserError, match=f"replies: is in use by process {os.getpid()} "):
            Journal(tmp_path / "replies")
        journal.put("a", REPLY)
    Journal(tmp_path / "replies").close()


@pytest.mark.timeout(60)
def test_kill_minus_9_loses_no_reply_that_was_put(tmp_path: Path) -> None:
    path = tmp_path / "replies"
    with subprocess.Popen(
        [sys.executable, "-c", PUTS, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        last = [int(process.stdout.readline()) for _ in range(300)][-1]
        process.send_signal(signal.SIGKILL)
        last = max([last, *map(int, process.stdout.read().split("\n")[:-1])])
    lines: list[str] = []
    with Journal(path, lines.append) as journal:
        for number in range(last + 1):
            reply = journal.get(f"{number:08}")
            assert reply and reply.text == "text " * number
        assert last + 1 <= len(journal) <= last + 2
    assert len(lines) == 1 and "its process is gone" in lines[0]


def other_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE t (a)")


def truncated(path: Path) -> None:
    with Journal(path) as journal:
        for number in range(200):
            journal.put(str(number), replace(REPLY, text="x" * 1000))
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    truncated(path)
    path.write_bytes(b"\xff" * path.stat().st_size)


def newer(path: Path) -> None:
    Journal(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")


@pytest.mark.parametrize(
    "make, says",
    [
        (other_program, "a SQLite file of another program"),
        (lambda path: path.write_text("no database, but a text\n" * 99), "file is not a database"),
        (Path.mkdir, "unable to open database file"),
        (truncated, "malformed"),
        (overwritten, "file is not a database"),
        (newer, "version 2, expected 1"),
    ],
)
def test_what_is_no_journal_is_named_and_left_as_it_is(
    tmp_path: Path, make: object, says: str
) -> None:
    path = tmp_path / "replies"
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(UserError, match=f"replies: .*{says}"), Journal(path) as journal:
        journal.get("1")
        journal.digest()
    assert not path.is_file() or path.read_bytes() == before
    assert not path.with_name("replies.lock").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/replies: cannot be written to"):
        Journal(tmp_path / "file" / "replies")
