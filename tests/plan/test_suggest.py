"""Proposed layouts fit, are accepted, come fastest first, and more memory never takes one away."""

from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.plan.devices import DEVICES, Peak
from megacode.plan.memory import memory_per_rank
from megacode.plan.suggest import suggest
from megacode.recipe.checks import check_layout, check_recipe
from megacode.recipe.load import load_recipe

CRYSTAL = Path(__file__).parents[2] / "recipes/crystal-7b.yaml"
H100 = DEVICES["h100"][1]


@pytest.mark.parametrize("devices", [1, 8, 64, 256, 2112])
@pytest.mark.parametrize("device", ["h200", "b200"])
def test_every_proposal_can_be_taken(devices, device):
    peak = DEVICES[device][1]
    proposals = suggest(load_recipe(CRYSTAL), 32032, devices, peak)
    assert proposals and proposals == suggest(load_recipe(CRYSTAL), 32032, devices, peak)
    assert [p.seconds for p in proposals] == sorted(p.seconds for p in proposals)
    for proposal in proposals:
        recipe = load_recipe(CRYSTAL, proposal.settings())  # as a user would take it
        assert not check_recipe(recipe)
        check_layout(recipe, devices)
        assert recipe.parallel == proposal.parallel
        assert memory_per_rank(recipe, 32032, devices).total == proposal.memory.total <= peak.usable
        assert proposal.data * proposal.micro_batches * recipe.parallel.micro_batch_size == 2112
        assert 0.1 < proposal.mfu < 0.6


def test_more_memory_never_makes_it_slower():
    best = [
        suggest(load_recipe(CRYSTAL), 32032, 8, Peak(67, 989, 1979, memory=memory))[0].seconds
        for memory in (40, 80, 160)
    ]
    assert best == sorted(best, reverse=True)


def test_a_model_that_does_not_fit_is_split_or_recomputed():
    small = suggest(load_recipe(CRYSTAL), 32032, 4, Peak(67, 989, 1979, memory=40))
    assert all(p.parallel.tensor * p.parallel.pipeline > 1 for p in small)
    (only,) = {
        p.parallel.recompute.granularity
        for p in suggest(load_recipe(CRYSTAL), 32032, 1, Peak(67, 989, memory=122))
    }
    assert only == "full"


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(
        UserError,
        match=r"nothing fits 1 devices of 74 usable GiB.* takes 11\d GiB a rank; give more",
    ):
        suggest(load_recipe(CRYSTAL), 32032, 1, H100)
    with pytest.raises(UserError, match="no tensor x pipeline layout divides 7 devices"):
        suggest(load_recipe(CRYSTAL), 32032, 7, H100)
