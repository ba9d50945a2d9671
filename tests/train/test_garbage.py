"""Python's cyclic garbage goes when the loop says, on every rank after the same step."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from megacode.train import garbage
from tests.e2e.conftest import ROOT, corpora, recipe  # noqa: F401  # fixtures


class Node:
    """One that refers to itself: no count of references frees it."""

    def __init__(self) -> None:
        self.self = self


def _dropped() -> weakref.ref[Node]:
    return weakref.ref(Node())


def test_cycles_stay_until_the_loop_says() -> None:
    with garbage.held_off():
        gone = _dropped()
        many = [[] for _ in range(200_000)]  # enough new objects for a collection of its own
        for _ in range(3):
            many.append([list(item) for item in many[:200_000]])
        garbage.collect_after(garbage.EVERY - 1)
        assert gone() is not None
        garbage.collect_after(garbage.EVERY)
        assert gone() is None


def test_afterwards_python_collects_as_before() -> None:
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            with garbage.held_off():
                assert not gc.isenabled()
                assert gc.get_freeze_count() > 0
            assert gc.isenabled() is was_on
            assert gc.get_freeze_count() == 0
        finally:
            gc.enable()


WATCHED = """
import gc, json, sys
from megacode.cli.main import main
from megacode.train import garbage

seen = []
def watch(phase, info):
    if phase == "start" and gc.get_freeze_count():  # inside the loop
        seen.append(info["generation"])
gc.callbacks.append(watch)
garbage.EVERY = 5
code = main(["train", sys.argv[1], "--run", sys.argv[2]])
print(json.dumps(seen))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_run_collects_when_due_and_after_saves_and_evaluations(
    recipe: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WATCHED, recipe, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert set(seen) == {2}, "Python began one by itself"
    assert (
        len(seen) >= 4 + 3 + 2
    )  # 20 steps, saves after 8, 10 and 20, evaluations after 8 and 20; Megatron-Core's own
