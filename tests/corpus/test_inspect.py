"""`megacode inspect` tells the truth about a dataset, and --verify finds whatever is done to one."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from megacode.cli.main import main
from megacode.corpus import inspect, verify
from megacode.corpus.inspect import open_dataset, parse_documents, statistics
from megacode.data import indexed
from megacode.data.indexed import write_manifest
from megacode.data.lengths import length_histogram
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.training import train_tokenizer
from tests.data.conftest import EOD, write_shard

TEXTS = [
    f"def f_{n}(x):\n\treturn x * {n}  # naïve </s> \x1b[31m\n" * (1 + n % 5) for n in range(60)
]
HEADER = 34


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(TEXTS, path, vocab_size=300)
    return load_tokenizer(schema.TokenizerSection(path=str(path), added_tokens="crystal"))


def manifest(
    prefix: Path, tokenizer: Tokenizer, documents: list[list[int]], segments: int = 3
) -> dict[str, Any]:
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    size = len(data) // segments + 1
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return {
        "kind": "megacode dataset",
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "bytes": 2 * len(data),
        "token type": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {
            "path": str(tokenizer.path),
            "kind": None,
            "added_tokens": "crystal",
            "bos": False,
            "eod": True,
            "fingerprint": tokenizer.fingerprint(),
        },
        "settings": "a9a9535427350cad",
        "input files": [{"path": "corpus/a.jsonl", "bytes": 1, "xxh3_128": [[1, "0"]]}],
        "checksums": {
            "algorithm": "xxh3_128",
            "bin": [[len(piece), xxhash.xxh3_128_hexdigest(piece)] for piece in pieces],
            "idx": xxhash.xxh3_128_hexdigest(prefix.with_name(prefix.name + ".idx").read_bytes()),
        },
    }


def documents_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), EOD] for text in TEXTS]


@pytest.fixture
def whole(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A dataset of TEXTS as megacode makes it."""
    prefix = tmp_path / "whole"
    write_shard(prefix, documents_of(tokenizer))
    write_manifest(prefix, manifest(prefix, tokenizer, documents_of(tokenizer)))
    return prefix


