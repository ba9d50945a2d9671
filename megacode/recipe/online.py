"""Shares that are decided while training: Online Data Mixing (Albalak et al., arXiv 2312.02406).

The arms of the bandit are the K groups of a mixture (its domains, or its sources), and a turn is a
block of steps with constant shares p. With L the mean losses of the block, and t turns finished:

* reward estimates: R_i <- decay R_i + L_i / (10 p_i);
* exploration rate: e_t = min(1/K, sqrt(ln K / (K t)));
* shares of the next block: p_i = (1 - K e_t) exp(e_(t-1) R_i) / sum_j exp(e_(t-1) R_j) + e_t.

With `decay` 0.9 the estimate is the paper's moving average (weight 0.1 on the new L_i / p_i). With
`decay` 1 it is the sum that the authors' EXP3 code keeps, whose rewards are L_i / 10.

Shares are rounded to whole 1/10,000, so that their text in a file is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megacode.recipe.schema import Mixture, Online, Phase, Recipe

_PARTS = 10_000


def exploration(groups: int, turn: int) -> float:
    """The least share of a group after `turn` finished blocks, before rounding."""
    if turn < 1:
        return 1 / groups
    return min(1 / groups, math.sqrt(math.log(groups) / (groups * turn)))


def least_share(groups: int, turn: int) -> float:
    """`exploration`, rounded as shares are."""
    return math.floor(_PARTS * exploration(groups, turn)) / _PARTS


def next_rewards(
    rewards: Sequence[float], shares: Sequence[float], losses: Sequence[float], decay: float
) -> list[float]:
    """Reward estimates after a block. A group without a loss in it (NaN) keeps its own."""
    return [
        decay * reward + loss / (10 * share) if math.isfinite(loss) else reward
        for reward, share, loss in zip(rewards, shares, losses, strict=True)
    ]


def next_shares(rewards: Sequence[float], turn: int) -> list[float]:
    """Shares of the block that follows `turn` finished ones; their sum is 1."""
    groups, before = len(rewards), exploration(len(rewards), turn - 1)
    least, top = exploration(groups, turn), max(rewards)
    odds = [math.exp(before * (reward - top)) for reward in rewards]
    return _rounded([(1 - groups * least) * odd / math.fsum(odds) + least for odd in odds])


def _rounded(shares: Sequence[float]) -> list[float]:
    """Shares in whole 1/10,000, by largest remainder: none falls below its floor."""
    whole = [math.floor(_PARTS * share) for share in shares]
    rest = [_PARTS * share - floor for share, floor in zip(shares, whole, strict=True)]
    for group in sorted(range(len(shares)), key=lambda i: -rest[i])[: _PARTS - sum(whole)]:
        whole[group] += 1
    return [parts / _PARTS for parts in whole]


def known_shares(mixture: Mixture) -> dict[str, list[float]]:
    """Shares of each known block by group; of a phase that has not begun, those of its weights."""
    assert mixture.online is not None
    if mixture.online.shares:
        return mixture.online.shares
    weights = mixture.group_weights
    total = math.fsum(weights.values())
    first = _rounded([weight / total for weight in weights.values()])
    return {name: [share] for name, share in zip(weights, first, strict=True)}


def decides(phase: Phase) -> Online | None:
    """The settings of a phase whose shares are decided while training; None for others."""
    online = phase.mixture.online
    return online if online and online.algorithm == "odm" else None


def with_shares(recipe: Recipe, name: str, **changes: object) -> Recipe:
    """The recipe with other settings of `online` in the phase of that name."""

    def changed(phase: Phase) -> Phase:
        assert phase.mixture.online is not None
        online = phase.mixture.online.model_copy(update=changes)
        mixture = phase.mixture.model_copy(update={"online": online})
        return phase.model_copy(update={"mixture": mixture})

    phases = [changed(phase) if phase.name == name else phase for phase in recipe.phases]
    return recipe.model_copy(update={"phases": phases})
