"""Plans: Crystal's published numbers, cursors across phases, what leaves earlier steps alone."""

from pathlib import Path

import numpy as np
import pytest

from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.plan import make_plan
from megacode.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TOKENS = {"python": 1_000_000, "docs": 500_000}


@pytest.fixture(scope="module")
def crystal():
    recipe = load_recipe(RECIPES / "crystal-7b.yaml")
    return make_plan(recipe, {name: source.tokens for name, source in recipe.sources.items()})


def plan_of(path, *overrides, tokens=TOKENS):
    return make_plan(load_recipe(path, overrides), tokens)


def test_crystals_steps_and_tokens(crystal):
    assert [phase.steps for phase in crystal.phases] == [79_721, 214_387, 27_728]
    assert [round(phase.tokens / 1e9, 1) for phase in crystal.phases] == [344.8, 927.3, 119.9]
    assert crystal.total_steps == 321_836 and round(crystal.total_tokens / 1e12, 3) == 1.392


def test_crystals_learning_rate(crystal):
    assert crystal.learning_rate(0) == 0
    assert crystal.learning_rate(86) == 0.012
    assert crystal.learning_rate(79_720) == pytest.approx(0.008787, abs=5e-7)
    assert crystal.learning_rate(79_721) == 0
    assert crystal.learning_rate(79_721 + 86) == 0.0087825
    assert crystal.learning_rate(321_835) == pytest.approx(0.0002, rel=1e-3)


def test_crystals_checkpoints(crystal):
    saves, ends = np.array(crystal.checkpoints()), crystal.phase_ends()
    per_phase = [
        int(((saves > a) & (saves <= b)).sum()) for a, b in zip((0, *ends), ends, strict=False)
    ]
    assert per_phase == [54, 143, 28]
    assert crystal.kept_checkpoints() == frozenset(crystal.checkpoints())


def test_crystals_shares_are_the_published_ones(crystal):
    for phase, given in zip(crystal.phases, crystal.recipe.phases, strict=True):
        for stream, entry in zip(phase.streams, given.mixture.sources.values(), strict=True):
            assert abs(stream.samples - entry.weight * phase.samples) < 1
    starcoder = crystal.phases[1].streams[-1]
    assert starcoder.epochs == pytest.approx(2, abs=0.001) and starcoder.fim_rate == 0.9