@pytest.fixture
def sharded(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """The same documents in three shards of 20."""
    prefix, documents = tmp_path / "sharded", documents_of(tokenizer)
    names = [f"sharded-0000{n}-of-00003" for n in range(3)]
    for n, name in enumerate(names):
        part = documents[20 * n : 20 * n + 20]
        write_shard(tmp_path / name, part)
        write_manifest(tmp_path / name, manifest(tmp_path / name, tokenizer, part))
    common = manifest(tmp_path / names[0], tokenizer, documents)
    del common["checksums"]
    write_manifest(prefix, {**common, "shards": names})
    return prefix


def megatron(prefix: Path, documents: list[list[list[int]]], vocab_size: int = 1000) -> None:
    """A dataset of documents of several sequences each, written by Megatron-Core."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def problems(prefix: Path, **more: Any) -> tuple[str, ...]:
    return verify.verify(prefix, **more).problems


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_statistics_are_those_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    monkeypatch.setattr(
        inspect, "_COUNTED", 1000
    )  # so that some documents are too long to be counted by length
    generator = np.random.default_rng(3)
    lengths = np.append(
        np.exp(generator.normal(5, 2, 150)).astype(int), [0, 0, 1000, 999, 2048, 4097, 8193]
    )
    write_shard(tmp_path / "a", [[5] * n for n in lengths])
    found = statistics(open_dataset(tmp_path / "a"))
    expected = [int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 99)]
    assert [found.median, found.p90, found.p99] == expected
    assert (found.shortest, found.longest, found.tokens) == (
        lengths.min(),
        lengths.max(),
        lengths.sum(),
    )
    assert found.documents == found.sequences == len(lengths) and found.mean == lengths.mean()
    assert found.empty == (lengths == 0).sum() >= 2
    assert found.beyond == {limit: (lengths > limit).sum() for limit in (2048, 4096, 8192)}
    assert (found.histogram == length_histogram(lengths)).all()


@pytest.mark.parametrize("chunk", [1 << 20, 2])
def test_a_document_may_be_several_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    monkeypatch.setattr(verify, "CHUNK", chunk)
    megatron(tmp_path / "m", [[[1, 2], [3]], [[4]], [], [[5, 6, 7], [8], [9]]])
    dataset = open_dataset(tmp_path / "m")
    found = statistics(dataset)
    assert (found.documents, found.sequences, found.tokens, found.empty) == (4, 6, 9, 1)
    assert found.histogram[0, [0, 1, 3, 5]].tolist() == [1] * 4
    assert [dataset.span(n)[1:] for n in range(4)] == [(0, 3), (3, 1), (4, 0), (4, 5)]
    assert problems(tmp_path / "m", vocab_size=10) == ()
    (problem,) = problems(tmp_path / "m", vocab_size=9)
    assert "token 4 of document 3 (5 tokens) is 9, outside the vocabulary of 9" in problem


def test_shards_count_as_one_dataset(sharded: Path, whole: Path, tokenizer: Tokenizer) -> None:
    one, three = open_dataset(whole), open_dataset(sharded)
    assert str(statistics(one)) == str(statistics(three)) and three.documents == 60
    for number in (0, 19, 20, 59):
        shard, first, tokens = three.span(number)
        assert inspect.read_tokens(shard, first, tokens).tolist() == documents_of(tokenizer)[number]
    with pytest.raises(IndexError):
        three.span(60)


def test_no_documents_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron(tmp_path / "none", [])
    assert main(["inspect", str(tmp_path / "none")]) == 0
    assert main(["inspect", str(tmp_path / "none"), "--verify", "--vocab-size", "5"]) == 0
    assert "tokens 0 " in " ".join(capsys.readouterr().out.split())


# -------------------------------------------------------------------------------------------------------- documents


def test_numbers_and_ranges_of_documents() -> None:
    def numbers(text: str) -> list[int]:
        return [n for chosen in parse_documents(text, 10) for n in chosen]

    assert numbers("0,5,2:4,-1") == [0, 5, 2, 3, 9]
    assert numbers("-2:") == [8, 9] and numbers(":2, 7") == [0, 1, 7] and numbers("8:99") == [8, 9]
    for wrong in ("10", "-11", "a", "1,,2", "1:2:3"):
        with pytest.raises(UserError, match="--documents"):
            parse_documents(wrong, 10)


@pytest.mark.parametrize("dataset", ["whole", "sharded"])
def test_documents_are_shown_decoded(
    dataset: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = request.getfixturevalue(dataset)
    assert main(["inspect", f"{prefix}.idx", "--documents", "3,39:41,-1", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert [one["document"] for one in entry["documents"]] == [3, 39, 40, 59]
    assert [one["text"] for one in entry["documents"]] == [
        TEXTS[n] + "</s>" for n in (3, 39, 40, 59)
    ]
    assert main(["inspect", str(prefix), "--documents", "40", "--limit", "20"]) == 0
    out = capsys.readouterr().out
    assert TEXTS[40][:20] in out and TEXTS[40][:21] not in out
    assert "[the rest is left out (--limit 20)]" in out


def test_a_document_cannot_steer_the_terminal(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(whole), "--documents", "0"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m" in out


def test_control_tokens_are_told_from_text_that_spells_them(tokenizer: Tokenizer) -> None:
    fim = tokenizer.control_tokens["<|fim_prefix|>"]
    ids = [fim, *tokenizer.encode("a </s>"), EOD, 5000]
    pieces = list(inspect.pieces_of_text(tokenizer, ids, [False] * len(ids)))
    assert pieces == [
        ("control", "<|fim_prefix|>", False),
        ("text", "a </s>", False),
        ("control", "</s>", False),
        ("unknown", "<id 5000>", False),
    ]


def test_documents_as_ids(
    whole: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = documents_of(tokenizer)[7]
    assert main(["inspect", str(whole), "--documents", "7", "--tokens", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["documents"] == [
        {"document": 7, "tokens": len(expected), "ids": expected}
    ]
    assert main(["inspect", str(whole), "--documents", "7", "--tokens", "--limit", "9"]) == 0
    out = capsys.readouterr().out
    shown = [int(token) for token in out.splitlines()[2].split()]
    assert (
        shown == expected[: len(shown)] and len(" ".join(map(str, expected[: len(shown) + 1]))) > 9
    )
    assert "[the rest is left out (--limit 9)]" in out


def test_another_tokenizer_is_not_taken_for_the_one_of_the_dataset(
    whole: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole.with_name("whole.json")
    said = json.loads(path.read_text())
    beside = tmp_path / tokenizer.path.name
    beside.write_bytes(tokenizer.path.read_bytes())
    for named, expected in (
        (
            {"path": "elsewhere/gone.model"},
            "its tokenizer elsewhere/gone.model is not there; give --tokenizer FILE",
        ),
        ({"fingerprint": "0" * 64}, "is not the tokenizer that made it"),
        ({"path": "elsewhere/t.model"}, None),
    ):
        path.write_text(json.dumps({**said, "tokenizer": {**said["tokenizer"], **named}}))
        assert main(["inspect", str(whole), "--documents", "0"]) == (2 if expected else 0)
        assert expected is None or expected in capsys.readouterr().err
    path.unlink()
    assert main(["inspect", str(whole), "--documents", "0"]) == 2
    assert "give --tokenizer FILE" in capsys.readouterr().err
    given = ("--tokenizer", str(tokenizer.path), "--added-tokens", "crystal")
    assert main(["inspect", str(whole), "--documents", "1", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["documents"][0]["text"] == TEXTS[1] + "</s>"


# ------------------------------------------------------------------------------------------------------ the command


def test_the_summary(
    whole: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(whole), "--plot", str(tmp_path / "a.png")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for expected in (
        "format version 1",
        "token type uint16",
        "bytes per token 4 ",
        "corpus/a.jsonl",
        "digest a9a9535427350cad",
        "eod true",
    ):
        assert expected in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main(["inspect", str(whole), str(whole) + ".bin", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    lengths = [len(ids) for ids in documents_of(tokenizer)]
    assert (entry["documents"], entry["tokens"]) == (60, sum(lengths))
    assert entry["tokens per document"]["longest"] == max(lengths)
    assert entry["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert sum(entry["histogram"]["documents"]) == 60


def test_a_corpus_is_its_datasets(
    whole: Path, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = whole.with_name("corpus")
    write_manifest(
        corpus,
        {
            "kind": "megacode corpus",
            "run": {"datasets": {"a": "whole", "b": "sharded", "c": "../x"}},
        },
    )
    assert main(["inspect", str(corpus), "--verify", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [entry["prefix"] for entry in json.loads(out)] == [str(whole), str(sharded)]
    assert err == "in other folders, to be named by themselves: ../x\n"


def test_mistakes_are_sentences(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in (
        ([str(tmp_path / "nothing")], "nothing: no dataset there (nothing.bin and nothing.idx)"),
        ([str(whole), "--limit", "0"], "--limit: expected 1 or more, not 0"),
        ([str(whole), "--vocab-size", "0"], "--vocab-size: expected 1 or more, not 0"),
        ([str(whole), "--added-tokens", "crystal"], "go with --tokenizer"),
        ([str(whole), "--plot", str(tmp_path / "a.docx")], "cannot be drawn"),
    ):
        assert main(["inspect", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_it_needs_no_torch(whole: Path) -> None:
    code = (
        "import sys; from megacode.cli.main import main; main(['inspect', sys.argv[1]]); main([*sys.argv[2:], sys.argv[1]])\n"
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(whole), "inspect", "--verify"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


# ---------------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("chunk", [1 << 20, 11])
@pytest.mark.parametrize("dataset", ["whole", "sharded"])
def test_nothing_is_wrong_with_a_whole_dataset(
    dataset: str, chunk: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = request.getfixturevalue(dataset)
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    monkeypatch.setattr(verify, "CHUNK", chunk)
    read: list[int] = []
    result = verify.verify(prefix, on_bytes=read.append)
    assert (result.problems, result.count, result.unchecked, result.documents) == ((), 0, (), 60)
    headers = HEADER * len(inspect.shards_at(prefix))
    assert sum(read) == verify.bytes_at(prefix) - headers


def change(prefix: Path, ending: str, offset: int, form: str, value: int) -> None:
    with open(f"{prefix}{ending}", "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


def reseal(prefix: Path, tokenizer: Tokenizer) -> None:
    """Give a changed dataset the checksums of what it is now, to see what else finds the change."""
    path = prefix.with_name(prefix.name + ".json")
    sums = manifest(prefix, tokenizer, [])["checksums"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksums": sums}))


def token(prefix: Path, document: int, within: int, value: int) -> None:
    _, first, tokens = open_dataset(prefix).span(document)
    change(prefix, ".bin", 2 * (first + within % tokens), "<H", value)


def length(prefix: Path, sequence: int, value: int) -> None:
    change(prefix, ".idx", HEADER + 4 * sequence, "<i", value)


def offset(prefix: Path, sequence: int, value: int) -> None:
    change(prefix, ".idx", HEADER + 4 * 60 + 8 * sequence, "<q", value)


def boundary(prefix: Path, number: int, value: int) -> None:
    change(prefix, ".idx", HEADER + 12 * 60 + 8 * number, "<q", value)


BREAKS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "id beyond the vocabulary": (
        lambda p: token(p, 7, 3, 4000),
        [
            r"whole\.bin: token 3 of document 7 \(\d+ tokens\) is 4,000, outside the vocabulary of 332"
        ],
    ),
    "no EOD": (
        lambda p: token(p, 7, -1, 40),
        [
            r"token (\d+) of document 7 \(\d+ tokens\) is the last one and should be EOD \(2\); it is 40"
        ],
    ),
    "early EOD": (
        lambda p: token(p, 59, 5, EOD),
        [r"token 5 of document 59 .* is EOD \(2\) before the document's end"],
    ),
    "length 0": (
        lambda p: length(p, 30, 0),
        [r"sequence 30 \(document 30\) has a length of 0", "sequence 31"],
    ),
    "length below 0": (lambda p: length(p, 30, -5), ["has a length of -5", "sequence 31"]),
    "length too large": (
        lambda p: length(p, 30, 9999),
        [r"sequence 31 \(document 31\) begins at byte .* ends at"],
    ),
    "offset outside": (
        lambda p: offset(p, 30, 1 << 40),
        ["sequence 30 .*1,099,511,627,776", "sequence 31"],
    ),
    "boundary backwards": (
        lambda p: boundary(p, 30, 28),
        ["document 29 begins at sequence 29 and ends before it, at 28"],
    ),
    "boundary outside": (
        lambda p: boundary(p, 30, 500),
        ["document 30 begins at sequence 500 and ends before it"],
    ),
}


@pytest.mark.parametrize("chunk", [1 << 20, 11])
@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_without_checksums(
    name: str, chunk: int, whole: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    monkeypatch.setattr(verify, "CHUNK", chunk)
    harm, expected = BREAKS[name]
    harm(whole)
    reseal(whole, tokenizer)
    found = problems(whole)
    assert len(found) == len(expected)
    for sentence, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, sentence), sentence
    result = verify.verify(whole)
    index_is_whole = ".bin" in "".join(found) and ".idx" not in "".join(found)
    assert (
        bool(result.unchecked) != index_is_whole
    )  # then it says that ends of documents were not looked at


@pytest.mark.parametrize("chunk", [1 << 20, 11])
def test_checksums_find_any_change(
    whole: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(verify, "CHUNK", chunk)
    segments = json.loads(whole.with_name("whole.json").read_text())["checksums"]["bin"]
    assert len(segments) == 3
    at = segments[0][0] + 7
    before = whole.with_name("whole.bin").read_bytes()
    ids = np.frombuffer(before, dtype="<u2").copy()
    ids[at // 2] = 20 if ids[at // 2] != 20 else 21
    whole.with_name("whole.bin").write_bytes(ids.tobytes())
    found = [problem for problem in problems(whole) if "EOD" not in problem]
    start, end = f"{segments[0][0]:,}", f"{segments[0][0] + segments[1][0]:,}"
    assert len(found) == 1 and f"bytes {start} to {end} are not those that were written" in found[0]
    whole.with_name("whole.bin").write_bytes(before)
    assert problems(whole) == ()
    change(whole, ".idx", HEADER + 4 * 60, "<q", 0)  # as it was
    assert problems(whole) == ()
    with open(f"{whole}.idx", "ab") as file:
        file.write(b"\0" * 60)  # modes, which the format allows
    (problem,) = problems(whole)
    assert "whole.idx: is not what was written" in problem


def test_manifests_that_say_something_else(whole: Path, sharded: Path) -> None:
    path = whole.with_name("whole.json")
    said = json.loads(path.read_text())
    for key, value, expected in (
        ("documents", 61, "says documents 61; the index says 60"),
        ("tokens", 5, "says tokens 5; the index says"),
        (
            "checksums",
            {**said["checksums"], "bin": said["checksums"]["bin"][:-1]},
            "has checksums of",
        ),
    ):
        path.write_text(json.dumps({**said, key: value}))
        (problem,) = problems(whole)
        assert expected in problem
    path = sharded.with_name("sharded.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "documents": 61}))
    (problem,) = problems(sharded)
    assert "sharded.json says 61 documents; its shards hold 60" in problem


def test_one_bad_shard_does_not_hide_the_next(
    sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded.parent
    (folder / "sharded-00000-of-00003.idx").unlink()
    with open(folder / "sharded-00001-of-00003.bin", "ab") as file:
        file.write(b"\0\0")
    last = folder / "sharded-00002-of-00003"
    token(last, 4, 1, 9999)
    assert main(["inspect", str(sharded), "--verify"]) == 2
    captured = capsys.readouterr()
    assert "sharded-00000-of-00003.idx is missing" in captured.out
    assert "sharded-00001-of-00003.bin has" in captured.out
    assert (
        "token 1 of document 44" in captured.out and "9,999" in captured.out
    )  # numbers go on through the shards
    assert f"{sharded}: 4 problems found" in captured.err


def test_many_problems_are_counted_and_each_kind_is_shown(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.fromfile(f"{whole}.bin", dtype="<u2")
    data[data != EOD] = 5000
    data[-1] = 7
    data.tofile(f"{whole}.bin")
    result = verify.verify(whole)
    assert result.count == (data == 5000).sum() + 1 + 3 and len(result.problems) == 10
    assert sum("outside the vocabulary" in problem for problem in result.problems) == 6
    assert sum("should be EOD" in problem for problem in result.problems) == 1
    assert sum("were written" in problem for problem in result.problems) == 3
    assert main(["inspect", str(whole), "--verify"]) == 2
    assert f"and {result.count - 10:,} more" in capsys.readouterr().out


def test_a_dataset_without_a_manifest(
    whole: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    whole.with_name("whole.json").unlink()
    token(whole, 3, 2, 320)
    assert main(["inspect", str(whole), "--verify"]) == 0
    out = capsys.readouterr().out
    for what in (
        "checksums: whole.json is not there",
        "vocabulary: nothing says",
        "EOD at the ends",
    ):
        assert f"not checked {what}" in out
    assert "nothing wrong in what was checked" in out and "highest id 320" in out
    assert main(["inspect", str(whole), "--verify", "--tokenizer", str(tokenizer.path)]) == 2
    assert "outside the vocabulary of 300" in capsys.readouterr().out
    assert main(["inspect", str(whole), "--verify", "--vocab-size", "321"]) == 0


def test_empty_documents_have_no_eod(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [[], [[5, 6], [EOD]], [], [[EOD]], []]
    prefix = tmp_path / "m"
    megatron(prefix, documents)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    write_manifest(prefix, manifest(prefix, tokenizer, flat))
    found = problems(prefix)
    assert [re.search(r"m\.idx: document (\d) is empty", problem)[1] for problem in found] == [
        "0",
        "2",
        "4",
    ]
    without = manifest(prefix, tokenizer, flat)
    without["tokenizer"]["eod"] = False
    write_manifest(prefix, without)
    assert problems(prefix) == ()


def test_negative_ids(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[5, -3, 7]], vocab_size=100_000)
    (problem,) = problems(tmp_path / "a")
    assert "token 1 of document 0 (3 tokens) is -3, outside any vocabulary" in problem


def test_memory_stays_the_same(tmp_path: Path) -> None:
    """60 MB of tokens in 3 million documents, mapped and read, within 25 MB of what a small dataset takes."""
    from megacode.data.indexed import write_index

    code = (
        "import sys; from pathlib import Path; from megacode.corpus import inspect, verify\nfrom megacode.data import indexed\n"
        "p = Path(sys.argv[1]); indexed.CHUNK = verify.CHUNK = 1 << 16\n"
        "inspect.statistics(inspect.open_dataset(p)); assert not verify.verify(p, vocab_size=9).count\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for name, documents in (("small", 1000), ("large", 3_000_000)):
        lengths = np.full(documents, 10, dtype=np.int32)
        write_index(tmp_path / f"{name}.idx", lengths, np.dtype(np.uint16))
        (tmp_path / f"{name}.bin").write_bytes(bytes(2 * int(lengths.sum())))
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout) / 1024)
    assert peaks[1] - peaks[0] < 25
