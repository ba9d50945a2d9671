"""Killed and resumed is the same as left alone: bit for bit in the same layout, same tokens in any."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import ROOT, megacode, steps_of


@pytest.fixture(scope="module")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    megacode("train", recipe, "--run", run, "--processes", 2, "--set", "parallel.tensor=2")
    return run


def train_and_kill(recipe: Path, run: Path, after: int) -> None:
    """Start two processes and kill -9 them all once the checkpoint after step `after` is named by `latest`."""
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(recipe), "--run", str(run), "--processes", "2",
         "--set", "parallel.tensor=2"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    latest = run / "checkpoints" / "latest"
    deadline = time.time() + 120
    while time.time() < deadline and not (latest.exists() and int(latest.read_text().split("_")[1]) >= after):
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(recipe: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_and_kill(recipe, run, after=8)
    before = steps_of(run)
    assert len(before.losses) < 20
    done = megacode("train", recipe, "--run", run, "--processes", 2, "--set", "parallel.tensor=2")
    assert "continu" in done.stdout.lower() or "resum" in done.stdout.lower()
    assert steps_of(run) == steps_of(straight)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["parallel.pipeline=2", "parallel.tensor=1"])
def test_resumed_in_another_layout_reads_the_same_tokens(change: str, recipe: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_and_kill(recipe, run, after=8)
    layout = ["--set", change] if "tensor" in change else ["--set", "parallel.tensor=1", "--set", change]
    megacode("train", recipe, "--run", run, "--processes", 2, *layout)
    expected, got = steps_of(straight), steps_of(run)
    assert got.batches == expected.batches
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)


@pytest.mark.slow
def test_a_stop_signal_saves_and_a_longer_run_keeps_its_past(recipe: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(recipe), "--run", str(run), "--processes", "2",
         "--set", "parallel.tensor=2", "--set", "checkpoints.keep_phase_ends=false", "--set", "checkpoints.every=1000"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == 0
    stopped = json.loads((next(run.glob("checkpoints/step_*")) / "megacode.json").read_text())["step"]
    assert 3 <= stopped < 20
    # A third phase after it, and the first 20 steps stay as they were.
    third = [
        "phases=" + json.dumps([
            *_phases(recipe),
            {**_phases(recipe)[0], "name": "third", "steps": 3},
        ])
    ]  # fmt: skip
    megacode("train", recipe, "--run", run, "--processes", 2, "--set", "parallel.tensor=2", "--set", *third)
    expected, got = steps_of(straight), steps_of(run)
    assert len(got.losses) == 23
    assert got.losses[:20] == expected.losses and got.batches[:20] == expected.batches


def _phases(recipe: Path) -> list[dict]:
    import yaml

    return yaml.safe_load(recipe.read_text())["phases"]


@pytest.mark.slow
def test_a_changed_past_is_refused_and_named(recipe: Path, straight: Path) -> None:
    changes = ("--set", "parallel.tensor=2", "--set", "seed=8")
    done = megacode("train", recipe, "--run", straight, "--processes", 2, *changes, check=False)
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr
