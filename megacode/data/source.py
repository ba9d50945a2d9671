"""One tokenized source: the token stream of its shards, one after another.

Opening a source reads index headers, whatever its size. Tokens are read with `preadv` and not
through a memory map. A random window then costs one read of its own size and not a read-ahead of
128 KiB. A truncated file or a failing disk is an error and not a SIGBUS. Resident memory stays that
of the batch. From a warm cache the two are equally fast.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.indexed import Shard, listed_shards, open_shard
from megacode.data.loss_marks import has_marks, open_marks
from megacode.data.pack_index import SourcePacks, open_packs
from megacode.errors import UserError
from megacode.plan.plan import Plan
from megacode.recipe.schema import Recipe, Source

_MAX_OPEN_FILES = 48
"""Shards of a source kept open: twenty sources stay below the usual limit of 1024 files."""


@dataclass(frozen=True)
class Document:
    """Document number `document` of a shard: tokens [start, start + tokens) of the source."""

    prefix: Path
    document: int
    start: int
    tokens: int


@dataclass(frozen=True)
class DocumentPart:
    """Tokens [first, first + tokens) of a document."""

    document: Document
    first: int
    tokens: int

    @property
    def ends(self) -> bool:
        """Whether the document ends with this part."""
        return self.first + self.tokens == self.document.tokens


class TokenSource:
    """The concatenated token stream of a source's shards, for one thread at a time."""

    def __init__(
        self, name: str, shards: Sequence[Shard], marks: TokenSource | None = None
    ) -> None:
        self.name, self.marks = name, marks
        """`marks`: the loss marks of conversations, token by token."""
        self.shards = tuple(shards)
        self.dtype = np.result_type(*(shard.dtype for shard in self.shards))
        self.packs: dict[int, SourcePacks] = {}
        """By sequence length, where a plan reads this source in packs (`open_sources`)."""
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self._files: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Tokens [start, start + length) for each of `starts` (int64 [n]): [n, length] of `dtype`.

        IndexError outside [0, tokens). UserError if a file got shorter or cannot be read.
        """
        out = np.empty((len(starts), length), dtype=self.dtype)
        if len(starts) and (int(starts.min()) < 0 or int(starts.max()) + length > self.tokens):
            raise IndexError(
                f"source {self.name}: tokens outside [0, {self.tokens}) were asked for"
            )
        for row, start in zip(out, starts.tolist(), strict=True):
            self._read_row(row, start)
        return out

    def read_pieces(
        self, rows: Sequence[Sequence[tuple[int, int]]], size: int, pad: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Rows of pieces (first token, tokens), each padded to `size`: [n, size], and how many
        tokens of each are real, int64 [n]."""
        out = np.full((len(rows), size), pad, dtype=self.dtype)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for number, (row, pieces) in enumerate(zip(out, rows, strict=True)):
            done = 0
            for start, tokens in pieces:
                self._read_row(row[done : done + tokens], start)
                done += tokens
            lengths[number] = done
        return out, lengths

    def document_at(self, position: int) -> Document:
        """The document that holds token `position`: two binary searches in the shard's index."""
        if not 0 <= position < self.tokens:
            raise IndexError(f"source {self.name}: token {position} is outside [0, {self.tokens})")
        number, within = self._place(position)
        shard = self.shards[number]
        document, start, tokens = shard.document_at(within)
        return Document(shard.prefix, document, position - within + start, tokens)

    def parts(self, start: int, tokens: int) -> list[DocumentPart]:
        """The documents that tokens [start, start + tokens) touch, in order."""
        found, position, stop = [], start, start + tokens
        while position < stop:
            document = self.document_at(position)
            end = min(document.start + document.tokens, stop)
            found.append(DocumentPart(document, position - document.start, end - position))
            position = end
        return found

    def close(self) -> None:
        """Close the files. The next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _place(self, position: int) -> tuple[int, int]:
        """Shard of token `position`, and its number within the shard."""
        shard = bisect_right(self._ends, position)
        return shard, position - (self._ends[shard] - self.shards[shard].tokens)

    def _read_row(self, row: NDArray[Any], start: int) -> None:
        """Fill `row` from token `start` on, across shards."""
        number, first = self._place(start)
        while len(row):
            shard = self.shards[number]
            part = row[: shard.tokens - first]
            if shard.dtype == row.dtype:
                self._pread(number, part, first)
            else:  # another shard has a wider token type
                raw = np.empty(len(part), dtype=shard.dtype)
                self._pread(number, raw, first)
                part[:] = raw
            row, number, first = row[len(part) :], number + 1, 0

    def _pread(self, number: int, out: NDArray[Any], first: int) -> None:
        """Fill `out` from token `first` of a shard on."""
        path, offset = self.shards[number].bin_path, first * out.itemsize
        try:
            file = self._file(number)
            got = more = os.preadv(file, [out.data], offset)
            while more and got < out.nbytes:  # a signal or a network file system cut it short
                more = os.preadv(file, [out.view(np.uint8).data[got:]], offset + got)
                got += more
        except OSError as error:
            raise UserError(
                f"sources.{self.name}: cannot read {path}: {error.strerror or error}"
            ) from error
        if got < out.nbytes:
            raise UserError(
                f"sources.{self.name}: {path} got shorter since it was opened; tokenize it again"
            )

    def _file(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))  # the one opened first
            file = os.open(self.shards[number].bin_path, os.O_RDONLY | os.O_CLOEXEC)
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            self._files[number] = file
        return self._files[number]


def open_source(name: str, paths: Sequence[str], key: str = "path") -> TokenSource:
    """Open the shards that `paths` name, reading headers only.

    Each path is a prefix, with or without .bin, of one shard or of a dataset in several, or a glob
    of prefixes (matches in sorted order).

    Raises:
        UserError: naming `sources.NAME.KEY`: a shard is missing or damaged, or all are empty.
    """
    label, prefixes = f"sources.{name}.{key}", []
    for path in paths:
        found = matching_prefixes(path)
        if not found:
            raise UserError(
                f"{label}: {path} matches no .bin/.idx files; tokenize the source, or correct it"
            )
        prefixes += found
    if not prefixes:
        raise UserError(f"{label}: names no data; give the prefix of a .bin/.idx pair")
    if twice := [prefix for number, prefix in enumerate(prefixes) if prefix in prefixes[:number]]:
        raise UserError(
            f"{label}: {twice[0]} is there twice; to read a source more often, raise its weight"
        )
    shards = [open_shard(prefix, label) for prefix in prefixes]
    marked = [has_marks(prefix) for prefix in prefixes]
    marks = None
    if any(marked):
        if not all(marked):
            raise UserError(
                f"{label}: {prefixes[marked.index(False)]} has no loss marks (.loss.idx) and "
                "others have; make two sources of them"
            )
        marks = TokenSource(name, [open_marks(shard, label) for shard in shards])
    source = TokenSource(name, shards, marks)
    if source.tokens == 0:
        raise UserError(
            f"{label}: {', '.join(map(str, prefixes[:3]))} has no tokens; was its corpus empty?"
        )
    return source


def open_sources(plan: Plan) -> dict[str, TokenSource]:
    """Every source that the plan reads, by name, with its packs (made where they are missing).

    UserError if a source names no data or its files are missing.
    """
    sources: dict[str, TokenSource] = {}
    for stream in (stream for phase in plan.phases for stream in phase.streams):
        name, length = stream.source, stream.sequence_length
        if name not in sources:
            paths = plan.recipe.sources[name].paths
            if not paths:
                raise UserError(
                    f"sources.{name}: has no `path`; a plan can do without data, training cannot"
                )
            sources[name] = open_source(name, paths)
        source = sources[name]
        if stream.packing != "concatenate" and length not in source.packs:
            cache = pack_cache(plan.recipe)
            source.packs[length] = open_packs(source.shards, length, cache, stream.packing)
    return sources


def pack_cache(recipe: Recipe) -> Path | None:
    """Folder of the pack indexes; None: beside the shards."""
    return Path(recipe.data.pack_cache) if recipe.data.pack_cache else None


def has_data(source: Source) -> bool:
    """Whether any file of a source is there."""
    return any(matching_prefixes(path) for path in source.paths)


def matching_prefixes(path: str) -> list[Path]:
    """Prefixes that `path` names and of which at least one file is there: itself, the shards that
    its manifest lists, or the matches of a glob in sorted order."""
    prefix = _bare(path)
    if os.path.exists(prefix + ".bin") or os.path.exists(prefix + ".idx"):
        return [Path(prefix)]
    if shards := listed_shards(Path(prefix)):
        return shards
    if not glob.has_magic(prefix):
        return []
    found = glob.glob(prefix + ".bin", recursive=True) + glob.glob(prefix + ".idx", recursive=True)
    named = {_bare(path) for path in found}
    return [Path(p) for p in sorted(named) if p.removesuffix(".loss") not in named - {p}]


def _bare(path: str) -> str:
    return path[:-4] if path.endswith((".bin", ".idx")) else path
