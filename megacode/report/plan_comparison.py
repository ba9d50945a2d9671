"""Two plans beside each other: what each reads of every source in all, and in which order.

Orders are equal if, at each end of a phase of either, both have read as much of every source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from rich.console import Console
from rich.table import Table

from megacode.plan.plan import Plan
from megacode.terminal import count, print_table, table_of


@dataclass(frozen=True)
class Total:
    """What a plan reads of a source, in all its parts and phases."""

    sequences: int = 0
    tokens: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Plans A and B."""

    a: Plan
    b: Plan

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys((*_read(self.a), *_read(self.b))))

    def totals(self, source: str) -> tuple[Total, Total]:
        """A's and B's."""
        return _total(self.a, source), _total(self.b, source)

    @property
    def unequal(self) -> list[str]:
        """Sources of which one plan reads more tokens."""
        pairs = {source: self.totals(source) for source in self.sources}
        return [source for source, (a, b) in pairs.items() if a.tokens != b.tokens]

    @property
    def reordered(self) -> list[str]:
        """Sources of which one plan has read more tokens at an end of a phase."""
        ends = sorted({*self.a.phase_ends(), *self.b.phase_ends()})
        read = [(_read(self.a, end), _read(self.b, end)) for end in ends]
        return [
            source
            for source in self.sources
            if any(a.get(source, 0) != b.get(source, 0) for a, b in read)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        totals = {source: self.totals(source) for source in self.sources}
        return {
            "totals_equal": not self.unequal,
            "order_equal": not self.reordered,
            "sources": {name: [asdict(a), asdict(b)] for name, (a, b) in totals.items()},
        }

    def print(self, console: Console) -> None:
        """Totals by source, what each phase reads, and a sentence."""
        for letter, plan in (("A", self.a), ("B", self.b)):
            steps, tokens = f"{plan.total_steps:,} steps", f"{plan.total_tokens:,} tokens"
            console.print(f"{letter} is {plan.recipe.name}: {steps}, {tokens}")
        console.print()
        print_table(console, self._totals_table())
        print_table(console, _phase_table("A", self.a))
        print_table(console, _phase_table("B", self.b))
        console.print(self.verdict())

    def verdict(self) -> str:
        """One sentence: totals, then orders."""
        sources, unequal, reordered = self.sources, self.unequal, self.reordered
        if unequal:
            return f"totals differ in {len(unequal)} of {len(sources)} sources: {_names(unequal)}"
        equal = f"totals of all {len(sources)} sources are equal to the token"
        if reordered:
            return f"{equal}; the order differs in {len(reordered)}: {_names(reordered)}"
        return f"{equal}, also at every end of a phase"

    def _totals_table(self) -> Table:
        sides = [
            f"{what}, {letter}" for what in ("sequences", "tokens", "epochs") for letter in "AB"
        ]
        table = table_of("Totals", "source", *sides, "tokens, B - A", "order")
        reordered = self.reordered
        for source in self.sources:
            a, b = self.totals(source)
            table.add_row(
                source,
                *(f"{one.sequences:,}" for one in (a, b)),
                *(f"{one.tokens:,}" for one in (a, b)),
                *(f"{one.epochs:.4g}" for one in (a, b)),
                "equal" if a.tokens == b.tokens else f"{b.tokens - a.tokens:+,}",
                "differs" if source in reordered else "equal",
            )
        return table


def _total(plan: Plan, source: str) -> Total:
    streams = [s for phase in plan.phases for s in phase.streams if s.source == source]
    return Total(
        sum(stream.samples for stream in streams),
        sum(stream.tokens for stream in streams),
        # As fractions: equal totals give equal numbers, whatever their parts.
        float(sum(Fraction(s.tokens, s.epoch_tokens) * Fraction(s.high - s.low) for s in streams)),
    )


def _read(plan: Plan, end: int | None = None) -> dict[str, int]:
    """Tokens of every source that the steps before `end` read; of every source to the end."""
    read: dict[str, int] = {}
    for phase in plan.phases:
        stop = phase.end if end is None else max(min(end, phase.end), phase.first_step)
        counts = phase.counts_before(stop).tolist()
        for stream, samples in zip(phase.streams, counts, strict=True):
            tokens = samples * phase.sequence_length
            read[stream.source] = read.get(stream.source, 0) + tokens
    return read


def _phase_table(letter: str, plan: Plan) -> Table:
    table = table_of(
        f"{letter}: tokens by phase", "source", *(phase.name for phase in plan.phases), "total"
    )
    for source, total in _read(plan).items():
        of_phases = (
            sum(stream.tokens for stream in phase.streams if stream.source == source)
            for phase in plan.phases
        )
        table.add_row(source, *map(count, of_phases), count(total))
    return table


def _names(sources: list[str]) -> str:
    return ", ".join(sources[:6]) + (", ..." if len(sources) > 6 else "")
