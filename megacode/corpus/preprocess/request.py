"""What a run is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from megacode.corpus.preprocess.conditions import parse_condition
from megacode.corpus.preprocess.counts import Counts, Group
from megacode.corpus.readers import MAX_DOCUMENT
from megacode.data import indexed
from megacode.recipe import schema

PairForm = Literal["members", "sequences"]
TooLongPolicy = Literal["error", "drop", "left", "right"]
_LONGEST_NAME = 100
"""Bytes: file systems allow 255, endings and temporary names included."""


@dataclass(frozen=True)
class Request:
    """What to tokenize, and how. Everything here but `overwrite` decides the output."""

    inputs: tuple[str, ...]
    tokenizer: schema.TokenizerSection
    output: Path
    """Prefix of the dataset: PREFIX.bin, .idx, .records.npy, .json (manifest). With `split_by`:
    `{value}` in it stands for the value."""
    validation: float = 0.0
    """Share of documents held out by hash of their text, into a dataset of its own."""
    validation_output: Path | None = None
    """Default: PREFIX_validation."""
    text_field: str = "text"
    """Empty: the whole record (`conversations`, `pairs`)."""
    conversations: bool = False
    """Records are conversations, rendered by a chat template, with loss marks."""
    pairs: PairForm | None = None
    """Records are pairs, with marks of the roles of their members; see `preprocess.pairs`."""
    template: str | None = None
    """A built-in template or a file; None: the one beside the tokenizer."""
    max_tokens: int | None = None
    """Of a conversation or a pair."""
    too_long: TooLongPolicy = "error"
    """What becomes of a longer one: an error, set aside, or its beginning (`left`) or end
    (`right`) cut away."""
    format: str = "auto"
    include: tuple[str, ...] = ()
    every: tuple[int, int] = (0, 1)
    """Of the input files, every n-th, beginning with number i."""
    where: str | None = None
    """Which records are wanted: see `conditions`."""
    split_by: str | None = None
    """A dataset for each value of this field."""
    deduplicate: bool = False
    """Keep only the first of documents with equal text."""
    shuffle: int | None = None
    """Seed of a random order of all documents; None: the order of the input."""
    repository: str | None = None
    """Field that names a repository: its files become one document, ordered by `path`."""
    path: str | None = None
    shard_size: int | None = None
    """Bytes of a .bin, at most; None: one shard."""
    max_document: int = MAX_DOCUMENT
    """Bytes of a record beyond which it is set aside."""
    exact: bool = False
    """Do without the fast backend."""
    overwrite: bool = False
    """Replace a dataset of that name that was made otherwise."""

    @property
    def marked(self) -> bool:
        """Whether tokens have marks."""
        return self.conversations or self.pairs is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields to be read beside the text."""
        where = parse_condition(self.where).fields if self.where else ()
        fields = (self.split_by, self.repository, self.path, *where)
        return tuple(dict.fromkeys(field for field in fields if field))

    def part_dtype(self, vocab_size: int) -> np.dtype[Any]:
        """Of tokens in the files of parts: those with marks are joined with them."""
        return np.dtype(np.uint32) if self.marked else indexed.token_dtype(vocab_size)

    @property
    def name(self) -> Path:
        """Prefix of what belongs to the run as a whole: parts, quarantine and, with `split_by`, its
        manifest."""
        if not self.split_by:
            return self.output
        bare = self.output.name.replace("{value}", "").strip("-_.")
        return (
            self.output.with_name(bare or "corpus")
            if "{value}" in self.output.name
            else self.output
        )

    def prefix(self, group: Group) -> Path:
        """Where a group's dataset goes."""
        output = self.output
        if group.split == "validation":
            output = self.validation_output or self.output.with_name(
                self.output.name + "_validation"
            )
        if not self.split_by:
            return output
        value = file_name(group.value)
        name = (
            output.name.replace("{value}", value)
            if "{value}" in output.name
            else f"{output.name}-{value}"
        )
        return output.with_name(name)


def file_name(value: str) -> str:
    """A value as part of a file's name: what is no letter, digit or one of `._+#-` becomes `_`; of
    a long value the start, and a digest."""
    name = "".join(c if c.isalnum() or c in "._+#-" else "_" for c in value).lstrip(".") or "_"
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return (
        name.encode()[: _LONGEST_NAME - 17].decode(errors="ignore")
        + "-"
        + xxhash.xxh3_64_hexdigest(value.encode())
    )


@dataclass(frozen=True)
class Result:
    """`kept`: the datasets were already there, made with the same settings from the same files."""

    outputs: dict[Group, Path]
    """Prefixes of datasets that have documents. Empty: this machine's share is done, others are
    still at theirs."""
    counts: Counts
    kept: bool
    parts: int
    parts_kept: int
    quarantine: Path | None
    notes: tuple[str, ...] = ()
    """What else a person should know."""

    @property
    def bad_share(self) -> float:
        return self.counts.bad.total() / max(self.counts.records, 1)
