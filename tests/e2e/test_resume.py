"""Killed and resumed is the same as left alone: 40 steps straight against 20, kill -9, and 20 more. Bit for bit in the same
layout; in any other the same tokens (the digest of every step's batch) and losses within 1e-5."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megacode.launch import STOPPED
from megacode.run.metrics import read_metrics
from tests.e2e.conftest import ROOT, megacode, steps_of

LAYOUT = ("--set", "parallel.tensor=2")
# Step 20 is inside the second phase: its ratios move, its rate falls and Adam's state is its own.
FORTY = """
extends: small.yaml
phases:
  first: {steps: 16}
  second: {steps: 24}
checkpoints: {every: 20}
"""
THIRD = """
extends: forty.yaml
phases:
  +:
    - name: third
      steps: 3
      batch_size: 8
      sequence_length: 32
      mixture: {sources: {web: 1}}
      learning_rate: {schedule: constant, peak: 0.001}
"""


@pytest.fixture(scope="module")
def forty(recipe: Path) -> Path:
    path = recipe.with_name("forty.yaml")
    path.write_text(FORTY)
    return path


@pytest.fixture(scope="module")
def straight(forty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    megacode("train", forty, "--run", run, *LAYOUT, ranks=2)
    assert len(steps_of(run).losses) == 40
    return run


@pytest.fixture(scope="module")
def killed(forty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, killed with -9 once the checkpoint after step 20 is named by `latest`."""
    run = tmp_path_factory.mktemp("killed") / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(forty), "--run", str(run), "--processes", "2", *LAYOUT],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    latest = run / "checkpoints" / "latest"
    deadline = time.time() + 120
    while time.time() < deadline and not (
        latest.exists() and latest.read_text() == "step_00000020\n"
    ):
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 20 <= len(steps_of(run).losses) < 40
    return run


def resume(killed: Path, run: Path, forty: Path, *layout: str) -> None:
    shutil.copytree(killed, run)
    done = megacode("train", forty, "--run", run, *layout, ranks=2)
    assert f"continuing from {run / 'checkpoints/step_00000020'}: step 20 of 40" in done.stdout


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(
    forty: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    resume(killed, tmp_path / "run", forty, *LAYOUT)
    assert steps_of(tmp_path / "run") == steps_of(straight)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["parallel.pipeline=2", "parallel.tensor=1"])
def test_resumed_in_another_layout_reads_the_same_tokens(
    change: str, forty: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    """Also a copy of the folder that came without `latest`."""
    bare = shutil.copytree(killed, tmp_path / "bare", ignore=shutil.ignore_patterns("latest"))
    resume(bare, tmp_path / "run", forty, "--set", change)
    expected, got = steps_of(straight), steps_of(tmp_path / "run")
    assert got.batches == expected.batches
    assert got.losses[:20] == expected.losses[:20] and got.losses != expected.losses, (
        "the layout is not another"
    )
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)


@pytest.mark.slow
def test_a_stop_signal_saves_and_a_longer_run_keeps_its_past(
    forty: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(forty), "--run", str(run), "--processes", "2", *LAYOUT,
         "--set", "checkpoints.keep_phase_ends=false", "--set", "checkpoints.every=2"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (
        metrics.exists() and metrics.read_text().count('"train"') >= 3
    ):
        assert child.poll() is None
        time.sleep(0.005)
    os.killpg(
        child.pid, signal.SIGUSR1
    )  # as Slurm does: every process, also those that write a checkpoint
    assert child.wait(timeout=120) == STOPPED
    stopped = int((run / "checkpoints/latest").read_text()[5:])
    assert 3 <= stopped < 40
    # A third phase after them, and the first 40 steps stay as they were.
    longer = forty.with_name("third.yaml")
    longer.write_text(THIRD)
    megacode("train", longer, "--run", run, *LAYOUT, ranks=2)
    expected, got = steps_of(straight), steps_of(run)
    assert len(got.losses) == 43
    assert got.losses[:40] == expected.losses and got.batches[:40] == expected.batches


def holds_back(pid: int, number: int) -> bool:
    mask = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(mask and int(mask[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_signal_while_it_starts_is_heeded_after_the_first_step(
    processes: int, forty: Path, tmp_path: Path
) -> None:
    """Also by the processes that it starts."""
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "megacode.cli", "train", str(forty), "--run", str(run), "--processes", str(processes)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while not holds_back(child.pid, signal.SIGUSR1):
        assert time.time() < deadline and child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGUSR1)
    told, _ = child.communicate(timeout=120)
    assert child.returncode == STOPPED, told
    assert (run / "checkpoints/latest").read_text() == f"step_{processes:08d}\n", (
        "agreed a step later"
    )


@pytest.mark.slow
def test_a_changed_past_is_refused_and_named(forty: Path, straight: Path) -> None:
    done = megacode(
        "train", forty, "--run", straight, *LAYOUT, "--set", "seed=8", check=False, ranks=2
    )
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_accepted_change_is_on_record(forty: Path, killed: Path, tmp_path: Path) -> None:
    run, change = shutil.copytree(killed, tmp_path / "run"), ("--set", "model.rotary_base=5000")
    done = megacode("train", forty, "--run", run, *change, check=False)
    assert done.returncode == 2 and "model.rotary_base: 10000 before, 5000 now" in done.stderr
    for _ in range(2):  # the same command goes on with what it began
        done = megacode(
            "train", forty, "--run", run, *change, "--accept-change", "model.rotary_base"
        )
    assert "nothing to do" in done.stdout
    (event,) = [record for record in read_metrics(run) if record.get("event") == "accepted change"]
    assert (event["step"], event["key"], event["before"], event["now"]) == (
        21,
        "model.rotary_base",
        10000,
        5000,
    )
    accepted = json.loads((run / "checkpoints/step_00000040/megacode.json").read_text())["accepted"]
    assert [(change["step"], change["key"]) for change in accepted] == [(20, "model.rotary_base")]
    megacode("report", run)
    assert (
        "model.rotary_base from step 21 on: 10000.0 → 5000.0" in (run / "report.html").read_text()
    )


@pytest.mark.slow
def test_a_vocabulary_larger_than_the_weights_trains_on(forty: Path, tmp_path: Path) -> None:
    """Rows of new tokens that are zero made the first gradient some hundred times too long."""
    one = (
        "--set",
        "phases.second=null",
        "--set",
        "phases.first.steps=1",
        "--set",
        "sources.text.validation=null",
    )
    code, text = (
        ("--set", f"phases.first.mixture={{sources: {{{others[0]}: null, {others[1]}: null}}}}")
        for others in (("text", "web"), ("code", "web"))
    )
    megacode(
        "train", forty, "--run", tmp_path / "base", *one, *code, "--set", "model.vocab_size=150"
    )
    start = (*one, *text, "--set", f"initialize_from={tmp_path / 'base'}")
    done = megacode("train", forty, "--run", tmp_path / "run", *start)
    assert (
        "has 150 tokens, the tokenizer 300: rows of the 150 new ones start as the mean"
        in done.stdout
    )
    norms = [
        r["grad_norm"]
        for folder in ("base", "run")
        for r in read_metrics(tmp_path / folder)
        if r["kind"] == "train"
    ]
    assert norms[1] < 2 * norms[0], norms
    done = megacode(
        "train",
        forty,
        "--run",
        tmp_path / "less",
        *start,
        "--set",
        "model.vocab_size=149",
        check=False,
    )
    assert done.returncode == 2 and "model.vocab_size: 150 before, 149 now" in done.stderr
    assert "--accept-change" not in done.stderr
