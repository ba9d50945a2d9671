"""One tokenized source: the token stream of its shards, one after another.

Opening a source reads index headers, whatever its size. Tokens are read with `pread` and not through a memory map. A
random window then costs one read of its own size and not a read-ahead of 128 KiB. A truncated file or a failing disk is
an error and not a SIGBUS. Resident memory stays that of the batch. From a warm cache the two are equally fast.
"""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.indexed import Shard, listed_shards, open_shard
from megacode.data.pack_index import SourcePacks, open_packs
from megacode.errors import UserError
from megacode.plan.plan import Plan
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe, Source

_MAX_OPEN_FILES = 48
"""Shards of one source kept open; twenty sources then stay below the usual limit of 1024 files a process."""


@dataclass(frozen=True)
class Document:
    """Where a token comes from: document number `document` (0-based) of `prefix`; `start` is its first token in the
    source's stream, `tokens` its length."""

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
    """The concatenated token stream of a source's shards. Safe to read from several threads only one at a time."""

    def __init__(self, name: str, shards: Sequence[Shard]) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.dtype = np.result_type(*(s.dtype for s in self.shards))
        self.packs: dict[int, SourcePacks] = {}
        """By sequence length, where a plan reads this source in packs (`open_sources`)."""
        self._ends = np.cumsum([s.tokens for s in self.shards], dtype=np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return int(self._ends[-1])

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.shards)

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Tokens [start, start + length) for each of `starts` (int64 [n]); [n, length] in the source's own token type.

        IndexError outside [0, tokens). UserError if a file got shorter or cannot be read.
        """
        out = np.empty((len(starts), length), dtype=self.dtype)
        if not len(starts):
            return out
        starts = np.asarray(starts, dtype=np.int64)
        if int(starts.min()) < 0 or int(starts.max()) + length > self.tokens:
            raise IndexError(
                f"source {self.name}: tokens outside [0, {self.tokens}) were asked for"
            )
        shards = np.searchsorted(self._ends, starts, side="right")
        firsts = starts - (
            self._ends[shards] - np.array([s.tokens for s in self.shards], dtype=np.int64)[shards]
        )
        for row, shard, first in zip(out, shards.tolist(), firsts.tolist(), strict=True):
            self._read_row(row, shard, first)
        return out

    def read_pack(self, pack: int, sequence_length: int, out: NDArray[Any]) -> int:
        """Fill the beginning of `out` (of this source's type) with the tokens of a pack; how many they are."""
        done = 0
        for start, tokens in self.pack_pieces(pack, sequence_length):
            shard = int(np.searchsorted(self._ends, start, side="right"))
            first = start - (int(self._ends[shard]) - self.shards[shard].tokens)
            self._read_row(out[done : done + tokens], shard, first)
            done += tokens
        return done

    def pack_pieces(self, pack: int, sequence_length: int) -> list[tuple[int, int]]:
        """(first token in the stream, tokens) of each piece of a pack, in order."""
        shard, starts, tokens = self.packs[sequence_length].pieces(pack)
        before = int(self._ends[shard]) - self.shards[shard].tokens
        return [
            (before + start, count)
            for start, count in zip(starts.tolist(), tokens.tolist(), strict=True)
        ]

    def document_at(self, position: int) -> Document:
        """The document that holds token `position` of the stream: two binary searches in the shard's index."""
        if not 0 <= position < self.tokens:
            raise IndexError(f"source {self.name}: token {position} is outside [0, {self.tokens})")
        shard = int(np.searchsorted(self._ends, position, side="right"))
        first = int(self._ends[shard]) - self.shards[shard].tokens
        document, start, tokens = self.shards[shard].document_at(position - first)
        return Document(self.shards[shard].prefix, document, first + start, tokens)

    def parts(self, start: int, tokens: int) -> list[DocumentPart]:
        """The documents that tokens [start, start + tokens) of the stream touch, in order."""
        found, position = [], start
        while position < start + tokens:
            document = self.document_at(position)
            first = position - document.start
            found.append(
                DocumentPart(
                    document, first, min(document.tokens - first, start + tokens - position)
                )
            )
            position += found[-1].tokens
        return found

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # another process opens its own files

    def _read_row(self, row: NDArray[Any], shard: int, first: int) -> None:
        """Fill `row` from token `first` of a shard on, going on into the shards after it."""
        while len(row):
            entry = self.shards[shard]
            part = row[: max(0, entry.tokens - first)]
            if len(part):
                raw = part if entry.dtype == row.dtype else np.empty(len(part), dtype=entry.dtype)
                self._pread(shard, raw, first * entry.dtype.itemsize)
                if raw is not part:
                    part[:] = raw
            row, shard, first = row[len(part) :], shard + 1, 0

    def _pread(self, shard: int, out: NDArray[Any], offset: int) -> None:
        path = self.shards[shard].bin_path
        try:
            file = self._file(shard)
            got = os.preadv(file, (out.data,), offset)
            while 0 < got < out.nbytes:
                more = os.preadv(file, (memoryview(out.data).cast("B")[got:],), offset + got)
                got = got + more if more else 0
        except OSError as error:
            raise UserError(
                f"sources.{self.name}: cannot read {path}: {error.strerror or error}"
            ) from error
        if got != out.nbytes:
            raise UserError(
                f"sources.{self.name}: {path} got shorter since it was opened; tokenize the source again"
            )

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        file = os.open(self.shards[shard].bin_path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self._files[shard] = file
        return file


def open_source(
    name: str, paths: Sequence[str], base: Path = Path(), key: str = "path"
) -> TokenSource:
    """Open the shards that `paths` name, reading headers only.

    Prefixes with or without .bin, of one shard or of a dataset in several, or globs of them (matches in sorted order),
    relative to `base`. UserError, naming
    `sources.NAME.KEY`, if one is missing or damaged, or if all are empty.
    """
    label = f"sources.{name}.{key}"
    prefixes = [prefix for path in paths for prefix in _prefixes(path, base, label)]
    if not prefixes:
        raise UserError(f"{label}: names no data; give the prefix of a .bin/.idx pair")
    if len(set(prefixes)) != len(prefixes):
        twice = next(p for i, p in enumerate(prefixes) if p in prefixes[:i])
        raise UserError(
            f"{label}: {twice} is there twice; to read a source more often, raise its weight"
        )
    source = TokenSource(name, [open_shard(prefix, label) for prefix in prefixes])
    if source.tokens == 0:
        raise UserError(
            f"{label}: {', '.join(map(str, prefixes[:3]))} has no tokens; was its corpus empty?"
        )
    return source


def open_sources(plan: Plan, base: Path = Path()) -> dict[str, TokenSource]:
    """Every source that the plan reads, by name, with the packs that it reads (made where they are not there yet).

    UserError if a source names no data or it is not there.
    """
    sources: dict[str, TokenSource] = {}
    cache = pack_cache(plan.recipe, base)
    for stream in (stream for phase in plan.phases for stream in phase.streams):
        name, length = stream.source, stream.sequence_length
        if name not in sources:
            paths = plan.recipe.sources[name].paths
            if not paths:
                raise UserError(
                    f"sources.{name}: has no `path`; a plan can do without data, training cannot"
                )
            sources[name] = open_source(name, paths, base)
        if stream.packing == "best_fit" and length not in sources[name].packs:
            sources[name].packs[length] = open_packs(sources[name].shards, length, cache)
    return sources


def token_counts(recipe: Recipe, base: Path = Path()) -> dict[str, int]:
    """Tokens of every source that a phase reads: counted where its data is there, else the declared `tokens`.

    Reads index headers only. UserError if a source has neither, if some of its files are there and others are not, or
    if one is damaged.
    """
    used = dict.fromkeys(
        entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)
    )
    return {name: _count(name, recipe.sources[name], base) for name in used}


def pack_cache(recipe: Recipe, base: Path = Path()) -> Path | None:
    return base / recipe.data.pack_cache if recipe.data.pack_cache else None


def has_data(source: Source, base: Path = Path()) -> bool:
    """Whether any file of a source is there."""
    return any(matching_prefixes(path, base) for path in source.paths)


def _count(name: str, source: Source, base: Path) -> int:
    if has_data(source, base):
        return open_source(name, source.paths, base).tokens
    if source.tokens is not None:
        return source.tokens
    if not source.paths:
        raise UserError(f"sources.{name}: give `path` (data) or `tokens` (its expected size)")
    raise UserError(
        f"sources.{name}.path: no data at {base / source.paths[0]} (.bin and .idx); tokenize it first, or give "
        "`tokens` to plan without it"
    )


def _bare(path: str) -> str:
    return path[:-4] if path.endswith((".bin", ".idx")) else path


def matching_prefixes(path: str, base: Path) -> list[Path]:
    """Prefixes that `path` names and of which at least one file is there: itself, the shards that its manifest lists, or
    a glob's in sorted order."""
    prefix = _bare(str(base / path))
    if os.path.exists(prefix + ".bin") or os.path.exists(prefix + ".idx"):
        return [Path(prefix)]
    if shards := listed_shards(Path(prefix)):
        return shards
    if not glob.has_magic(prefix):
        return []
    found = glob.glob(prefix + ".bin", recursive=True) + glob.glob(prefix + ".idx", recursive=True)
    return [Path(p) for p in sorted({_bare(p) for p in found})]


def _prefixes(path: str, base: Path, label: str) -> list[Path]:
    found = matching_prefixes(path, base)
    if not found:
        what = (
            "matches no .bin/.idx files" if glob.has_magic(path) else "is not there (.bin and .idx)"
        )
        raise UserError(
            f"{label}: {base / _bare(path)} {what}; tokenize the source, or correct the path"
        )
    return found
