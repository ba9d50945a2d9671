"""The corpora of a Python installation: real, clean, apart, the same twice; and the tiny recipes' data made once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megacode.data import indexed
from megacode.quickstart.corpora import gather, prepare
from megacode.quickstart.docstrings import docstring_prose, paragraphs
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import load_tokenizer

PROSE = "This paragraph explains, in whole sentences, what the function is for and when it helps.\nIt has two lines."


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gathered")
    gather(folder, code_mb=3.0, text_mb=2.0, console=quiet())
    return folder


def test_the_corpora_have_the_size_asked_for(gathered: Path) -> None:
    for name, limit in (("code", 3_000_000), ("text", 2_000_000)):
        sizes = [
            len(document["text"].encode()) for document in documents(gathered / f"{name}.jsonl")
        ]
        assert 0.9 * limit < sum(sizes) < 1.5 * limit


def test_code_is_python_and_nothing_comes_twice(gathered: Path) -> None:
    code = documents(gathered / "code.jsonl")
    assert len({document["text"] for document in code}) == len(code) > 20
    assert all(
        document["path"].endswith(".py") and "test" not in Path(document["path"]).parts
        for document in code
    )
    for document in code[:20]:
        compile(document["text"], document["path"], "exec", dont_inherit=True)
    text = [
        p
        for document in documents(gathered / "text.jsonl")
        for p in document["text"].strip().split("\n\n")
    ]
    assert len(set(text)) == len(text)


def test_text_is_prose(gathered: Path) -> None:
    text = documents(gathered / "text.jsonl")
    assert {"language reference", "docstrings"} <= {document["origin"] for document in text}
    assert not [document["path"] for document in text if ">>>" in document["text"]]
    whole = "".join(document["text"] for document in text)
    assert sum(c.isalpha() or c.isspace() for c in whole) > 0.9 * len(whole)


def test_gathering_again_gives_the_same_or_keeps_it(gathered: Path, tmp_path: Path) -> None:
    gather(tmp_path, code_mb=3.0, text_mb=2.0, console=quiet())
    for name in ("code.jsonl", "text.jsonl"):
        assert (tmp_path / name).read_bytes() == (gathered / name).read_bytes()
    console = quiet()
    stamp = (tmp_path / "code.jsonl").stat().st_mtime_ns
    gather(tmp_path, code_mb=3.0, text_mb=2.0, console=console)
    assert "kept" in said(console)
    assert (tmp_path / "code.jsonl").stat().st_mtime_ns == stamp
    gather(tmp_path, code_mb=0.5, text_mb=0.5, console=quiet())
    assert (tmp_path / "code.jsonl").stat().st_size < 900_000


def test_prepare_makes_all_that_the_tiny_recipes_read_and_keeps_it(
    tmp_path: Path, gathered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacode.quickstart.corpora.gather", lambda folder, console: dict(
        code=gathered / "code.jsonl", text=gathered / "text.jsonl"
    ))  # fmt: skip
    made = prepare(tmp_path, vocab_size=2000, workers=1, console=quiet())
    tokenizer = load_tokenizer(
        schema.TokenizerSection(path=str(made["tokenizer"]), added_tokens="crystal")
    )
    assert tokenizer.vocab_size == 2032
    for prefix in ("python/train", "python/valid", "docs/train", "docs/valid"):
        manifest = indexed.read_manifest(tmp_path / prefix)
        assert manifest is not None
        assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint()
        assert manifest["tokens"] * 2 == (tmp_path / f"{prefix}.bin").stat().st_size
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    console = quiet()
    prepare(tmp_path, vocab_size=2000, workers=1, console=console)
    assert said(console).count("kept") == 3
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    } == stamps


# --------------------------------------------------------------------------------------------------------------- prose


def test_paragraphs_of_a_page() -> None:
    page = f"""Heading of the page
===================

   {PROSE.splitlines()[0]}
   {PROSE.splitlines()[1]}

   >>> print("an example, which is code and so has no place in a corpus of prose, has it?")

x : int, the number of something that is described at length here, in words and words.

[1, 2, 3], {{"a": 5}}, (7 + 8) * 9 == 135, `x` != `y`; "=" * 70 + "-" * 70 + "*" * 70.

Too short.
"""
    assert paragraphs(page) == [PROSE]


def test_docstrings_without_their_code_and_parameters() -> None:
    indented = PROSE.replace("\n", "\n        ")
    source = "import os\n" + "".join(
        f'''
class C{i}:
    """{PROSE.splitlines()[0]}"""

    def method(self):
        """Short.

        {indented} Number {"i" * (i + 1)}.

            {indented}

        :param x: {PROSE.splitlines()[1]}
        """
'''
        for i in range(5)
    )
    found = docstring_prose(source)
    assert found.count(PROSE.splitlines()[0]) == 5
    assert [p for p in found if p.startswith(PROSE)] == [
        f"{PROSE} Number {'i' * (i + 1)}." for i in range(5)
    ]
    assert len(found) == 10
    assert docstring_prose("x = 1\n" * 1000) == []
    assert docstring_prose(source + "\nnot python (") == []
