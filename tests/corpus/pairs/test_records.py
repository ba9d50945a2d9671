"""Every fault of a pair record in one sentence with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacode.corpus.pairs.records import Candidate, PairRecord, pair_record, read_pairs
from megacode.errors import UserError

CANDIDATES = [
    {"kind": "renamed", "equivalent": True, "text": "b", "proof": "run"},
    {"kind": "mine", "equivalent": False, "text": "c"},
]
RECORD: dict[str, Any] = {
    "id": "a:0", "group": "a", "language": "python", "name": "f", "query": "a", "candidates": CANDIDATES,
}  # fmt: skip


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    record = pair_record({**RECORD, "more": 1})
    path.write_bytes(record.line() + b"\n" + record.line())
    candidates = (Candidate("renamed", True, "b", "run"), Candidate("mine", False, "c"))
    assert list(read_pairs(path)) == [PairRecord("a:0", "a", "python", "f", "a", candidates)] * 2


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "is no JSON object"),
        ({**RECORD, "group": 3}, "the record: `group` is 3; expected text"),
        ({**RECORD, "query": " "}, "the query is empty"),
        ({**RECORD, "candidates": {}}, "no list `candidates`"),
        ({**RECORD, "candidates": CANDIDATES[:1]}, "needs an equivalent and a non-equivalent"),
        ({**RECORD, "candidates": [3]}, "candidate 0 is no JSON object"),
        ({**RECORD, "candidates": [{**CANDIDATES[0], "equivalent": 1}]}, "expected true or false"),
        (
            {**RECORD, "candidates": [{**CANDIDATES[0], "equivalent": False}]},
            "which renamed is not",
        ),
        ({**RECORD, "candidates": [{**CANDIDATES[0], "text": ""}]}, "its text is empty"),
        ({**RECORD, "candidates": [{**CANDIDATES[0], "proof": "yes"}]}, "expected 'run' or null"),
    ],
)
def test_faults(value: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(value) + "\n")
    with pytest.raises(UserError) as error:
        list(read_pairs(path))
    assert told in str(error.value) and f"{path}, line 2: " in str(error.value)
    path.write_text("{")
    with pytest.raises(UserError, match="line 1: is not JSON"):
        list(read_pairs(path))
