"""A pair record: a query with equivalent and non-equivalent candidates, one JSON line.

{"id": "a.py:0", "group": "a.py", "language": "python", "name": "f", "query": "def f ...",
 "candidates": [{"kind": "renamed", "equivalent": true, "text": "...", "proof": "run"}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megacode.errors import UserError

EQUIVALENT = ("renamed", "solution", "rewritten")
DIFFERENT = (
    "lines-shuffled",
    "tokens-shuffled",
    "keyword-replaced",
    "operator-flipped",
    "other-problem",
)
KINDS = (*EQUIVALENT, *DIFFERENT)
RUN = "run"
"""The proof of a candidate that was run beside its query."""


@dataclass(frozen=True)
class Candidate:
    """`equivalent`: whether it computes what the query does. `proof`: `run` or None."""

    kind: str
    equivalent: bool
    text: str
    proof: str | None = None


@dataclass(frozen=True)
class PairRecord:
    """`group`: the file or the problem; records of a group are never split between datasets."""

    id: str
    group: str
    language: str
    name: str
    query: str
    candidates: tuple[Candidate, ...]

    def line(self) -> bytes:
        """The record as a JSON line."""
        return orjson.dumps(asdict(self)) + b"\n"


def pair_record(value: Any) -> PairRecord:
    """A record from a JSON value. Further fields are ignored.

    Raises:
        ValueError: what is wrong with it, in words that follow a place ("line 7: ...").
    """
    if not isinstance(value, dict):
        raise ValueError("is no JSON object; expected a pair record, as megacode pairs writes it")
    texts = [
        _text(value, key, "the record") for key in ("id", "group", "language", "name", "query")
    ]
    if not value["query"].strip():
        raise ValueError("the query is empty; expected source code")
    listed = value.get("candidates")
    if not isinstance(listed, list):
        raise ValueError("the record has no list `candidates`")
    candidates = tuple(_candidate(one, number) for number, one in enumerate(listed))
    if len({one.equivalent for one in candidates}) < 2:
        raise ValueError("needs an equivalent and a non-equivalent candidate at least")
    return PairRecord(texts[0], texts[1], texts[2], texts[3], texts[4], candidates)


def read_pairs(path: Path) -> Iterator[PairRecord]:
    """The records of a file, one after another.

    Raises:
        UserError: the file cannot be read, or a line of it is no pair record.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield pair_record(orjson.loads(line))
                except ValueError as error:
                    broken = isinstance(error, orjson.JSONDecodeError)
                    told = f"is not JSON ({error})" if broken else str(error)
                    raise UserError(f"{path}, line {number}: {told}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a file of pairs"
        ) from None


def _candidate(value: Any, number: int) -> Candidate:
    where = f"candidate {number}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    kind, text = _text(value, "kind", where), _text(value, "text", where)
    equivalent, proof = value.get("equivalent"), value.get("proof")
    if not isinstance(equivalent, bool):
        raise ValueError(f"{where}: `equivalent` is {equivalent!r}; expected true or false")
    if kind in KINDS and equivalent != (kind in EQUIVALENT):
        raise ValueError(f"{where}: `equivalent` is {equivalent!r}, which {kind} is not")
    if not text.strip():
        raise ValueError(f"{where}: its text is empty; expected source code")
    if proof not in (None, RUN):
        raise ValueError(f"{where}: `proof` is {proof!r}; expected {RUN!r} or null")
    return Candidate(kind, equivalent, text, proof)


def _text(value: dict[str, Any], key: str, where: str) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise ValueError(f"{where}: `{key}` is {found!r:.60}; expected text")
    return found
