"""Mixing laws: known laws found again, published tables predicted, optima that the goal's rules allow, recipes that train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megacode.cli.main import main
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.run.metrics import MetricsWriter
from megacode.studies.mixing_law import Goal, MixingLaw, _drawn, fit, fit_table, optimum
from megacode.studies.mixing_table import MixtureTable, read_table

RECIPES = Path(__file__).parents[2] / "recipes"
# Ye et al., arXiv 2403.16952, yegcjs/mixinglaws data/2Mix, step 30,000: share of GitHub; losses on GitHub and Pile-CC.
PUBLISHED = {
    "70M": [
        (0.25, 1.44434, 3.49873),
        (0.375, 1.38597, 3.53159),
        (0.5, 1.32782, 3.56695),
        (0.625, 1.29360, 3.62689),
        (0.75, 1.25677, 3.70329),
    ],
    "160M": [
        (0.25, 1.21302, 3.16343),
        (0.375, 1.15533, 3.19214),
        (0.5, 1.10663, 3.23002),
        (0.625, 1.07623, 3.29358),
        (0.75, 1.04117, 3.36603),
    ],
}
PLAIN = dict(weights=np.ones(2), natural=np.full(2, 0.5), kl=0.0, most=np.ones(2))


def law() -> MixingLaw:
    return MixingLaw(np.array([1.3, 2.2]), np.array([[-2.0, 0.5], [0.3, -1.1]]))


def table_of(shares: np.ndarray, losses: np.ndarray) -> MixtureTable:
    steps = np.zeros(len(shares), dtype=np.int64)
    return MixtureTable(("code", "text"), ("code", "text"), shares, losses, steps)


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_a_law_is_found_again(domains: int) -> None:
    random = np.random.default_rng(domains)
    shares = random.dirichlet(np.ones(domains), 16)
    true = MixingLaw(np.array([1.5, 2.0]), random.normal(-0.5, 1, (2, domains)))
    found = fit(shares, true.predict(shares), "law")
    unseen = random.dirichlet(np.ones(domains), 100)
    np.testing.assert_allclose(found.predict(unseen), true.predict(unseen), atol=2e-3)
    assert isinstance(found, MixingLaw)
    np.testing.assert_allclose(found.floors, true.floors, atol=0.05)


def test_the_floor_is_between_zero_and_the_least_loss_however_losses_bend() -> None:
    x = np.linspace(0, 1, 6)
    shares = np.column_stack([x, 1 - x])
    for losses in (3 - x**2, 3 - x, np.full(6, 2.0), 2 + 1e-4 * np.sin(9 * x)):
        found = fit(shares, losses[:, None], "law")
        assert isinstance(found, MixingLaw)
        assert 0 <= found.floors[0] < losses.min()
        assert abs(found.predict(shares)[:, 0] - losses).max() < 0.3


@pytest.mark.parametrize("size", PUBLISHED)
def test_left_out_mixtures_of_the_authors_tables(size: str) -> None:
    """Interior points within 0.0001 to 0.0085 nats, ends within 0.001 to 0.025."""
    rows = np.array(PUBLISHED[size])
    shares = np.column_stack([rows[:, 0], 1 - rows[:, 0]])
    result = fit_table(table_of(shares, rows[:, 1:]), Goal(**PLAIN))
    errors = abs(result.errors)
    assert errors[1:-1].max() <= 0.0085
    assert errors[[0, -1]].max() <= 0.025
    assert result.seeds is None and result.kind == "law"
    alone = fit(shares[1:], rows[1:, 1:], "law").predict(shares[:1])
    np.testing.assert_allclose(result.left_out[0], alone[0])
    residuals = abs(result.model.predict(shares) - rows[:, 1:])
    assert errors.sum() > 2 * residuals.sum(), "a fit of the others is worse than one of all"
    # Least squares of losses, not of their logarithms: no change of one parameter is better.
    law = result.model
    assert isinstance(law, MixingLaw)
    for index in np.ndindex(law.logs.shape):
        for change in (-1e-2, 1e-2):
            logs = law.logs.copy()
            logs[index] += change
            moved = MixingLaw(law.floors, logs).predict(shares) - rows[:, 1:]
            assert (moved**2).sum(0)[index[0]] >= (residuals**2).sum(0)[index[0]]


def test_the_optimum_is_the_minimum() -> None:
    x = np.linspace(0, 1, 100_001)
    grid = np.column_stack([x, 1 - x])
    for changes in (
        {},
        {"weights": np.array([1.0, 3.0])},
        {"kl": 0.1, "natural": np.array([0.9, 0.1])},
    ):
        goal = Goal(**(PLAIN | changes))
        best = optimum(law(), goal)
        assert best.sum() == pytest.approx(1)
        assert best[0] == pytest.approx(x[goal.value(law(), grid).argmin()], abs=2e-4), changes


def test_caps_hold_and_the_rest_is_still_best() -> None:
    three = MixingLaw(np.array([1.0]), np.array([[-3.0, -1.0, 1.0]]))
    goal = Goal(np.ones(1), np.full(3, 1 / 3), 0.0, np.array([0.2, 0.5, 1.0]))
    np.testing.assert_allclose(optimum(three, goal), [0.2, 0.5, 0.3], atol=1e-6)
    strong = Goal(np.ones(1), np.array([0.5, 0.3, 0.2]), 1e6, np.ones(3))
    np.testing.assert_allclose(optimum(three, strong), strong.natural, atol=1e-3)
    drawn = _drawn(goal)
    assert (drawn <= goal.most + 1e-12).all() and np.allclose(drawn.sum(1), 1)
    with pytest.raises(UserError, match=r"fill 0.5 of the tokens"):
        optimum(three, Goal(np.ones(1), goal.natural, 0.0, np.array([0.1, 0.2, 0.2])))


def test_seeds_are_means_and_one_mixture_is_left_out_whole() -> None:
    shares = np.repeat([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.9, 0.1]], 3, axis=0)
    noise = np.random.default_rng(0).normal(0, 0.01, (12, 2))
    result = fit_table(table_of(shares, law().predict(shares) + noise), Goal(**PLAIN))
    assert result.table.losses.shape == (4, 2) and result.without.shape == (4, 2)
    np.testing.assert_allclose(result.seeds, 0.01, rtol=0.5)


def test_trees_rank_mixtures_of_many_domains() -> None:
    pytest.importorskip("lightgbm")
    random = np.random.default_rng(0)
    true = MixingLaw(np.array([2.0]), random.normal(0, 1, (1, 8)))
    shares, unseen = random.dirichlet(np.full(8, 0.5), 120), random.dirichlet(np.full(8, 0.5), 200)
    found = fit(shares, true.predict(shares), "trees").predict(unseen)[:, 0]
    ranks = [np.argsort(np.argsort(v)) for v in (found, true.predict(unseen)[:, 0])]
    assert np.corrcoef(*ranks)[0, 1] > 0.85
    best = optimum(
        fit(shares, true.predict(shares), "trees"),
        Goal(np.ones(1), np.full(8, 1 / 8), 0.0, np.ones(8)),
    )
    assert true.predict(best[None])[0, 0] < np.quantile(true.predict(unseen)[:, 0], 0.05)


# ------------------------------------------------------------------------------------------------ tables and the command


def write_csv(path: Path, steps: tuple[int, ...] = (100, 200, 300, 400), seeds: int = 2) -> Path:
    random = np.random.default_rng(0)
    lines = ["share.code,loss.code,loss.text,step,seed"]
    for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
        for step in steps:
            # Code is learned early: the best share of it falls.
            early = MixingLaw(
                np.array([1.3, 2.2]), np.array([[-2.0, 0.5 + 100 / step], [0.3, -1.1]])
            )
            for seed in range(seeds):
                code, text = early.predict(np.array([[share, 1 - share]]))[0] + random.normal(
                    0, 0.003, 2
                )
                lines.append(f"{share},{code:.5f},{text:.5f},{step},{seed}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_one_share_has_a_domain_for_the_rest(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "a.csv"))
    assert table.domains == ("code", "rest") and table.targets == ("code", "text")
    assert table.shares.sum(1) == pytest.approx(1) and set(table.steps) == {100, 200, 300, 400}
    rows = [json.dumps({"share.a": 3, "loss.b": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"a.jsonl, line 1: its shares sum to 3"):
        read_table(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "a,b\n1,2\n", "no columns share.DOMAIN and loss.TARGET"),
        ("t.csv", "share.a,loss.b\n0.5,\n", "line 2: loss.b: expected a number"),
        ("t.jsonl", "no json\n", "line 1: is no JSON object"),
        ("t.csv", "share.a,loss.b\n0.5,nan\n", "line 2: loss.b: is not finite"),
        (
            "t.csv",
            "share.a,loss.b\n0.5,2\n0.2,3\n",
            "there are 2 mixtures, and a law of 2 domains needs 4",
        ),
    ],
)
def test_a_bad_table_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["mix", "fit", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kl", "0.1"], "needs the natural mix"),
        (["--tokens", "1B"], "need both"),
        (["--weights", "cod=1"], "--weights has cod; the table has: code, text"),
        (["--sizes", "code=1B", "--tokens", "1B"], "--sizes lacks rest"),
        (["--stages", "9"], "the table has 4 steps"),
        (["--axis", "math", "--plot", "x.png"], "is no domain"),
        (["--output", "x.yaml"], "goes with --recipe"),
        (["--sizes", "code=1M,rest=1M", "--tokens", "1B"], "lower --tokens or raise --max-epochs"),
    ],
)
def test_bad_options_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], told: str
) -> None:
    path = write_csv(tmp_path / "a.csv")
    assert main(["mix", "fit", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_command_prints_errors_seeds_and_the_optimum_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, plot = write_csv(tmp_path / "a.csv"), tmp_path / "a.png"
    assert main(["mix", "fit", str(path), "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    assert "mixing law of 6 mixtures, step 400" in told and "without one mixture" in told
    assert plot.stat().st_size > 10_000
    assert main(["mix", "fit", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["left_out"]["code"]["worst"] < 0.02 and sum(
        found["optimum"].values()
    ) == pytest.approx(1)


def test_stages_are_a_recipe_whose_rates_are_the_whole_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, output = write_csv(tmp_path / "a.csv"), tmp_path / "mixed.yaml"
    base = RECIPES / "crystal-tiny.yaml"
    table = path.read_text().splitlines()
    rows = [f"{1 - float(line.split(',')[0])},{line}" for line in table[1:]]
    path.write_text("\n".join([f"share.text,{table[0]}", *rows]) + "\n")
    options = ["--stages", "2", "--recipe", str(base), "--phase", "phase2", "--output", str(output)]
    assert main(["mix", "fit", str(path), *options]) == 0
    assert "phase2 in 2 pieces of 130, 130 steps" in capsys.readouterr().out
    before, after = load_recipe(base), load_recipe(output)
    assert [phase.name for phase in after.phases] == ["phase1", "phase2-1", "phase2-2", "phase3"]
    first, second = after.phases[1:3]
    shares = [phase.mixture.domains["code"].ratio for phase in (first, second)]
    assert shares[0] > shares[1] + 0.02, "code first"
    assert (
        first.mixture.domains["code"].fim_rate == before.phases[1].mixture.domains["code"].fim_rate
    )
    assert second.placed("learning_rate", second.steps) == (130, 260)
    assert after.phases[3] == before.phases[2] and after.phases[0] == before.phases[0]
    with pytest.raises(UserError, match="there is no nowhere"):
        from megacode.studies.mixing_phases import write_phases

        write_phases(base, "nowhere", [(1.0, {"code": 1, "text": 0})], output)
    bad = [*options[:-3], "phase2", "--output", str(tmp_path / "not.yaml")]
    assert main(["mix", "fit", str(write_csv(tmp_path / "b.csv")), *bad]) == 2
    assert "name both alike" in capsys.readouterr().err and not (tmp_path / "not.yaml").exists()


def test_a_folder_of_runs_is_a_table(tmp_path: Path) -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        run = tmp_path / f"code-{share}"
        with MetricsWriter(run, tensorboard=False) as writer:
            for step in (0, 50, 100):
                code, text = law().predict(np.array([[share, 1 - share]]))[0]
                writer.write(
                    {
                        "kind": "validation",
                        "step": step,
                        "loss_by_domain": {"code": code, "text": text},
                    }
                )
        streams = [
            {"domain": "code", "tokens": int(1000 * share)},
            {"domain": "text", "tokens": int(1000 * (1 - share))},
        ]
        plan = {"phases": [{"streams": [s for s in streams if s["tokens"]]}]}
        (run / "plan.json").write_text(json.dumps(plan))
    MetricsWriter(tmp_path / "new", tensorboard=False).close()
    (tmp_path / "new/plan.json").write_text(
        json.dumps({"phases": [{"streams": [{"domain": "code", "tokens": 1}]}]})
    )
    table = read_table(tmp_path)
    assert table.left_out == ("1 of 5 runs have no validation losses",)
    assert set(table.steps) == {50, 100}, "the untrained model is no measurement"
    assert fit_table(table.at(100), Goal(**PLAIN)).errors.max() < 0.05
    with pytest.raises(UserError, match="holds no runs"):
        read_table(tmp_path / "new")
