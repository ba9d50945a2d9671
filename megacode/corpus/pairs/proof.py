"""Whether programs compute the same, shown by running them in the sandbox on seeded inputs.

A *program* is Python source; its last top-level function is what is called. A *generator* is Python
source whose last top-level function takes a `random.Random` and returns the arguments: a dict by
name, a tuple in order, or anything else as the only one. Two programs agree if, on every input,
they return the same value (or raise an error of the same type), print the same, and leave the
arguments the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megacode.sandbox import run_program

INPUTS = 20
_BATCH = 16
"""Trials of one start of the sandbox, which takes as long as several of them."""
_SECONDS = 1
"""CPU time of a program for all its inputs; it may take five times as long by the clock."""


@dataclass(frozen=True)
class Trial:
    """A program, its generator, and programs to be compared with it."""

    program: str
    generator: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """`agrees`: of each candidate; empty where the program itself cannot be compared with
    anything, and `reason` says why."""

    agrees: tuple[bool, ...] = ()
    reason: str = ""


def prove(trials: Sequence[Trial]) -> list[Verdict]:
    """The verdict on each trial, which does not depend on the others.

    Raises:
        UserError: this machine offers no sandbox.
    """
    found: list[Verdict] = []
    for start in range(0, len(trials), _BATCH):
        some = trials[start : start + _BATCH]
        # A program that ends the whole batch is found by itself.
        found += _run(some) or [(_run([one]) or [Verdict(reason=_ENDED)])[0] for one in some]
    return found


_ENDED = "ends the program that runs it"


def _run(trials: Sequence[Trial]) -> list[Verdict] | None:
    """None if not all of them came to a verdict."""
    order = json.dumps([[asdict(trial) for trial in trials], INPUTS, _SECONDS])
    source = _START.format(running=_running(), order=order)
    programs = sum(len(trial.candidates) + 2 for trial in trials)
    outcome = run_program(source, seconds=30.0 + 5 * _SECONDS * programs, memory_mb=1024)
    try:
        found = [Verdict(tuple(agrees), reason) for agrees, reason in json.loads(outcome.stdout)]
    except ValueError:
        return None
    return found if outcome.ok and len(found) == len(trials) else None


@functools.cache
def _running() -> str:
    return Path(__file__).with_name("running.py").read_text(encoding="utf-8")


_START = """
import os, sys
for name, text in (("running.py", {running!r}), ("order.json", {order!r})):
    with open(name, "w") as file:
        file.write(text)
command = [sys.executable, "-s", "-S", "running.py"]
child = os.posix_spawn(sys.executable, command, {{"PYTHONHASHSEED": "0"}})
assert os.waitpid(child, 0)[1] == 0
"""
"""An interpreter in whose sets texts have the same order every time."""
