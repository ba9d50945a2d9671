"""Shares decided while training: counts never depend on later blocks, and the plan's bounds hold whatever the losses are."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.plan import Plan, make_plan
from megacode.plan.quota import BlockQuota
from megacode.plan.trajectory import next_boundary
from megacode.recipe.online import known_shares, next_rewards, next_shares, with_shares
from megacode.recipe.schedules import BatchSizes, Weights
from megacode.recipe.schema import BatchRamp, Recipe, Schedule

TOKENS = {"a": 40_000, "b": 30_000, "rare": 9_000, "c": 20_000}


def recipe_of(**online: object) -> Recipe:
    usual = {
        "batch_size": {"start": 4, "end": 12, "increment": 4, "over": 40},
        "sequence_length": 16,
        "learning_rate": {"schedule": "constant", "peak": 1e-3},
    }
    domains = {"x": 0.5, "y": {"ratio": 0.3, "sources": {"b": 0.97, "rare": 0.03}}, "z": 0.2}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"layers": 1, "hidden_size": 8, "heads": 1, "vocab_size": 10},
            "sources": {
                "a": {"domain": "x"}, "b": {"domain": "y"}, "rare": {"domain": "y"}, "c": {"domain": "z"},
            },
            "phases": [
                {"name": "one", "steps": 61, "mixture": {"domains": domains, "online": online}, **usual},
                {"name": "two", "steps": 9, "mixture": {"sources": {"b": 1, "c": 1}}, **usual},
            ],
        }
    )  # fmt: skip


def decided(plan: Plan, losses: np.random.Generator | None, stop: int = 70) -> list[Plan]:
    """The plans of a run, one a block; without `losses` the largest is always the first domain's."""
    plans, rewards, done = [plan], [0.0] * 3, 0
    while (done := next_boundary(plan, done)) < min(stop, plan.phases[0].end):
        online = plan.recipe.phases[0].mixture.online
        known = known_shares(plan.recipe.phases[0].mixture)
        now, turn = [shares[-1] for shares in known.values()], done // online.every
        chosen = now
        if done > online.warmup:
            found = losses.exponential(5, 3) if losses else np.array([1e4, 0.1, 0.1])
            rewards = next_rewards(rewards, now, found.tolist(), online.decay)
            chosen = next_shares(rewards, turn)
        rows = {n: [*s, new] for (n, s), new in zip(known.items(), chosen, strict=True)}
        plan = plan.again(with_shares(plan.recipe, "one", shares=rows))
        plans.append(plan)
    return plans


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_decision_changes_nothing_before_it(every: int) -> None:
    """Also where shares are below one sample a step, and the batch size grows."""
    plans = decided(make_plan(recipe_of(every=every, warmup=5), TOKENS), np.random.default_rng(0))
    done = 0
    for old, new in pairwise(plans):
        done = next_boundary(old, done)
        counts = [plan.phases[0].counts_range(0, done) for plan in (old, new)]
        assert np.array_equal(*counts)
        assert differences(fingerprint(old, done), fingerprint(new, done)) == []
        singly = [new.phases[0].counts_before(step) for step in range(done + 1)]
        assert np.array_equal(counts[1], singly)
    assert len(plans) == -(-61 // every)


def deviations(plan: Plan) -> np.ndarray:
    """[steps, streams]: samples taken less what was due, after every step of the first phase."""
    phase = plan.phases[0]
    sizes = np.array([phase.batch_size(step) for step in range(61)])
    due = np.cumsum(sizes[:, None] * phase.weights_at(np.arange(61)), axis=0)
    counts = phase.counts_range(0, 61)
    assert (np.diff(counts, axis=0) >= 0).all() and (np.diff(counts.sum(axis=1)) == sizes).all()
    return counts[1:] - due


@pytest.mark.parametrize("seed", range(5))
def test_counts_follow_the_shares_over_the_whole_phase(seed: int) -> None:
    """`rare` is due a fifth of a sample in the first blocks."""
    plan = decided(make_plan(recipe_of(every=5), TOKENS), np.random.default_rng(seed))[-1]
    off = deviations(plan)
    assert (off < 2).all() and (off > -5).all()
    ends = off[4::5]
    assert (ends < 1).all() and (ends > -4).all()


def test_a_share_that_is_no_whole_number_of_a_block_is_read_all_the_same() -> None:
    """Blocks of 8 samples and a share of 0.53: 4.24 samples each."""
    shares = {"x": [0.53] * 50, "y": [0.27] * 50, "z": [0.2] * 50}
    recipe = recipe_of(every=2, shares=shares)
    constant = recipe.phases[0].model_copy(update={"batch_size": 4})
    plan = make_plan(recipe.model_copy(update={"phases": [constant]}), TOKENS)
    assert plan.phases[0].counts_before(60).tolist()[0] in (127, 128)


@given(
    st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.integers(1, 9), st.integers(0, 30), st.integers(0, 30), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_piece_of_a_phase_has_the_whole_s_counts(
    rows: list[list[float]], every: int, first: int, length: int, ramp: bool
) -> None:
    """A fork may begin inside a block."""
    size = BatchRamp(start=2, end=8, increment=2, over=20) if ramp else 5
    ratios = tuple(
        Schedule(shape="stepwise", values=list(column), over=len(rows) * every)
        for column in zip(*rows, strict=True)
    )
    weights = Weights(ratios, tuple((i, 1.0) for i in range(3)), 100)
    whole = BlockQuota(weights, BatchSizes.of(size), every=every)
    piece = BlockQuota(weights, BatchSizes.of(size), first, every=every)
    expected = whole.range(first, first + length) - whole.before(first)
    assert np.array_equal(piece.range(0, length), expected)
    assert np.array_equal(piece.range(length, length + 3)[0], piece.before(length))


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_bounds_hold_and_narrow_down_to_what_was_read(
    seed: int | None, decay: float, warmup: int
) -> None:
    losses = None if seed is None else np.random.default_rng(seed)
    plans = decided(make_plan(recipe_of(every=4, warmup=warmup, decay=decay), TOKENS), losses)
    final = [stream.samples for stream in plans[-1].phases[0].streams]
    low, high = np.zeros(4), np.full(4, np.inf)
    for plan in plans:
        bounds = np.array([stream.bounds for stream in plan.phases[0].streams])
        assert (bounds[:, 0] <= final).all() and (final <= bounds[:, 1]).all()
        assert (bounds[:, 0] >= low).all() and (bounds[:, 1] <= high).all(), "never wider again"
        low, high = bounds.T
    assert np.array_equal(low, final) and np.array_equal(high, final)


def test_later_phases_go_on_where_the_decided_shares_have_led() -> None:
    plans = decided(make_plan(recipe_of(every=4), TOKENS), None)
    streams = {stream.source: stream for stream in plans[-1].phases[1].streams}
    assert streams["b"].cursor == plans[-1].phases[0].streams[1].samples * 16
    assert streams["b"].cursor != plans[0].phases[1].streams[0].cursor


def test_max_epochs_is_checked_against_what_could_be_read() -> None:
    most = make_plan(recipe_of(every=4), TOKENS).phases[0].streams[2]
    capped = recipe_of(every=4)
    text = capped.model_dump(exclude_none=True)
    for cap, fits in (
        (most.most_after / most.epoch_tokens, True),
        (most.most_after / most.epoch_tokens * 0.999, False),
    ):
        text["phases"][0]["mixture"]["domains"]["y"]["sources"]["rare"]["max_epochs"] = cap
        if fits:
            make_plan(Recipe.model_validate(text), TOKENS)
        else:
            with pytest.raises(
                UserError, match=r"rare can be read up to .* decided while training"
            ):
                make_plan(Recipe.model_validate(text), TOKENS)


def test_the_block_that_is_known_ends_at_a_boundary_or_the_phase() -> None:
    plan = make_plan(recipe_of(every=10), TOKENS)
    assert [next_boundary(plan, done) for done in (0, 9, 10, 59, 60, 61, 69)] == [
        10, 10, 20, 60, 61, 70, 70,
    ]  # fmt: skip
