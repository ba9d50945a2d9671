"""A sweep that trains: what its cells come to is what each would come to alone, whatever befell it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megacode.studies.sweep import open_sweep
from tests.e2e.conftest import ROOT, corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures

pytestmark = pytest.mark.slow
SWEEP = """
name: share
recipe: {recipe}
seeds: {{model: [1, 2], data: [1, 1]}}
grid:
  code:
    phases.second.mixture.domains.code.ratio: [0, 0.5]
    phases.second.mixture.domains.text.ratio: [1, 0.5]
"""


@pytest.fixture
def sweep_file(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("share.yaml").write_text(SWEEP.format(recipe=recipe))
    return Path("share.yaml")


def start(*arguments: object) -> subprocess.Popen[str]:
    """`megacode sweep ARGUMENTS` in a session of its own, as from another terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megacode.cli", "sweep", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=500)
    return process.returncode, out


def wait_for_metrics(pattern: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(Path("runs/share").glob(f"{pattern}/metrics.jsonl")):
        time.sleep(0.05)


def test_killed_and_stopped_a_sweep_goes_on_to_the_same_numbers(sweep_file: Path) -> None:
    """kill -9 while shared phases are trained, SIGTERM while cells are; four cells of which pairs share their first phase."""
    killed = start(sweep_file, "--jobs", 2)
    wait_for_metrics("shared-*", killed)
    killed.kill()
    assert finish(killed)[0] == -signal.SIGKILL
    stopped = start(sweep_file, "--jobs", 2)
    wait_for_metrics("code-*", stopped)
    stopped.send_signal(signal.SIGTERM)
    code, out = finish(stopped)
    assert code == 75 and "stopped by a signal; the same command goes on" in out, out
    code, out = finish(start(sweep_file, "--jobs", 2))
    assert code == 0, out
    assert (
        "4 of 4 cells finished" in out and "fewer than 3 seeds: an arm here has only 2 seeds" in out
    )
    sweep = open_sweep(sweep_file)
    assert len(sweep.shared) == 2 and (sweep.runs / "sweep.html").is_file()
    assert all((cell.folder / "fork.json").is_file() for cell in sweep.cells)
    for cell in (sweep.cells[0], sweep.cells[3]):
        alone = Path("alone").absolute() / cell.name
        megacode("train", cell.recipe_file.absolute(), "--run", alone, OMP_NUM_THREADS="1")
        assert steps_of(alone) == steps_of(cell.folder)
        both = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone, cell.folder)]
        validated = [
            [r for r in map(json.loads, lines) if r["kind"] == "validation"] for lines in both
        ]
        assert validated[0] == validated[1] and len(validated[0]) == 2
    # Of one data seed and two model seeds: the same batches, other weights.
    one, other = (steps_of(cell.folder) for cell in sweep.cells[:2])
    assert one.batches == other.batches and one.losses[0] != other.losses[0]
    before = {path: path.stat().st_mtime for path in sweep.runs.rglob("metrics.jsonl")}
    code, out = finish(start(sweep_file))
    assert code == 0 and "4 cells, 0 trainings to do" in out
    assert before == {path: path.stat().st_mtime for path in sweep.runs.rglob("metrics.jsonl")}


def test_a_failed_cell_says_why_and_the_others_go_on(sweep_file: Path) -> None:
    text = sweep_file.read_text().split("seeds:")[0] + (
        "cells:\n  - {name: bad, set: {phases.second: null, phases.first.learning_rate.peak: 1e30}}\n"
        "  - {name: good, set: {phases.second: null, phases.first.steps: 4}}\n"
    )
    sweep_file.write_text(text)
    code, out = finish(start(sweep_file, "--jobs", 1))
    assert code == 1, out
    sweep = open_sweep(sweep_file)
    bad, good = sweep.cells
    assert (
        f"{bad.name}: failed: exit code 2: megacode train: {bad.folder}: the gradient of step"
        in out
    )
    assert "1 failed; the same command tries them again:" in out and "1 of 2 cells finished" in out
    assert len(steps_of(good.folder).losses) == 4
    page = (sweep.runs / "sweep.html").read_text()
    assert "failed: exit code 2" in page and "is of the 1 of 2 that are" in page
    assert "cell" in out and "fewer than 3 seeds: an arm here has only one seed" in out
