"""Laws of the quota: what holds for every mixture, every batch size and every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.plan.quota import BITS, CHUNK, ONE, Quota, multiply, normalise
from megacode.recipe.schedules import BatchSizes, Weights
from megacode.recipe.schema import BatchRamp, Schedule

positive = st.floats(1e-6, 1e3)
schedules = st.builds(
    lambda shape, start, end, over: Schedule(shape=shape, start=start, end=end, over=over),
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 5),
    st.floats(0, 5),
    st.integers(1, 300),
) | st.builds(
    lambda values, over: Schedule(shape="stepwise", values=values, over=over),
    st.lists(st.floats(0, 3), min_size=1, max_size=5),
    st.integers(1, 300),
)
ramps = st.builds(
    lambda start, stairs, increment, over: BatchRamp(
        start=start, end=start + stairs * increment, increment=increment, over=over
    ),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 100),
)
batches = st.integers(1, 64) | ramps
constant_mixtures = st.lists(positive, min_size=1, max_size=12)
# The first weight is a constant above zero, so that no step is without a source.
moving_mixtures = st.tuples(positive, st.lists(positive | schedules, max_size=8)).map(
    lambda t: [t[0], *t[1]]
)


def quota(weights, batch, steps=200):
    inner = tuple((number, 1.0) for number in range(len(weights)))
    return Quota(Weights(tuple(weights), inner, steps), BatchSizes.of(batch))


def exact_shares(q, steps):
    """C after every step in units of 2^-40, by Python's whole numbers."""
    total, out = [0] * q.streams, []
    sizes = q.batch.at(np.arange(steps)).tolist()
    for size, row in zip(sizes, q.shares(np.arange(steps)).tolist(), strict=True):
        total = [c + size * w for c, w in zip(total, row, strict=True)]
        out.append(total)
    return out


def assert_laws(q, steps):
    counts = q.range(0, steps)
    assert (np.diff(counts, axis=0) >= 0).all(), "counts never fall"
    sizes = q.batch.at(np.arange(steps))
    assert (np.diff(counts.sum(axis=1)) == sizes).all(), "every step is full"
    for row, shares in zip(counts[1:].tolist(), exact_shares(q, steps), strict=True):
        assert all(abs((n << BITS) - c) < ONE for n, c in zip(row, shares, strict=True)), (
            "within one sample"
        )


@given(constant_mixtures, batches, st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_constant_mixtures_are_within_one_sample_after_every_step(weights, batch, steps):
    assert_laws(quota(weights, batch), steps)


@given(moving_mixtures, batches, st.integers(1, 300))
@settings(max_examples=80, deadline=None)
def test_moving_mixtures_are_within_one_sample_after_every_step(weights, batch, steps):
    assert_laws(quota(weights, batch), steps)


@pytest.mark.parametrize(
    ("weights", "batch"),
    [
        ([1.0], 1),
        ([0.5, 0.5], 1),
        ([1.0, 1e-3, 1e-4], 8),
        ([1e-12, 1.0], 64),
        ([1.0 + 0.37 * n for n in range(100)], 1),
        ([0.0, 1.0, 2.0], 3),
        ([Schedule(shape="linear", start=1.0, end=0.0, over=CHUNK + 50), 0.01, 0.002, 1e-4], 4),
        ([Schedule(shape="stepwise", values=[0, 1, 0, 2], over=3 * CHUNK), 0.3], 2),
        ([Schedule(shape="cosine", start=0.2, end=0.9, over=2 * CHUNK + 1), 0.4], 50),
    ],
)
def test_laws_hold_across_chunk_boundaries(weights, batch):
    assert_laws(quota(weights, batch), 3 * CHUNK + 7)


@given(moving_mixtures, batches, st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_step_can_be_asked_for_first(weights, batch, steps):
    table = quota(weights, batch).range(0, 3 * CHUNK)
    fresh = quota(weights, batch)
    for step in steps:
        assert (fresh.before(step) == table[step]).all()


@given(moving_mixtures, batches, st.integers(1, 100), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_counts_do_not_depend_on_the_length_of_the_phase(weights, batch, steps, more):
    short, long = quota(weights, batch, steps), quota(weights, batch, steps + more)
    assert (short.range(0, steps) == long.range(0, steps + more)[: steps + 1]).all()


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=6), st.integers(30, 90))
@settings(max_examples=30, deadline=None)
def test_the_formula_and_the_walk_agree_where_both_hold(weights, batch):
    by_formula, walked = quota(weights, batch), quota(weights, batch)
    assert by_formula._free(0)
    walked._is_free.update(dict.fromkeys(range(3), False))
    assert (by_formula.range(0, 2 * CHUNK) == walked.range(0, 2 * CHUNK)).all()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=100).filter(lambda w: sum(w) > 1e-300))
@settings(deadline=None)
def test_normalised_weights_sum_to_exactly_one_and_zero_stays_zero(weights):
    shares = normalise(np.array([weights]))[0]
    assert shares.sum() == ONE and (shares >= 0).all()
    assert all(share == 0 for share, weight in zip(shares, weights, strict=True) if weight == 0)
    assert np.abs(shares / ONE - np.array(weights) / sum(weights)).max() <= 2**-39


@given(st.integers(0, 2**42 - 1), st.integers(0, ONE))
def test_multiply_is_exact(samples, share):
    whole, fraction = multiply(np.array([samples]), np.array([share]))
    assert (int(whole[0]) << BITS) + int(fraction[0]) == samples * share


def test_a_ramp_and_its_mirror_take_the_same_total():
    up = quota(
        [
            Schedule(shape="linear", start=0.2, end=0.8),
            Schedule(shape="linear", start=0.8, end=0.2),
        ],
        100,
        501,
    )
    assert abs(int(np.diff(up.before(501))[0])) <= 1


def test_billions_of_samples_cost_nothing_to_open():
    q = quota([0.7, 0.2, 0.1], 4096)
    counts = q.before(10**9)
    assert counts.sum() == 4096 * 10**9
    assert not q._tables and not q._counts
