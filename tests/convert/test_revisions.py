"""Every checkpoint as a folder of its own: named as published, kept when whole, made again when not; and the export verb."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

from megacode.cli.main import main  # noqa: E402
from megacode.convert.export import Wanted  # noqa: E402
from megacode.convert.revisions import export_all, revision_names  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from tests.convert.runs import damage_tensors, make_run  # noqa: E402
from tests.convert.test_families import tensors_of  # noqa: E402

pytestmark = pytest.mark.slow
CRYSTAL = Wanted("crystalcoder")
NAMES = [
    "phase1_checkpoint_000002",
    "phase1_checkpoint_000004",
    "phase2_checkpoint_000002",
    "phase2_checkpoint_000005",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "revisions"
    assert [outcome.state for outcome in export_all(run, out, CRYSTAL)] == ["written"] * 4
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "revisions"))


def states(run: Path, out: Path, wanted: Wanted = CRYSTAL, **keys: bool) -> list[str]:
    done = sorted(export_all(run, out, wanted, **keys), key=lambda outcome: outcome.step)
    return [outcome.state for outcome in done]


def test_names_count_steps_within_the_phase(run: Path) -> None:
    assert list(revision_names(run)) == NAMES
    published = list(revision_names(run, "CrystalCoder_phase{n}_checkpoint_{step:06d}"))
    assert published[2] == "CrystalCoder_phase2_checkpoint_000002"
    assert list(revision_names(run, "{model}-{phase}-{total}"))[-1] == "tiny-two-9"
    for pattern, words in {
        "{n}": r"gives 1 twice", "{wrong}": "cannot be filled in", "{n}/{step}": "no name of a folder", "{step:x<": "cannot",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            revision_names(run, pattern)
    (run / "plan.json").rename(run / "plan.aside")  # then the plan is made anew
    assert list(revision_names(run)) == NAMES
    (run / "plan.aside").rename(run / "plan.json")


def test_each_folder_is_a_whole_export_of_its_checkpoint(run: Path, done: Path) -> None:
    assert sorted(path.name for path in done.iterdir()) == sorted(NAMES)
    embeddings = []
    for name in NAMES:
        files = {path.name for path in (done / name).iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "README.md",
            "modeling_crystalcoder.py",
        } < files
        assert (
            subprocess.run(
                ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=done / name, capture_output=True
            ).returncode
            == 0
        )
        assert len((done / name / "SHA256SUMS").read_text().splitlines()) == len(files) - 1
        embeddings.append(tensors_of(done / name)["transformer.wte.weight"])
        assert (
            f'from_pretrained("{name}", trust_remote_code=True)'
            in (done / name / "README.md").read_text()
        )
    assert not any(torch.equal(embeddings[0], other) for other in embeddings[1:])
    assert "Losses at step 4" in (done / NAMES[1] / "README.md").read_text()


def test_what_is_whole_is_kept(run: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert states(run, out) == ["kept"] * 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert states(run, out, again=True) == ["asked for again"] * 4


def test_what_is_damaged_or_half_is_made_again(run: Path, out: Path) -> None:
    good = (out / NAMES[0] / "model.safetensors").read_bytes()
    for spoil, words in (
        (
            lambda f: (f / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1])),
            "model.safetensors was damaged",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json was missing"),
        (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS was missing"),
        (lambda f: (f / "SHA256SUMS").write_text("?"), "SHA256SUMS could not be read"),
        (shutil.rmtree, "written"),
    ):
        spoil(out / NAMES[0])
        (out / f".{NAMES[0]}.0a0b0c0d.tmp").mkdir()  # of a killed export
        found = states(run, out)
        assert words in found[0] and found[1:] == ["kept"] * 3
        assert (out / NAMES[0] / "model.safetensors").read_bytes() == good
        assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_another_checkpoint_or_another_way_is_made_again(run: Path, out: Path) -> None:
    half = states(run, out, Wanted("crystalcoder", "bf16"))
    assert all("made of another checkpoint, or in another way" in state for state in half)
    assert tensors_of(out / NAMES[0])["transformer.wte.weight"].dtype == torch.bfloat16
    assert states(run, out, Wanted("crystalcoder", "bf16")) == ["kept"] * 4
    shard = next((run / "checkpoints" / "step_00000004").glob("*.distcp"))
    stat = shard.stat()
    os.utime(shard, (stat.st_atime, stat.st_mtime + 5))  # trained anew
    found = states(run, out, Wanted("crystalcoder", "bf16"))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [state == "kept" for state in found] == [True, False, True, True]


def test_a_failure_leaves_nothing_half_made_and_others_files_alone(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    damage_tensors(copy / "checkpoints" / "step_00000006")
    with pytest.raises(UserError, match="step_00000006"):
        list(export_all(copy, tmp_path / "out", CRYSTAL))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES[:2]
    mine = tmp_path / "mine" / NAMES[0]
    mine.mkdir(parents=True)
    (mine / "thesis.tex").touch()
    for again in (False, True):
        with pytest.raises(UserError, match="is there and is no export"):
            list(export_all(run, tmp_path / "mine", CRYSTAL, again=again))
        assert (mine / "thesis.tex").exists()


def test_the_verb(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = ["--format", "crystalcoder", "--all", "--name-pattern", "r{total}"]
    assert main(["export", str(run), str(tmp_path / "all"), *output]) == 0
    assert "r9: step 9, written" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "one"), "--dtype", "bf16"]) == 0
    assert "CrystalCoderLMHeadModel, bfloat16, step 9" in capsys.readouterr().out
    assert not [record for record in caplog.records if "model of type" in record.getMessage()], (
        "means nothing to a user"
    )
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 452)
    (tmp_path / "plain").mkdir()
    for path in (
        tmp_path / "one",
        *(tmp_path / "one").iterdir(),
    ):  # others may read what the umask lets them
        like = (tmp_path / "plain") if path.is_dir() else tmp_path / "one" / "config.json"
        assert path.stat().st_mode == like.stat().st_mode, path

    for arguments, words in (
        (
            [str(run / "checkpoints" / "step_00000004"), str(tmp_path / "x"), "--all"],
            "is no run folder",
        ),
        (
            [str(run), str(tmp_path / "x"), "--name-pattern", "a"],
            "--name-pattern: names the folders that --all makes",
        ),
        ([str(run), str(tmp_path / "one")], "already there"),
        ([str(run), str(tmp_path / "x"), "--format", "llama"], "does not fit"),
        (
            [str(run), str(run / "recipe.yaml" / "x")],
            "recipe.yaml/x: cannot be written (Not a directory)",
        ),
        (
            [str(run), str(run / "recipe.yaml" / "x"), "--all"],
            "cannot be written (Not a directory)",
        ),
    ):
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_overwrite_keeps_the_old_one_until_the_new_one_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, copy = tmp_path / "one", Path(shutil.copytree(run, tmp_path / "run"))
    assert main(["export", str(copy), str(target)]) == 0
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    shard = next((copy / "checkpoints" / "step_00000009").glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:500])
    assert main(["export", str(copy), str(target), "--overwrite"]) == 2
    assert hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest() == digest
    shard.write_bytes(whole)
    (tmp_path / "link").symlink_to("one")
    assert (
        main(["export", str(copy), str(tmp_path / "link"), "--overwrite", "--dtype", "fp16"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one", "run"]
    assert (tmp_path / "link").is_symlink()
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    monkeypatch.chdir(target)
    assert main(["export", str(copy), ".", "--overwrite", "--dtype", "bf16"]) == 0
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_overwrite_leaves_alone_what_is_no_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for output in (copy, copy / "recipe.yaml"):
        before = sorted(copy.rglob("*"))
        assert main(["export", str(run), str(output), "--overwrite"]) == 2
        assert f"{output}: is there and is no export" in capsys.readouterr().err
        assert sorted(copy.rglob("*")) == before


def test_a_tokenizer_of_another_vocabulary_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    info = copy / "checkpoints" / "step_00000009" / "megacode.json"
    info.write_text(info.read_text().replace("452", "440"))
    assert main(["export", str(copy), str(tmp_path / "out")]) == 2
    assert "has 452 tokens and the model only 440" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_import_takes_the_tokenizer_along(
    run: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megacode.recipe.load import load_recipe
    from megacode.tokenizer.tokenizer import load_tokenizer

    assert main(["import", str(done / NAMES[3]), str(run / "recipe.yaml" / "in")]) == 2
    assert "recipe.yaml/in: cannot be written (Not a directory)" in capsys.readouterr().err
    assert main(["import", str(done / NAMES[3]), str(tmp_path / "in")]) == 0
    section = load_recipe(tmp_path / "in" / "recipe.yaml").tokenizer
    assert section is not None and section.bos and section.eod
    again, first = (
        load_tokenizer(section),
        load_tokenizer(load_recipe(run / "recipe.yaml").tokenizer),
    )
    assert again.encode("<s> naïve\n\n  x") == first.encode("<s> naïve\n\n  x")
    assert again.control_tokens == first.control_tokens
