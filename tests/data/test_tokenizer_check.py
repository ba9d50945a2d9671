"""Corpora that another tokenizer made are refused by every verb that reads them, with the two values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacode.cli.main import main
from megacode.corpus.preprocess import Request, preprocess
from megacode.data.tokenizer_check import check_tokenizers, unknown_makers
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.recipe.load import load_recipe
from megacode.tokenizer.training import train_tokenizer

TEXTS = [f"def f{i}(x): return the {i}" for i in range(200)]
OTHERS = [f"the cat {i} sat on a mat of wool" for i in range(200)]
NAMES = ["<filename>", "<reponame>"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of one size, and corpora of both, of other added tokens, with BOS, and without EOD."""
    folder = tmp_path_factory.mktemp("made")
    train_tokenizer(TEXTS, folder / "a.model", vocab_size=300)
    train_tokenizer(OTHERS, folder / "b.model", vocab_size=300)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    for name, settings, more in (
        ("a", {}, {"validation": 0.2}), ("b", {"path": "b.model"}, {"validation": 0.2}), ("no_eod", {"eod": False}, {}),
        ("bos", {"bos": True}, {}), ("shards", {}, {"shard_size": 4000}), ("no_added", {"added_tokens": "none"}, {}),
        ("added", {"added_tokens": NAMES}, {}), ("turned", {"added_tokens": NAMES[::-1]}, {}),
    ):  # fmt: skip
        path = folder / settings.pop("path", "a.model")
        tokenizer = schema.TokenizerSection.model_validate(
            {"path": str(path), "added_tokens": "crystal", **settings}
        )
        inputs = (str(folder / "corpus.jsonl"),)
        preprocess(Request(inputs=inputs, tokenizer=tokenizer, output=folder / name, **more))
    for name in ("shards", "b"):
        for path in folder.glob(f"{name}*"):
            if path.suffix in (".bin", ".idx"):
                (folder / f"bare_{path.name}").write_bytes(path.read_bytes())
    return folder


def recipe_of(
    made: Path, sources: dict[str, Any], tokenizer: dict[str, Any] | None = None, **model: Any
) -> dict[str, Any]:
    mixture = {"sources": {name: 1 / len(sources) for name in sources}}
    phase = {
        "name": "one",
        "steps": 2,
        "batch_size": 2,
        "sequence_length": 16,
        "learning_rate": {"peak": 1e-3},
    }
    default = {"path": str(made / "a.model"), "added_tokens": "crystal"}
    given = {} if tokenizer is None else {"tokenizer": {**default, **tokenizer}}
    return {
        "name": "small", "precision": "fp32", "model": {"layers": 1, "hidden_size": 32, "heads": 2, **model},
        "sources": {name: {"domain": "code", **source} for name, source in sources.items()},
        "phases": [{**phase, "mixture": mixture}], **given,
    }  # fmt: skip


def opened(tmp_path: Path, tree: dict[str, Any]) -> schema.Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("source", "tokenizer", "words"),
    [
        ("b", {}, r"sources.x.path: .*/b\.json: was made with another tokenizer, .*b\.model \(fingerprint \w{12}\), than"),
        ("no_eod", {}, r"no_eod\.json: was made with `eod: false` .* tokenizer\.eod is true; set it to false"),
        ("bos", {}, r"bos\.json: was made with `bos: true` .* tokenizer\.bos is false; set it to true"),
        ("a", {"bos": True}, r"a\.json: was made with `bos: false`"),
        ("shards", {"path": "b.model"}, r"shards-00000\.json: was made with another tokenizer.*\(and \d+ more of this source\)"),
        ("a", {"added_tokens": NAMES}, r"added_tokens \[.*\], and the recipe has \[.*; keep those first"),
        ("turned", {"added_tokens": NAMES}, r"added_tokens \[<reponame> = .*\], and the recipe has \[<filename> = "),
        ("*[!n]", {}, "was made with"),
    ],
)  # fmt: skip
def test_another_maker_is_named(
    tmp_path: Path, made: Path, source: str, tokenizer: dict[str, Any], words: str
) -> None:
    if "path" in tokenizer:
        tokenizer = {**tokenizer, "path": str(made / tokenizer["path"])}
    recipe = opened(tmp_path, recipe_of(made, {"x": {"path": str(made / source)}}, tokenizer))
    with pytest.raises(UserError, match=words):
        check_tokenizers(recipe)


