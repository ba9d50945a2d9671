"""Two real corpora that every Python installation carries, and everything the tiny recipes need made from them.

Code: sources of the standard library and of installed packages. Text: the language reference (pydoc_data.topics), the
descriptions of installed packages, and the prose of docstrings, from files that are not in the code corpus as far as
there are enough. Both are the same for the same installation: files in the order of their paths or of a hash of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megacode.corpus.preprocess import Request
from megacode.corpus.workers import available_cores
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.quickstart.docstrings import docstring_prose, package_description, paragraphs
from megacode.recipe import schema
from megacode.report.preprocessing import preprocess_visibly
from megacode.terminal import print_table
from megacode.tokenizer.training import train_tokenizer

GATHERING = 1
"""Raised when the same installation would give other corpora."""

_SKIPPED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "_bundled", "_vendor"),
    *("test", "tests", "testing", "idle_test"),
    *("encodings", "pydoc_data", "lib2to3"),  # tables; the text corpus; sources that are data
}


@dataclass
class _Gathered:
    """Documents written so far; what repeats is left out."""

    path: Path
    limit: int
    """Bytes of text."""
    size: int = 0
    by_origin: dict[str, list[int]] = field(default_factory=dict)
    """Origin -> [documents, bytes]."""
    seen: set[bytes] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.size >= self.limit

    def new(self, text: str) -> bool:
        """Whether this text (a document, a paragraph) is the first of its kind."""
        key = hashlib.blake2b(text.encode(errors="replace"), digest_size=12).digest()
        return not (key in self.seen or self.seen.add(key))  # type: ignore[func-returns-value]

    def line(self, origin: str, name: str, text: str) -> bytes:
        """The JSONL line of a document, which now counts."""
        size = len(text.encode(errors="replace"))
        counts = self.by_origin.setdefault(origin, [0, 0])
        counts[0] += 1
        counts[1] += size
        self.size += size
        return (json.dumps({"text": text, "origin": origin, "path": name}) + "\n").encode()


def gather(
    folder: Path, code_mb: float = 12.0, text_mb: float = 6.0, console: Console | None = None
) -> dict[str, Path]:
    """Write `folder/code.jsonl` and `folder/text.jsonl` (`text`, `origin`, `path`), at most that many MB each.

    Corpora of that size that are there are kept, also when packages have been installed since. Returns the two files.
    """
    console = console or Console()
    files = {"code": folder / "code.jsonl", "text": folder / "text.jsonl"}
    wanted = {
        "gathering": GATHERING,
        "code_mb": code_mb,
        "text_mb": text_mb,
        "python": platform.python_version(),
    }
    done = _read_json(folder / "gathered.json")
    if (
        done
        and done.get("settings") == wanted
        and all(_size(files[k]) == done["sizes"].get(k) for k in files)
    ):
        console.print(f"{folder}: kept; gathered before from Python {wanted['python']}")
        return files
    code = _Gathered(files["code"], int(code_mb * 1e6))
    text = _Gathered(files["text"], int(text_mb * 1e6))
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f} of {task.total:.0f} MB"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        chosen: set[Path] = set()
        for corpus, name, documents in (
            (code, "gathering code", _code(code, chosen)),
            (text, "gathering text", _text(text, chosen)),
        ):
            task = bar.add_task(name, total=corpus.limit / 1e6)
            with replace_file(corpus.path) as out:
                for line in documents:
                    out.write(line)
                    bar.update(task, completed=min(corpus.size, corpus.limit) / 1e6)
            bar.update(task, total=corpus.size / 1e6)
    write_json(
        folder / "gathered.json",
        {"settings": wanted, "sizes": {k: _size(p) for k, p in files.items()}},
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("corpus", "from"):
        table.add_column(heading)
    for heading in ("documents", "MB"):
        table.add_column(heading, justify="right")
    for name, corpus in (("code", code), ("text", text)):
        for origin, (count, size) in corpus.by_origin.items():
            table.add_row(name, origin, f"{count:,}", f"{size / 1e6:.1f}")
    print_table(console, table)
    return files


def prepare(
    folder: Path, vocab_size: int = 8000, workers: int | None = None, console: Console | None = None
) -> dict[str, Path]:
    """Everything that the tiny recipes read, in `folder`: corpora gathered, a tokenizer trained, both tokenized.

    `python/{train,valid}` and `docs/{train,valid}` (dataset prefixes), `tokenizer.model`, `gathered/`. BOS and EOD
    around each document, 2 % held out. What is there and was made the same way is kept, and it says so.
    """
    console = console or Console()
    corpora = gather(folder / "gathered", console=console)
    model = folder / "tokenizer.model"
    wanted = {
        "vocab_size": vocab_size,
        "corpora": {k: _sha256(path) for k, path in corpora.items()},
    }
    note = folder / "tokenizer.made-from.json"
    if model.exists() and _read_json(note) == wanted:
        console.print(f"{model}: kept; trained before on these corpora")
    else:
        note.unlink(missing_ok=True)
        with console.status("training the tokenizer"):
            train_tokenizer(_texts(corpora.values()), model, vocab_size)
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
        preprocess_visibly(
            request, workers or available_cores(), console, title=f"tokenizing {name}"
        )
    return {"tokenizer": model, **outputs}


# -------------------------------------------------------------------------------------------------------------- code


def _code(corpus: _Gathered, chosen: set[Path]) -> Iterator[bytes]:
    """Sources: the standard library by path, then packages by hash of path, so that a few MB come from all of them."""
    for origin, root, paths in _sources():
        for path in paths:
            if corpus.full:
                return
            text = _read(path, 400, 120_000)
            if text is not None and _like_code(text) and corpus.new(text):
                chosen.add(path)
                yield corpus.line(origin, path.relative_to(root).as_posix(), text)


def _sources() -> Iterator[tuple[str, Path, list[Path]]]:
    standard = Path(sysconfig.get_paths()["stdlib"])
    yield "standard library", standard, list(_python_files(standard))
    for packages in _package_folders():
        found = _python_files(packages)
        yield (
            "installed packages",
            packages,
            sorted(found, key=lambda p: _path_hash(p.relative_to(packages))),
        )


def _package_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [
        Path(p) for p in dict.fromkeys((paths["purelib"], paths["platlib"])) if os.path.isdir(p)
    ]


def _python_files(root: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")
        )
        yield from (Path(here, name) for name in sorted(names) if name.endswith(".py"))


def _path_hash(path: Path) -> bytes:
    return hashlib.blake2b(path.as_posix().encode(errors="surrogateescape"), digest_size=8).digest()


def _read(path: Path, smallest: int, largest: int) -> str | None:
    """A file's text if its size is within bounds and it is UTF-8."""
    try:
        if not smallest <= path.stat().st_size <= largest:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _like_code(text: str) -> bool:
    """The usual filters against data written as code (StarCoder, arXiv 2305.06161, section 3): mean line up to 100
    characters, longest up to 1000, at least a quarter of all characters letters."""
    lines = text.splitlines()
    letters = sum(map(str.isalpha, text))
    return (
        max(map(len, lines), default=0) <= 1000
        and len(text) <= 100 * len(lines)
        and 4 * letters >= len(text)
    )


# -------------------------------------------------------------------------------------------------------------- text


def _text(corpus: _Gathered, in_code: set[Path]) -> Iterator[bytes]:
    for origin, name, kept in _prose(in_code):
        if corpus.full:
            return
        text = "\n\n".join(paragraph for paragraph in kept if corpus.new(paragraph))
        if len(text) >= 300:
            yield corpus.line(origin, name, text + "\n")


def _prose(in_code: set[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """(origin, name, paragraphs)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield "language reference", name, paragraphs(topics[name])
    for folder in _package_folders():
        for path in sorted(folder.glob("*.dist-info/METADATA")):
            metadata = _read(path, 0, 1_000_000)
            if metadata is not None:
                yield "package descriptions", path.parent.name, package_description(metadata)
    everything = [(root, path) for _, root, paths in _sources() for path in paths]
    for root, path in sorted(everything, key=lambda pair: pair[1] in in_code):
        source = _read(path, 2_000, 400_000)
        if source is not None:
            yield "docstrings", path.relative_to(root).as_posix(), docstring_prose(source)


# ------------------------------------------------------------------------------------------------------------- helpers


def _texts(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise UserError(f"{path}: not JSON; delete it to make it anew") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
