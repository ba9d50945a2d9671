"""Intervals against published tables, exact cases, and their coverage in simulated studies."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megacode.evaluate.statistics import (
    bootstrap,
    bootstrap_difference,
    holm,
    mean_interval,
    slope,
    t_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "expected"),  # any table of Student's t, two-sided 95 %
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (10, 2.228),
        (30, 2.042),
        (120, 1.980),
        (math.inf, 1.960),
    ],
)
def test_t_quantiles_are_the_tables(freedom: float, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_t_of_broken_degrees_lies_between_its_neighbours() -> None:
    assert t_quantile(3) < t_quantile(2.5) < t_quantile(2)


def test_mean_interval_of_students_sleep_data() -> None:
    # Student (1908), R's t.test(extra ~ group, sleep, paired = TRUE).
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    interval = mean_interval(gained)
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (1.58, 0.7001142, 2.4598858), abs=1e-6
    )
    assert interval.seeds == 10


def test_one_seed_has_no_interval() -> None:
    interval = mean_interval([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_slope_of_one_block_is_ordinary_least_squares() -> None:
    # The first ten of R's `cars`; numpy's least squares and a table's t for 8 degrees of freedom.
    x = np.array([4, 4, 7, 7, 8, 9, 10, 10, 10, 11.0])
    y = np.array([2, 10, 4, 22, 16, 10, 18, 26, 34, 17.0])
    result = slope(x, y, np.zeros(10))
    design = np.stack([np.ones(10), x], 1)
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(residual[0] / 8 * np.linalg.inv(design.T @ design)[1, 1])
    assert result.mean == pytest.approx(solution[1])
    assert (result.high - result.low) / 2 == pytest.approx(2.306004 * error, rel=1e-5)


def test_seeds_are_blocks_of_a_slope() -> None:
    x = np.tile([0, 0.5, 1.0], 3)
    seeds = np.repeat([1, 2, 3], 3)
    noise = np.tile([0.01, -0.02, 0.01], 3)
    plain = slope(x, 2 * x + noise, seeds)
    shifted = slope(x, 2 * x + noise + 100 * seeds, seeds)
    assert shifted.mean == pytest.approx(plain.mean)
    assert shifted.high == pytest.approx(plain.high)
    assert plain.mean == pytest.approx(2)
    assert plain.p is not None
    assert plain.p < 1e-6
    with pytest.raises(ValueError, match="the same"):
        slope(np.ones(4), np.arange(4), np.array([0, 0, 1, 1]))


def test_holm_is_rs_p_adjust() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def _coverage(study, truth: float = 0.0, trials: int = 300) -> float:
    hits = 0
    for trial in range(trials):
        interval = study(np.random.default_rng(trial))
        hits += interval.low <= truth <= interval.high
    return hits / trials


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_item", "by_pair"),
    [(3, 1.0, 0.0, 0.1), (3, 0.1, 1.0, 1.0), (5, 0.2, 1.0, 0.0), (3, 0.0, 1.0, 0.0)],
    ids=["seeds", "items and pairs", "both", "items"],
)
def test_crossed_bootstrap_covers(
    seeds: int, by_seed: float, by_item: float, by_pair: float
) -> None:
    def study(random):
        scores = (
            by_seed * random.normal(size=(seeds, 1))
            + by_item * random.normal(size=(1, 60))
            + by_pair * random.normal(size=(seeds, 60))
        )
        return bootstrap(list(scores), draws=400)

    assert 0.92 <= _coverage(study) <= 0.995


def test_clusters_widen_the_interval_as_far_as_needed() -> None:
    clusters = np.repeat(np.arange(15), 6)

    def study(random, known=True):
        scores = np.repeat(random.normal(size=15), 6) + 0.3 * random.normal(size=(3, 90))
        return bootstrap(list(scores), clusters if known else None, draws=400)

    assert _coverage(study) >= 0.92
    assert _coverage(lambda random: study(random, known=False)) < 0.8


def test_difference_pairs_seeds_and_items() -> None:
    def arms(random, gain=0.0):
        hard = random.normal(size=(1, 80)) + random.normal(size=(4, 1))
        return [list(hard + g + 0.2 * random.normal(size=(4, 80))) for g in (gain, 0.0)]

    result = bootstrap_difference(*arms(np.random.default_rng(0), gain=0.2))
    assert result.p is not None
    assert result.p < 0.01
    assert result.low > 0.1
    assert result.high < 0.3
    assert _coverage(lambda random: bootstrap_difference(*arms(random), draws=400)) >= 0.92
    # Pairing matters: shuffled items of one arm are no difference that anybody sees.
    a, b = arms(np.random.default_rng(0), gain=0.2)
    unpaired = bootstrap_difference(a, [np.random.default_rng(1).permutation(row) for row in b])
    assert unpaired.high - unpaired.low > 3 * (result.high - result.low)


def test_one_seed_gives_an_interval_over_items() -> None:
    scores = np.random.default_rng(0).normal(size=400)
    result = bootstrap([scores])
    half = 1.966 * scores.std() / 20
    assert result.seeds == 1
    assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.03)


def test_the_interval_of_a_share_ends_at_0_and_1() -> None:
    scores = [np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0])]
    free, ended = bootstrap(scores), bootstrap(scores, shares=True)
    assert free.high > 1 and ended == replace(free, low=max(free.low, 0.0), high=1.0)


def test_the_same_call_gives_the_same_interval() -> None:
    scores = list(np.random.default_rng(0).normal(size=(3, 50)))
    assert bootstrap(scores) == bootstrap(scores)


def test_equal_scores_have_no_width() -> None:
    result = bootstrap_difference([np.ones(5)] * 3, [np.ones(5)] * 3)
    assert (result.mean, result.low, result.high, result.p) == (0, 0, 0, 1.0)


def test_items_must_match() -> None:
    with pytest.raises(ValueError, match="same items"):
        bootstrap([np.ones(3), np.ones(4)])
    with pytest.raises(ValueError, match="one cluster"):
        bootstrap([np.ones(3)], np.zeros(2))
