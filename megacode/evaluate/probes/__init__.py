"""Generators of tasks that small models can show something on, from a seed.

1. A maker (`MAKERS`) draws the items of one or more tasks, and what a model is tuned on for them.
2. `make_probe` writes them as task files and as records of conversations.

Ranking items come in blocks: the same choices, and each of them right once. A model that prefers
some choice whatever the prompt scores exactly chance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacode.evaluate.probes import (
    arithmetic,
    boxes,
    brackets,
    cogs,
    copying,
    functions,
    pairs,
    passivization,
)
from megacode.evaluate.probes.probe import Probe, ProbeTask
from megacode.evaluate.tasks import open_task
from megacode.files import write_text
from megacode.recipe.yaml_tree import dump_yaml

MAKERS: dict[str, tuple[Callable[[random.Random, int], Probe], int, str]] = {
    "copying": (copying.make, 300, "a nonce word of the context, in code and in prose"),
    "brackets": (brackets.make, 300, "the closer of nested brackets, the outer closer apart"),
    "quotes": (pairs.make_quotes, 500, "the quote that opened"),
    "agreement": (pairs.make_agreement, 500, "is or are after a noun and a second one"),
    "cogs": (cogs.make, 800, "logical forms of sentences; tuned; lexical and structural cases"),
    "passivization": (passivization.make, 500, "active to passive; tuned; PP on the subject apart"),
    "boxes": (boxes.make, 1000, "what a box holds after operations; tuned"),
    "arithmetic": (arithmetic.make, 300, "sums and differences of 1 to 3 digits; tuned or ranked"),
    "functions": (functions.make, 300, "a docstring to one line of Python, which is run; tuned"),
}
"""name -> (maker, items of each task, what it asks)."""


@dataclass(frozen=True)
class Written:
    """A task's file, the task, and how many items each group has."""

    path: Path
    task: ProbeTask
    groups: dict[str, int]


def make_probe(name: str, seed: int, folder: Path, items: int | None = None) -> list[Written]:
    """Write the tasks of a probe; what a model is tuned on goes to NAME.train.jsonl and
    NAME.dev.jsonl, as `{"prompt", "completion"}`.

    Args:
        items: of each task (the probe's number if None): rounded up to whole blocks, and fewer
            where there are no more that differ.
    """
    maker, usual, _ = MAKERS[name]
    probe = maker(random.Random(f"{name} {seed}"), items or usual)
    written = []
    for task in probe.tasks:
        path = folder / f"{task.name}.yaml"
        how = {"ranking": task.ranking} if task.ranking else {"generation": task.generation}
        head = {"name": task.name, "description": task.description, "data": f"{task.name}.jsonl"}
        _write_lines(folder / f"{task.name}.jsonl", task.items)
        write_text(path, dump_yaml({**head, **how}))
        groups: dict[str, int] = {}
        for item in open_task(path).items:
            groups[item.group] = groups.get(item.group, 0) + 1
        written.append(Written(path, task, groups))
    for part, records in (("train", probe.train), ("dev", probe.dev)):
        if records:
            lines = [{"prompt": prompt, "completion": answer} for prompt, answer in records]
            _write_lines(folder / f"{name}.{part}.jsonl", lines)
    return written


def _write_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
