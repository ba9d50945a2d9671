"""From corpus to dataset: Megatron-Core's own bytes, the same on any number of workers and after any kill."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import xxhash

from megacode.cli.arguments import Parser, share
from megacode.cli.preprocess import add_arguments, run
from megacode.corpus.inputs import find_inputs
from megacode.corpus.preprocess import Request, Result, preprocess
from megacode.corpus.preprocess.counts import Group
from megacode.corpus.preprocess.folder import open_folder, remove_folder
from megacode.corpus.preprocess.splitting import plan_units
from megacode.corpus.preprocess.tokenize import in_validation
from megacode.corpus.workers import Workers, _serve
from megacode.data import indexed
from megacode.errors import UserError
from megacode.files import replace_file
from megacode.lock import Lock
from megacode.recipe import schema
from megacode.tokenizer.training import train_tokenizer
from tests.data.conftest import write_shard

WORDS = [
    "def",
    "return",
    "self",
    "the",
    "of",
    "(x)",
    "= [i]",
    "for",
    "naïve",
    "12",
    "<s>",
    "</s>",
    "\t",
    "\n",
    "  ",
]


def document(number: int) -> str:
    digest = hashlib.sha256(str(number).encode()).digest()
    return " ".join(WORDS[b % len(WORDS)] for b in digest * (1 + number % 9)) + f" {number}\n"


DOCUMENTS = [document(i) for i in range(4000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_tokenizer(DOCUMENTS[:200], path, vocab_size=330)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Several parts: two large files, one of them compressed, and small ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in DOCUMENTS]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:3000]) * 2)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3000:3990])))
    (folder / "c.jsonl").write_bytes(b"".join(lines[3990:]))
    return folder


def request(model: Path, corpus: Path, output: Path, **more: Any) -> Request:
    tokenizer = schema.TokenizerSection(
        path=str(model), added_tokens="crystal", bos=more.pop("bos", False)
    )
    return Request(inputs=(str(corpus),), tokenizer=tokenizer, output=output, **more)


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("vocab_size", [400, 70000])
@pytest.mark.parametrize("documents", [1, 3000])
def test_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, vocab_size: int, documents: int
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = np.random.default_rng(7)
    ids = [
        generator.integers(0, vocab_size, size=generator.integers(0, 50)).tolist()
        for _ in range(documents)
    ]
    dtype = indexed.token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for document_ids in ids:
        builder.add_item(torch.tensor(document_ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_shard(tmp_path / "ours", ids, vocab_size)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (
            tmp_path / f"theirs.{ending}"
        ).read_bytes()


def test_an_index_longer_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1000, dtype=np.int32) % 7
    indexed.write_index(tmp_path / "whole.idx", lengths, np.dtype(np.uint16))
    monkeypatch.setattr(indexed, "CHUNK", 17)
    indexed.write_index(tmp_path / "chunks.idx", lengths, np.dtype(np.uint16))
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "chunks.idx").read_bytes()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")

    def fail() -> None:
        with replace_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == {"x": b"old"}


# --------------------------------------------------------------------------------------------------------- the corpus


def test_every_document_in_order_with_sentencepieces_ids(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    result = preprocess(request(model, corpus, tmp_path / "out", bos=True))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [*DOCUMENTS[:3000], *DOCUMENTS[:3000], *DOCUMENTS[3000:]]
    assert read(tmp_path / "out") == [[1, *reference.encode(text), 2] for text in expected]
    numbers = result.counts.groups[Group("train")]
    assert (numbers.documents, numbers.bytes) == (
        7000,
        sum(len(text.encode()) for text in expected),
    )
    assert result.parts > 1
    assert result.counts.checked >= result.parts


def test_any_number_of_workers_gives_the_same_bytes(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    for workers, name in ((1, "one"), (3, "three")):
        (tmp_path / name).mkdir()
        preprocess(request(model, corpus, tmp_path / name / "out", validation=0.1), workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert set(contents(tmp_path / "one")) == {
        f"{prefix}.{ending}"
        for prefix in ("out", "out_validation")
        for ending in ("bin", "idx", "json", "records.npy")
    }


def test_the_split_goes_by_content(model: Path, corpus: Path, tmp_path: Path) -> None:
    preprocess(
        request(
            model,
            corpus,
            tmp_path / "out",
            validation=0.2,
            validation_output=tmp_path / "held" / "out",
        )
    )
    train, held = (
        {tuple(ids) for ids in read(prefix)}
        for prefix in (tmp_path / "out", tmp_path / "held" / "out")
    )
    assert not train & held
    assert len(train) + len(held) == len(set(DOCUMENTS))
    assert 0.15 < len(held) / len(set(DOCUMENTS)) < 0.25
    texts = [text.encode() for text in DOCUMENTS]
    assert {t for t in texts if in_validation(t, 0.05)} < {
        t for t in texts if in_validation(t, 0.2)
    }


def test_the_manifest_says_what_is_there(model: Path, corpus: Path, tmp_path: Path) -> None:
    preprocess(request(model, corpus, tmp_path / "out", validation=0.1))
    manifest = json.loads((tmp_path / "out.json").read_text())
    tokens = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert manifest["tokens"] == len(tokens)
    assert manifest["vocab_size"] == 362
    data, done = (tmp_path / "out.bin").read_bytes(), 0
    for size, digest in manifest["checksums"]["bin"]:
        assert xxhash.xxh3_128_hexdigest(data[done : done + size]) == digest
        done += size
    assert done == len(data)
    assert (
        xxhash.xxh3_128_hexdigest((tmp_path / "out.idx").read_bytes())
        == manifest["checksums"]["idx"]
    )
    for row in manifest["input files"]:
        contents_of_file, done = Path(row["path"]).read_bytes(), 0
        assert row["bytes"] == len(contents_of_file)
        for size, digest in row["xxh3_128"]:
            assert xxhash.xxh3_128_hexdigest(contents_of_file[done : done + size]) == digest
            done += size
        assert done == len(contents_of_file)
    assert [row["path"] for row in manifest["input files"]] == [
        str(p) for p in sorted(corpus.iterdir())
    ]
    assert (
        manifest["documents"]
        + json.loads((tmp_path / "out_validation.json").read_text())["documents"]
        == 7000
    )


def test_units_tile_the_corpus(corpus: Path) -> None:
    files = find_inputs([corpus], on_link=print)
    units = plan_units(files)
    covered = dict.fromkeys(range(3), 0)
    for unit in units:
        for n in unit.part.files:
            span = unit.part.span
            covered[n] += span[1] - span[0] if span else files[n].size
    assert covered == {n: file.size for n, file in enumerate(files)}
    assert [unit.part.unit for unit in units] == list(range(len(units)))
    assert sum(unit.size for unit in units) == sum(file.size for file in files)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_records_are_set_aside_and_the_good_ones_are_all_there(
    model: Path, tmp_path: Path
) -> None:
    good = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    lines = []
    for number, line in enumerate(good):
        lines.append(line)
        if number % 1000 == 7:
            lines += [
                b'{"text": "broken',
                b'{"text": "\xff"}',
                b'{"text": ""}',
                rb'{"text": "half \ud83d pair"}',
            ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    result = preprocess(request(model, tmp_path / "in.jsonl", tmp_path / "out"))
    assert result.counts.bad.total() == 8
    assert result.counts.passed_over == {"empty text": 4}
    assert result.counts.repaired == 4
    assert result.counts.total.documents == len(DOCUMENTS) + 4
    assert result.parts > 1
    quarantined = [
        json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    ]
    assert len(quarantined) == 12
    for entry in quarantined:
        assert lines[entry["record"] - 1].startswith(
            (b'{"text": "broken', b'{"text": "\xff', b'{"text": ""')
        )
    assert {
        entry["raw"].strip() for entry in quarantined if entry["reason"].startswith("not JSON")
    } == {'{"text": "broken'}
    assert all(
        "raw_base64" in entry for entry in quarantined if entry["reason"].startswith("not UTF-8")
    )


def arguments(*args: str) -> argparse.Namespace:
    parser = Parser()
    add_arguments(parser)
    return parser.parse_args(args)


def test_too_many_bad_records_end_the_command_after_the_good_ones_are_written(
    model: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS[:99]] + ["broken"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    common = (
        str(tmp_path / "in.jsonl"),
        "--tokenizer",
        str(model),
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "1",
    )
    with pytest.raises(
        UserError, match=r"1 of 100 records are bad \(1\.00%, over --max-bad 0\.1%\).*quarantine"
    ):
        run(arguments(*common, "--max-bad", "0.1%"))
    assert len(read(tmp_path / "out")) == 99
    assert run(arguments(*common, "--max-bad", "2%")) == 0


def test_shares() -> None:
    assert (share("0.1%"), share("0.5"), share("0")) == (0.001, 0.5, 0.0)
    for wrong in ("5", "-1%", "lots", "200%"):
        with pytest.raises(UserError, match="--max-bad: "):
            arguments("in", "--tokenizer", "t", "--output", "o", f"--max-bad={wrong}")


# ------------------------------------------------------------------------------------------------- resuming, repeating


def test_a_finished_output_is_kept_and_another_one_is_not_overwritten(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    first = preprocess(request(model, corpus, tmp_path / "out", validation=0.1))
    before = contents(tmp_path)
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    again = preprocess(request(model, corpus, tmp_path / "out", validation=0.1), workers=2)
    assert (first.kept, again.kept) == (False, True)
    assert (again.counts, again.outputs) == (first.counts, first.outputs)
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == stamps
    with pytest.raises(UserError, match=r"already there.*\(bos differ\).*--overwrite"):
        preprocess(request(model, corpus, tmp_path / "out", validation=0.1, bos=True))
    assert contents(tmp_path) == before
    (corpus / "c.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(UserError, match="input files differ"):
        preprocess(request(model, corpus, tmp_path / "out", validation=0.1))
    assert not preprocess(
        request(model, corpus, tmp_path / "out", validation=0.1, overwrite=True)
    ).kept
    assert contents(tmp_path) != before


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    whole = preprocess(request(model, corpus, alone / "out", validation=0.1))

    class Stop(Exception):
        pass

    def interrupt_after(count: int) -> Result:
        seen = 0

        def on_progress(progress: object) -> None:
            nonlocal seen
            seen += 1
            if seen > count:
                raise Stop

        return preprocess(
            request(model, corpus, killed / "out", validation=0.1), on_progress=on_progress
        )

    for count in (0, 2, 3):
        with pytest.raises(Stop):
            interrupt_after(count)
        assert not (killed / "out.json").exists()
    last = interrupt_after(10**9)
    assert 0 < last.parts_kept < last.parts == whole.parts
    assert contents(killed) == contents(alone)


@pytest.mark.parametrize("reordered", [False, True])
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    model: Path, corpus: Path, tmp_path: Path, reordered: bool
) -> None:
    """A real process with workers, kill -9, again and again; its workers go with it."""
    alone, killed = tmp_path / "alone" / "out", tmp_path / "killed" / "out"
    options: dict[str, Any] = dict(
        validation=0.1, **(dict(deduplicate=True, shuffle=3) if reordered else {})
    )
    (corpus / "d.jsonl").write_bytes((corpus / "a.jsonl").read_bytes() * 3)
    preprocess(request(model, corpus, alone, **options))
    command = [
        sys.executable, "-m", "megacode.cli", "preprocess", str(corpus), "--tokenizer", str(model),
        "--added-tokens", "crystal", "--output", str(killed), "--validation", "0.1", "--workers", "2",
        *(("--deduplicate", "--shuffle", "3") if reordered else ()),
    ]  # fmt: skip
    folder = killed.with_name("out.parts")

    def parts() -> set[str]:
        try:
            return set(os.listdir(folder))
        except FileNotFoundError:  # not begun, or finished
            return set()

    choose = random.Random(5)
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen = parts()
        while process.poll() is None and not parts() - seen:
            time.sleep(0.005)  # until it has begun to work
        time.sleep(choose.random() * 0.3)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    made = contents(killed.parent)
    assert made.pop("out.lengths.png")
    assert made == contents(alone.parent)


ENDED_BEFORE_A_CHANGE = """
import os, sys
from pathlib import Path
from megacode.corpus.preprocess import Request, preprocess
from megacode.recipe import schema

