"""The fewest and the most samples of each stream, where shares are decided while training.

ODM's shares are at least `least_share` in every block, whatever the losses are, so a group's share
is at most what the others leave. `BlockQuota` says how far counts are from shares.
"""

from __future__ import annotations

import math

import numpy as np

from megacode.plan.quota import BlockQuota
from megacode.recipe.online import least_share
from megacode.recipe.schedules import Weights
from megacode.recipe.schema import Phase, Schedule

_MARGIN = 1e-9
"""Shares of the quota differ from these numbers by less."""


def sample_bounds(
    phase: Phase, weights: Weights, quota: BlockQuota, steps: int
) -> list[tuple[int, int]]:
    """(fewest, most) samples of each stream over the `steps` of a phase.

    What is known of it (`online.shares`) is exact: both are equal at the end of such a phase.

    Args:
        weights: of the mixture, whose schedules are those of `known_shares`.
    """
    online = phase.mixture.online
    assert online is not None
    first, _ = phase.placed("mixture", steps)
    known = min(max(weights.settled - first, 0), steps)
    done = quota.before(known)
    if known == steps:
        return [(count, count) for count in done.tolist()]
    # Blocks of the mixture, which began `first` steps before the phase.
    blocks = np.arange((first + known) // online.every, -(-(first + steps) // online.every))
    edges = (np.append(blocks, blocks[-1:] + 1) * online.every - first).clip(known, steps)
    sizes = np.diff(quota.batch.before(edges))
    last = np.array([s.values[-1] for s in weights.ratios if isinstance(s, Schedule) and s.values])
    groups = [group for group, _ in weights.inner]
    inner = weights.at(np.array([weights.settled]))[0] / last[groups]
    floor = np.array([least_share(len(last), block) for block in blocks.tolist()])
    decided = (blocks * online.every > online.warmup)[:, None]
    low = np.where(decided, floor[:, None], last)[:, groups] * inner
    high = np.where(decided, 1 - (len(last) - 1) * floor[:, None], last)[:, groups] * inner
    due, size = done + quota.owed, sizes[:, None]
    fewest = due + (size * low).sum(axis=0) * (1 - _MARGIN) - len(groups) - 1
    most = due + (size * high).sum(axis=0) * (1 + _MARGIN) + 2
    return [
        (max(math.floor(least), taken), math.ceil(greatest))
        for least, greatest, taken in zip(fewest, most, done.tolist(), strict=True)
    ]
