"""Laws of the data order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.mixture import OpenMixture, StepSamples
from megacode.errors import UserError
from tests.data.conftest import mixture_of

Make = Callable[..., OpenMixture]
MIXED = {"mixture": {"sources": {"a": 0.6, "b": 0.3, "c": 0.1}}}


def read(mixture: OpenMixture, steps: range) -> list[tuple[str, int, int]]:
    """(source, epoch, start) in order."""
    return [one for step in steps for one in named(mixture.step(step))]


def named(samples: StepSamples) -> list[tuple[str, int, int]]:
    names = [stream.label for stream in samples.phase.streams]
    columns = (samples.stream.tolist(), samples.epoch.tolist(), samples.start.tolist())
    return [(names[stream], epoch, start) for stream, epoch, start in zip(*columns, strict=True)]


@pytest.mark.parametrize("window", [None, 16, 32, 48])
def test_within_an_epoch_every_sample_once(
    make_mixture: Make, corpora: dict[str, Any], window: int | None
) -> None:
    mixture = make_mixture([{"steps": 60, **MIXED}])
    if window is not None:
        recipe = mixture.plan.recipe
        sources = {
            name: source.model_copy(update={"window": window})
            for name, source in recipe.sources.items()
        }
        mixture = mixture_of(recipe.model_copy(update={"sources": sources}))
    seen = Counter(read(mixture, range(60)))
    assert max(seen.values()) == 1
    for stream in mixture.plan.phases[0].streams:
        whole = set(range(0, stream.windows * stream.window, 16))
        for epoch in range(stream.samples * 16 // (stream.windows * stream.window)):
            assert {
                start for name, e, start in seen if (name, e) == (stream.source, epoch)
            } == whole


def test_counts_are_the_plans(make_mixture: Make) -> None:
    mixture = make_mixture([{"steps": 30, **MIXED}])
    for step in range(30):
        found = np.bincount(mixture.step(step).stream, minlength=3)
        assert found.tolist() == mixture.plan.phases[0].counts(step).tolist()


def test_any_step_can_be_asked_for_first_and_again(make_mixture: Make) -> None:
    phases = [{"steps": 20, **MIXED}, {"steps": 20, "mixture": {"sources": {"b": 1, "a": 1}}}]
    forwards = [named(make_mixture(phases).step(step)) for step in range(40)]
    mixture = make_mixture(phases)
    backwards = [named(mixture.step(step)) for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert named(mixture.step(7)) == forwards[7]


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 29), data=st.data())
def test_a_share_is_the_same_part_of_the_whole(
    make_mixture: Make, step: int, data: st.DataObject
) -> None:
    mixture = make_mixture([{"steps": 30, **MIXED}])
    places = data.draw(st.lists(st.integers(0, 7), max_size=12))
    whole = named(mixture.step(step))
    assert named(mixture.step(step, np.array(places, dtype=np.int64))) == [
        whole[place] for place in places
    ]
    assert named(mixture.step(step).take(slice(3, None))) == whole[3:]


def test_another_seed_is_another_order_of_the_same_samples(make_mixture: Make) -> None:
    phases = [{"steps": 23, "mixture": {"sources": {"a": 1}}}]  # 184 of the epoch's 187 samples
    orders = [read(make_mixture(phases, seed=seed), range(23)) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert sum(x == y for x, y in zip(orders[0], orders[1], strict=True)) <= 9
    assert len(set(orders[0]) & set(orders[1])) >= 181


def test_every_epoch_has_its_own_order(make_mixture: Make) -> None:
    mixture = make_mixture([{"steps": 60, "batch_size": 1, "mixture": {"sources": {"b": 1}}}] * 4)
    starts = [start for _, _, start in read(mixture, range(240))]
    per_epoch = mixture.plan.phases[0].streams[0].windows
    first, second = starts[:per_epoch], starts[per_epoch : 2 * per_epoch]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    "change", ["longer", "another phase", "another source later", "more streams unread"]
)
def test_extending_a_run_leaves_its_past(make_mixture: Make, change: str) -> None:
    first = {"steps": 20, **MIXED}
    later: list[dict[str, Any]] = [first]
    if change == "longer":
        later = [{**first, "steps": 55}]
    elif change == "another phase":
        later = [first, {"steps": 9, "mixture": {"sources": {"c": 1}}, "batch_size": 4}]
    elif change == "another source later":
        later = [
            first,
            {"steps": 9, "mixture": {"sources": {"b": 1, "c": 3}}, "sequence_length": 8},
        ]
    elif change == "more streams unread":
        more = {"sources": {**MIXED["mixture"]["sources"], "a": {"weight": 0.6}}}
        later = [{**first, "mixture": more}]
    assert read(make_mixture(later), range(20)) == read(make_mixture([first]), range(20))


def test_a_cursor_goes_on_from_phase_to_phase(make_mixture: Make) -> None:
    """23 + 23 steps in two phases read what one phase of 46 reads; a restart reads its start again."""
    one = make_mixture([{"steps": 16, "mixture": {"sources": {"a": 1}}}])
    two = make_mixture(
        [
            {"steps": 7, "mixture": {"sources": {"a": 1}}},
            {"steps": 9, "mixture": {"sources": {"a": 1}}},
        ]
    )
    assert read(one, range(16)) == read(two, range(16))
    assert max(Counter(read(two, range(16))).values()) == 1
    phases = [{"steps": 7, **MIXED}, {"steps": 7, "cursor": "restart", **MIXED}]
    again = read(make_mixture(phases), range(14))
    assert Counter(again[:56]) == Counter(again[56:])


def test_phases_of_other_lengths_read_on_without_repeating(make_mixture: Make) -> None:
    """16 tokens a sample, then 8, then 16: a window that was read in part is left, and no token is read twice."""
    one = {"mixture": {"sources": {"a": 1}}}
    mixture = make_mixture(
        [
            {"steps": 5, **one},
            {"steps": 5, "batch_size": 3, "sequence_length": 8, **one},
            {"steps": 10, **one},
        ]
    )
    seen: Counter[int] = Counter()
    for step in range(20):
        samples = mixture.step(step)
        for start in samples.start.tolist():
            seen.update(range(start, start + samples.phase.sequence_length))
    assert max(seen.values()) == 1


def test_subsets_stay_in_their_part_and_have_cursors_of_their_own(make_mixture: Make) -> None:
    part = {"sources": {"a": {"weight": 1, "subset": "0.0-0.1"}}}
    mixture = make_mixture(
        [{"steps": 5, "mixture": {"sources": {"a": 1}}}, {"steps": 9, "mixture": part}]
    )
    stream = mixture.plan.phases[1].streams[0]
    starts = [start for _, _, start in read(mixture, range(5, 14))]
    assert stream.cursor == 0 and stream.windows == 18
    assert set(starts) == set(range(0, 18 * 16, 16))


def test_micro_batches_see_the_mixture(make_mixture: Make) -> None:
    """The order inside a step is shuffled: over 200 steps every place sees stream a about as often."""
    mixture = make_mixture([{"steps": 200, "mixture": {"sources": {"a": 0.5, "b": 0.5}}}])
    at = np.array([mixture.step(step).stream for step in range(200)])
    assert (np.abs(at.mean(axis=0) - 0.5) < 0.18).all()
    assert (at.sum(axis=1) == 4).all()


def test_documents_of_a_step_can_be_named(make_mixture: Make) -> None:
    mixture = make_mixture([{"steps": 5, **MIXED}])
    for origin in mixture.describe(3):
        source = mixture.sources[origin.stream.source]
        tokens = source.read(np.array([origin.start]), origin.tokens)[0]
        base = {"a": 0, "b": 100_000, "c": 5_000}[origin.stream.source]
        assert tokens[0] - base == origin.start
        documents = [part.document for part in origin.parts]
        first, last = documents[0], documents[-1]
        assert first.start <= origin.start < first.start + first.tokens
        assert last.start < origin.start + origin.tokens <= last.start + last.tokens
        assert all(x.start + x.tokens == y.start for x, y in itertools.pairwise(documents))


def test_a_step_or_place_outside_is_an_error(make_mixture: Make) -> None:
    mixture = make_mixture([{"steps": 5, **MIXED}])
    for step in (-1, 5):
        with pytest.raises(IndexError, match="outside the run's 5 steps"):
            mixture.step(step)
    with pytest.raises(IndexError, match="batch of 8"):
        mixture.step(0, [8])


def test_data_that_changed_since_the_plan_is_one_sentence(make_mixture: Make) -> None:
    mixture = make_mixture([{"steps": 5, **MIXED}])
    phase = mixture.plan.phases[0]
    promised = replace(phase.streams[0], windows=phase.streams[0].windows + 1)
    plan = replace(mixture.plan, phases=(replace(phase, streams=(promised, *phase.streams[1:])),))
    with pytest.raises(UserError, match=r"sources\.a: has 3,000 tokens where the plan reads 3,009"):
        OpenMixture(plan, mixture.sources)
