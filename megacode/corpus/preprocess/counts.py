"""What a run read and wrote: of one part, or of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SPLITS = ("train", "validation")


class Group(NamedTuple):
    """The documents of one dataset: a split, and a value of the `--split-by` field ("" without)."""

    split: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.split}/{self.value}" if self.value else self.split

    @staticmethod
    def parse(text: str) -> Group:
        split, _, value = text.partition("/")
        return Group(split, value)


@dataclass
class GroupCounts:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text."""
    longest: int = 0
    """Tokens of the longest document."""

    def add(self, other: GroupCounts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.longest = max(self.longest, other.longest)


@dataclass
class Counts:
    groups: dict[Group, GroupCounts] = field(default_factory=dict)
    records: int = 0
    """Documents, bad ones and harmless ones."""
    bad: Counter[str] = field(default_factory=Counter)
    """By reason."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Empty documents, binary files, duplicates, records that `--where` excludes, by reason."""
    repaired: int = 0
    """Documents with lone surrogates, which became U+FFFD."""
    checked: int = 0
    """Documents whose ids were compared with the reference library's."""
    exact: str = ""
    """Why the reference library did it all, if it did."""

    def add(self, other: Counts) -> None:
        for name, group in other.groups.items():
            self.groups.setdefault(name, GroupCounts()).add(group)
        self.records += other.records
        self.bad += other.bad
        self.passed_over += other.passed_over
        self.repaired += other.repaired
        self.checked += other.checked
        self.exact = self.exact or other.exact

    @property
    def total(self) -> GroupCounts:
        """Over all groups."""
        total = GroupCounts()
        for group in self.groups.values():
            total.add(group)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "groups": {str(name): vars(group) for name, group in sorted(self.groups.items())},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Counts:
        return Counts(
            groups={
                Group.parse(name): GroupCounts(**group) for name, group in value["groups"].items()
            },
            records=value["records"],
            bad=Counter(value["bad"]),
            passed_over=Counter(value["passed_over"]),
            repaired=value["repaired"],
            checked=value["checked"],
            exact=value["exact"],
        )
