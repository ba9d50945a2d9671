"""`megacode trace`: the documents it names are those that a step reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacode.cli.main import main
from megacode.cli.trace import printable
from megacode.data.loader import StepReader
from megacode.data.records import read_records
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.tokenizer.tokenizer import load_tokenizer
from megacode.tokenizer.training import train_tokenizer
from tests.data.conftest import mixture_of, recipe_of, write_shard
from tests.data.test_fim import CODE, TEXT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipe.yaml` over `code` (two shards; the first has records, by manifest) and `text` (records by a listing)."""
    folder = tmp_path_factory.mktemp("traced")
    train_tokenizer([CODE, TEXT], folder / "t.model", vocab_size=400, character_coverage=0.98)
    tokenizer = load_tokenizer(
        schema.TokenizerSection(path=str(folder / "t.model"), added_tokens="crystal")
    )

    def documents(text: str, count: int) -> list[list[int]]:
        texts = [f"{number}: {text[number : number + 20 + 9 * number]}" for number in range(count)]
        return [[tokenizer.bos_id, *tokenizer.encode(one), tokenizer.eod_id] for one in texts]

    for name, made in (
        ("code0", documents(CODE, 20)),
        ("code1", documents(CODE[::-1], 11)),
        ("text", documents(TEXT, 25)),
    ):
        write_shard(folder / name, made, tokenizer.vocab_size)
    np.save(folder / "code0.records.npy", np.array([[n % 2, 10 + n] for n in range(20)]))
    files = [{"path": f"in/{name}.jsonl", "bytes": 1, "sha256": "0"} for name in "ab"]
    (folder / "code0.json").write_text(
        json.dumps({"kind": "megacode dataset", "input files": files})
    )
    np.save(folder / "text.records.npy", np.array([[n, 0] for n in range(25)]))
    (folder / "table.tsv").write_text("".join(f"plain/{n} x.txt\t1\t0\n" for n in range(25)))
    (folder / "text.json").write_text(
        json.dumps({"kind": "megacode dataset", "input files table": "table.tsv"})
    )
    sources = {"code": {"path": str(folder / "code?")}, "text": {"path": str(folder / "text")}}
    mixed = {"sources": {"code": {"weight": 1, "fim_rate": 0.9}, "text": 1}}
    recipe = recipe_of(
        sources, [{"steps": 6, "sequence_length": 32, "mixture": mixed}],
        tokenizer={"path": str(folder / "t.model"), "added_tokens": "crystal"},
        model={"layers": 1, "hidden_size": 8, "heads": 1},
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def traced(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    assert main(["trace", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_documents_it_names_hold_the_tokens_of_the_batch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for packing in ("concatenate", "best_fit"):
        change = ("--set", f"data.packing={packing}")
        found = traced(capsys, folder, "--step", 4, "--text", *change)
        mixture = mixture_of(load_recipe(folder / "recipe.yaml", change[1:]))
        tokenizer = load_tokenizer(
            mixture.plan.recipe.tokenizer or schema.TokenizerSection(path="")
        )
        plain = mixture.step(3)
        assert [sample["sample"] for sample in found["samples"]] == list(range(8))
        for place, sample in enumerate(found["samples"]):
            source = mixture.sources[sample["source"]]
            ids: list[int] = []
            for part in sample["documents"]:
                shard = next(s for s in source.shards if str(s.prefix) == part["shard"])
                before = sum(s.tokens for s in source.shards[: source.shards.index(shard)])
                number, first, end = part["document"], part["first"], part["end"]
                start, stop = shard.token_edges(number, number + 1).tolist()
                assert part["document_tokens"] == stop - start and 0 <= first < end <= stop - start
                part_ids = source.read(np.array([before + start + first]), end - first)[0]
                ids += part_ids.tolist()
                assert tokenizer.decode(part_ids, control=True).startswith(
                    part["text"].rstrip("\ufffd")
                )
            if packing == "concatenate":
                assert ids == source.read(plain.start[place : place + 1], 33)[0].tolist()
            elif sample["source"] == "text":
                trained = StepReader(mixture, tokenizer=tokenizer).sample(3, place)
                assert [*trained.tokens[0].tolist(), int(trained.labels[0, -1])][: len(ids)] == ids


def test_original_files_and_records_are_named_where_the_dataset_knows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()
    for step in range(1, 7):
        for sample in traced(capsys, folder / "recipe.yaml", "--step", step)["samples"]:
            for part in sample["documents"]:
                number, shard = part["document"], Path(part["shard"]).name
                expected = {
                    "code0": (f"in/{'ab'[number % 2]}.jsonl", 10 + number), "code1": (None, None),
                    "text": (f"plain/{number} x.txt", 0),
                }[shard]  # fmt: skip
                assert (part["file"], part["record"]) == expected
                seen.add(shard)
    assert seen == {"code0", "code1", "text"}


def test_a_sample_in_full_is_what_training_reads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = 0
    for place in range(8):
        found = traced(capsys, folder, "--step", 2, "--sample", place)
        content = found["content"]
        assert [sample["sample"] for sample in found["samples"]] == [place]
        assert (
            len(content["tokens"]) == len(content["loss_mask"]) == 32
            and content["tokens"][1:] == content["labels"][:-1]
        )
        if "<|fim_middle|>" in content["text"]:
            assert found["samples"][0]["source"] == "code"
            marks += 1
    assert marks > 0
    assert main(["trace", str(folder), "--step", "2", "--sample", "8"]) == 2
    assert "--sample 8: step 2 has 8 sequences, 0 to 7" in capsys.readouterr().err


def test_check_says_whether_it_is_the_batch_that_was_trained_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 2, "batch": "0000000000000000"}\n{"kind": "tr'
    )
    assert traced(capsys, folder, "--step", 2, "--check", code=1)["equal"] is False
    assert main(["trace", str(folder), "--step", "2", "--check"]) == 1
    out = capsys.readouterr().out
    assert "NOT the run's batch" in out
    digest = out.split("digest ")[1].split(":")[0]
    (folder / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 2, "batch": digest}) + "\n"
    )
    assert traced(capsys, folder, "--step", 2, "--check")["equal"] is True
    assert main(["trace", str(folder), "--step", "3", "--check"]) == 2
    assert "has no step 3" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 7, -1])
