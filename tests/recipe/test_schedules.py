"""Rates, batch sizes and moving weights against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.recipe.schedules import (
    BatchSizes,
    Weights,
    half_cosine,
    learning_rate,
    schedule_values,
)
from megacode.recipe.schema import BatchRamp, LearningRate, Schedule


@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(1, 60),
    st.integers(0, 120),
)
@settings(max_examples=80, deadline=None)
def test_batch_ramps_have_a_formula(start, stairs, increment, over, step):
    ramp = BatchRamp(start=start, end=start + stairs * increment, increment=increment, over=over)
    sizes = BatchSizes.of(ramp)
    plain = [start + increment * (t * stairs // over) if t < over else ramp.end for t in range(200)]
    assert sizes.at(np.arange(200)).tolist() == plain
    assert int(sizes.before(np.array([step]))[0]) == sum(plain[:step])
    samples = sum(plain[:step]) + 1
    fewest = int(sizes.steps_for(np.array([samples]))[0])
    assert sum(plain[: fewest - 1]) < samples <= sum(plain[:fewest])


def test_half_cosine_is_the_cosine():
    x = np.linspace(0, 1, 1001)
    assert np.abs(half_cosine(x) - (1 - np.cos(np.pi * x)) / 2).max() < 1e-15
    assert half_cosine(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ramps_begin_and_end_exactly_and_stay(shape):
    values = schedule_values(Schedule(shape=shape, start=0.1, end=0.7, over=11), np.arange(30), 11)
    assert values[0] == 0.1 and values[10] == 0.7 and (values[10:] == 0.7).all()
    assert (np.diff(values[:11]) > 0).all() and values[5] == pytest.approx(0.4)


def test_stepwise_holds_equal_parts():
    values = schedule_values(
        Schedule(shape="stepwise", values=[7, 7, 6, 5], over=8), np.arange(10), 8
    )
    assert values.tolist() == [7, 7, 7, 7, 6, 6, 5, 5, 5, 5]


def test_domain_ratios_split_by_the_weights_inside():
    weights = Weights((0.6, 0.3), ((0, 1.0), (0, 3.0), (1, 5.0)), 10).at(np.arange(2))
    assert weights[0] == pytest.approx([0.15, 0.45, 0.3])


def rates(steps=100, **keys):
    rate = LearningRate(**keys)
    return [learning_rate(rate, step, steps) for step in range(steps)]


def test_warm_up_rises_from_start_and_reaches_the_peak_at_its_end():
    line = rates(schedule="linear", peak=1.0, start=0.2, warmup=4, final=0.0, decay_steps=96)
    assert line[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert line[5] == pytest.approx(95 / 96) and line[99] == pytest.approx(1 / 96)


def test_a_decay_longer_than_the_phase_is_cut_and_a_shorter_one_stays_at_final():
    assert rates(schedule="linear", peak=1.0, decay_steps=200)[-1] == pytest.approx(1 - 99 / 200)
    assert rates(schedule="cosine", peak=1.0, final=0.1, decay_steps=50)[50:] == [0.1] * 50


def test_cosine_is_halfway_in_the_middle():
    assert rates(schedule="cosine", peak=1.0, final=0.5, decay_steps=100)[50] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_wsd_holds_and_then_decays(shape, middle):
    line = rates(schedule="wsd", peak=1.0, final=0.0, wsd_decay=0.2, wsd_shape=shape)
    assert line[:81] == [1.0] * 81 and line[90] == pytest.approx(middle) and 0 < line[99] < 0.25


def test_inverse_square_root_follows_its_formula():
    line = rates(schedule="inverse-sqrt", peak=1.0, warmup=4)
    assert line[4] == 1.0 and line[16] == pytest.approx(0.5) and line[64] == pytest.approx(0.25)
    assert rates(schedule="inverse-sqrt", peak=1.0)[0] == 1.0


def test_constant_stays():
    assert rates(schedule="constant", peak=0.3, warmup=2)[2:] == [0.3] * 98
