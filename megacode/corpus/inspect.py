"""What is in an IndexedDataset, made by megacode or by Megatron-LM: statistics and documents.

Of any size: the index is mapped a few megabytes at a time, so memory stays the same. Numbers of
documents count through all shards of a dataset. Whether a dataset is whole is a question for
`megacode.corpus.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.indexed import Shard, listed_shards, open_shard, read_manifest, with_ending
from megacode.data.lengths import length_histogram
from megacode.data.loss_marks import loss_prefix
from megacode.errors import UserError
from megacode.files import inside
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

BEYOND = (2048, 4096, 8192)
"""Statistics say how many documents are longer than each of these."""

_COUNTED = 1 << 20
"""Lengths below this are counted one by one."""


def nothing(_: int) -> None:
    """Ignore progress."""


# ------------------------------------------------------------------------------------------ opening


@dataclass(frozen=True)
class Dataset:
    """One dataset: its shards in order, and the manifest PREFIX.json where megacode wrote one."""

    prefix: Path
    shards: tuple[Shard, ...]
    manifest: Mapping[str, Any] | None

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Documents before each shard, and all of them: int64 [shards + 1]."""
        return np.cumsum([0, *(shard.documents for shard in self.shards)], dtype=np.int64)

    @property
    def documents(self) -> int:
        return int(self.firsts[-1])

    def span(self, document: int) -> tuple[Shard, int, int]:
        """(shard, first token, tokens) of a document. IndexError if there is no such number."""
        if not 0 <= document < self.documents:
            raise IndexError(document)
        number = int(np.searchsorted(self.firsts, document, side="right")) - 1
        shard, within = self.shards[number], document - int(self.firsts[number])
        first, end = shard.token_edges(within, within + 1).tolist()
        return shard, first, end - first


def manifest_of(prefix: Path) -> dict[str, Any] | None:
    """The manifest PREFIX.json of a dataset or of a corpus of several; None if there is none."""
    try:
        return read_manifest(prefix)
    except (UserError, OSError):
        return None


def datasets_at(prefix: Path, on_outside: Callable[[str], None]) -> list[Path]:
    """`prefix`, or the prefixes of the datasets of a corpus that megacode cut into several.
    UserError if there is nothing of that name. `on_outside`: told of each that the manifest puts
    into another folder, which is not followed."""
    manifest = manifest_of(prefix)
    if manifest is None and not any(
        with_ending(prefix, ending).exists() for ending in (".bin", ".idx")
    ):
        raise UserError(f"{prefix}: no dataset there ({prefix.name}.bin and {prefix.name}.idx)")
    if manifest is None or manifest["kind"] != "megacode corpus":
        return [prefix]
    found = []
    for name in manifest["run"]["datasets"].values():
        try:
            found.append(inside(prefix.parent, name, str(with_ending(prefix, ".json"))))
        except UserError:
            on_outside(str(name))
    return found


def shards_at(prefix: Path) -> list[Path]:
    """The prefix of each .bin/.idx pair of a dataset, in order."""
    return listed_shards(prefix) or [prefix]


def open_dataset(prefix: Path) -> Dataset:
    """Open a dataset, reading headers only. UserError if a file is missing or damaged."""
    return Dataset(
        prefix, tuple(open_shard(shard) for shard in shards_at(prefix)), manifest_of(prefix)
    )


def tokenizer_of(prefix: Path, manifest: Mapping[str, Any] | None) -> Tokenizer:
    """The tokenizer that the manifest names, from there or from beside the dataset.

    UserError if there is no manifest, if the file is not there, or if it is not the one that made
    the dataset.
    """
    if manifest is None or "tokenizer" not in manifest:
        raise UserError(
            f"{prefix}: no manifest ({prefix.name}.json) says which tokenizer made it; "
            "give --tokenizer FILE"
        )
    fingerprint = manifest["tokenizer"].get("fingerprint")
    named = {
        key: value
        for key, value in manifest["tokenizer"].items()
        if key in schema.TokenizerSection.model_fields
    }
    path = Path(named["path"]).expanduser()
    if not path.exists():
        beside = [prefix.parent / path, prefix.parent / path.name]
        path = next((one for one in beside if one.exists()), path)
    if not path.exists():
        raise UserError(f"{prefix}: its tokenizer {path} is not there; give --tokenizer FILE")
    tokenizer = load_tokenizer(schema.TokenizerSection(**{**named, "path": str(path)}))
    if fingerprint not in (None, tokenizer.fingerprint()):
        raise UserError(
            f"{prefix}: {path} is not the tokenizer that made it (their fingerprints differ); "
            "give --tokenizer FILE"
        )
    return tokenizer


