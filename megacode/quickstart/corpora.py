"""Two real corpora that every Python installation carries, and the tiny recipes' data.

Code: sources of the standard library and of installed packages. Text: the language reference
(pydoc_data.topics), the descriptions of installed packages, and the prose of docstrings, first from
files that are not in the code corpus. The same installation gives the same corpora: files are taken
in the order of their paths or of a hash of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from megacode.corpus.preprocess import Request
from megacode.corpus.workers import available_cores
from megacode.files import replace_file, write_json
from megacode.quickstart.docstrings import docstring_prose, paragraphs
from megacode.recipe import schema
from megacode.report.preprocessing import preprocess_visibly
from megacode.terminal import print_table, progress_bar, table_of
from megacode.tokenizer.training import train_tokenizer

GATHERING = 1
"""Raised when the same installation would give other corpora."""

_SKIPPED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "_bundled", "_vendor"),
    *("test", "tests", "testing", "idle_test"),
    *("encodings", "pydoc_data", "lib2to3"),  # tables; the text corpus; sources that are data
}


@dataclass
class _Corpus:
    """Documents gathered so far; what repeats is left out."""

    limit: float
    """Bytes of text."""
    documents: Counter[str] = field(default_factory=Counter)
    """By origin; `sizes` are their bytes of text."""
    sizes: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.sizes.total() >= self.limit

    def is_new(self, text: str) -> bool:
        """Whether this text (a document, a paragraph) is the first of its kind."""
        before = len(self.seen)
        self.seen.add(text)
        return len(self.seen) > before

    def line(self, origin: str, path: str, text: str) -> bytes:
        """The JSONL line of a document, which now counts."""
        self.documents[origin] += 1
        self.sizes[origin] += len(text.encode(errors="replace"))
        return (json.dumps({"text": text, "origin": origin, "path": path}) + "\n").encode()


def gather(
    folder: Path, console: Console, code_mb: float = 12.0, text_mb: float = 6.0
) -> dict[str, Path]:
    """Write `folder/code.jsonl` and `folder/text.jsonl`, about that many MB of text each.

    A line is an object with `text`, `origin` and `path`. Corpora that were gathered with the same
    settings are kept, even if packages have been installed since.

    Returns:
        The two files, by `code` and `text`.
    """
    files = {"code": folder / "code.jsonl", "text": folder / "text.jsonl"}
    python = platform.python_version()
    settings = dict(gathering=GATHERING, code_mb=code_mb, text_mb=text_mb, python=python)
    note = folder / "gathered.json"
    if note.exists() and _read_json(note) == {"settings": settings, "sizes": _sizes(files)}:
        console.print(f"{folder}: kept; gathered before from Python {python}")
        return files
    code, text, in_code = _Corpus(code_mb * 1e6), _Corpus(text_mb * 1e6), set[Path]()
    table = table_of("", "corpus", "from", "documents", "MB", left=2)
    for name, corpus, lines in (
        ("code", code, _code(code, in_code)),
        ("text", text, _text(text, in_code)),
    ):
        with (
            replace_file(files[name]) as out,
            progress_bar(f"gathering {name}", int(corpus.limit)) as advance,
        ):
            for line in lines:
                advance(out.write(line))
        for origin, documents in corpus.documents.items():
            table.add_row(name, origin, f"{documents:,}", f"{corpus.sizes[origin] / 1e6:.1f}")
    write_json(note, {"settings": settings, "sizes": _sizes(files)})
    print_table(console, table)
    return files


def prepare(
    folder: Path, console: Console, vocab_size: int = 8000, workers: int | None = None
) -> dict[str, Path]:
    """Make everything that the tiny recipes read: corpora, a tokenizer, datasets.

    Makes `gathered/`, `tokenizer.model` and the dataset prefixes `python/{train,valid}` and
    `docs/{train,valid}` in `folder`: BOS and EOD around each document, 2 % held out for validation.
    What was made before in the same way is kept.

    Returns:
        Path of the `tokenizer`, and folders of `code` and `text`.
    """
    corpora = gather(folder / "gathered", console)
    model, note = folder / "tokenizer.model", folder / "tokenizer.made-from.json"
    digests = {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in corpora.items()}
    wanted = {"vocab_size": vocab_size, "corpora": digests}
    if model.exists() and note.exists() and _read_json(note) == wanted:
        console.print(f"{model}: kept; trained before on these corpora")
    else:
        note.unlink(missing_ok=True)
        with console.status("training the tokenizer"):
            lines = (line for path in corpora.values() for line in path.read_bytes().splitlines())
            train_tokenizer((json.loads(line)["text"] for line in lines), model, vocab_size)
        write_json(note, wanted)
        console.print(f"{model}: trained, {vocab_size:,} pieces")
    section = schema.TokenizerSection(path=str(model), added_tokens="crystal", bos=True, eod=True)
    outputs = {"code": folder / "python", "text": folder / "docs"}
    for name, output in outputs.items():
        request = Request(
            inputs=(str(corpora[name]),),
            tokenizer=section,
            output=output / "train",
            validation=0.02,
            validation_output=output / "valid",
            overwrite=True,
        )
        cores = workers or available_cores()
        preprocess_visibly(request, cores, console, title=f"tokenizing {name}")
    return {"tokenizer": model, **outputs}


def _read_json(path: Path) -> Any:
    """The value in a note of an earlier start; None if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _sizes(files: dict[str, Path]) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files.items() if path.exists()}