def test_validation_sets_are_asked_too(tmp_path: Path, made: Path) -> None:
    x = {"path": str(made / "a"), "validation": str(made / "b_validation")}
    with pytest.raises(
        UserError,
        match=r"sources.x.validation: .*b_validation\.json: was made with another tokenizer",
    ):
        check_tokenizers(opened(tmp_path, recipe_of(made, {"x": x}, {})))


@pytest.mark.parametrize(
    ("source", "tokenizer"),
    [
        ("a", {}), ("shards", {}), ("no_added", {}), ("no_added", {"added_tokens": NAMES}), ("bos", {"bos": True}),
        ("added", {"added_tokens": [*NAMES, "<more>"]}), ("no_eod", {"eod": False}),
    ],
)  # fmt: skip
def test_the_same_maker_with_more_added_tokens_is_the_same(
    tmp_path: Path, made: Path, source: str, tokenizer: dict[str, Any]
) -> None:
    recipe = opened(tmp_path, recipe_of(made, {"x": {"path": str(made / source)}}, tokenizer))
    check_tokenizers(recipe)
    assert unknown_makers(recipe) is None


def test_what_cannot_be_asked_is_counted(tmp_path: Path, made: Path) -> None:
    paths = {"x": "a", "y": "bare_b", "z": "bare_shards-0000*"}
    sources = {name: {"path": str(made / path)} for name, path in paths.items()}
    recipe = opened(tmp_path, recipe_of(made, sources, {}))
    check_tokenizers(recipe)
    assert unknown_makers(recipe) == (
        "2 sources without a manifest (y, z): whether the recipe's tokenizer made them cannot be told"
    )


def test_without_a_tokenizer_sources_are_compared(tmp_path: Path, made: Path) -> None:
    sources = {"x": {"path": str(made / "a")}, "y": {"path": str(made / "b")}}
    with pytest.raises(
        UserError,
        match=r"sources.y.path was made with another tokenizer \(.*b\.model\) than sources.x.path",
    ):
        check_tokenizers(opened(tmp_path, recipe_of(made, sources, vocab_size=400)))
    with pytest.raises(
        UserError, match=r"was made with a vocabulary of 332, and model\.vocab_size is 300"
    ):
        check_tokenizers(opened(tmp_path, recipe_of(made, {"x": sources["x"]}, vocab_size=300)))
    check_tokenizers(opened(tmp_path, recipe_of(made, {"x": sources["x"]}, vocab_size=332)))


def test_every_verb_asks(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe = opened(tmp_path, recipe_of(made, {"x": {"path": str(made / "b")}}, {}))
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    for place in (run, run / "checkpoints" / "step_00000001"):
        (place / "recipe.yaml").write_text(path.read_text())
    (run / "checkpoints" / "step_00000001" / "megacode.json").write_text(
        json.dumps({"step": 1, "phase": "one"})
    )
    assert recipe.tokenizer
    for arguments in (
        ["plan", path], ["train", path, "--run", tmp_path / "new"], ["trace", path, "--step", 1],
        ["fork", run, "--at", 1, "--to", tmp_path / "fork", "--set", "seed=3"],
    ):  # fmt: skip
        assert main([str(argument) for argument in arguments]) == 2
        told = capsys.readouterr().err
        assert "b.json: was made with another tokenizer" in told and "Traceback" not in told, (
            arguments
        )
    assert not (tmp_path / "new").exists() and not (tmp_path / "fork").exists()
