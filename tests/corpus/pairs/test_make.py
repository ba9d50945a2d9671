"""From a corpus to a file of pairs: the same bytes however it is made, whole, and with every reason counted."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megacode.cli.main import main
from megacode.corpus.pairs import drafts, make
from megacode.corpus.pairs.make import make_pairs
from megacode.corpus.pairs.records import PairRecord, read_pairs
from megacode.corpus.pairs.request import PairRequest, PairResult
from megacode.corpus.preprocess import Request, preprocess
from megacode.corpus.preprocess.splitting import CorpusPart, Unit
from megacode.errors import UserError
from megacode.recipe.schema import TokenizerSection
from megacode.tokenizer.training import train_tokenizer

FUNCTION = """def f{n}(first, second, third):
    total = first * {n}
    for each in second:
        if each > third:
            total += each
    return total
"""
METHOD = '''class Thing:
    @staticmethod
    def method(self, value, other=1):
        """Says f"{x}"."""
        def inner(item):
            return f"{item + value}"
        match value:
            case [head, *tail]:
                result = inner(head)
            case _:
                result = other
        return result
'''
PROGRAM = """def helper(item):
    return item + {n}

def solve(items, limit):
    found = []
    for item in items:
        if item < limit:
            found.append(helper(item))
    return found
"""
OTHER = """def solve(values, top):
    return [value + {n} for value in values if not value >= top]
