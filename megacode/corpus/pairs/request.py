"""What `megacode pairs` is asked for, and what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacode.corpus.pairs.records import KINDS
from megacode.corpus.preprocess.conditions import parse_condition
from megacode.data.indexed import with_ending
from megacode.recipe.schema import TokenizerSection


@dataclass(frozen=True)
class PairRequest:
    """The options of `megacode pairs`, whose help says more."""

    inputs: tuple[str, ...]
    output: Path
    """The JSONL file; the note, the quarantine and the parts lie beside it."""
    validation: float = 0.0
    validation_output: Path | None = None
    kinds: tuple[str, ...] = KINDS
    hold_out: tuple[str, ...] = ()
    """Kinds of the validation file alone."""
    seed: int = 0
    text_field: str = "text"
    format: str = "auto"
    include: tuple[str, ...] = ()
    where: str = ""
    path_field: str = "path"
    language: str = ""
    """A language, the field that has it, or "": by the path's ending."""
    problem_field: str = ""
    generator_field: str = ""
    unproven: bool = False
    min_lines: int = 3
    max_lines: int = 60
    min_names: int = 3
    tokenizer: TokenizerSection | None = None
    """Of inputs that are datasets; None: the one that their manifest names."""
    overwrite: bool = False

    @property
    def name(self) -> Path:
        """What the names of the files beside the output begin with."""
        return self.output.with_suffix("")

    @property
    def outputs(self) -> dict[str, Path]:
        """Split -> file."""
        held_out = self.validation_output or with_ending(self.name, ".validation.jsonl")
        return {"train": self.output} | ({"validation": held_out} if self.validation else {})

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields to read beside the text."""
        wanted = parse_condition(self.where).fields if self.where else ()
        named = (self.path_field, self.language, self.problem_field, self.generator_field)
        return tuple(dict.fromkeys((*wanted, *filter(None, named))))


@dataclass
class PairCounts:
    """Of records and candidates by split."""

    records: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    """By split and kind, joined by a blank; with `run` behind them, how many were run."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Documents, functions, candidates and pairs that were left out, by reason."""

    def add(self, other: PairCounts) -> None:
        self.records += other.records
        self.candidates += other.candidates
        self.left_out += other.left_out

    def to_json(self) -> dict[str, Any]:
        return {name: dict(sorted(value.items())) for name, value in vars(self).items()}

    @staticmethod
    def from_json(value: dict[str, dict[str, int]]) -> PairCounts:
        return PairCounts(*(Counter(value[key]) for key in ("records", "candidates", "left_out")))


@dataclass(frozen=True)
class PairResult:
    """`kept`: the files were already there, made with the same settings from the same files."""

    counts: PairCounts
    kept: bool
    parts: int = 0
    parts_kept: int = 0
    quarantine: Path | None = None


def reasons(counts: Iterable[tuple[str, int]]) -> str:
    """The first few, in words."""
    return ", ".join(f"{number:,} {reason}" for reason, number in list(counts)[:4]) or "no records"
