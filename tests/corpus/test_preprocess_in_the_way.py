"""What stands where a run would write: it takes away its own earlier output, and nothing else, whatever it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacode.cli.main import main
from megacode.corpus.preprocess import Request, Result, preprocess
from megacode.corpus.preprocess.request import file_name
from megacode.data import indexed
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.training import train_tokenizer

LANGUAGES = ("go", "python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_tokenizer([f"def f{i}(x): return the {i}" for i in range(200)], path, vocab_size=300)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two corpora of 40 documents."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        corpus(Path(f"{name}.jsonl"), name)
    return tmp_path


def corpus(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": f"{name} {i} " * (i % 7 + 1), "lang": LANGUAGES[i % 2]})
        for i in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make(model: Path, source: str, output: str, **more: Any) -> Result:
    inputs = (source,) if isinstance(source, str) else source
    return preprocess(Request(inputs=inputs, tokenizer=schema.TokenizerSection(path=str(model), added_tokens="crystal"),
                              output=Path(output), **more))  # fmt: skip


def contents(folder: Path = Path()) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("source", "output", "more"),
    [
        ("raw/python.json", "raw/{value}", {"split_by": "lang"}),
        ("raw/all.json", "raw/{value}", {"split_by": "lang"}),
        ("raw/all.json", "raw/all", {}),
        ("raw/all.quarantine.jsonl", "raw/all", {}),
        ("raw/all_validation.json", "raw/all", {"validation": 0.1}),
        ("raw/all-00003.json", "raw/all", {"shard_size": 1000}),
        ("raw/all.json", "raw/../raw/all", {"overwrite": True}),
    ],
)
def test_an_input_is_never_written_over(
    model: Path, here: Path, source: str, output: str, more: dict[str, Any]
) -> None:
    corpus(Path(source), "raw")
    before = contents()
    with pytest.raises(
        UserError, match=r"may get a file of this name|in the way: not the manifest"
    ):
        make(model, source, output, **more)
    assert contents() == before


def test_a_dataset_of_another_run_stays_unless_overwriting_is_asked_for(
    model: Path, here: Path
) -> None:
    make(model, "first.jsonl", "o/web_validation")
    make(model, "first.jsonl", "o/python")
    make(model, "first.jsonl", "o/one", validation=0.3, validation_output=Path("o/held"))
    cases = (
        ("o/web", {"validation": 0.3}),
        ("o/{value}", {"split_by": "lang"}),
        ("o/two", {"validation": 0.3, "validation_output": Path("o/held")}),
    )
    before = contents(Path("o"))
    for output, more in cases:
        with pytest.raises(
            UserError, match="already there: is a dataset that another run made; choose"
        ):
            make(model, "second.jsonl", output, **more)
        kept = contents(Path("o"))
        assert {name: kept[name] for name in before} == before
    for output, more in cases:
        assert not make(model, "second.jsonl", output, overwrite=True, **more).kept
    assert make(model, "second.jsonl", *cases[2][:1], **cases[2][1]).kept
    with pytest.raises(
        UserError, match=r"o/held\.json: already there: is a dataset that another run made"
    ):
        make(model, "first.jsonl", "o/one", validation=0.3, validation_output=Path("o/held"))


@pytest.mark.parametrize(
    "victim", ["../victim/one", "{here}/victim/one", "x/../../victim/one", "sub/one", 7]
)
def test_a_manifest_deletes_nothing_elsewhere(model: Path, here: Path, victim: Any) -> None:
    """Nor does the list of what a killed run began."""
    victim = victim.replace("{here}", str(here)) if isinstance(victim, str) else victim
    make(model, "first.jsonl", "victim/one", validation=0.3, validation_output=Path("victim/held"))
    make(model, "first.jsonl", "o/sub/one")
    made = json.loads(Path("victim/one.json").read_text())
    made["run"]["datasets"] = {"train": victim}
    make(model, "first.jsonl", "o/two")
    Path("o/two.json").write_text(json.dumps(made))
    for bad in ("two.json", "two.parts/datasets.json"):
        before = contents()
        with pytest.raises(
            UserError, match=r"o/two.*is not in o, where this command writes; nothing was deleted"
        ):
            make(model, "second.jsonl", "o/two", overwrite=True)
        kept = contents()
        assert {name: kept[name] for name in before} == before, bad
        Path("o/two.json").unlink(missing_ok=True)
        Path("o/two.parts").mkdir(exist_ok=True)
        Path("o/two.parts/datasets.json").write_text(json.dumps([victim]))


def test_files_of_no_run_stay(model: Path, here: Path) -> None:
    for name in ("corpus_validation.json", "corpus.idx", "corpus-00000.bin"):
        Path(name).write_text("mine")
        with pytest.raises(
            UserError, match=f"{name}: (already there: was not made by this tool|in the way)"
        ):
            make(model, "first.jsonl", "corpus", validation=0.3)
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    Path("corpus.bin").write_text("mine")
    with pytest.raises(UserError, match=r"corpus\.bin: already there: was not made by this tool"):
        make(model, "first.jsonl", "corpus", split_by="lang")
    assert Path("corpus.bin").read_text() == "mine"
    Path("corpus.bin").unlink()
    Path("corpus.parts").mkdir()
    Path("corpus.parts/mine.jsonl").write_text("mine")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(
            UserError, match=r"corpus\.parts: in the way: not made by a run of this tool"
        ):
            make(model, "first.jsonl", "corpus", **more)
    assert Path("corpus.parts/mine.jsonl").read_text() == "mine"


def test_a_run_goes_on_over_what_it_had_begun_to_write(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"split_by": "lang", "validation": 0.3}
    make(model, "first.jsonl", "whole/{value}", **wanted)
    make(model, "second.jsonl", "o/{value}", **wanted)

    class Killed(BaseException):
        pass

    def kill(prefix: Path, *rest: Any) -> None:
        monkeypatch.undo()
        monkeypatch.chdir(here)
        raise Killed

    # Before any manifest: all the datasets lie there, none of them says whose it is.
    monkeypatch.setattr("megacode.corpus.preprocess.run.write_manifests", kill)
    with pytest.raises(Killed):
        make(model, "first.jsonl", "o/{value}", overwrite=True, **wanted)
    assert Path("o/go.bin").exists() and not Path("o/go.json").exists()
    for source in ("second.jsonl", "first.jsonl"):  # in another way, then as it was
        monkeypatch.setattr("megacode.corpus.preprocess.run.write_manifests", kill)
        with pytest.raises(Killed):
            make(model, source, "o/{value}", **wanted)
    make(model, "first.jsonl", "o/{value}", **wanted)
    for name, content in contents(Path("whole")).items():
        if name.endswith((".bin", ".idx", ".npy")):
            assert Path("o", Path(name).name).read_bytes() == content


def test_what_would_come_out_otherwise_is_not_kept(model: Path, here: Path) -> None:
    for repository in ("a", "b"):
        corpus(Path("org", repository, "src", "x.jsonl"), repository)
    make(model, "org/*/*/*.jsonl", "o/{value}", split_by="file.repository")
    with pytest.raises(UserError, match="input files differ"):
        make(model, "org", "o/{value}", split_by="file.repository")
    made = make(model, "org", "o/{value}", split_by="file.repository", overwrite=True)
    assert sorted(path.name for path in made.outputs.values()) == ["a", "b"]
    assert not indexed.is_complete(Path("o/src"))
    make(model, "first.jsonl", "v", validation=0.3, validation_output=Path("d1/held"))
    with pytest.raises(UserError, match="validation output differ"):
        make(model, "first.jsonl", "v", validation=0.3, validation_output=Path("d2/held"))


def test_the_working_directory_has_a_name(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(Path("project/x.jsonl"), "project")
    monkeypatch.chdir(here / "project")
    assert [
        path.name
        for path in make(model, ".", "../o/{value}", split_by="file.repository").outputs.values()
    ] == ["project"]


def test_long_and_odd_values_make_names_that_a_file_system_takes(model: Path, here: Path) -> None:
    values = ["x" * 300, "é" * 200, "x" * 299 + "y", "p\ud83d.py", "../up", "a\0b"]
    with open("odd.jsonl", "w") as out:
        out.writelines(
            json.dumps({"text": f"text {i}", "v": value}) + "\n" for i, value in enumerate(values)
        )
    made = make(model, "odd.jsonl", "o/{value}", split_by="v")
    assert len(made.outputs) == len(values) and {path.parent for path in made.outputs.values()} == {
        Path("o")
    }
    assert all(len(file_name(value).encode(errors="replace")) <= 100 for value in values)


def test_file_names_that_are_no_utf8(model: Path, here: Path) -> None:
    folder = Path("old")
    folder.mkdir()
    (folder / b"caf\xe9.py".decode(errors="surrogateescape")).write_text("x = 1")
    made = make(model, "old", "o/{value}", split_by="file.name")
    assert [group.value for group in made.outputs] == ["caf\ufffd.py"]
    joined = make(model, "old", "joined", repository="file.repository", path="file.path")
    assert joined.counts.total.documents == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--output", "."], "--output .: expected a prefix"),
        (["--output", "o/{value}/train", "--split-by", "lang"], "may stand in the name only"),
        (
            ["--output", "o/x", "--validation", "0.1", "--validation-output", "o/../o/x"],
            "is --output too",
        ),
        (["--output", "first.jsonl/x"], "first.jsonl/x.parts: Not a directory"),
        (["--output", "o/" + "x" * 300], "File name too long"),
    ],
)
def test_outputs_that_cannot_be(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    assert (
        main(["preprocess", "first.jsonl", "--tokenizer", str(model), "--workers", "1", *more]) == 2
    )
    assert expected in " ".join(capsys.readouterr().err.split())