"""
GENERATOR = (
    "def inputs(rng):\n    return [rng.randint(-5, 5) for _ in range(4)], rng.randint(-2, 4)"
)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def files() -> list[dict[str, Any]]:
    """Four MB of files of Python, most of it one string: several parts."""
    padding = f"PADDING = '{'padding ' * 4_000}'\n"
    texts = [
        FUNCTION.format(n=i) + "\n\n" + METHOD.replace("other=1", f"other={i}") + padding
        for i in range(120)
    ]
    return [{"text": text, "path": f"p{i % 100}.py"} for i, text in enumerate(texts)]


def request(out: Path, *inputs: Path, **more: Any) -> PairRequest:
    return PairRequest(tuple(map(str, inputs)), out, **more)


def made(out: Path, *inputs: Path, **more: Any) -> tuple[PairResult, list[PairRecord]]:
    result = make_pairs(request(out, *inputs, **more))
    return result, list(read_pairs(out))


def contents(out: Path) -> bytes:
    held_out = out.with_suffix(".validation.jsonl")
    return out.read_bytes() + b"\n" + (held_out.read_bytes() if held_out.exists() else b"")


# ----------------------------------------------------------------------------------------- the same


def test_the_same_bytes_from_any_parts_and_processes(
    tmp_path: Path, files: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = write(tmp_path / "a.jsonl", files), write(tmp_path / "b.jsonl.gz", files)
    cut = [write(tmp_path / f"c{i}.jsonl", files[30 * i : 30 * i + 30]) for i in range(4)]
    how: dict[str, Any] = {"validation": 0.3, "hold_out": ("tokens-shuffled",)}
    found = []
    for number, (inputs, workers) in enumerate(
        (((plain,), 1), ((plain,), 2), ((packed,), 1), (cut, 1))
    ):
        out = tmp_path / str(number) / "pairs.jsonl"
        result = make_pairs(request(out, *inputs, **how), workers)
        assert result.parts == 1 if inputs == (packed,) else result.parts > 1
        assert not out.with_suffix(".parts").exists()
        found.append(contents(out))
    monkeypatch.setattr(
        make, "plan_units", lambda files: [Unit(CorpusPart(i, (i,)), 1) for i in range(len(files))]
    )
    monkeypatch.setattr(drafts, "_TOGETHER", 1)
    made(tmp_path / "5/pairs.jsonl", *cut, **how)
    found.append(contents(tmp_path / "5/pairs.jsonl"))
    assert len(set(found)) == 1 and found[0].count(b"\n") > 200
    make_pairs(request(tmp_path / "6/pairs.jsonl", plain, **how, seed=1))
    assert contents(tmp_path / "6/pairs.jsonl") != found[0]


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    source = write(tmp_path / "a.jsonl", files)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    make_pairs(request(whole, source))
    command = [sys.executable, "-m", "megacode.cli", "pairs", str(source), "--out", str(out), "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    parts = out.with_suffix(".parts")
    while not list(parts.glob("000*.json")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (parts / "000000.drafts").write_bytes(b"damaged")
    result = make_pairs(request(out, source))
    assert result.parts_kept < result.parts and contents(out) == contents(whole)
    (tmp_path / "pairs.json").unlink()
    assert make_pairs(request(out, source, overwrite=True)).counts == result.counts


def test_made_before(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    source, out = write(tmp_path / "a.jsonl", files[:9]), tmp_path / "pairs.jsonl"
    first, _ = made(out, source)
    again, _ = made(out, source)
    assert again.kept and not first.kept and again.counts == first.counts
    with pytest.raises(UserError, match=r"other settings \(seed differ\); choose another --out"):
        made(out, source, seed=1)
    assert not made(out, source, seed=1, overwrite=True)[0].kept
    out.write_bytes(b"damaged")
    assert not made(out, source, seed=1)[0].kept
    note = json.loads((tmp_path / "pairs.json").read_text())
    assert note["settings"]["seed"] == 1 and note["documents"] == 9
    assert note["input files"][0]["xxh3_128"] and note["counts"]["records"] == {"train": 18}


def test_what_is_in_the_way(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    source = write(tmp_path / "a.jsonl", files[:9])
    (tmp_path / "mine.jsonl").write_text("mine")
    for out, told in (("mine.jsonl", "not made by this tool"), ("a.jsonl", "is an input"), ("b.json", "end it in .jsonl")):  # fmt: skip
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError, match=told):
            make_pairs(request(tmp_path / out, source))
        assert sorted(path.name for path in tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------- the pairs


def test_splits_are_by_file(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    short = [{**one, "text": one["text"].partition("PADDING")[0]} for one in files]
    source, out = write(tmp_path / "a.jsonl", short), tmp_path / "pairs.jsonl"
    result, train = made(out, source, validation=0.3, hold_out=("operator-flipped",))
    held_out = list(read_pairs(tmp_path / "pairs.validation.jsonl"))
    assert result.counts.records == {"train": len(train), "validation": len(held_out)}
    assert len(train) + len(held_out) == 240 and len(held_out) > 20
    assert not {one.group for one in train} & {one.group for one in held_out}
    kinds = [{c.kind for one in some for c in one.candidates} for some in (train, held_out)]
    assert kinds[1] - kinds[0] == {"operator-flipped"}
    for some in (train, held_out):  # nor does a candidate come from the other split
        queries = {one.query: one.group for one in some}
        for one in some:
            other = [c.text for c in one.candidates if c.kind == "other-problem"]
            assert other and queries[other[0]] != one.group
    assert "method" in {one.name for one in train}
    assert all(c.proof is None for one in train for c in one.candidates)


def test_solutions_of_problems_are_run(tmp_path: Path) -> None:
    records = []
    for n in range(6):
        common = {"problem": n, "inputs": GENERATOR}
        records += [{"text": PROGRAM.format(n=n), **common}, {"text": OTHER.format(n=n), **common}]
    records.append({"text": OTHER.format(n=9), "problem": 0, "inputs": GENERATOR})  # a wrong one
    records.append(
        {"text": PROGRAM.format(n=1), "problem": 7, "inputs": "def inputs(rng): return rng.none"}
    )
    records.append({"text": PROGRAM.format(n=2), "problem": None, "inputs": GENERATOR})
    result, found = made(
        tmp_path / "pairs.jsonl", write(tmp_path / "a.jsonl", records), language="python",
        problem_field="problem", generator_field="inputs", min_lines=1,
    )  # fmt: skip
    counts = result.counts
    assert (
        counts.candidates["train solution run"] >= 11
        and counts.candidates["train rewritten run"] >= 12
    )
    assert counts.left_out["no text or number in 'problem'"] == 1 and result.quarantine
    assert counts.left_out["solution: computes something else"] >= 1
    assert counts.left_out["proofs: the program raises AttributeError on every input"] == 1
    assert counts.left_out["rewritten: not proven"] == 1
    by_query = {one.query: one for one in found}
    right = by_query[PROGRAM.format(n=3).strip()]
    assert {c.kind: c.text for c in right.candidates}["solution"] == OTHER.format(n=3).strip()
    assert all(c.proof == "run" for c in right.candidates) and right.group == "3"


def test_a_wrong_rewrite_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        drafts, "rewritten", lambda text, key: text.replace("item < limit", "item <= limit")
    )
    monkeypatch.setitem(
        drafts.CORRUPTIONS, "keyword-replaced", lambda text, language, key: f"{text}\n\nunused = 1"
    )
    source = write(
        tmp_path / "a.jsonl", [{"text": PROGRAM.format(n=n), "inputs": GENERATOR} for n in range(3)]
    )
    how: dict[str, Any] = {"language": "python", "generator_field": "inputs"}
    result, found = made(tmp_path / "pairs.jsonl", source, **how)
    assert result.counts.left_out["rewritten: computes something else"] == 3
    assert result.counts.left_out["keyword-replaced: computes the same"] == 3
    assert not {"rewritten", "keyword-replaced"} & {c.kind for one in found for c in one.candidates}
    del how["generator_field"]
    _, found = made(tmp_path / "unproven.jsonl", source, **how, unproven=True)
    assert {c.proof for one in found for c in one.candidates if c.kind == "rewritten"} == {None}


def test_odd_files(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "empty.py").write_text("")
    (folder / "bytes.py").write_bytes(b"# \xff\n" + FUNCTION.encode())
    (folder / "one_line.py").write_text(
        "def f(first, second, third): return first + second + third\n"
    )
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "long.py").write_text("x = 1\n" * 100_000 + FUNCTION.format(n=1))
    (folder / "other.py").write_text(METHOD)
    (folder / "notes.txt").write_text("def f(a, b, c):\n    pass\n")
    (folder / "a.go").write_text(
        "package a\n\nfunc Sum(left int, right int) int {\n\ttotal := left + right\n\treturn total\n}\n"
    )
    result, found = made(tmp_path / "pairs.jsonl", folder)
    assert {one.id for one in found} == {"long.py:0", "other.py:0", "a.go:0"}
    left_out = result.counts.left_out
    assert left_out["empty text"] == 1 and left_out["documents without a function that parses"] == 1
    assert left_out["documents of no language that is known here (--language)"] == 1
    assert left_out["functions shorter than 3 lines (--min-lines)"] == 1
    assert left_out["other-problem: none"] == 1, "there is one function of Go"
    assert "not UTF-8" in result.quarantine.read_text() if result.quarantine else False
    assert next(one for one in found if one.language == "go").name == "Sum"
    method = next(one for one in found if one.name == "method")
    assert method.query.startswith("@staticmethod\ndef method(") and "inner" in method.query


def test_datasets_are_decoded(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    """By their tokenizer: the same pairs as from the files that they were made of."""
    folder, model = tmp_path / "code", tmp_path / "t.model"
    folder.mkdir()
    for one in files[:12]:
        (folder / one["path"]).write_text(one["text"].partition("PADDING")[0])
    train_tokenizer([one["text"][:700] for one in files], model, vocab_size=330)
    section = TokenizerSection(path=str(model), bos=True)
    preprocess(Request((str(folder),), section, tmp_path / "code/train", shuffle=1))
    _, from_files = made(
        tmp_path / "files.jsonl", folder, include=("*.py",), kinds=("renamed", "lines-shuffled")
    )
    result, found = made(
        tmp_path / "data.jsonl", tmp_path / "code/train", kinds=("renamed", "lines-shuffled")
    )
    assert result.counts.records == {"train": 24}
    assert {one.query for one in found} == {one.query for one in from_files}
    assert all(one.group.endswith(".py") for one in found)


def test_nothing_to_pair(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x = 1", "path": "a.py"}, {"txet": ""}])
    with pytest.raises(UserError, match=r"no pair for .* \(1 no field 'text', 1 documents without"):
        made(tmp_path / "pairs.jsonl", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


# ------------------------------------------------------------------------------------------ the verb


def test_the_verb_and_inspect(
    tmp_path: Path, files: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "a.jsonl", files[:4]), tmp_path / "pairs.jsonl"
    command = ["pairs", str(source), "--out", str(out), "--workers", "1", "--kinds", "renamed,lines-shuffled,other-problem"]  # fmt: skip
    assert main(command) == 0 and main(command) == 0
    told = capsys.readouterr().out
    assert (
        "kept; already made" in told and "lines-shuffled" in told and "tokens-shuffled" not in told
    )
    assert main(["inspect", str(out)]) == 0 and "renamed" in capsys.readouterr().out
    assert main(["inspect", str(out), "--documents", "0"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("renamed: equivalent" in line for line in shown)
    assert max(map(len, shown)) <= 100
    assert any(line.split() == ["return", "total", "return", "total"] for line in shown)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kinds", "renamed,nonsense"], "expected some of renamed"),
        (["--kinds", "renamed"], "leaves no equivalent or no non-equivalent"),
        (["--kinds", "renamed,solution,lines-shuffled"], "give --problem-field"),
        (["--kinds", "rewritten,lines-shuffled"], "give --generator-field"),
        (["--hold-out", "operator-flipped"], "give --validation too"),
        (["--validation", "1"], "leaves nothing to train on"),
        (["--validation-out", "v.jsonl"], "give --validation F"),
        (["--where", "stars >"], "--where"),
    ],
)
def test_mistakes(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pairs", "a.jsonl", "--out", str(tmp_path / "p.jsonl"), *options]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
