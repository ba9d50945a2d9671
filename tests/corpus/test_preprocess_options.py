"""Filters, splits, duplicates, shuffling, repositories, shards, shares of the work: each against a plain computation."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megacode.corpus.preprocess import Request, order, preprocess
from megacode.corpus.preprocess import tokenize as part
from megacode.corpus.preprocess.conditions import parse_condition
from megacode.corpus.preprocess.counts import Group
from megacode.data import indexed
from megacode.data.records import read_records
from megacode.data.source import open_source
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.fast import FastEncoder
from megacode.tokenizer.tokenizer import load_tokenizer
from megacode.tokenizer.training import train_tokenizer
from tests.tokenizer.test_fast import GPT2_BY_TIKTOKEN, write_tiktoken

LANGUAGES = ("python", "c++", "c/h")


def record(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    text = " ".join(
        rng.choice(("def", "x", "return", "naïve", "<s>", "\n", "  ", str(number)))
        for _ in range(number % 90 + 1)
    )
    return {
        "text": text + f" {number if number % 5 else 'copy'}",
        "meta": {"language": LANGUAGES[number % 3], "stars": number % 13 if number % 7 else None},
        "repo": f"owner/r{number % 11}",
        "path": f"src/{number % 17}/f{number}.py",
    }


RECORDS = [record(i) for i in range(3000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_tokenizer([r["text"] for r in RECORDS[:300]], path, vocab_size=330)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return path


def make(
    model: Path, source: Path, output: Path, workers: int = 1, share: Any = None, **more: Any
) -> Any:
    tokenizer = schema.TokenizerSection(path=str(model), added_tokens="crystal")
    return preprocess(
        Request(inputs=(str(source),), tokenizer=tokenizer, output=output, **more), workers, share
    )


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def encoded(model: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens="crystal"))
    return [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]


def same(one: list[list[int]], other: list[list[int]]) -> bool:
    return Counter(map(tuple, one)) == Counter(map(tuple, other))


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("meta.stars >= 10", lambda r: (r["meta"]["stars"] or 0) >= 10),
        (
            "meta.language in ('python', 'c++') and not meta.stars == 3",
            lambda r: r["meta"]["language"] in ("python", "c++") and r["meta"]["stars"] != 3,
        ),
        (
            "0 < meta.stars < 4 or startswith(path, 'src/16/')",
            lambda r: 0 < (r["meta"]["stars"] or 0) < 4 or r["path"].startswith("src/16/"),
        ),
        ("matches(lower(repo), 'r1$')", lambda r: r["repo"].endswith("r1")),
        ("meta.stars == None", lambda r: r["meta"]["stars"] is None),
        ("file.name == 'in.jsonl' and len(text) > 100", lambda r: len(r["text"]) > 100),
        # A function of nothing is nothing, wherever it stands: the rest of the expression holds.
        ("startswith(meta.stars, 'x') or meta.stars == None or len(meta.stars)", lambda r: r["meta"]["stars"] is None),
        ("not (matches(meta.stars, 'x') or meta.stars > 3)", lambda r: (r["meta"]["stars"] or 0) <= 3),
    ],
)  # fmt: skip
def test_where(
    model: Path, corpus: Path, tmp_path: Path, expression: str, wanted: Callable[[Any], bool]
) -> None:
    result = make(model, corpus, tmp_path / "out", where=expression)
    expected = [r["text"] for r in RECORDS if wanted(r)]
    assert 0 < len(expected) < len(RECORDS)
    assert read(tmp_path / "out") == encoded(model, expected)
    assert result.counts.passed_over["not wanted (--where)"] == len(RECORDS) - len(expected)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("stars >=", "invalid syntax"),
        ("__import__('os').system('x')", "not understood"),
        ("open('x')", "no function open"),
        ("[c for c in text]", "not understood"),
        ("text.__class__()", "not understood"),
        ("lambda: 1", "not understood"),
        ("1 < 2", "names no field"),
        ("(x := 3)", "not understood"),
        ("f'{text}'", "not understood"),
        ("startswith(text)", r"startswith has 1 arguments; it is startswith\(text, start\)"),
        ("matches(path, '*.py')", r"'\*.py' is no regular expression \(nothing to repeat"),
        ("matches(path, 3)", "3 is no regular expression"),
    ],
)
def test_a_wrong_condition_is_a_sentence(expression: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_condition(expression)


def test_a_field_that_no_record_has_is_named(model: Path, corpus: Path, tmp_path: Path) -> None:
    for more in (
        {"where": "metta.stars > 3"},
        {"split_by": "language"},
        {"repository": "repository", "path": "path"},
    ):
        with pytest.raises(
            UserError,
            match=r"no field '.*' in the first records \(they have text, meta, repo, path",
        ):
            make(model, corpus, tmp_path / "out", **more)
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------------------------------------------- several datasets


def test_a_dataset_for_each_value(model: Path, corpus: Path, tmp_path: Path) -> None:
    options = dict(split_by="meta.language", validation=0.1)
    result = make(model, corpus, tmp_path / "data" / "{value}", **options)
    assert {p.name for p in result.outputs.values()} == {
        f"{value}{split}" for value in ("python", "c++", "c_h") for split in ("", "_validation")
    }
    for language, name in zip(LANGUAGES, ("python", "c++", "c_h"), strict=True):
        train, held = read(tmp_path / "data" / name), read(tmp_path / "data" / f"{name}_validation")
        assert same(
            train + held,
            encoded(model, [r["text"] for r in RECORDS if r["meta"]["language"] == language]),
        )
        assert json.loads((tmp_path / "data" / f"{name}.json").read_text())["value"] == language
    again = make(model, corpus, tmp_path / "data" / "{value}", **options)
    assert again.kept and again.outputs == result.outputs and again.counts == result.counts
    (tmp_path / "data" / "c_h.idx").unlink()
    assert not make(model, corpus, tmp_path / "data" / "{value}", **options).kept


def test_values_that_would_share_a_name_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "l": "c/h"}\n{"text": "b", "l": "c:h"}\n')
    with pytest.raises(UserError, match="'c/h' and 'c:h' would both be written to"):
        make(model, tmp_path / "in.jsonl", tmp_path / "out", split_by="l")


def test_parquet_folders_named_by_language(model: Path, tmp_path: Path) -> None:
    for language in LANGUAGES[:2]:
        rows = [r for r in RECORDS if r["meta"]["language"] == language]
        (tmp_path / "in" / language).mkdir(parents=True)
        table = pyarrow.table(
            {
                "content": [r["text"] for r in rows],
                "stars": [r["meta"]["stars"] for r in rows],
                "other": rows,
            }
        )
        pyarrow.parquet.write_table(
            table, tmp_path / "in" / language / "train-0.parquet", row_group_size=100
        )
    options = dict(
        text_field="content",
        split_by="file.folder",
        where="stars >= 5 and other.repo != 'owner/r3'",
    )
    make(model, tmp_path / "in", tmp_path / "out", **options)
    for language in LANGUAGES[:2]:
        expected = [
            r["text"]
            for r in RECORDS
            if r["meta"]["language"] == language
            and (r["meta"]["stars"] or 0) >= 5
            and r["repo"] != "owner/r3"
        ]
        assert read(tmp_path / f"out-{language}") == encoded(model, expected)


def test_even_and_odd_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(7):
        (tmp_path / "in" / f"{i}.jsonl").write_text(json.dumps({"text": f"file {i}"}) + "\n")
    for first in (0, 1):
        make(model, tmp_path / "in", tmp_path / f"half{first}", every=(first, 2))
        assert read(tmp_path / f"half{first}") == encoded(
            model, [f"file {i}" for i in range(first, 7, 2)]
        )


# --------------------------------------------------------------------------------------------------- order, duplicates


def test_only_the_first_of_equal_texts_stays(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(dict.fromkeys(r["text"] for r in RECORDS))
    assert len(expected) < len(RECORDS)
    for name, hashes_at_a_time in (("at once", 1 << 25), ("in ranges", 100)):
        monkeypatch.setattr(order, "_SORTED_HASHES", hashes_at_a_time)
        result = make(model, corpus, tmp_path / name, deduplicate=True)
        assert read(tmp_path / name) == encoded(model, expected)
        assert result.counts.passed_over["duplicate"] == len(RECORDS) - len(expected)
        assert result.counts.total.bytes == sum(len(text.encode()) for text in expected)
        assert result.counts.total.documents == len(expected)


def test_the_first_of_equal_texts_stays_whatever_dataset_it_goes_into(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random.Random(3).choices(
        ["a", "b", "c"], k=600
    )  # "first" is by place in the corpus, not by the value's name
    lines = [
        {"text": f"text {i // 2 if i % 3 else i % 7}", "to": value}
        for i, value in enumerate(values)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = {line["text"]: line["to"] for line in reversed(lines)}
    for name, hashes_at_a_time in (("at once", 1 << 25), ("in ranges", 100)):
        monkeypatch.setattr(order, "_SORTED_HASHES", hashes_at_a_time)
        make(
            model,
            tmp_path / "in.jsonl",
            tmp_path / name / "{value}",
            split_by="to",
            deduplicate=True,
        )
        for value in "abc":
            expected = [
                text
                for text in dict.fromkeys(line["text"] for line in lines)
                if first[text] == value
            ]
            assert read(tmp_path / name / value) == encoded(model, expected)


def test_a_shuffle_is_a_permutation_that_depends_on_the_seed_alone(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(model, corpus, tmp_path / "plain")
    make(model, corpus, tmp_path / "one", shuffle=1)
    make(model, corpus, tmp_path / "two", shuffle=2)
    monkeypatch.setattr(order, "BUCKET_BYTES", 5000)  # many buckets
    make(model, corpus, tmp_path / "small", workers=2, shuffle=1)
    plain, one, two, small = (read(tmp_path / name) for name in ("plain", "one", "two", "small"))
    assert one == small
    assert same(plain, one) and same(plain, two)
    assert plain != one != two
    records = np.load(tmp_path / "one.records.npy")
    assert one == [plain[line - 1] for line in records[:, 1]]
    # Uniform: where the first half of the input went has the mean and the spread of a random half.
    places = np.flatnonzero(records[:, 1] <= 1500)
    assert abs(places.mean() - 1500) < 4 * np.sqrt(3000**2 / 12 / 1500)


def test_files_of_a_repository_become_one_document(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens="crystal"))
    repositories: dict[str, list[Any]] = {}
    for r in RECORDS:
        repositories.setdefault(r["repo"], []).append(r)
    expected = []
    for name, files in repositories.items():
        ids = [tokenizer.token_id("<reponame>"), *tokenizer.encode(name)]
        for r in sorted(files, key=lambda r: r["path"]):
            ids += [
                tokenizer.token_id("<filename>"),
                *tokenizer.encode(r["path"] + "\n" + r["text"]),
            ]
        expected.append([*ids, tokenizer.eod_id])
    options = dict(repository="repo", path="path")
    result = make(model, corpus, tmp_path / "out", **options)
    assert same(read(tmp_path / "out"), expected)
    assert result.counts.total.documents == 11
    assert result.counts.total.bytes == sum(len(r["text"].encode()) for r in RECORDS)
    monkeypatch.setattr(order, "BUCKET_BYTES", 20_000)
    make(model, corpus, tmp_path / "small", workers=2, **options)
    assert (tmp_path / "small.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()
    halves = make(model, corpus, tmp_path / "halves", validation=0.4, **options)
    assert same(read(tmp_path / "halves") + read(halves.outputs[Group("validation")]), expected)
    with pytest.raises(UserError, match=r"--repository puts <reponame> in front.*crystal"):
        preprocess(
            Request(
                (str(corpus),),
                schema.TokenizerSection(path=str(model)),
                tmp_path / "no",
                repository="repo",
                path="path",
            )
        )


def test_a_tree_of_repositories(model: Path, tmp_path: Path) -> None:
    for path in ("b/z.py", "a/x/1.py", "a/x.py", "a/README.md"):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_text(f"# {path}\n")
    result = make(
        model,
        tmp_path / "in",
        tmp_path / "out",
        repository="file.repository",
        path="file.path",
        include=("*.py",),
    )
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens="crystal"))
    texts = {tokenizer.decode(ids, control=True) for ids in read(tmp_path / "out")}
    assert texts == {
        "<reponame>a<filename>a/x.py\n# a/x.py\n<filename>a/x/1.py\n# a/x/1.py\n</s>",
        "<reponame>b<filename>b/z.py\n# b/z.py\n</s>",
    }
    assert result.counts.total.documents == 2


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("more", [{}, {"shuffle": 4}, {"deduplicate": True}])
def test_shards_hold_the_same_documents_and_none_is_too_large(
    model: Path, corpus: Path, tmp_path: Path, more: Any
) -> None:
    make(model, corpus, tmp_path / "whole", **more)
    make(model, corpus, tmp_path / "cut", shard_size=20_000, **more)
    manifest = json.loads((tmp_path / "cut.json").read_text())
    shards = [tmp_path / name for name in manifest["shards"]]
    assert len(shards) > 5
    assert [ids for shard in shards for ids in read(shard)] == read(tmp_path / "whole")
    sizes = [indexed.with_ending(shard, ".bin").stat().st_size for shard in shards]
    assert max(sizes) <= 20_000 and min(sizes[:-1]) > 19_000
    own = [json.loads(indexed.with_ending(shard, ".json").read_text()) for shard in shards]
    assert sum(m["documents"] for m in own) == manifest["documents"]
    records = np.concatenate(
        [np.load(indexed.with_ending(shard, ".records.npy")) for shard in shards]
    )
    assert np.array_equal(records, np.load(tmp_path / "whole.records.npy"))
    again = make(model, corpus, tmp_path / "cut", shard_size=10**9, overwrite=True, **more)
    assert not again.kept and sorted(p.name for p in tmp_path.glob("cut-*")) == [
        "cut-00000.bin", "cut-00000.idx", "cut-00000.json", "cut-00000.records.npy"
    ]  # fmt: skip


def test_a_document_longer_than_a_shard_is_a_shard(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.jsonl").write_bytes(
        b"".join(corpus.read_bytes().splitlines(keepends=True)[:40])
    )
    make(model, tmp_path / "few.jsonl", tmp_path / "out", shard_size=50)
    shards = json.loads((tmp_path / "out.json").read_text())["shards"]
    assert [ids for shard in shards for ids in read(tmp_path / shard)] == encoded(
        model, [r["text"] for r in RECORDS[:40]]
    )


def test_every_document_knows_its_record(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [
        json.dumps(r) if i % 50 else "\n" * (i % 3) + "broken" for i, r in enumerate(RECORDS * 3)
    ]
    text = "\n".join(lines) + "\n\n"
    (tmp_path / "in" / "a.jsonl").write_text(text)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    make(model, tmp_path / "in", tmp_path / "out", workers=2)
    documents = read(tmp_path / "out")
    records = np.load(tmp_path / "out.records.npy")
    source = text.split("\n")
    texts = [json.loads(source[line - 1])["text"] for _, line in records]
    assert documents == encoded(model, texts)
    assert sorted({int(f) for f in records[:, 0]}) == [0, 1]
    bad = [
        json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    ]
    assert len(bad) == 2 * 180
    assert all(source[entry["record"] - 1] == "broken" == entry["raw"].strip() for entry in bad)


# ------------------------------------------------------------------------------------------------- shares of the work


def test_shares_make_what_one_run_makes(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = corpus.read_bytes() * 8
    (tmp_path / "in" / "a.jsonl").write_bytes(data)
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(zstandard.compress(data))
    make(model, tmp_path / "in", tmp_path / "one" / "out", shuffle=1)
    results = [
        make(model, tmp_path / "in", tmp_path / "three" / "out", share=(i, 3), shuffle=1)
        for i in (2, 0)
    ]
    assert not any(result.outputs for result in results)
    with pytest.raises(UserError, match=r"already there|other settings|differ"):
        make(model, tmp_path / "in", tmp_path / "three" / "out", share=(1, 3), shuffle=1)
        make(model, tmp_path / "in", tmp_path / "three" / "out", share=(1, 3), shuffle=2)
    one, three = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()}
        for name in ("one", "three")
    )
    assert one == three and not (tmp_path / "three" / "out.parts").exists()


def test_shares_at_the_same_time(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_bytes(corpus.read_bytes() * 8)
    make(model, tmp_path / "big.jsonl", tmp_path / "one")
    command = [
        sys.executable, "-m", "megacode.cli", "preprocess", str(tmp_path / "big.jsonl"), "--tokenizer", str(model),
        "--added-tokens", "crystal", "--output", str(tmp_path / "three"), "--workers", "1",
    ]  # fmt: skip
    processes = [
        subprocess.Popen([*command, "--shard", f"{i}/3"], stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("documents" in text for text in said) == 1
    for ending in ("bin", "idx", "records.npy"):
        assert (tmp_path / f"three.{ending}").read_bytes() == (
            tmp_path / f"one.{ending}"
        ).read_bytes()


# ------------------------------------------------------------------------------------------- large and broken records


def test_a_large_compressed_file_is_many_parts_with_the_same_documents(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    noise = [
        {"text": "".join(chr(rng.randrange(33, 1000)) for _ in range(2000))} for _ in range(1500)
    ]
    data = b"".join(json.dumps(r).encode() + b"\n" for r in [*RECORDS, *noise] * 2)
    (tmp_path / "plain.jsonl").write_bytes(data)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(data, 1))
    make(model, tmp_path / "plain.jsonl", tmp_path / "plain")
    result = make(model, tmp_path / "packed.jsonl.gz", tmp_path / "packed", workers=2)
    assert result.parts > 2
    for ending in ("bin", "idx", "records.npy"):
        assert (tmp_path / f"packed.{ending}").read_bytes() == (
            tmp_path / f"plain.{ending}"
        ).read_bytes()
    cut = (tmp_path / "packed.jsonl.gz").read_bytes()[:-200_000]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    result = make(model, tmp_path / "cut.jsonl.gz", tmp_path / "cut", workers=2)
    assert result.counts.bad["broken .gz: the file ends before its data does"] == 1
    assert result.counts.bad.total() <= 2  # the record that the file ends in is broken too
    whole = read(tmp_path / "plain")
    assert read(tmp_path / "cut") == whole[: result.counts.total.documents]
    assert result.counts.total.documents > len(whole) * 0.9


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_record_beyond_the_limit_is_set_aside_whole(
    model: Path, tmp_path: Path, ending: str
) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
    }
    long = json.dumps({"text": "x" * 3_000_000}).encode()
    lines = [json.dumps(RECORDS[1]).encode(), long, json.dumps(RECORDS[2]).encode()]
    (tmp_path / f"in.jsonl{ending}").write_bytes(pack[ending](b"\n".join(lines)))
    result = make(model, tmp_path / f"in.jsonl{ending}", tmp_path / "out", max_document=1 << 20)
    assert read(tmp_path / "out") == encoded(model, [RECORDS[1]["text"], RECORDS[2]["text"]])
    assert result.counts.bad == {"longer than 1 MiB (--max-document)": 1}
    (entry,) = map(json.loads, (tmp_path / "out.quarantine.jsonl").open())
    import base64

    assert base64.b64decode(entry["raw_base64"]).rstrip(b"\n") == long
    assert entry["record"] == 2


def test_memory_stays_bounded_by_a_huge_line(model: Path, tmp_path: Path) -> None:
    """400 MB in one line, read by a process that may not have 1.2 GB of address space for data."""
    with open(tmp_path / "in.jsonl", "wb") as file:
        file.write(json.dumps(RECORDS[1]).encode() + b'\n{"text": "')
        for _ in range(400):
            file.write(b"y" * 1_000_000)
        file.write(b'"}\n' + json.dumps(RECORDS[2]).encode() + b"\n")
    code = (
        "import sys\n"
        "from megacode.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "preprocess", str(tmp_path / "in.jsonl"), "--tokenizer", str(model), "--output",
         str(tmp_path / "out"), "--workers", "1", "--max-bad", "50%"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        int(done.stdout.split("PEAK")[1]) < 600_000
    )  # kB; Python with its libraries is 150,000 of them
    assert len(read(tmp_path / "out")) == 2
    assert (tmp_path / "out.quarantine.jsonl").stat().st_size > 400_000_000


@pytest.mark.skipif(
    os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="mounting a small disk needs root"
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_afterwards(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "big.jsonl").write_bytes(corpus.read_bytes() * 10)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        with pytest.raises(UserError, match=r"disk of the output is full.*run again to go on"):
            make(model, tmp_path / "big.jsonl", disk / "out")
        assert not (disk / "out.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert make(model, tmp_path / "big.jsonl", disk / "out").parts_kept > 0
        assert len(read(disk / "out")) == 10 * len(RECORDS)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_damaged_parts_are_done_again(model: Path, corpus: Path, tmp_path: Path) -> None:
    """What a power cut can leave: a finished part whose data did not reach the disk."""
    (tmp_path / "big.jsonl").write_bytes(corpus.read_bytes() * 8)
    make(model, tmp_path / "big.jsonl", tmp_path / "alone")
    make(model, tmp_path / "big.jsonl", tmp_path / "out", share=(0, 2))
    victim = min((tmp_path / "out.parts").glob("*.0.bin"))
    victim.write_bytes(b"\0" * victim.stat().st_size)
    result = make(model, tmp_path / "big.jsonl", tmp_path / "out")
    assert result.parts_kept > 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "alone.bin").read_bytes()


def test_a_recipe_reads_all_shards_by_the_name_of_the_dataset(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    make(model, corpus, tmp_path / "whole")
    make(model, corpus, tmp_path / "cut", shard_size=20_000)
    whole, cut = (open_source("s", [str(tmp_path / name)]) for name in ("whole", "cut"))
    assert len(cut.shards) > 5 and cut.tokens == whole.tokens
    origin = read_records(tmp_path / json.loads((tmp_path / "cut.json").read_text())["shards"][2])
    assert origin is not None and origin.origin(0)[0] == str(corpus)


def test_a_fast_backend_that_is_wrong_ends_the_run(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FastEncoder.encode_documents
    encoder = part.load_fast(
        load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens="crystal"))
    )
    assert isinstance(encoder, FastEncoder)

    def wrong(self: FastEncoder, texts: Any) -> Any:
        ids, offsets = right(self, texts)
        return ids + 1, offsets

    monkeypatch.setattr(FastEncoder, "encode_documents", wrong)
    monkeypatch.setattr(part, "load_fast", lambda tokenizer: encoder)
    with pytest.raises(UserError, match=r"in\.jsonl, record \d+: the fast tokenizer's ids differ"):
        make(model, corpus, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
    assert make(model, corpus, tmp_path / "exact", exact=True).counts.exact == "asked for (--exact)"


# ------------------------------------------------------------------------------ a tokenizer that panics


@pytest.mark.parametrize("pattern", ["known", "unknown"])
def test_texts_on_which_the_tokenizer_fails_are_set_aside(tmp_path: Path, pattern: str) -> None:
    """tiktoken's expressions run out of stack on a million blanks: a panic of Rust, no Exception."""
    tokenizer = tmp_path / "t.tiktoken"
    write_tiktoken(
        tokenizer, GPT2_BY_TIKTOKEN if pattern == "known" else rf"{GPT2_BY_TIKTOKEN}|Q{{7}}"
    )
    panics = " " * 1_000_000 + "\u0378"
    texts = ["def f(x):", panics, "return 1", panics, "a", *["word "] * 20]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    section = schema.TokenizerSection(path=str(tokenizer))
    request = Request(
        inputs=(str(tmp_path / "in.jsonl"),), tokenizer=section, output=tmp_path / "out"
    )
    for _ in range(2):
        result = preprocess(request, workers=1)
        assert result.counts.bad.total() == 2
        set_aside = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").open()]
        assert [one["record"] for one in set_aside] == [2, 4]
        assert all(one["reason"].startswith("tiktoken fails on it: ") for one in set_aside)
        assert indexed.open_shard(tmp_path / "out").documents == 23
        request = replace(request, overwrite=True)


def test_conversations_on_which_the_tokenizer_fails_are_a_sentence(tmp_path: Path) -> None:
    """From a worker's process, too."""
    write_tiktoken(tmp_path / "t.tiktoken", GPT2_BY_TIKTOKEN)
    hard = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": " " * 1_000_000 + "\u0378"},
        ]
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(hard) + "\n")
    section = schema.TokenizerSection(path=str(tmp_path / "t.tiktoken"))
    request = Request(
        inputs=(str(tmp_path / "in.jsonl"),), tokenizer=section, output=tmp_path / "out",
        text_field="", conversations=True, template="plain",
    )  # fmt: skip
    with pytest.raises(UserError, match="tiktoken fails on it"):
        preprocess(request, workers=2)
