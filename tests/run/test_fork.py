"""A fork's recipe: the shared past is the old run's in every batch and rate, and so is what follows where nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.run.fork import cooled, fork, split

TOKENS = {"python": 4_000_000, "docs": 2_000_000, "rare": 100_000}
# Shares below one sample a step (rare), ratios and batches that move, rates with a length of their own and without.
RECIPE = """\
name: old
seed: 7
model: {layers: 2, hidden_size: 32, heads: 2, vocab_size: 300}
sources:
  python: {path: p, domain: code, tokens: 4M, window: 32}
  docs: {path: d, domain: text, tokens: 2M, window: 32}
  rare: {path: r, domain: text, tokens: 100k, window: 32}
phases:
  - name: one
    steps: 30
    batch_size: 8
    sequence_length: 16
    mixture: {sources: {docs: 0.7, python: 0.3}}
    learning_rate: {peak: 1e-3, warmup: 10}
  - name: two
    steps: 3000
    batch_size: {start: 4, end: 16, increment: 4, over: 1500}
    sequence_length: 16
    cursor: restart
    optimizer_state: fresh
    mixture:
      domains:
        code: {ratio: {shape: linear, start: 0.1, end: 0.9}, fim_rate: 0}
        text: {ratio: {shape: cosine, start: 0.9, end: 0.1, over: 2000}, sources: {docs: 0.99, rare: 0.01}}
    learning_rate: {schedule: wsd, peak: 1e-3, final: 1e-5, warmup: 200, wsd_decay: 0.5}
  - name: three
    tokens: 20k
    batch_size: 8
    sequence_length: 32
    mixture: {sources: {python: 0.9, rare: 0.1}}
    learning_rate: {schedule: constant, peak: 1e-4}
checkpoints: {every: 100}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def plan_of(path: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(path, overrides), TOKENS)


def forked(recipe: Path, step: int, *overrides: str, name: str = "fork.yaml") -> Plan:
    """The plan of the fork as a new process would read it."""
    path = recipe.with_name(name)
    path.write_text(dump_recipe(split(plan_of(recipe), plan_of(recipe, *overrides), step)))
    return plan_of(path)


def facts(plan: Plan, start: int, stop: int) -> list[object]:
    """All that decides steps: rate, batch size, and for each stream where its samples begin and how many there are."""
    out: list[object] = []
    for step in range(start, stop):
        phase = plan.phase_at(step)
        taken, counts = phase.counts_before(step), phase.counts(step)
        streams = [
            (s.label, s.cursor + int(before) * phase.sequence_length, int(count), s.fim_rate)
            for s, before, count in zip(phase.streams, taken, counts, strict=True)
        ]
        weights = phase.weights(step).tolist()
        assert phase.batch_size(step) == counts.sum()
        out.append(
            (
                phase.learning_rate(step),
                phase.batch_size(step),
                phase.fresh_optimizer and step == phase.first_step,
                weights,
                streams,
            )
        )
    return out


NOTHING = "phases.two.checkpoint_every=7"  # makes a split, and changes no step


@pytest.mark.parametrize("step", [31, 200, 1040, 2500, 3029])
def test_a_split_that_changes_nothing_changes_no_step(recipe: Path, step: int) -> None:
    old, new = plan_of(recipe), forked(recipe, step, NOTHING)
    assert [phase.name for phase in new.phases] == ["one", "two", "two-fork", "three"]
    assert new.phases[1].steps + new.phases[2].steps == old.phases[1].steps
    assert facts(new, 0, new.total_steps) == facts(old, 0, old.total_steps)
    for done in (step, 30, 10):
        assert differences(fingerprint(old, done), fingerprint(new, done)) == []


def test_forks_of_forks_change_no_step(recipe: Path) -> None:
    forked(recipe, 500, NOTHING, name="first.yaml")
    new = forked(recipe.with_name("first.yaml"), 1700, "phases.two-fork.checkpoint_every=9")
    assert [phase.name for phase in new.phases] == ["one", "two", "two-fork", "two-fork2", "three"]
    old = plan_of(recipe)
    assert facts(new, 0, new.total_steps) == facts(old, 0, old.total_steps)


def test_what_is_changed_begins_anew_and_the_rest_goes_on(recipe: Path) -> None:
    old, step = plan_of(recipe), 1030
    new = forked(recipe, step, "phases.two.learning_rate.peak=5e-4")
    assert facts(new, 0, step) == facts(old, 0, step)
    assert [f[1:] for f in facts(new, step, new.total_steps)] == [
        f[1:] for f in facts(old, step, old.total_steps)
    ]
    assert [new.learning_rate(step + t) for t in (0, 200)] == [0.0, 5e-4], (
        "warm-up and peak, from the split on"
    )

    new = forked(
        recipe, step, "phases.two.mixture.domains.code.ratio={shape: linear, start: 0.5, end: 1.0}"
    )
    assert facts(new, 0, step) == facts(old, 0, step)
    for t in (step, 2000, 3029):
        assert new.learning_rate(t) == old.learning_rate(t)
        assert new.phase_at(t).batch_size(t) == old.phase_at(t).batch_size(t)
    piece = new.phases[2]
    assert piece.weights(step)[0] == pytest.approx(0.5 / 1.4) and piece.weights(3029)[
        0
    ] == pytest.approx(1.0 / 1.1)
    # Within one sample of its share after every step, counted from the split.
    due = np.cumsum(
        [piece.weights(t) * piece.batch_size(t) for t in range(step, step + 1500)], axis=0
    )
    taken = piece.counts_range(step, step + 1500)[1:]
    assert np.abs(taken - due).max() < 1

    new = forked(recipe, step, "phases.two.batch_size=16")
    assert facts(new, 0, step) == facts(old, 0, step) and new.phase_at(step).batch_size(step) == 16
    assert new.phase_at(2500).weights(2500).tolist() == old.phase_at(2500).weights(2500).tolist()


