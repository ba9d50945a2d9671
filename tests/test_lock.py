"""One job in a run folder: a living holder refuses, a dead one's lock is taken over, two takers never both have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megacode import lock
from megacode.errors import UserError
from megacode.lock import STALE, HeldError, Lock, Owner, take, this_process
from megacode.run.folder import lock_run, start_over

ELSEWHERE = Owner("theirs", "node7", "another boot", 4711, "99", "", 0, "2026-01-01 00:00:00")


def left_by(run: Path, owner: Owner, age: float = 0.0) -> Path:
    run.mkdir(exist_ok=True)
    path = run / "lock"
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def quietly(_: str) -> None:
    pass


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_a_lock_is_there_while_it_is_held_and_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = lock_run(run)
    assert [path.name for path in run.iterdir()] == ["lock"]
    there = json.loads((run / "lock").read_text())
    assert there["pid"] == os.getpid() and there["host"] and there["started"]
    held.check()
    held.release()
    held.release()
    assert list(run.iterdir()) == []
    lock_run(run).release()


def test_a_file_in_the_folders_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(
        UserError,
        match=r"--run .*run: cannot be made or written to \(File exists: .*choose",
    ):
        lock_run(tmp_path / "run")


def test_a_living_process_on_this_machine_refuses_at_once_in_one_sentence(tmp_path: Path) -> None:
    held = lock_run(tmp_path)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=rf"this run is being trained by process {os.getpid()} on .* since .*; "
    ) as error:
        lock_run(tmp_path)
    assert time.monotonic() - start < STALE / 4 and "\n" not in str(error.value)
    held.check()
    held.release()


def test_a_process_killed_here_leaves_a_lock_that_is_taken_over_at_once(tmp_path: Path) -> None:
    body = "import sys, time; from megacode.lock import take; take(__import__('pathlib').Path(sys.argv[1]) / 'lock'); time.sleep(99)"
    child = subprocess.Popen([sys.executable, "-c", body, tmp_path])
    wait_for((tmp_path / "lock").exists)
    with pytest.raises(HeldError, match=f"process {child.pid} on"):
        take(tmp_path / "lock")
    child.kill()
    child.wait()
    said: list[str] = []
    start = time.monotonic()
    take(tmp_path / "lock", say=said.append).release()
    assert time.monotonic() - start < STALE / 4
    assert len(said) == 1 and "left over by" in said[0] and "its process is gone" in said[0]


def test_a_process_number_that_came_back_is_another_process(tmp_path: Path) -> None:
    left_by(tmp_path, replace(this_process(), pid_started="1"))
    take(tmp_path / "lock", say=quietly).release()


def test_a_requeued_job_takes_its_own_lock_and_another_job_does_not(tmp_path: Path) -> None:
    first = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c"}
    again = this_process({**first, "SLURM_RESTART_COUNT": "1"})
    theirs = replace(ELSEWHERE, job="c/7", job_start=0)
    left_by(tmp_path, theirs)
    said: list[str] = []
    take(tmp_path / "lock", say=said.append, me=again).release()
    assert "an earlier start of this Slurm job" in said[0]
    path = left_by(tmp_path, replace(theirs, job="c/8"))
    beating = threading.Event()
    beat = threading.Thread(
        target=lambda: [os.utime(path) for _ in iter(lambda: beating.wait(0.1), True)]
    )
    beat.start()
    with pytest.raises(HeldError, match="Slurm job 8, process 4711 on node7"):
        take(tmp_path / "lock", say=quietly, me=again, stale=2.0)
    beating.set()
    beat.join()


def test_a_machine_that_is_gone_is_watched_for_and_then_taken_over_from(tmp_path: Path) -> None:
    left_by(tmp_path, ELSEWHERE)
    said: list[str] = []
    start = time.monotonic()
    take(tmp_path / "lock", say=said.append, stale=1.0).release()
    assert 0.9 < time.monotonic() - start < STALE / 4
    assert "watching" in said[0] and "no sign of life" in said[1]
    left_by(tmp_path, ELSEWHERE, age=200)
    start = time.monotonic()
    take(tmp_path / "lock", say=quietly).release()
    assert time.monotonic() - start < STALE / 4


def test_the_machines_clock_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A taker whose clock is an hour ahead sees a holder that lives."""
    path = left_by(tmp_path, ELSEWHERE)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    timer = threading.Timer(0.5, lambda: os.utime(path))
    timer.start()
    with pytest.raises(HeldError, match="held by"):
        take(tmp_path / "lock", say=quietly, stale=3.0)