def test_tokens_become_the_fewest_whole_steps(write):
    second = plan_of(write()).phases[1]
    assert second.steps == -(-100_000 // (16 * 128)) and second.tokens >= 100_000


def test_tokens_over_a_batch_ramp(write):
    plan = plan_of(write(), "phases.second.batch_size={start: 4, end: 16, increment: 4, over: 12}")
    phase = plan.phases[1]
    sizes = [
        phase.batch_size(step) for step in range(phase.first_step, phase.first_step + phase.steps)
    ]
    assert sizes[:13] == [4] * 4 + [8] * 4 + [12] * 4 + [16]
    assert sum(sizes) * 128 >= 100_000 > sum(sizes[:-1]) * 128
    assert phase.samples == sum(sizes) == sum(stream.samples for stream in phase.streams)


def test_counts_of_a_step_are_counts_before_it_and_after(write):
    plan = plan_of(write())
    phase = plan.phases[1]
    assert (phase.counts_before(phase.first_step) == 0).all()
    assert phase.counts_before(phase.last_step + 1).tolist() == [
        stream.samples for stream in phase.streams
    ]
    for step in (phase.first_step, phase.first_step + 7, phase.last_step):
        assert phase.counts(step).sum() == phase.batch_size(step)
        assert phase.weights(step).sum() == 1.0
    table = phase.counts_range(phase.first_step, phase.last_step + 1)
    assert (table[8] - table[7] == phase.counts(phase.first_step + 7)).all()


def test_tokens_before(write):
    plan = plan_of(write(), "phases.second.sequence_length=64", "phases.second.steps=10")
    assert plan.tokens_before(0) == 0
    assert plan.tokens_before(103) == 800 * 128 + 48 * 64
    assert plan.tokens_before(plan.total_steps) == plan.total_tokens
    assert plan.phase_at(99).name == "first" and plan.phase_at(100).name == "second"


def test_a_stream_goes_on_from_phase_to_phase(write):
    first, second = plan_of(write()).phases
    docs, later = first.streams[0], second.streams[1]
    assert (docs.source, later.source) == ("docs", "docs")
    assert docs.cursor == 0 and later.cursor == docs.samples * 128 == docs.cursor_after
    assert later.epochs_after == pytest.approx(docs.epochs + later.epochs)


def test_a_cursor_can_restart_and_its_reading_still_counts(write):
    first, second = plan_of(write(), "phases.second.cursor=restart").phases
    assert second.streams[1].cursor == 0
    assert second.streams[1].epochs_after == pytest.approx(
        first.streams[0].epochs + second.streams[1].epochs
    )


def test_each_subset_has_a_cursor_of_its_own(write):
    path = write()
    plan = plan_of(path, "phases.first.mixture.sources.docs.subset=0.5-1.0")
    docs, later = plan.phases[0].streams[0], plan.phases[1].streams[1]
    windows = (500_000 - 1) // 128
    assert (docs.first_window, docs.windows) == (windows // 2, windows - windows // 2)
    assert docs.label == "docs[0.5-1.0]"
    assert (later.cursor, later.first_window, later.windows) == (0, 0, windows)


def test_a_continued_cursor_is_rounded_up_to_the_new_length(write):
    plan = plan_of(
        write(), "sources.docs.window=512", "sources.python.window=512", "phases.second.sequence_length=512",
        "phases.first.steps=3",
    )  # fmt: skip
    taken = plan.phases[0].streams[0].samples * 128
    assert taken % 512 and plan.phases[1].streams[1].cursor == -(-taken // 512) * 512


def test_natural_weights_follow_the_token_counts(write):
    path = write()
    text = "phases.second.mixture.domains.text=null"
    override = "sources.more={domain: code, tokens: 3M}"
    plan = plan_of(path, override, text, tokens={**TOKENS, "more": 3_000_000})
    assert plan.phases[1].weights(plan.phases[1].first_step) == pytest.approx([0.25, 0.75])


def test_fim_rate_is_the_sources_else_the_domains_else_the_phases(write):
    plan = plan_of(
        write(), "phases.first.fim_rate=0.1", "phases.first.mixture.sources.python.fim_rate=0.9",
        "phases.second.mixture.domains.code.fim_rate=0.5",
    )  # fmt: skip
    assert [s.fim_rate for s in plan.phases[0].streams] == [0.1, 0.9]
    assert [s.fim_rate for s in plan.phases[1].streams] == [0.5, 0.0]


def test_max_epochs_suggestions_fit(write):
    path, tokens = write(), {"python": 5000, "docs": 10**6}
    cap = "phases.first.mixture.sources.python.max_epochs=2"
    plan_of(path, cap, "phases.first.steps=32", tokens=tokens)
    with pytest.raises(UserError):
        plan_of(path, cap, "phases.first.steps=33", tokens=tokens)


def test_clipped_sources_are_read_to_their_cap_and_the_others_fill_the_phase(write):
    path = write()
    tokens = {"python": 5121, "docs": 10**6, "more": 10**6}
    text = path.read_text().replace(
        "sources: {docs: 0.7, python: 0.3}", "sources: {docs: 0.4, python: 0.4, more: 0.2}"
    )
    path.write_text(text.replace("phases:", "  more: {path: data/more, tokens: 1M}\nphases:", 1))
    cap = ["phases.first.mixture.sources.python.max_epochs=2"]
    with pytest.raises(UserError, match="max_epochs"):
        plan_of(path, *cap, tokens=tokens)
    cap += ["phases.first.mixture.over_epochs=clip"]
    first = plan_of(path, *cap, tokens=tokens).phases[0]
    docs, python, more = first.streams
    assert 2 * 40 - 1 <= python.samples <= 2 * 40
    assert docs.samples + python.samples + more.samples == 800
    assert abs(docs.samples - 480) <= 1, "2:1 of the 720 that are left"
    assert first.asked == (320, 320, 160)
    # Nothing to clip: the plan is the one without it.
    free = plan_of(
        path, *cap, "phases.first.mixture.sources.python.max_epochs=20", tokens=tokens
    ).phases[0]
    assert free.asked is None and free.streams[1].samples == 320
    # A second phase counts what the first one read.
    again = [
        "phases.second.mixture={sources: {docs: 1, python: {weight: 1, max_epochs: 3}}, over_epochs: clip}"
    ]
    second = plan_of(path, *cap, *again, tokens=tokens).phases[1]
    assert 3 - 128 / 5120 <= second.streams[1].epochs_after <= 3 and second.streams[1].epochs <= 1
    everything = [
        f"phases.first.mixture.sources.{name}.max_epochs=0.001" for name in ("docs", "more")
    ]
    with pytest.raises(
        UserError, match=r"phases.first.mixture.over_epochs: its sources have .* the phase has 800"
    ):
        plan_of(path, *cap, *everything, tokens=tokens)
    with pytest.raises(UserError, match="clip takes weights that do not move"):
        plan_of(
            path,
            *cap,
            "phases.first.mixture.sources.docs={shape: linear, start: 0, end: 1}",
            tokens=tokens,
        )


def test_a_cascade_of_caps_clips_those_that_only_the_rest_fills(write):
    path = write()
    path.write_text(
        path.read_text().replace(
            "{docs: 0.7, python: 0.3}", "{docs: 1, python: 8, more: {weight: 1, max_epochs: 1}}"
        )
    )
    path.write_text(
        path.read_text().replace("phases:", "  more: {path: data/more, tokens: 1M}\nphases:", 1)
    )
    caps = [
        "phases.first.mixture.sources.python.max_epochs=1",
        "phases.first.mixture.over_epochs=clip",
    ]
    (docs, python, more) = (
        plan_of(path, *caps, tokens={"python": 128 * 100 + 1, "more": 128 * 100 + 1, "docs": 10**6})
        .phases[0]
        .streams
    )
    assert docs.samples + python.samples + more.samples == 800
    assert {99, 100} >= {python.samples, more.samples}


def test_checkpoints_count_the_runs_steps_and_phases_their_own(write):
    path = write()
    plan = plan_of(path, "checkpoints={every: 30, keep_every: 60}", "phases.second.steps=50")
    assert plan.checkpoints() == (30, 60, 90, 100, 120, 150)
    assert plan.kept_checkpoints() == {60, 100, 120, 150}
    plan = plan_of(
        path,
        "phases.second.steps=50",
        "phases.second.checkpoint_every=20",
        "checkpoints.keep_phase_ends=false",
    )
    assert plan.checkpoints() == (120, 140, 150)


EXTENSIONS = {
    "a longer phase": ["phases.second.steps=500"],
    "another phase": ["phases.+=[{name: third, steps: 9, batch_size: 2, sequence_length: 128, "
                      "mixture: {sources: {docs: 1}}, learning_rate: {peak: 1}}]"],
    "another layout": ["parallel.tensor=2", "parallel.micro_batch_size=2"],
    "another name and path": ["phases.second.name=other", "sources.docs.path=/elsewhere"],
    "another rate": ["phases.second.learning_rate.peak=1"],
}  # fmt: skip


@pytest.mark.parametrize("change", EXTENSIONS)
def test_earlier_steps_stay_as_they_were(write, change):
    path = write()
    before, after = plan_of(path), plan_of(path, *EXTENSIONS[change])
    step = 120
    assert fingerprint(before, step) == fingerprint(after, step)
    for number in range(step):
        assert (
            before.phase_at(number).counts(number) == after.phase_at(number).counts(number)
        ).all()
    if change == "a longer phase":
        assert [before.learning_rate(n) for n in range(100)] == [
            after.learning_rate(n) for n in range(100)
        ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=8", "seed: 7 before, 8 now"),
        ("phases.first.batch_size=16", "phases.1.batch_size: [[0, 8]] before, [[0, 16]] now"),
        (
            "phases.second.mixture.domains.code.fim_rate=0.5",
            "phases.2.streams.python.fim_rate: 0 before, 0.5 now",
        ),
        (
            "phases.first.mixture.sources.docs=0.6",
            "phases.1.streams.docs.first share: 0.7 before, 0.666666667 now",
        ),
        (
            "phases.first.mixture.sources.docs={shape: linear, start: 0.7, end: 0.6}",
            "phases.1.counts of every step: None",
        ),
        ("data.reset_at_eod=true", "phases.1.reset_at_eod: False before, True now"),
        ("phases.first.steps=90", "phases.1.steps: 100 before, 90 now"),
        ("phases.second.cursor=restart", "phases.2.streams.docs.cursor: 71680 before, 0 now"),
        ("sources.docs.window=256", "phases.1.streams.docs.window: 128 before, 256 now"),
    ],
)
def test_what_differs_is_named(write, change, line):
    path = write()
    old, new = fingerprint(plan_of(path), 120), fingerprint(plan_of(path, change), 120)
    lines = differences(old, new)
    assert any(entry.startswith(line) for entry in lines), lines


def test_a_ramp_with_its_own_length_survives_a_longer_phase(write):
    path = write()
    ramp = "phases.second.mixture.domains.code={shape: cosine, start: 0.1, end: 0.9, over: 40}"
    assert fingerprint(plan_of(path, ramp), 140) == fingerprint(
        plan_of(path, ramp, "phases.second.steps=99"), 140
    )