def test_checkpoints_of_the_pieces_keep_the_phases_cadence(recipe: Path) -> None:
    every = "phases.two.checkpoint_every=400"
    recipe.write_text(dump_recipe(load_recipe(recipe, [every])))
    new, old = forked(recipe, 1000, "phases.two.fim_rate=0"), plan_of(recipe)
    assert set(new.checkpoints()) == set(old.checkpoints())
    new = forked(recipe, 1000, "phases.two.reset_at_eod=true")
    assert set(new.checkpoints()) == {*old.checkpoints(), 1000}


def test_at_the_end_of_a_phase_nothing_is_split(recipe: Path) -> None:
    new = forked(recipe, 30, "phases.two.steps=10", "phases.three.batch_size=16")
    assert [phase.name for phase in new.phases] == ["one", "two", "three"] and new.phases[
        1
    ].steps == 10


@pytest.mark.parametrize(
    ("step", "override", "told"),
    [
        (30, "phases.one.learning_rate.peak=1", "phases.one: ended at step 30"),
        (500, "phases.one=null", "phases.one: was trained before step 500"),
        (500, "phases.two.steps=400", "phases.two: has 400 steps and the fork is 470 into it"),
        (500, "model.layers=4", "model: a fork goes on with the same model"),
        (500, "seed=8", "seed: a fork goes on with the same seed"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    recipe: Path, step: int, override: str, told: str
) -> None:
    with pytest.raises(UserError) as error:
        split(plan_of(recipe), plan_of(recipe, override), step)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_fork_where_nothing_remains(recipe: Path) -> None:
    plan = plan_of(recipe)
    with pytest.raises(UserError, match="the recipe ends there"):
        split(plan, plan, plan.total_steps)


def test_a_step_without_checkpoint_and_a_folder_that_is_there(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / "run/checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "megacode.json").write_text(json.dumps({"step": step}))
    with pytest.raises(UserError, match="has no checkpoint at step 15; there are: 10, 20"):
        fork(tmp_path / "run", 15, tmp_path / "new")
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="exists already"):
        fork(tmp_path / "run", 10, tmp_path / "new")


def test_a_piece_that_begins_after_its_phase(recipe: Path) -> None:
    text = RECIPE.replace(
        "    tokens: 20k\n", "    tokens: 20k\n    within: {mixture: {first: 9, steps: 9}}\n"
    )
    recipe.write_text(text)
    with pytest.raises(
        UserError, match=r"within.mixture: `first` counts from 0 and is 9, in a schedule of 9 steps"
    ):
        load_recipe(recipe)


@pytest.mark.parametrize("step", [1040, 2500, 3030])
def test_a_cool_down_goes_linearly_to_zero_and_changes_nothing_else(
    recipe: Path, step: int
) -> None:
    """Inside a phase, in the decay of its rate, and at its end, where what moved stays."""
    old, path = plan_of(recipe), recipe.with_name("cooled.yaml")
    path.write_text(dump_recipe(cooled(old, step, 50)))
    new = plan_of(path)
    assert facts(new, 0, step) == facts(old, 0, step) and new.total_steps == step + 50
    assert differences(fingerprint(old, step), fingerprint(new, step)) == []
    assert [phase.name for phase in new.phases] == ["one", "two", "two-fork"]
    assert not new.phases[2].fresh_optimizer
    rate = old.learning_rate(min(step, 3029))
    rates = [new.learning_rate(each) for each in range(step, step + 50)]
    assert rates == pytest.approx(rate * (1 - np.arange(50) / 50))
    goes_on = min(step + 49, 3029)
    assert new.phases[2].weights(step + 49).tolist() == pytest.approx(
        old.phases[1].weights(goes_on).tolist(), abs=1e-6
    )
    assert new.phases[2].batch_size(step + 49) == old.phases[1].batch_size(goes_on)
    for before, after in zip(old.phases[1].streams, new.phases[2].streams, strict=True):
        assert (
            after.label == before.label
            and after.cursor
            == new.phases[1].streams[new.phases[2].streams.index(after)].cursor_after
        )


def test_no_cool_down_from_a_rate_of_zero(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "peak: 1e-3, warmup: 10", "schedule: linear, peak: 1e-3, decay_steps: 20"
    )
    recipe.write_text(text)
    with pytest.raises(UserError, match="--cool-down 5: the rate at step 25 is zero already"):
        cooled(plan_of(recipe), 25, 5)