def _code(corpus: _Corpus, in_code: set[Path]) -> Iterator[bytes]:
    """JSONL lines of source files, whose paths it adds to `in_code`."""
    for origin, root, paths in python_sources():
        for path in paths:
            if corpus.full:
                return
            text = read_source(path, 400, 120_000)
            if text is not None and _like_code(text) and corpus.is_new(text):
                in_code.add(path)
                yield corpus.line(origin, path.relative_to(root).as_posix(), text)


def python_sources() -> Iterator[tuple[str, Path, list[Path]]]:
    """(origin, root, Python files): the standard library by path, then packages by hash of path, so
    that a few MB come from all of them."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    yield "standard library", standard, list(_python_files(standard))
    for packages in _package_folders():
        found = _python_files(packages)
        by_hash = sorted(found, key=lambda path: _path_hash(path.relative_to(packages)))
        yield "installed packages", packages, by_hash


def _package_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    folders = dict.fromkeys((paths["purelib"], paths["platlib"]))
    return [Path(folder) for folder in folders if os.path.isdir(folder)]


def _python_files(root: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")
        )
        yield from (Path(here, name) for name in sorted(names) if name.endswith(".py"))


def _path_hash(path: Path) -> bytes:
    return hashlib.blake2b(path.as_posix().encode(errors="surrogateescape"), digest_size=8).digest()


def read_source(path: Path, smallest: int, largest: int) -> str | None:
    """A file's text if its size is within bounds and it is UTF-8."""
    try:
        if not smallest <= path.stat().st_size <= largest:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _like_code(text: str) -> bool:
    """Filters against data written as code (StarCoder, arXiv 2305.06161, section 3).

    Mean line up to 100 characters, longest up to 1000, at least a quarter of characters letters.
    """
    lines = text.splitlines()
    if max(map(len, lines), default=0) > 1000 or len(text) > 100 * len(lines):
        return False
    return 4 * sum(map(str.isalpha, text)) >= len(text)


def _text(corpus: _Corpus, in_code: set[Path]) -> Iterator[bytes]:
    for origin, name, kept in _prose(in_code):
        if corpus.full:
            return
        text = "\n\n".join(paragraph for paragraph in kept if corpus.is_new(paragraph))
        if len(text) >= 300:
            yield corpus.line(origin, name, text + "\n")


def _prose(in_code: set[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """(origin, name, paragraphs)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield "language reference", name, paragraphs(topics[name])
    for folder in _package_folders():
        for path in sorted(folder.glob("*.dist-info/METADATA")):
            metadata = read_source(path, 0, 1_000_000)
            if metadata is not None:
                _, _, body = metadata.partition("\n\n")  # after the headers
                yield "package descriptions", path.parent.name, paragraphs(body)
    everything = [(root, path) for _, root, paths in python_sources() for path in paths]
    for root, path in sorted(everything, key=lambda pair: pair[1] in in_code):
        source = read_source(path, 2_000, 400_000)
        if source is not None:
            yield "docstrings", path.relative_to(root).as_posix(), docstring_prose(source)
