"""Which streams a phase reads, and by what weights.

A *stream* is a source or a part of one (`subset`): the unit that has a cursor, so that a later
phase goes on where an earlier one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megacode.recipe.online import known_shares
from megacode.recipe.schedules import Weights
from megacode.recipe.schema import FimLevel, MixtureSource, Phase, Recipe, Schedule


@dataclass(frozen=True)
class Entry:
    """One source in one phase's mixture, with the phase's and the domain's defaults filled in.

    Attributes:
        key: where it stands in the recipe, `phases.NAME.mixture. ...`.
        group: number of the ratio it belongs to (its own, or its domain's).
    """

    key: str
    source: str
    domain: str
    given: MixtureSource
    group: int
    fim_rate: float
    fim_level: FimLevel
    restart: bool


def mixture_entries(recipe: Recipe, phase: Phase) -> list[Entry]:
    """The streams of a phase, in the recipe's order.

    Names of sources must be known (`megacode.recipe.checks`).
    """
    top = f"phases.{phase.name}.mixture"
    rate, level = phase.fim_rate, phase.fim_level or recipe.data.fim.level
    rows = [
        (f"{top}.sources", name, given, group, rate, level)
        for group, (name, given) in enumerate((phase.mixture.sources or {}).items())
    ]
    for group, (domain, part) in enumerate((phase.mixture.domains or {}).items()):
        members = part.sources
        if members is None:
            names = [name for name, source in recipe.sources.items() if source.domain == domain]
            members = {name: MixtureSource() for name in names}
        part_rate = rate if part.fim_rate is None else part.fim_rate
        rows += [
            (
                f"{top}.domains.{domain}.sources",
                name,
                given,
                group,
                part_rate,
                part.fim_level or level,
            )
            for name, given in members.items()
        ]
    return [
        Entry(
            key=f"{key}.{name}",
            source=name,
            domain=recipe.sources[name].domain,
            given=given,
            group=group,
            fim_rate=default_rate if given.fim_rate is None else given.fim_rate,
            fim_level=given.fim_level or default_level,
            restart=(given.cursor or phase.cursor) == "restart",
        )
        for key, name, given, group, default_rate, default_level in rows
    ]


def mixture_weights(
    phase: Phase,
    entries: list[Entry],
    tokens: Mapping[str, int],
    steps: int,
    worth: Callable[[str], float] = lambda source: 1.0,
) -> Weights:
    """Weights of a phase's streams over its `steps`.

    Args:
        tokens: of every source; inside a domain a source without a weight gets its (subset's)
            number of tokens.
        worth: tokens with a loss in a sequence of a source (`weight_by: tokens`).
    """
    per_stream = None
    if phase.mixture.weight_by == "tokens":
        per_stream = tuple(worth(entry.source) for entry in entries)
    ratios = tuple(weight or 0.0 for weight in phase.mixture.group_weights.values())
    if online := phase.mixture.online:
        ratios = tuple(
            Schedule(shape="stepwise", values=list(shares), over=len(shares) * online.every)
            for shares in known_shares(phase.mixture).values()
        )
    in_domains = bool(phase.mixture.domains)
    inner = tuple((e.group, _inner_weight(e, tokens) if in_domains else 1.0) for e in entries)
    return Weights(ratios, inner, steps, worth=per_stream)


def _inner_weight(entry: Entry, tokens: Mapping[str, int]) -> float | Schedule:
    """Weight of a source within its domain: the given one, else the natural one."""
    if entry.given.weight is not None:
        return entry.given.weight
    low, high = entry.given.subset_range
    return tokens[entry.source] * (high - low)
