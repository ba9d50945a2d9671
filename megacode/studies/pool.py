"""Trains the cells of a sweep, some at a time on this machine.

A cell is trained by `megacode train RUNS/recipes/CELL.yaml --run RUNS/CELL`, so everything that a
run promises holds: stopped or killed at any moment, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megacode.errors import UserError
from megacode.files import write_text
from megacode.launch import STOPPED
from megacode.lock import HeldError, is_held, take
from megacode.recipe.checks import check_files, check_layout
from megacode.recipe.load import dump_recipe
from megacode.run.folder import LOCK
from megacode.run.fork import fork
from megacode.signals import STOPPING
from megacode.studies.state import last_step, state_of, unfinished
from megacode.studies.sweep import Cell, OpenSweep

_LOOK = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Slots:
    """How many cells are trained at a time, each by how many processes.

    Attributes:
        devices: visible CUDA devices by index or UUID; empty on a CPU.
    """

    jobs: int
    processes: int
    devices: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """What the processes of one slot get: their devices and threads.

        On a CPU a process has one thread whatever `jobs` is: how many threads add up a sum decides
        its rounding, and numbers must not depend on what else is trained at the time.
        """
        threads = (os.cpu_count() or 1) // (self.jobs * self.processes) if self.devices else 1
        given = {"OMP_NUM_THREADS": str(max(threads, 1))} | os.environ
        if self.devices:
            first = slot * self.processes % len(self.devices)
            own = (self.devices * 2)[first : first + min(self.processes, len(self.devices))]
            given["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return given


def slots_for(sweep: OpenSweep, jobs: int | None, processes: int | None) -> Slots:
    """As many cells at a time as the machine has devices (else cores) for, unless `jobs` says.

    Args:
        processes: of each cell; default: as many as hold the largest model of the sweep once.

    Raises:
        UserError: a cell's files are not there, or its layout does not fit the processes.
    """
    import torch

    each = processes or max(cell.ranks for cell in sweep.cells)
    for cell in sweep.cells:
        try:
            check_files(cell.recipe)
            check_layout(cell.recipe, processes or cell.ranks)
        except UserError as error:
            raise UserError(f"{sweep.path}: {cell.name}: {error}") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(torch.cuda.device_count())]
    if visible and devices:
        devices = visible.split(",")[: len(devices)]
    room = len(devices) or os.cpu_count() or 1
    return Slots(jobs or max(room // each, 1), each, tuple(devices))


@dataclass
class Outcome:
    """What a start of the pool came to."""

    failed: list[Cell] = field(default_factory=list)
    stopped: bool = False


def train_cells(sweep: OpenSweep, slots: Slots, processes: int | None, console: Console) -> Outcome:
    """Train the unfinished cells, as many at a time as there are slots.

    SIGINT, SIGTERM and SIGUSR1 stop the cells in training, which save. A cell that fails does not
    stop the others. Cells that other processes train (those of a killed start, too) are waited for,
    and take a slot each.

    Args:
        processes: of each cell; default: as many as hold its model once.

    Raises:
        UserError: another process trains this sweep.
    """
    sweep.runs.mkdir(parents=True, exist_ok=True)
    try:
        lock = take(sweep.runs / LOCK)
    except HeldError as error:
        raise UserError(
            f"{sweep.runs / LOCK}: this sweep is being trained by {error.owner}; wait for it, or "
            "stop it"
        ) from None
    with lock, _stop_signals() as received, _Bar(sweep, console) as bar:
        pool = _Pool(slots, processes, bar)
        pool.train(unfinished(sweep), received)
        return pool.outcome


@dataclass
class _Training:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    asked_to_stop: bool = False

    def stop(self) -> None:
        if not self.asked_to_stop and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.asked_to_stop = True


class _Pool:
    def __init__(self, slots: Slots, processes: int | None, bar: _Bar) -> None:
        self.slots, self.processes, self.bar = slots, processes, bar
        self.running: list[_Training] = []
        self.outcome = Outcome()
        self._told: set[str] = set()
        """Cells that other processes train, or did."""

    def train(self, pending: list[Cell], received: Sequence[int]) -> None:
        try:
            while self.running or (pending and not received):
                self._reap()
                if received:
                    for one in self.running:
                        one.stop()
                else:
                    pending = self._start(pending)
                self.bar.show([one.cell for one in self.running])
                time.sleep(_LOOK)
        except BaseException:
            for one in self.running:
                one.stop()
            raise
        self.outcome.stopped = bool(received)

    def _start(self, pending: list[Cell]) -> list[Cell]:
        """Start cells while there are slots; returns those that are left."""
        held = {cell.name for cell in pending if is_held(cell.folder / LOCK)}
        for name in sorted(held - self._told):
            self.bar.say(f"{name}: is being trained by another process; waiting for it")
        self._told |= held
        waiting = {cell.name for cell in (*pending, *(one.cell for one in self.running))}
        left = []
        for cell in pending:
            parent = None if cell.folder.exists() else cell.parent
            if cell.name in held or (parent and parent.name in waiting):
                left.append(cell)
            elif cell.name in self._told and state_of(cell).kind == "finished":
                self.bar.finished(cell)
            elif parent and state_of(parent).kind != "finished":
                self.bar.say(
                    f"{cell.name}: not begun: {parent.name}, which it goes on from, failed"
                )
            elif len(self.running) + len(held) >= self.slots.jobs:
                left.append(cell)
            else:
                self._begin(cell)
        return left

    def _begin(self, cell: Cell) -> None:
        try:
            prepare(cell)
        except UserError as error:
            self._fail(cell, str(error))
            return
        slot = min(set(range(self.slots.jobs)) - {one.slot for one in self.running})
        command = [sys.executable, "-m", "megacode.cli", "train"]
        count = self.processes or cell.ranks
        command += [*arguments(cell), *(["--processes", str(count)] if count > 1 else [])]
        with cell.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.slots.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.running.append(_Training(cell, process, slot))

    def _reap(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            code, cell = one.process.returncode, one.cell
            if code == 0:
                self.bar.finished(cell)
            elif code == STOPPED or one.asked_to_stop:
                self.bar.say(f"{cell.name}: stopped at step {last_step(cell.folder)[0]:,}")
            else:
                how = f"exit code {code}" if code > 0 else f"signal {-code}"
                self._fail(cell, f"{how}: {_last_line(cell.log)}")

    def _fail(self, cell: Cell, why: str) -> None:
        write_text(cell.failure, why + "\n")
        self.outcome.failed.append(cell)
        self.bar.say(f"{cell.name}: failed: {why}")


def prepare(cell: Cell) -> None:
    """Write a cell's recipe; make the fork where it goes on from shared phases.

    Raises:
        UserError: the shared phases are not trained.
    """
    write_text(cell.recipe_file, dump_recipe(cell.recipe))
    cell.log.parent.mkdir(exist_ok=True)
    cell.failure.unlink(missing_ok=True)
    if cell.parent and not cell.folder.exists():
        fork(cell.parent.folder, cell.parent.end, cell.folder, cell.recipe_file)


def arguments(cell: Cell) -> list[str]:
    """Of `megacode train`, for a cell that is prepared."""
    until = ["--until-phase", cell.until] if cell.until else []
    return [str(cell.recipe_file), "--run", str(cell.folder), *until]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that the stopping signals are appended to."""
    received: list[int] = []
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in STOPPING}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Bar(contextlib.AbstractContextManager["_Bar"]):
    """Finished work and time left, under lines that say what happened. Work is FLOPs where the
    vocabulary is known, else tokens."""

    def __init__(self, sweep: OpenSweep, console: Console) -> None:
        self._console = console
        todo = {cell.name for cell in unfinished(sweep)}
        self._arms = [cell.name for cell in sweep.cells]
        self._left = todo & set(self._arms)
        flops = [cell.flops() for cell in sweep.all_cells]
        known = all(flops)
        self._work = {
            cell.name: (work if known else None) or float(cell.tokens)
            for cell, work in zip(sweep.all_cells, flops, strict=True)
        }
        self._done = {
            cell.name: _share(cell) if cell.name in todo else 1.0 for cell in sweep.all_cells
        }
        columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=sum(self._work.values()))

    def __enter__(self) -> _Bar:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def finished(self, cell: Cell) -> None:
        self._done[cell.name] = 1.0
        self._left.discard(cell.name)
        _, loss = last_step(cell.folder)
        shown = "" if loss is None else f", loss {loss:.4f}"
        self.say(f"{cell.name}: finished, {cell.end:,} steps{shown} ({self._cells()})")

    def show(self, running: Sequence[Cell]) -> None:
        if self._console.is_terminal:
            self._done |= {cell.name: _share(cell) for cell in running}
            text = ", ".join([self._cells(), *(cell.name for cell in running)])
            self._bar.update(self._task, completed=self._completed(), description=text)

    def _cells(self) -> str:
        return f"{len(self._arms) - len(self._left)} of {len(self._arms)} cells"

    def _completed(self) -> float:
        return sum(self._work[name] * done for name, done in self._done.items())


def _share(cell: Cell) -> float:
    """How much of a cell's own steps is done."""
    own = last_step(cell.folder)[0] - cell.first
    return min(max(own / (cell.end - cell.first), 0.0), 1.0)