model, corpus, folder = sys.argv[1:]
changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
left = None

def hook(event, args):
    global left
    if left is not None and (event in changes or event == "open" and set(str(args[1])) & set("wax+")):
        left -= 1
        left < 0 and os._exit(77)

def run(output, changes_allowed):
    global left
    left = changes_allowed
    tokenizer = schema.TokenizerSection(path=model, added_tokens="crystal")
    preprocess(Request(inputs=(corpus,), tokenizer=tokenizer, output=Path(folder, output), validation=0.1))
    made, left = changes_allowed - left, None
    return made

def run_apart(output, changes_allowed):
    pid = os.fork()
    if not pid:
        run(output, changes_allowed)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

sys.addaudithook(hook)
whole = run("whole/out", 10**9)
for n in [*range(0, whole - 16, 9), *range(whole - 16, whole)]:
    print(n, run_apart(f"{n}/out", n), run_apart(f"{n}/out", 10**9), flush=True)
"""


def test_ended_before_any_change_to_the_disk_it_goes_on(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    """The last moments, when the parts are cleared away, one by one."""
    for path in corpus.iterdir():
        path.unlink()
    for name in "ab":
        lines = [json.dumps({"text": text}) for text in DOCUMENTS[:40]]
        (corpus / f"{name}.jsonl").write_text("\n".join([*lines, "broken"]))
    command = [sys.executable, "-c", ENDED_BEFORE_A_CHANGE, str(model), str(corpus), str(tmp_path)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    tries = [line.split() for line in shown.splitlines()]
    assert len(tries) > 20
    for number, ended, code in tries:
        assert (ended, code) == ("77", "0"), f"after {number} changes"
        assert contents(tmp_path / number) == contents(tmp_path / "whole")
        assert not (tmp_path / number / "out.parts").exists()


def test_a_picture_half_drawn_by_a_killed_process_goes(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    from rich.console import Console

    from megacode.report.preprocessing import preprocess_visibly

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    node = platform.node().partition(".")[0]
    writers = (f"{node}-{gone.pid}", f"{node}-{os.getppid()}", f"far-{gone.pid}")
    half, living, elsewhere = (
        tmp_path / f".out.lengths.png.{writer}.partial" for writer in writers
    )
    preprocess_visibly(request(model, corpus, tmp_path / "out"), 1, Console(quiet=True))
    half.touch(), living.touch(), elsewhere.touch()
    preprocess_visibly(request(model, corpus, tmp_path / "out"), 1, Console(quiet=True))
    assert not half.exists() and living.exists() and elsewhere.exists(), (
        "of another machine's nobody here knows"
    )


def test_two_runs_do_not_write_one_output(model: Path, corpus: Path, tmp_path: Path) -> None:
    mine = request(model, corpus, tmp_path / "out")

    def meanwhile(stage: str, total: int, done: int) -> None:
        with pytest.raises(UserError, match="another run is writing"):
            preprocess(mine)

    assert not preprocess(mine, on_stage=meanwhile).kept


def test_a_lock_that_its_holder_removed_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between this one's looking for the folder and taking the lock."""
    from megacode.corpus.preprocess import folder

    parts, take = tmp_path / "out.parts", folder.take

    def late(*args: Any, **how: Any) -> Lock:
        shutil.rmtree(parts)
        return take(*args, **how)

    monkeypatch.setattr(folder, "take", late)
    with pytest.raises(UserError, match="has just finished"), folder.open_folder(parts, {}, None):
        pass
    assert not parts.exists()


