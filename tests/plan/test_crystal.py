"""The published recipe, from the recipe files: totals, validation sets, the small ones in proportion, every layout divides."""

from pathlib import Path

import pytest

from megacode.plan.devices import DEVICES
from megacode.plan.estimate import parameter_count
from megacode.plan.memory import memory_per_rank
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.checks import check_layout
from megacode.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def plan_of(name: str) -> Plan:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return make_plan(recipe, {name: source.tokens or 0 for name, source in recipe.sources.items()})


def test_totals_are_the_published_ones():
    plan = plan_of("crystal-7b")
    assert [phase.steps for phase in plan.phases] == [79_721, 214_387, 27_728]
    assert [round(phase.tokens / 1e9, 1) for phase in plan.phases] == [344.8, 927.3, 119.9]
    # The authors' file says 119,931,863,040: half a step less.
    assert plan.phases[2].tokens == 27_728 * 2112 * 2048 == 119_931_863_040 + 2112 * 2048 // 2
    assert plan.total_steps == 321_836
    assert parameter_count(plan.recipe.model, 32_032) == 6_575_278_720
    assert plan.phases[0].learning_rate(79_720) == pytest.approx(0.008787, abs=5e-7)
    assert plan.phases[2].fresh_optimizer and not plan.phases[1].fresh_optimizer


def test_eleven_validation_sets_of_the_published_sizes():
    sources = load_recipe(RECIPES / "crystal-7b.yaml").sources
    sizes = {
        name: source.validation_samples
        for name, source in sources.items()
        if source.validation_paths
    }
    assert len(sizes) == 11 and sum(sizes.values()) == 620_033
    assert (
        -(-620_033 // 32) == 19_377 and 620_033 // 32 == 19_376
    )  # the authors' eval_steps is 19,375


@pytest.mark.parametrize("name", ["crystal-160m", "crystal-1b"])
def test_small_ones_keep_proportions(name):
    large, small = plan_of("crystal-7b"), plan_of(name)
    parameters = parameter_count(small.recipe.model, 32_032)
    ratio = parameters / 6_575_278_720
    assert small.total_tokens / large.total_tokens == pytest.approx(ratio, rel=1e-3)
    for ours, theirs in zip(small.phases, large.phases, strict=True):
        assert ours.tokens / theirs.tokens == pytest.approx(ratio, rel=1e-3)
        assert ours.rate.peak == theirs.rate.peak
        assert ours.learning_rate(ours.last_step) == pytest.approx(
            theirs.learning_rate(theirs.last_step), rel=0.02
        )
        for a, b in zip(ours.streams, theirs.streams, strict=True):
            assert a.source == b.source and a.fim_rate == b.fim_rate
            assert a.epochs == pytest.approx(b.epochs, rel=0.01)
    model = small.recipe.model
    assert (
        model.resolved_head_dim == 128
        and model.hidden_init_std > large.recipe.model.hidden_init_std
    )


@pytest.mark.parametrize(
    ("name", "devices", "device"),
    [("crystal-7b", n, "h100") for n in (8, 64, 256)]
    + [
        ("crystal-7b-8x80gb", 8, "a100"),
        ("crystal-7b-64x80gb", 64, "a100"),
        ("crystal-7b-256x80gb", 256, "a100"),
    ]
    + [
        ("crystal-7b-8xh200", 8, "h200"),
        ("crystal-7b-64xh200", 64, "h200"),
        ("crystal-160m", 8, "h100"),
    ]
    + [
        ("crystal-1b", 8, "h100"),
        ("crystal-1b", 64, "h100"),
        ("crystal-chat", 8, "h100"),
        ("crystal-adaptation", 64, "h100"),
    ],
)
def test_layouts_divide_and_fit(name, devices, device):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    check_layout(recipe, devices)
    assert memory_per_rank(recipe, 32_032, devices).total < DEVICES[device][1].usable


def test_stages_that_follow():
    adaptation, chat = plan_of("crystal-adaptation"), plan_of("crystal-chat")
    assert [p.name for p in adaptation.phases] == ["phase3"] and adaptation.total_steps == 27_728
    assert chat.total_tokens == 1600 * 1024 * 2048
    assert chat.learning_rate(0) == 2e-4 and chat.learning_rate(1599) == pytest.approx(
        2e-5, rel=1e-3
    )
    for plan in (adaptation, chat):
        assert plan.recipe.initialize_from.endswith("runs/crystal-7b/checkpoints/step_00294108")
