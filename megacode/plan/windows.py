"""What a stream shuffles: fixed windows of its source's tokens, or packs of its documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megacode.errors import UserError
from megacode.recipe.mixtures import Entry, mixture_entries
from megacode.recipe.schema import Packing, Phase, Recipe

PACKING_ALGORITHM = 1
"""Of `megacode.data.best_fit`: raised when the same documents would be packed otherwise."""


@dataclass(frozen=True)
class Windows:
    """What a stream shuffles: `count` windows of `size` tokens from number `first`; see `StreamPlan`."""

    size: int
    first: int
    count: int
    packing: Packing
    estimated: bool


def windows_of(
    recipe: Recipe,
    entry: Entry,
    phase: Phase,
    tokens: Mapping[str, int],
    packs: Mapping[tuple[str, int], int],
    shuffle: Mapping[str, int],
) -> Windows:
    """The windows of a stream of a phase.

    Args:
        tokens: of every source.
        packs: of the packed ones, by (source, sequence length), where they are counted.
        shuffle: `shuffle_units`.

    Raises:
        UserError: there is not one whole window.
    """
    if recipe.packing(entry.source) == "concatenate":
        size = shuffle[entry.source]
        return Windows(
            size, *subset_windows(entry, tokens[entry.source], size), "concatenate", False
        )
    length = phase.sequence_length
    counted = packs.get((entry.source, length))
    total = -(-tokens[entry.source] // (length + 1)) if counted is None else counted
    if total == 0:
        raise UserError(
            f"{entry.key}: source {entry.source} has no documents; give it data, or take it out of the mixture"
        )
    return Windows(
        length,
        *_part(entry, total, f"{total:,} packs of {length + 1:,} tokens"),
        "best_fit",
        counted is None,
    )


def shuffle_units(recipe: Recipe, where: str) -> dict[str, int]:
    """Window of every source that is read end to end: its own, else the first sequence length it is read at."""
    lengths: dict[str, list[int]] = {}
    for phase in recipe.phases:
        for entry in mixture_entries(recipe, phase):
            if recipe.packing(entry.source) == "concatenate":
                lengths.setdefault(entry.source, []).append(phase.sequence_length)
    windows = {name: recipe.sources[name].window or read[0] for name, read in lengths.items()}
    problems = [
        f"{where}sources.{name}.window: {windows[name]:,} "
        f"tokens{'' if recipe.sources[name].window else ' (by default)'} is no multiple of every sequence length the "
        f"source is read at ({', '.join(map(str, dict.fromkeys(read)))}); set it to {math.lcm(*read)}"
        for name, read in lengths.items()
        if any(windows[name] % length for length in read)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return windows


def subset_windows(entry: Entry, tokens: int, window: int) -> tuple[int, int]:
    """(first window, number of windows) of a stream in a source of `tokens`.

    Raises:
        UserError: there is not one whole window (and the token after it).
    """
    total = max(tokens - 1, 0) // window
    if total == 0:
        raise UserError(
            f"{entry.key}: source {entry.source} has {tokens:,} tokens, fewer than one window of {window:,} + 1; "
            "give it more data, a shorter sequence_length, or take it out of the mixture"
        )
    return _part(entry, total, f"{total:,} windows of {window:,} tokens")


def _part(entry: Entry, total: int, shown: str) -> tuple[int, int]:
    """(first, number) of the windows, of `total`, that are in the entry's subset; UserError if none is."""
    low, high = (
        Fraction(str(bound)) for bound in entry.given.subset_range
    )  # the decimals as written
    first, end = math.floor(low * total), math.floor(high * total)
    if end == first:
        raise UserError(
            f"{entry.key}.subset: {entry.given.subset} of source {entry.source} ({shown}) holds no whole window; widen the "
            "subset"
        )
    return first, end - first
