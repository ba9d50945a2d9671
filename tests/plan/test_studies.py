"""The study recipes: every one plans, arms that are compared read equal totals, tiny twins keep the shares of theirs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megacode.cli.main import main
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.load import load_recipe
from megacode.recipe.mixtures import mixture_entries
from megacode.studies.sweep import is_sweep, open_sweep

RECIPES = Path(__file__).parents[2] / "recipes"
STUDIES = RECIPES / "studies"
WITHOUT_TWIN = "share", "share-base", "quality"  # code-share's twin; there is one kind of code
WITHOUT_MARKUP = "code-to-text", "code-to-text-fresh"
PAPER = sorted(
    path
    for path in STUDIES.rglob("*.yaml")
    # ntp-plus: the large recipes start from published models, the tiny one from nothing.
    if not path.stem.endswith("-tiny") and path.parent.name != "ntp-plus"
)


def plan_of(path: Path) -> Plan:
    """From declared sizes, whatever data is here."""
    recipe = load_recipe(path)
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    sizes = {name: recipe.sources[name].tokens for name in read}
    return make_plan(recipe, {name: size for name, size in sizes.items() if size is not None})


def shares(plan: Plan) -> list[list[tuple[str, float, float, float]]]:
    """Of every phase: (domain, share, part of the source) of what it reads."""
    return [
        [
            (stream.domain, round(float(weight), 6), stream.low, stream.high)
            for stream, weight in zip(phase.streams, phase.weights(phase.first_step), strict=True)
        ]
        for phase in plan.phases
    ]


RUNS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "synthesis")
"""Recipes and sweeps, which trainings read."""


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_recipe_plans_before_its_data_is_there(path: Path) -> None:
    if is_sweep(path):
        assert len(open_sweep(path).cells) > 1
        return
    plan = plan_of(path)
    assert plan.total_steps > 0 and all(phase.streams for phase in plan.phases)
    starts = plan.recipe.initialize_from
    if starts and "/runs/" in starts and path.parent.parent == STUDIES:
        others = [load_recipe(one) for one in path.parent.glob("*.yaml") if not is_sweep(one)]
        (base,) = [one for one in others if one.name == Path(starts).name]
        longer = {"context_length": plan.recipe.model.context_length}
        assert base.model.model_copy(update=longer) == plan.recipe.model


@pytest.mark.parametrize("path", PAPER, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_tiny_twin_reads_the_shares_of_its_study(path: Path) -> None:
    if path.parent.name == "to-code" and path.stem in WITHOUT_TWIN:
        return
    if is_sweep(path):
        large_cells, tiny_cells = (
            {tuple(cell.arm.values()) for cell in open_sweep(one).cells}
            for one in (path, path.with_name(f"{path.stem}-tiny.yaml"))
        )
        if path.stem not in ("competitive", "additive"):  # fewer shares
            assert tiny_cells == large_cells
        return
    large, tiny = plan_of(path), plan_of(path.with_name(f"{path.stem}-tiny.yaml"))
    first = path.stem in WITHOUT_MARKUP  # phases that are left out
    assert shares(tiny)[first:] == shares(large)[first:]
    assert tiny.recipe.name == f"{large.recipe.name}-tiny"
    for ours, theirs in zip(tiny.recipe.phases, large.recipe.phases, strict=True):
        assert (ours.name, ours.epochs) == (theirs.name, theirs.epochs)
    for phase, twin in zip(large.phases[first:], tiny.phases[first:], strict=True):
        ours = [(s.packing, s.order, s.loss_on) for s in twin.streams]
        assert ours == [(s.packing, s.order, s.loss_on) for s in phase.streams]


@pytest.mark.parametrize("ending", ["", "-tiny"])
@pytest.mark.parametrize("arm", ["increase", "decrease"])
def test_dynamic_mixing_changes_the_order_and_no_total(
    arm: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [str(STUDIES / f"code-stage/code-{name}{ending}.yaml") for name in ("uniform", arm)]
    assert main(["plan", *arms, "--compare", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["totals_equal"] and not found["order_equal"]
    a, b = found["sources"]["text-tasks"], found["sources"]["code-tasks"]
    assert a[0] == a[1] and b[0] == b[1] and 3 * a[0]["sequences"] == 5 * b[0]["sequences"]


@pytest.mark.parametrize("arm", ["uniform", "increase", "decrease"])
def test_the_four_phases_are_equal_and_share_one_cosine(arm: str) -> None:
    plan = plan_of(STUDIES / f"code-stage/code-{arm}.yaml")
    assert [phase.samples for phase in plan.phases] == [100_000] * 4
    text = [int(phase.counts_before(phase.end)[0]) for phase in plan.phases]
    increase = [70_000, 70_000, 60_000, 50_000]
    assert text == {"uniform": [62_500] * 4, "increase": increase, "decrease": increase[::-1]}[arm]
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    assert rates[500] == 2e-5 == max(rates) and rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert all(after < before for before, after in itertools.pairwise(rates[500:]))


def test_problems_are_the_same_dataset_in_continued_pretraining_and_tuning() -> None:
    base2, sft, cpt = (
        load_recipe(STUDIES / f"math-cpt/{name}.yaml") for name in ("base2", "sft", "cpt")
    )
    assert base2.sources["problems"].path == sft.sources["problems"].path
    assert sft.sources["problems"].loss_on == "answers"
    other = cpt.sources["problems"].model_copy(update={"loss_on": "answers"})
    assert other == sft.sources["problems"] and cpt.phases == sft.phases
    assert cpt.optimizer == sft.optimizer and cpt.initialize_from == sft.initialize_from


def test_math_arms_differ_in_the_mixture_alone() -> None:
    base1 = plan_of(STUDIES / "math-cpt/base1.yaml")
    assert base1.total_tokens == 25_000 * 1024 * 4096
    for name, problems in (
        ("base2", 7.2),
        ("mix-7-3", 4.41),
        ("mix-5-5", 7.35),
        ("mix-3-7", 10.29),
    ):
        plan = plan_of(STUDIES / f"math-cpt/{name}.yaml")
        assert plan.total_tokens == base1.total_tokens
        read = {
            stream.source: stream.samples / plan.total_samples for stream in plan.phases[0].streams
        }
        assert read["problems"] == pytest.approx(problems / 63, rel=1e-6)
        assert read["general"] == pytest.approx(48.3 / 63, rel=1e-6)