def test_shares_exclude_each_other_and_runs_of_their_own(tmp_path: Path) -> None:
    parts, settings = tmp_path / "out.parts", {"input files": "a"}
    with open_folder(parts, settings, (0, 2)) as first:
        for other, share, refusal in (
            (settings, (0, 2), "--shard 0/2 is already running"),
            (settings, None, "another run is writing"),
            ({"input files": "b"}, (1, 2), "from other settings"),
        ):
            with pytest.raises(UserError, match=refusal), open_folder(parts, other, share):
                pass
        with open_folder(parts, settings, (1, 2)) as second:
            assert second() and not first(), "one of them writes the datasets"
            remove_folder(parts)
        assert first(), "the other one finds no parts and writes nothing"
    assert not parts.exists()


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_sentences(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text('{\n  "text": "a",\n  "id": 1\n}\n')
    (tmp_path / "content.jsonl").write_text('{"content": "a", "id": 1}\n' * 3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.bin").write_bytes(b"someone's")
    (tmp_path / "data.json").write_text('{"text": "mine"}\n')
    for source, output, expected in (
        ("object.json", "out", "one JSON value over many lines"),
        (
            "content.jsonl",
            "out",
            r"no field 'text' in its records \(they have content, id\); give --text-field",
        ),
        ("empty.jsonl", "out", r"no document for .*\(no records\)"),
        ("nothing.jsonl", "out", "no such file"),
        ("corpus", "other", "not made by this tool"),
        ("corpus", "data", "in the way: not the manifest"),
    ):
        with pytest.raises(UserError, match=expected):
            preprocess(request(model, tmp_path / source, tmp_path / output))
    assert (tmp_path / "data.json").read_text() == '{"text": "mine"}\n'
    common = (str(corpus), "--tokenizer", str(model), "--output", str(tmp_path / "out"))
    for more, expected in (
        (("--validation", "1.5"), "--validation: expected a share.*, not 1.5"),
        (("--workers", "0"), "--workers: expected 1 or more, not 0"),
    ):
        with pytest.raises(UserError, match=expected):
            run(arguments(*common, *more))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def _fails(how: str) -> Any:
    def work(task: int) -> Iterator[int]:
        yield task
        if task == 3:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {
                "user": UserError("a sentence"),
                "disk": OSError(28, "No space left", "/x"),
                "rights": PermissionError(13, "Permission denied", "/x"),
                "bug": KeyError("x"),
            }[how]

    return work


@pytest.mark.parametrize(
    ("how", "error", "expected"),
    [
        ("user", UserError, "a sentence"),
        ("disk", UserError, r"disk of the output is full \(/x\)"),
        ("rights", UserError, "/x: Permission denied; change its rights"),
        ("bug", RuntimeError, "KeyError: 'x'"),
        ("dies", UserError, "ended by signal 9"),
    ],
)
def test_what_goes_wrong_in_a_worker_reaches_the_user(
    how: str, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected), Workers(2) as workers:
        list(workers.run(_fails, how, range(6)))


def _squares(context: int) -> Any:
    return lambda task: iter([context * task * task])


@pytest.mark.parametrize(("tasks", "workers"), [(0, 1), (0, 2), (1, 4), (9, 1), (9, 3)])
def test_every_task_is_done_once(tasks: int, workers: int) -> None:
    with Workers(workers) as pool:
        assert sorted(pool.run(_squares, 2, range(tasks))) == [2 * i * i for i in range(tasks)]
        assert dict(pool.map(pow, [(i, 3) for i in range(tasks)])) == {
            i: i**3 for i in range(tasks)
        }


def test_a_worker_whose_parent_is_gone_ends_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    """What it had sent was not read: then its end of the pipe is reset, not closed."""
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,))
    worker.start()
    there.close()
    here.send((_squares, 2))
    here.send(3)
    assert here.poll(60)
    time.sleep(0.5)  # it has sent all and waits for another task
    here.close()
    worker.join(60)
    assert worker.exitcode == 0
    assert "Traceback" not in capfd.readouterr().err
