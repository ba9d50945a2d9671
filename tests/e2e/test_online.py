"""Online mixing: the shares that a run decides are recorded, and the data order is a function of (recipe, shares, step)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megacode.plan.trajectory import read_entries
from tests.e2e.conftest import ROOT, megacode, steps_of

pytestmark = pytest.mark.slow

# Blocks of 4 steps; checkpoints inside one (6, 18), and the last phase reads on where the shares have led.
ONLINE = """
extends: small.yaml
phases:
  first: {steps: 3}
  second:
    steps: 22
    mixture: !replace
      domains: {code: 0.8, text: 0.2}
      online: {every: 4, warmup: 4}
    optimizer_state: keep
  +:
    - name: third
      steps: 3
      batch_size: 8
      sequence_length: 32
      mixture: {sources: {text: 0.5, code: 0.5}}
      learning_rate: {schedule: constant, peak: 0.001}
checkpoints: {every: 9, keep_last: 9}
evaluation: {at_phase_end: false}
"""
RECORDS = [(4, 0), (8, 1), (12, 2), (16, 3), (20, 4), (24, 5)]  # (first step, block)


@pytest.fixture(scope="module")
def online(recipe: Path) -> Path:
    path = recipe.with_name("online.yaml")
    path.write_text(ONLINE)
    return path


@pytest.fixture(scope="module")
def straight(online: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 steps on two data-parallel ranks."""
    run = tmp_path_factory.mktemp("straight") / "run"
    megacode("train", online, "--run", run, ranks=2)
    return run


def entries(run: Path) -> list[str]:
    return (run / "mixture.jsonl").read_text().splitlines()