def test_a_holder_renews_and_learns_that_its_lock_was_taken(tmp_path: Path) -> None:
    lost: list[str] = []
    held = take(tmp_path / "lock", on_lost=lost.append, heartbeat=0.05)
    path = tmp_path / "lock"
    os.utime(path, (1, 1))
    wait_for(lambda: path.stat().st_mtime > 1000)
    left_by(tmp_path, ELSEWHERE)
    wait_for(lambda: bool(lost))
    assert "taken over by process 4711 on node7" in lost[0] and "saves nothing" in lost[0]
    with pytest.raises(UserError, match="taken over"):
        held.check()
    held.release()
    assert path.exists(), "another's lock is not ours to remove"


def test_a_lock_that_is_gone_is_lost(tmp_path: Path) -> None:
    lost: list[str] = []
    held = take(tmp_path / "lock", on_lost=lost.append, heartbeat=0.05)
    (tmp_path / "lock").unlink()
    wait_for(lambda: bool(lost))
    with pytest.raises(UserError, match="is gone"):
        held.check()


def test_a_late_taker_puts_the_new_holders_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race by hand: two find a dead lock, one takes it over before the other moves it away."""
    left_by(tmp_path, replace(this_process(), pid_started="1"))
    real, winner = lock._gone, []

    def slow(owner: Owner, me: Owner) -> str | None:
        why = real(owner, me)
        if why and not winner:
            winner.append(None)
            winner[0] = take(tmp_path / "lock", say=quietly)
        return why

    monkeypatch.setattr(lock, "_gone", slow)
    with pytest.raises(HeldError, match="held by"):
        take(tmp_path / "lock", say=quietly)
    winner[0].check()
    winner[0].release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    for _ in range(8):
        left_by(tmp_path, replace(this_process(), pid_started="1"))
        won: list[Lock] = []
        refused: list[str] = []
        together = threading.Barrier(8)

        def taker() -> None:
            together.wait()  # noqa: B023
            try:
                won.append(take(tmp_path / "lock", say=quietly, on_lost=quietly))  # noqa: B023
            except HeldError as error:
                refused.append(str(error))  # noqa: B023

        threads = [threading.Thread(target=taker) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holders = [held for held in won if held.is_mine()]
        assert len(holders) == 1 and len(won) + len(refused) == 8
        for held in won:
            held.release()
        assert list(tmp_path.iterdir()) == []


def test_a_damaged_lock_is_not_trusted_before_its_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("{")
    said: list[str] = []
    take(tmp_path / "lock", say=said.append, stale=1.0).release()
    assert "an unknown machine" in said[0]


def test_one_that_waits_gets_it_when_it_is_released(tmp_path: Path) -> None:
    held = take(tmp_path / "lock")
    threading.Timer(0.5, held.release).start()
    with take(tmp_path / "lock", wait=60) as mine:
        assert mine.is_mine() and not held.is_mine()


def test_starting_over_keeps_the_lock_in_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = lock_run(run)
    assert start_over(run) is None, "there is nothing to put aside"
    (run / "recipe.yaml").write_text("old")
    aside = start_over(run)
    assert aside == tmp_path / "run.before-1" and [p.name for p in aside.iterdir()] == [
        "recipe.yaml"
    ]
    held.check()
    held.release()
