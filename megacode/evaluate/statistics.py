"""Intervals over seeds and items: 95 %, two-sided.

A study has S runs that differ in their seeds, each scored on the same n items. Seeds and items are
*crossed*: both are samples of what the claim is about, and an item that is hard is hard for every
seed. The bootstrap here is the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1,
386): seeds and items are each drawn with replacement, independently, and all drawn seeds have the
same drawn items. Items drawn anew for every seed would treat an item's difficulty as S independent
draws; the intervals would be too short by up to √S. The pigeonhole bootstrap errs to the safe side:
it counts noise of a pair of seed and item up to three times.

Percentiles of so few seeds are too short (of three seeds, 95 % becomes 75 %). So the interval is
mean ± t × standard deviation of the draws, with the degrees of freedom of Satterthwaite (1946):
S - 1 where seeds make all the difference, n - 1 where items do. Deviations between drawn seeds are
scaled by √(S / (S - 1)), which makes their variance unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95
_CHUNK = 2_000_000
"""Drawn counts in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        low, high: NaN where there is nothing to estimate them from.
        seeds: runs that it is made of.
        p: two-sided, of a mean of 0; None where 0 is no hypothesis.
    """

    mean: float
    low: float
    high: float
    seeds: int
    p: float | None = None


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one number a seed, by Student's t. One seed has no interval.

    Raises:
        ValueError: there are no values.
    """
    count = len(values)
    if not count:
        raise ValueError("mean_interval: no values")
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return _interval(float(np.mean(values)), error, count - 1, count)


def bootstrap(
    items: Sequence[NDArray[Any]],
    clusters: NDArray[Any] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    shares: bool = False,
) -> Interval:
    """The mean score over seeds and items. With one seed the interval is over items only.

    Args:
        items: a seed's scores each, [n]; item i is the same in all of them.
        clusters: [n], the template or file that each item is from; items of one are drawn together.
        shares: scores are from 0 to 1, and the interval ends there.

    Raises:
        ValueError: there are no items, or seeds differ in how many they have.
    """
    mean, error, freedom = _crossed(items, clusters, draws, seed)
    found = _interval(mean, error, freedom, len(items))
    if shares and not math.isnan(found.low):
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return found


def bootstrap_difference(
    a: Sequence[NDArray[Any]],
    b: Sequence[NDArray[Any]],
    clusters: NDArray[Any] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of a - b, as `bootstrap`: seeds are paired by their place, items between the arms.

    Raises:
        ValueError: the arms differ in seeds or items.
    """
    pairs = [np.asarray(x, float) - np.asarray(y, float) for x, y in zip(a, b, strict=True)]
    mean, error, freedom = _crossed(pairs, clusters, draws, seed)
    return _interval(mean, error, freedom, len(pairs), test=True)


def slope(x: NDArray[Any], y: NDArray[Any], seeds: NDArray[Any]) -> Interval:
    """The slope of y on x by least squares, with an intercept for each seed (seeds are blocks), by
    Student's t with N - S - 1 degrees of freedom. A bend in y counts as noise.

    Args:
        x, y, seeds: [N], a run each.

    Raises:
        ValueError: they differ in length, or x is the same in all runs of every seed.
    """
    x, y, seeds = np.asarray(x, float), np.asarray(y, float), np.asarray(seeds)
    if not len(x) == len(y) == len(seeds):
        raise ValueError("slope: x, y and seeds differ in length")
    names, block = np.unique(seeds, return_inverse=True)
    sizes = np.bincount(block)
    x, y = (v - (np.bincount(block, weights=v) / sizes)[block] for v in (x, y))
    spread = float(x @ x)
    if spread == 0:
        raise ValueError("slope: x is the same in all runs of every seed")
    value, freedom = float(x @ y) / spread, len(x) - len(names) - 1
    residual = y - value * x
    error = math.sqrt(float(residual @ residual) / freedom / spread) if freedom > 0 else math.nan
    return _interval(value, error, freedom, len(names), test=True)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for being many (Holm 1979), in the order given."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        adjusted[index] = least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
    return adjusted


def _crossed(
    items: Sequence[NDArray[Any]], clusters: NDArray[Any] | None, draws: int, seed: int
) -> tuple[float, float, float]:
    """(mean, standard error, degrees of freedom) over seeds and clusters of items."""
    if not items or not len(items[0]) or len({len(scores) for scores in items}) > 1:
        raise ValueError("bootstrap: every seed needs scores of the same items, one at least")
    scores = np.asarray(items, float)
    count = len(scores)
    groups = np.arange(scores.shape[1]) if clusters is None else np.asarray(clusters)
    if len(groups) != scores.shape[1]:
        raise ValueError("bootstrap: one cluster for each item")
    group = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(group)
    sums = np.array([np.bincount(group, weights=row) for row in scores])
    generator = np.random.default_rng(seed)
    chunk = max(_CHUNK // len(sizes), 1)
    means = []
    for first in range(0, draws, chunk):
        many = min(chunk, draws - first)
        shares = generator.multinomial(count, [1 / count] * count, many) / count
        if count > 1:
            shares = 1 / count + math.sqrt(count / (count - 1)) * (shares - 1 / count)
        drawn = generator.multinomial(len(sizes), [1 / len(sizes)] * len(sizes), many)
        means.append(((drawn @ sums.T) * shares).sum(1) / (drawn @ sizes))
    variance = float(np.concatenate(means).var())
    by_seed = float(scores.mean(1).var(ddof=1)) / count if count > 1 else 0.0
    parts = [(by_seed, count - 1), (max(variance - by_seed, 0.0), len(sizes) - 1)]
    spread = sum(part**2 / freedom for part, freedom in parts if freedom > 0)
    if len(sizes) == 1 and count == 1:
        return float(scores.mean()), math.nan, 0
    freedom = variance**2 / spread if spread else math.inf
    return float(scores.mean()), math.sqrt(variance), freedom


def _interval(
    mean: float, error: float, freedom: float, seeds: int, test: bool = False
) -> Interval:
    if math.isnan(error):
        return Interval(mean, math.nan, math.nan, seeds)
    half = t_quantile(freedom) * error
    p = None
    if test:
        p = 1 - _within(abs(mean) / error, freedom) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, seeds, p)


def t_quantile(freedom: float, level: float = _LEVEL) -> float:
    """The t with Student's |T| <= t of probability `level`; 4.30 for two degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(t: float, freedom: float) -> float:
    """P(|T| <= t): the regularized incomplete beta function at t² / (freedom + t²), integrated in
    the angle atan(t / √freedom), where the density is cos(angle)^(freedom - 1)."""
    if freedom > 1e6:
        return math.erf(t / math.sqrt(2))
    if math.isinf(t):
        return 1.0
    nodes, weights = _LEGENDRE
    angle = math.atan(t / math.sqrt(freedom))
    half = angle / 2
    area = half * float(weights @ np.cos(half * (nodes + 1)) ** (freedom - 1))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(log_scale) * area)


_LEGENDRE = np.polynomial.legendre.leggauss(200)