def test_a_step_outside_the_run_is_one_sentence(
    folder: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(folder), "--step", str(step)]) == 2
    assert capsys.readouterr().err == f"megacode trace: --step {step}: the run has steps 1 to 6\n"


def test_tables_of_another_dataset_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "d"
    assert read_records(prefix) is None
    np.save(tmp_path / "d.records.npy", np.array([[0, 1], [5, 1]]))
    with pytest.raises(UserError, match=r"d\.records\.npy: cannot be read"):
        read_records(prefix)  # no manifest
    (tmp_path / "d.json").write_text(json.dumps({"input files": [{"path": "a", "bytes": 1}]}))
    records = read_records(prefix)
    assert records is not None and records.origin(0) == ("a", 1)
    for document, sentence in (
        (1, "names input file 5 of 1"),
        (2, "has 2 documents and number 2 was asked for"),
    ):
        with pytest.raises(UserError, match=sentence):
            records.origin(document)
    np.save(tmp_path / "d.records.npy", np.zeros((2, 3)))
    with pytest.raises(UserError, match="an array of float64"):
        read_records(prefix)


def test_it_reads_what_preprocess_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in range(2):
        records = [{"text": f"file {file} record {n} " + "word " * (5 + n)} for n in range(40)]
        (tmp_path / f"{file}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    command = [
        "preprocess",
        str(tmp_path / "*.jsonl"),
        "--tokenizer",
        str(folder / "t.model"),
        "--added-tokens",
        "crystal",
    ]
    for name, more in (("whole", []), ("cut", ["--shard-size", "4kB"])):
        assert main([*command, "--output", str(tmp_path / name), *more, "--workers", "1"]) == 0
        capsys.readouterr()
        change = ("--set", f"sources.text.path={tmp_path / name}")
        seen = set()
        for step in range(1, 7):
            found = traced(capsys, folder, "--step", step, "--text", *change)
            for part in (
                p
                for s in found["samples"]
                if s["source"] == "text"
                for p in s["documents"]
                if not p["first"]
            ):
                assert part["file"].endswith(".jsonl")
                file, record = Path(part["file"]).stem, part["record"]
                expected = f"file {file} record {record - 1} "
                assert part["text"][: len(expected)] == expected[: len(part["text"])]
                seen.add(file)
        assert seen == {"0", "1"}


def test_it_prints_for_people_without_torch_and_without_escapes(folder: Path) -> None:
    code = (
        "import sys\nfrom megacode.cli.main import main\n"
        f"code = main(['trace', {str(folder)!r}, '--step', '1', '--text'])\n"
        "assert not {'torch', 'megatron.core'} & set(sys.modules)\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "step 1, p0: 8 sequences of 32 tokens" in done.stdout
        and "code0:" in done.stdout
        and "\\n" in done.stdout
    )
    assert printable("a\x1b[31m\nb\tc é", "\t") == "a\\x1b[31m\\nb\tc é"
