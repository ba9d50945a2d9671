"""`megacode fork`: one that changes nothing is the run, bit for bit, also where it splits a phase; any shares the past."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import megacode, steps_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps; the checkpoint after step 10 is inside the second phase, whose ratios and rate move."""
    run = tmp_path_factory.mktemp("fork") / "run"
    megacode("train", recipe, "--run", run, ranks=2)
    return run


def test_an_unchanged_fork_is_the_run(run: Path) -> None:
    new = run.with_name("same")
    told = megacode(
        "fork", run, "--at", 10, "--to", new, "--set", "phases.second.checkpoint_every=5"
    ).stdout
    assert "second-fork: steps 11 to 20; learning rate, batch size, mixture go on" in told
    assert f"megacode train {new}/recipe.yaml --run {new}" in told
    before = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in before) == 10 and before[-1]["event"] == "fork"
    shards = sorted((new / "checkpoints/step_00000010").glob("*.distcp"))
    linked = [path.samefile(run / "checkpoints/step_00000010" / path.name) for path in shards]
    assert linked and all(linked), "a checkpoint is linked, not copied"
    done = megacode("train", new / "recipe.yaml", "--run", new, ranks=2)
    assert "step 10 of 20" in done.stdout
    assert steps_of(new) == steps_of(run)


def test_a_changed_fork_shares_the_past_and_nothing_else(run: Path) -> None:
    new = Path(f"{run}-at-10")
    changes = (
        "--set",
        "phases.second.mixture.domains.code.ratio=0.9",
        "--set",
        "parallel.tensor=2",
    )
    told = megacode("fork", run, "--at", 10, *changes).stdout
    assert told.endswith(f"--run {new} --processes 2\n"), "as many as the layout needs"
    megacode("train", new / "recipe.yaml", "--run", new, ranks=2)
    old, got = steps_of(run), steps_of(new)
    assert got.batches[:10] == old.batches[:10] and got.losses[:10] == old.losses[:10]
    assert len(got.losses) == 20 and not set(got.batches[10:]) & set(old.batches[10:])
    assert json.loads((new / "fork.json").read_text())["step"] == 10


def test_a_cool_down_trains_to_a_rate_of_zero(run: Path) -> None:
    new = run.with_name("cooled")
    told = megacode("fork", run, "--at", 10, "--cool-down", 4, "--to", new).stdout
    assert "second-fork: steps 11 to 14" in told and "linearly from 0.002" in told
    megacode("train", new / "recipe.yaml", "--run", new, ranks=2)
    assert steps_of(new).losses[:10] == steps_of(run).losses[:10]
    records = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if record["kind"] == "train"][10:]
    assert rates == pytest.approx([rates[0] * part / 4 for part in (4, 3, 2, 1)])
    assert json.loads((new / "fork.json").read_text())["changes"] == ["--cool-down 4"]
    done = megacode("fork", run, "--at", 10, "--cool-down", 4, "--set", "seed=1", check=False)
    assert done.returncode == 2 and "without --recipe and --set" in done.stderr