def test_shares_move_and_are_recorded_before_each_block(straight: Path) -> None:
    found = read_entries(straight)
    assert [(entry["step"], entry["block"]) for entry in found] == RECORDS
    shares = [entry["shares"]["code"] for entry in found]
    assert shares[:2] == [0.8, 0.8] and max(shares[2:]) < 0.6, "warm-up, then explored"
    assert len(set(shares)) > 3 and found[-1]["rewards"].keys() == {"code", "text"}
    losses = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    block = [record for record in losses if record["kind"] == "train" and 8 <= record["step"] < 12]
    assert found[2]["losses"].keys() == {"code", "text"} and not found[1]["losses"]
    means = np.mean(
        [[record["loss_by_domain"][name] for name in ("code", "text")] for record in block], axis=0
    )
    np.testing.assert_allclose(list(found[2]["losses"].values()), means, rtol=0.02)
    taken = block[0]["ratio_by_domain"]
    assert taken["code"] + taken["text"] == 1


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_every_layout_decides_from_the_same_losses(
    layout: str, online: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    megacode("train", online, "--run", run, "--set", layout, "--until-phase", "second", ranks=2)
    for got, expected in zip(read_entries(run), read_entries(straight), strict=True):
        for facts, close in (("losses", 1e-4), ("shares", 3e-4)):
            assert got[facts] == pytest.approx(expected[facts], rel=close)


def test_any_step_can_be_read_again(straight: Path) -> None:
    for step in (5, 14, 25, 28):
        assert (
            "the batch that the run recorded"
            in megacode("trace", straight, "--step", step, "--check").stdout
        )


@pytest.fixture(scope="module")
def killed(online: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed with -9 after a block was recorded that begins beyond the checkpoint after step 18."""
    run = tmp_path_factory.mktemp("killed") / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(online), "--run", str(run), "--processes", "2"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    latest, file = run / "checkpoints/latest", run / "mixture.jsonl"
    deadline = time.time() + 120
    while not (
        latest.exists() and latest.read_text() == "step_00000018\n" and len(entries(run)) > 4
    ):
        assert child.poll() is None and time.time() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with file.open("a") as torn:
        torn.write('{"step": 24, "pha')
    return run


def test_killed_inside_a_block_and_resumed_equals_straight_bit_for_bit(
    online: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(killed, tmp_path / "run")
    info = json.loads((run / "checkpoints/step_00000018/megacode.json").read_text())
    assert np.shape(info["online"]["sums"]) == (2, 3), "loss and tokens of the block so far"
    done = megacode("train", online, "--run", run, ranks=2)
    assert "step 18 of 28" in done.stdout
    assert steps_of(run) == steps_of(straight)
    assert entries(run) == entries(straight)


def test_a_checkpoint_alone_is_enough(
    online: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    """Without mixture.jsonl and the rest of the folder."""
    name = "checkpoints/step_00000009"
    shutil.copytree(straight / name, tmp_path / "run" / name)
    megacode("train", online, "--run", tmp_path / "run", ranks=2)
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    batches = [record["batch"] for record in records if record["kind"] == "train"]
    assert batches == steps_of(straight).batches[9:]
    assert entries(tmp_path / "run") == entries(straight)[2:]


def test_resumed_in_another_layout_the_recorded_part_stays(
    online: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(killed, tmp_path / "run")
    megacode("train", online, "--run", run, "--set", "parallel.tensor=2", ranks=2)
    got, expected = steps_of(run), steps_of(straight)
    known = 19  # the block that holds step 18 ends there
    assert got.batches[:known] == expected.batches[:known]
    assert got.losses[:18] == expected.losses[:18] and got.losses[18:] != expected.losses[18:]
    assert entries(run)[:4] == entries(straight)[:4]


def test_what_was_recorded_before_any_checkpoint_does_not_outlive_another_recipe(
    online: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(straight / "mixture.jsonl", run)
    change = ("--set", "phases.second.mixture.domains.code=0.3", "--set", "phases.first=null")
    megacode("train", online, "--run", run, *change, "--until-phase", "second")
    (first, *_), steps = read_entries(run), [entry["step"] for entry in read_entries(run)]
    assert first["shares"] == {"code": 0.6, "text": 0.4} and steps == [1, 5, 9, 13, 17, 21]


@pytest.mark.parametrize(("layout", "ranks"), [((), 0), (("--set", "parallel.tensor=2"), 2)])
def test_the_fixed_table_reads_the_very_same_samples_in_any_layout(
    layout: tuple[str, ...], ranks: int, straight: Path, tmp_path: Path
) -> None:
    table = tmp_path / "fixed.yaml"
    told = megacode("plan", straight, "--fixed-mixture", table).stdout
    assert (
        f"written: {table}; second: 6 blocks of 4 steps" in told
        and "decided while training" not in told
    )
    megacode("train", table, "--run", tmp_path / "run", *layout, ranks=ranks)
    assert steps_of(tmp_path / "run").batches == steps_of(straight).batches
    assert not (tmp_path / "run/mixture.jsonl").exists(), "nothing is decided"


def test_an_unchanged_fork_inside_a_block_is_the_run(straight: Path, tmp_path: Path) -> None:
    new = tmp_path / "fork"
    megacode("fork", straight, "--at", 9, "--to", new)
    assert len(entries(new)) == 2
    megacode("train", new / "recipe.yaml", "--run", new, ranks=2)
    assert steps_of(new) == steps_of(straight)
    rows = [json.loads(line)["shares"] for line in entries(new)]
    assert rows == [entry["shares"] for entry in read_entries(straight)]
    megacode("trace", new, "--step", 20, "--check")


def test_another_algorithm_s_past_is_refused(online: Path, straight: Path) -> None:
    change = ("--set", "phases.second.mixture.online.every=2")
    done = megacode("train", online, "--run", straight, *change, check=False, ranks=2)
    assert done.returncode == 2 and "steps of a block: 4 before, 2 now" in done.stderr
    named = ("--set", "phases.second.name=other")
    done = megacode("train", online, "--run", straight, *named, check=False, ranks=2)
    assert done.returncode == 2 and "keep the name" in done.stderr
