"""What a maker of a probe gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = tuple[str, str]
"""A prompt and its completion."""
Item = dict[str, Any]


@dataclass(frozen=True)
class ProbeTask:
    """A task to write; one of `ranking` and `generation` is given.

    Attributes:
        baselines: name -> accuracy of what needs no model, such as `chance`.
    """

    name: str
    description: str
    items: list[Item]
    ranking: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """Tasks, and records to tune a model on."""

    tasks: Sequence[ProbeTask]
    train: Sequence[Record] = ()
    dev: Sequence[Record] = ()


def is_held_out(text: str) -> bool:
    """Whether a word or an operand is for tests: one in five, by its hash, for every seed."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def block(
    prompts: Iterable[str], choices: Sequence[str], cluster: object, groups: Iterable[str]
) -> list[Item]:
    """One ranking item for each choice, which is the right one after the prompt of its number."""
    return [
        {"prompt": prompt, "choices": list(choices), "answer": number, "group": group,
         "cluster": str(cluster)}
        for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    ]  # fmt: skip
