"""Recipes shaped like published runs have the published steps, tokens, lengths and rotary bases, and their twins the stages."""

from pathlib import Path

import numpy as np
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


def stages(plan: Plan) -> list[tuple[int, int, int, float]]:
    """Steps, sequences a step, length and rotary base of each phase."""
    return [
        (
            phase.steps,
            phase.batch_size(phase.first_step),
            phase.sequence_length,
            plan.recipe.model_in(phase.name).rotary_base,
        )
        for phase in plan.phases
    ]


def shares(plan: Plan, phase: int) -> dict[str, float]:
    """Of each domain in a phase."""
    found: dict[str, float] = {}
    for stream in plan.phases[phase].streams:
        found[stream.domain] = found.get(stream.domain, 0) + stream.samples
    return {domain: samples / plan.phases[phase].samples for domain, samples in found.items()}


@pytest.mark.parametrize(
    ("name", "devices", "device", "vocabulary", "parameters"),
    [
        ("smollm3-3b", 384, "h100", 128_256, 3_075_098_624),
        ("smollm3-3b-long", 96, "h100", 128_256, 3_075_098_624),
        ("deepseek-coder-1.3b", 64, "h100", 32_022, 1_345_513_472),
        ("qwen2.5-coder-1.5b", 256, "h100", 151_936, 1_543_714_304),
        ("k2-v2-midtraining", 1600, "h200", 250_112, 72_550_195_200),
    ],
)
def test_published_models_and_layouts_that_fit(
    name: str, devices: int, device: str, vocabulary: int, parameters: int
) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    check_layout(recipe, devices)
    assert memory_per_rank(recipe, vocabulary, devices).total < DEVICES[device][1].usable
    assert parameter_count(recipe.model, vocabulary) == parameters


def test_smollm3() -> None:
    plan = plan_of("smollm3-3b-long")
    assert [phase.first_step for phase in plan.phases] == [
        0, 3_450_000, 4_198_000, 4_720_000, 4_740_000,
    ]  # fmt: skip
    assert stages(plan)[2:] == [
        (522_000, 576, 4096, 5e4), (20_000, 72, 32_768, 2e6), (22_000, 36, 65_536, 5e6),
    ]  # fmt: skip
    assert pytest.approx(0.11, abs=0.001) == 522_000 / 4_720_000
    assert plan.learning_rate(4_197_999) == 2e-4 == plan.learning_rate(4_198_000)
    assert plan.learning_rate(4_719_999) < 1e-9
    sums = [phase.quota.weights.at(np.array([0])).sum() for phase in plan.phases]
    assert sums == pytest.approx([1, 1.00005, 1.00565, 1, 1], abs=1e-6)
    assert shares(plan, 0) == pytest.approx({"web": 0.848, "code": 0.125, "math": 0.027}, abs=1e-3)
    assert shares(plan, 2)["code"] == pytest.approx(0.232, abs=1e-3)
    short = plan_of("smollm3-3b")
    assert plan.recipe.name == short.recipe.name, "one run goes on with the other recipe"
    for before, after in zip(short.phases, plan.phases, strict=False):
        assert before == after


def test_k2_v2() -> None:
    plan = plan_of("k2-v2-midtraining")
    assert stages(plan) == [
        (130_000, 1600, 8192, 5e5), (45_000, 200, 65_536, 1e6),
        (17_500, 100, 131_072, 1e7), (10_000, 25, 524_288, 1e7),
    ]  # fmt: skip
    assert plan.learning_rate(500) == 1.5e-5
    assert plan.learning_rate(129_999) == pytest.approx(6.03e-6, rel=1e-3)
    assert plan.learning_rate(130_000) == 6e-6
    assert shares(plan, 0)["code"] == pytest.approx(0.1198, abs=1e-4)
    assert all(s.packing == "best_fit" for phase in plan.phases[1:] for s in phase.streams)


def test_deepseek_coder() -> None:
    plan = plan_of("deepseek-coder-1.3b")
    assert stages(plan)[-1] == (1000, 512, 16_384, 1e5)
    long, first = plan.recipe.model_in("long-16k"), plan.recipe.model_in("high")
    assert long.rotary_scaling and (long.rotary_scaling.kind, long.rotary_scaling.factor) == (
        "linear", 4,
    )  # fmt: skip
    assert first.rotary_scaling is None and first.rotary_base == 1e4
    assert first.stored(32_022, 1) == 32_256
    assert plan.total_tokens == pytest.approx(1.8e12 + 8.39e9, rel=1e-4)
    assert shares(plan, 0) == pytest.approx({"code": 0.87, "text": 0.1, "chinese": 0.03}, abs=1e-6)
    rates = [phase.rate.peak for phase in plan.phases]
    assert rates[0] / rates[1] == pytest.approx(10**0.5, rel=1e-3) and rates[0] / rates[2] == 10
    assert plan.recipe.data.fim.spm_rate == 0
    for stream in plan.phases[0].streams:
        assert (stream.fim_rate, stream.fim_level) == (0.5 * (stream.source == "code"), "document")


def test_qwen_coder() -> None:
    plan = plan_of("qwen2.5-coder-1.5b")
    assert [stage[2:] for stage in stages(plan)] == [(8192, 1e4), (32_768, 1e6)]
    assert [round(phase.tokens / 1e9) for phase in plan.phases] == [5200, 300]
    assert shares(plan, 0) == pytest.approx({"code": 0.7, "text": 0.2, "math": 0.1}, abs=1e-6)


@pytest.mark.parametrize("name", ["smollm3", "deepseek-coder", "qwen2.5-coder", "k2-v2"])
def test_tiny_twins_have_the_stages_of_the_large(name: str) -> None:
    """As many phases, the same rotary positions in each, and lengths that grow where they do."""
    large_name = {"smollm3": "smollm3-3b-long", "deepseek-coder": "deepseek-coder-1.3b"}
    large_name |= {"qwen2.5-coder": "qwen2.5-coder-1.5b", "k2-v2": "k2-v2-midtraining"}
    large, tiny = plan_of(large_name[name]), plan_of(f"{name}-tiny")
    assert [s[3] for s in stages(tiny)] == [s[3] for s in stages(large)]
    for a, b in zip(large.phases, tiny.phases, strict=True):
        models = (large.recipe.model_in(a.name), tiny.recipe.model_in(b.name))
        assert models[0].rotary_scaling == models[1].rotary_scaling
        assert a.rate.schedule == b.rate.schedule and a.reset_at_eod == b.reset_at_eod
        assert a.fresh_optimizer == b.fresh_optimizer
        assert {s.packing for s in a.streams} == {s.packing for s in b.streams}
        assert {(s.fim_rate, s.fim_level) for s in a.streams} == {
            (s.fim_rate, s.fim_level) for s in b.streams
        }
    lengths = [[phase.sequence_length for phase in plan.phases] for plan in (large, tiny)]
    assert [b > a for a, b in zip(lengths[0], lengths[0][1:], strict=False)] == [
        b > a for a, b in zip(lengths[1], lengths[1][1:], strict=False)
    ]
    kept = ("no_rope_layer_interval", "qkv_bias", "tie_embeddings", "norm_epsilon")
    assert all(getattr(large.recipe.model, k) == getattr(tiny.recipe.model, k) for k in kept)
