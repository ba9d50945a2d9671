"""Names that stand in files stay in their folder, wherever they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacode.cli.main import main
from megacode.convert.safetensors_files import INDEX, HuggingFaceWeights
from megacode.data.records import input_files
from megacode.data.source import open_source
from megacode.errors import UserError
from megacode.files import inside
from tests.data.conftest import write_shard

OUT = ["../victim", "/etc/passwd", "a/../../victim", "link", "folder/x", "", 7, None, ["x"], "a\0b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two links out of it."""
    made = tmp_path / "in"
    (made / "deep").mkdir(parents=True)
    (tmp_path / "victim").write_text("keep")
    (made / "link").symlink_to(tmp_path / "victim")
    (made / "folder").symlink_to(tmp_path)
    return made


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_out_is_refused(folder: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"index: .*(leads out of|is not the name of a file)"):
        inside(folder, name, "index")


def test_names_of_the_folder_are_followed(folder: Path) -> None:
    (folder / "again").symlink_to("deep")
    for name in ("new", "deep/new", "again/new", "..new", "deep/..."):
        assert inside(folder, name, "index") == folder / name
    # A Hugging Face cache keeps its files beside the snapshots.
    snapshot = folder / "models--me--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "models--me--x" / "blobs").mkdir()
    (folder / "models--me--x" / "blobs" / "12").write_text("x")
    (snapshot / "a.safetensors").symlink_to("../../blobs/12")
    assert inside(snapshot, "a.safetensors", "index").read_text() == "x"
    (snapshot / "b.safetensors").symlink_to("../../../victim")
    with pytest.raises(UserError, match="leads out of"):
        inside(snapshot, "b.safetensors", "index")


@pytest.mark.parametrize("name", ["../other", "{tmp}/other", "linked", 7])
def test_a_manifest_names_shards_of_its_own_folder(
    tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    write_shard(Path("other"), [[1, 2, 3]])
    for ending in (".bin", ".idx"):
        Path(f"in/linked{ending}").symlink_to(tmp_path / f"other{ending}")
    name = name.replace("{tmp}", str(tmp_path)) if isinstance(name, str) else name
    Path("in/corpus.json").write_text(json.dumps({"kind": "megacode dataset", "shards": [name]}))
    with pytest.raises(
        UserError, match=r"in/corpus\.json, `shards`: .*(leads out of|is not the name)"
    ):
        open_source("a", ["in/corpus"])
    assert (
        main(["inspect", "in/corpus"]) == 2
        and "in/corpus.json, `shards`" in capsys.readouterr().err
    )


@pytest.mark.parametrize("manifest", [{"dataset": "../other"}, {"input files table": "../victim"}])
def test_nor_does_what_says_where_documents_are_from(
    folder: Path, manifest: dict[str, str]
) -> None:
    (folder / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out of"):
        input_files(folder / "corpus")


@pytest.mark.parametrize("name", OUT[:-2])
def test_nor_does_the_index_of_weights(folder: Path, name: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=r"leads out of|is not the name of a file"):
        HuggingFaceWeights.open(folder)