# --------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistics:
    """Of all documents of a dataset, exact. A percentile is the length of a document: the shortest
    one such that this share of the documents is no longer. `beyond` counts documents longer than
    each of BEYOND. `histogram` is `megacode.data.lengths.length_histogram`."""

    documents: int
    sequences: int
    tokens: int
    empty: int
    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    beyond: Mapping[int, int]
    histogram: NDArray[np.int64] = field(repr=False)

    @property
    def mean(self) -> float:
        return self.tokens / max(self.documents, 1)


def statistics(dataset: Dataset, on_documents: Callable[[int], None] = nothing) -> Statistics:
    """One pass over the index. Exact by counting: each length below 2^20 has a counter, and the few
    longer documents (at most one for each 2^20 tokens) are kept one by one. UserError if the index
    is damaged."""
    counts = np.zeros(_COUNTED, dtype=np.int64)
    longer: list[NDArray[np.int64]] = []
    for shard in dataset.shards:
        for lengths in shard.document_lengths():
            if lengths.max() >= _COUNTED:
                longer.append(lengths[lengths >= _COUNTED].astype(np.int64))
                short = np.bincount(lengths[lengths < _COUNTED])
            else:
                short = np.bincount(lengths)
            counts[: len(short)] += short
            on_documents(len(lengths))
    present = np.flatnonzero(counts)
    far, far_times = np.unique(
        np.concatenate([np.zeros(0, dtype=np.int64), *longer]), return_counts=True
    )
    values, times = np.append(present, far), np.append(counts[present], far_times)
    ends = np.cumsum(times)

    def percentile(percent: int) -> int:
        if not len(values):
            return 0
        rank = -(
            -percent * int(ends[-1]) // 100
        )  # the smallest number of documents that is this share
        return int(values[np.searchsorted(ends, rank)])

    return Statistics(
        documents=dataset.documents,
        sequences=sum(shard.sequences for shard in dataset.shards),
        tokens=int((values * times).sum()),
        empty=int(counts[0]),
        shortest=int(values[0]) if len(values) else 0,
        median=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        longest=int(values[-1]) if len(values) else 0,
        beyond={limit: int(times[values > limit].sum()) for limit in BEYOND},
        histogram=length_histogram(values, times),
    )


# ---------------------------------------------------------------------------------------- documents


def parse_documents(text: str, documents: int) -> list[range]:
    """`0,5,100:103,-1` -> the numbers it names. A range is half-open as in Python; a negative
    number counts from the end. UserError for what is neither, and for numbers that are not
    there."""
    chosen = []
    for item in text.split(","):
        begin, colon, end = item.strip().partition(":")
        try:
            if colon:
                chosen.append(
                    range(documents)[
                        slice(int(begin) if begin else None, int(end) if end else None)
                    ]
                )
                continue
            number = int(begin)
        except ValueError:
            raise UserError(
                f"--documents {text}: {item!r} is neither a number nor a range such as 100:103"
            ) from None
        if not -documents <= number < documents:
            raise UserError(
                f"--documents {text}: there is no document {number:,}; "
                f"there are {documents:,}, from 0"
            )
        chosen.append(range(number % documents, number % documents + 1))
    return chosen


def read_tokens(shard: Shard, first: int, count: int) -> NDArray[Any]:
    """Tokens [first, first + count) of a shard. UserError if the file cannot be read so far."""
    try:
        ids = np.fromfile(shard.bin_path, shard.dtype, count, offset=first * shard.dtype.itemsize)
    except OSError as error:
        raise UserError(f"{shard.bin_path}: cannot be read ({error.strerror or error})") from error
    if len(ids) < count:
        raise UserError(f"{shard.bin_path}: got shorter since it was opened")
    return ids


def read_marks(shard: Shard, first: int, count: int) -> NDArray[np.uint8] | None:
    """Loss marks of tokens [first, first + count) of a shard of conversations; None for another."""
    if not with_ending(shard.prefix, ".loss.idx").exists():
        return None
    return read_tokens(open_shard(loss_prefix(shard.prefix)), first, count)


def pieces_of_text(
    tokenizer: Tokenizer, ids: Sequence[int], answers: Sequence[bool]
) -> Iterator[tuple[str, str, bool]]:
    """Decoded ids as (kind, text, whether it is an answer, as `answers` says of each id): `text`;
    `control`, the name of a control token; `unknown`, an id that the tokenizer does not have."""
    names = {token: name for name, token in tokenizer.control_tokens.items()}

    def kind(token: int) -> str:
        known = 0 <= token < tokenizer.vocab_size
        return "unknown" if not known else "control" if token in names else "text"

    for (what, answer), run in groupby(
        zip(ids, answers, strict=True), key=lambda one: (kind(one[0]), one[1])
    ):
        own = [token for token, _ in run]
        if what == "text":
            yield what, tokenizer.decode(own), answer
        for token in own if what != "text" else ():
            yield what, names[token] if what == "control" else f"<id {token}>", answer
