"""Online Data Mixing by hand, and what a recipe with it must have."""

import math

import pytest

from megacode.errors import UserError
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.online import exploration, known_shares, least_share, next_rewards, next_shares

MIXTURE = "phases.second.mixture"


def test_the_exploration_rate_is_the_papers() -> None:
    assert exploration(4, 0) == exploration(4, 1) == 0.25, "at most 1/K"
    assert exploration(2, 50) == pytest.approx(math.sqrt(0.6931471805599453 / 100))
    assert least_share(2, 50) == 0.0832


def test_an_update_by_hand() -> None:
    """K = 2, 50 finished turns, worked out with a pocket calculator."""
    rewards = next_rewards([4.0, 3.0], [0.6, 0.4], [3.0, 2.0], 0.9)
    assert rewards == pytest.approx([0.9 * 4 + 0.5, 0.9 * 3 + 0.5])  # (1 - 0.9) L / p
    # e_49 = 0.084101..., e_50 = 0.083255...; exp(e_49 (4.1 - 3.2)) = 1.078626
    first = (1 - 2 * 0.0832555) * 1.0786263 / 2.0786263 + 0.0832555
    assert next_shares(rewards, 50) == [round(first, 4), round(1 - first, 4)] == [0.5158, 0.4842]


def test_without_decay_it_is_the_sum_of_exp3() -> None:
    assert next_rewards([4.0], [0.5], [3.0], 1.0) == pytest.approx([4.0 + 3.0 / 10 / 0.5])


def test_a_group_that_was_not_read_keeps_its_estimate() -> None:
    assert next_rewards([4.0, 1.0], [0.5, 0.5], [math.nan, 1.0], 0.9)[0] == 4.0


def test_shares_are_whole_parts_above_the_floor_and_large_rewards_do_no_harm() -> None:
    for turn in (1, 7, 1000):
        shares = next_shares([1e6, 0.0, 3.0, 2.9], turn)
        assert sum(round(10_000 * share) for share in shares) == 10_000
        assert min(shares) >= least_share(4, turn) and all(len(str(share)) <= 6 for share in shares)


def test_it_follows_the_loss() -> None:
    rewards, shares = [0.0, 0.0], [0.5, 0.5]
    for turn in range(1, 30):
        rewards = next_rewards(rewards, shares, [4.0, 1.0], 1.0)
        shares = next_shares(rewards, turn)
    assert shares[0] > 0.6


def test_a_recorded_recipe_is_read_back(write) -> None:  # type: ignore[no-untyped-def]
    shares = (
        "online={algorithm: fixed, every: 7, shares: {code: [0.63, 0.3333], text: [0.37, 0.6667]}}"
    )
    recipe = load_recipe(write(), [f"{MIXTURE}.{shares}"])
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again.phases == recipe.phases
    assert known_shares(again.phases[1].mixture) == {"code": [0.63, 0.3333], "text": [0.37, 0.6667]}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (f"{MIXTURE}.online.every=0", "greater than 0"),
        (f"{MIXTURE}.online.decay=1.5", "less than or equal to 1"),
        (f"{MIXTURE}.online.algorithm=doremi", "'odm' or 'fixed'"),
        (f"{MIXTURE}.online.algorithm=fixed", "shares: `algorithm: fixed` needs them"),
        (f"{MIXTURE}.online.shares={{code: [0.5]}}", "one list for each of code, text"),
        (f"{MIXTURE}.online.shares={{code: [0.5], text: [0.5, 0.5]}}", "all of one length"),
        (f"{MIXTURE}.online.shares={{code: [], text: []}}", "one list for each"),
        (f"{MIXTURE}.domains.code.ratio={{shape: linear, start: 0.1, end: 1}}", "not schedules"),
        (f"{MIXTURE}.domains.code.ratio=0", "a share of 0.001 at least"),
        (f"{MIXTURE}.domains.text=null", "two domains or sources at least"),
        (f"{MIXTURE}.weight_by=tokens", "set `weight_by: sequences`"),
        (f"{MIXTURE}.over_epochs=clip", "cannot be clipped to epochs"),
        ("phases.second.epochs=1", "`epochs` needs shares that are known before"),
    ],
)
def test_what_cannot_be_is_told(override: str, told: str, write) -> None:  # type: ignore[no-untyped-def]
    long = ["phases.second.tokens=null"] if "epochs" in override else []
    with pytest.raises(UserError) as error:
        load_recipe(write(), [f"{MIXTURE}.online=odm", *long, override])
    lines = str(error.value).splitlines()
    assert any(told in line and "second.mixture" in line for line in lines), lines
