"""A signal that any rank received stops all of them after the same step."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.processes import run_on

TERM, USR1, INT = signal.SIGTERM.value, signal.SIGUSR1.value, signal.SIGINT.value
Told = dict[int, tuple[int, int]]
"""By step: the rank that sends itself a signal in it, and which."""


def answers(world: Any, runs: list[Told]) -> list[list[int]]:
    """What a rank is told after each of four steps, for every run."""
    from megacode.train.stop import StopRequest

    out: list[list[int]] = []
    for told in runs:
        out.append([])
        with StopRequest() as stop:
            for step in range(4):
                rank, number = told.get(step, (-1, 0))
                if world.rank == rank:
                    os.kill(os.getpid(), number)
                out[-1].append(stop.should_stop())
    return out


def test_ranks_agree_a_step_later() -> None:
    runs = [{}, {1: (0, TERM)}, {1: (1, TERM)}, {0: (0, TERM), 1: (1, USR1)}]
    expected = [
        [0, 0, 0, 0],
        [0, 0, TERM, TERM],
        [0, 0, TERM, TERM],
        [0, TERM, max(TERM, USR1), max(TERM, USR1)],
    ]
    assert run_on(2, answers, runs) == [expected, expected]


def interrupted(world: Any) -> tuple[list[list[int]], str]:
    from megacode.train import stop as guard

    known = answers(world, [{1: (0, INT)}])
    with guard.StopRequest() as stop:
        try:
            for _ in range(3):  # one press, as the terminal and a launcher tell of it
                os.kill(os.getpid(), INT)
                time.sleep(0.01)
        except KeyboardInterrupt:
            return known, "at once"
        assert stop.should_stop() == INT
        time.sleep(guard._ONE_PRESS + 0.1)
        try:
            os.kill(os.getpid(), INT)
            time.sleep(0.01)
        except KeyboardInterrupt:
            return known, "at the second press"
    return known, "never"


def test_a_process_alone_knows_at_once_and_a_second_press_means_now() -> None:
    assert run_on(1, interrupted) == [([[0, INT, INT, INT]], "at the second press")]
