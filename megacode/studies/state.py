"""How far a sweep's cells are, read from their run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megacode.errors import UserError
from megacode.lock import is_held
from megacode.run.checkpoints import latest_checkpoint, read_info
from megacode.run.folder import LOCK
from megacode.run.metrics import FILE
from megacode.studies.sweep import Cell, OpenSweep

_TAIL = 65_536
"""Bytes at a metrics file's end that hold a training record."""


@dataclass(frozen=True)
class CellState:
    """How far a cell is.

    Attributes:
        step: of the last training record; the loss is its.
        failure: how the last start failed.
    """

    kind: Literal["finished", "running", "failed", "interrupted", "not begun"]
    step: int = 0
    loss: float | None = None
    failure: str = ""


def state_of(cell: Cell) -> CellState:
    """Read a cell's state."""
    step, loss = last_step(cell.folder)
    if _saved(cell) >= cell.end:
        return CellState("finished", step, loss)
    if is_held(cell.folder / LOCK):
        return CellState("running", step, loss)
    if cell.failure.is_file():
        return CellState("failed", step, loss, cell.failure.read_text(encoding="utf-8").strip())
    return CellState("interrupted" if cell.folder.exists() else "not begun", step, loss)


def unfinished(sweep: OpenSweep) -> list[Cell]:
    """Cells to train: those that are not finished, and shared phases that one of them that has not
    begun needs."""
    needed = [cell for cell in sweep.cells if _saved(cell) < cell.end]
    for cell in reversed(sweep.shared):
        children = (c for c in needed if c.parent and c.parent.name == cell.name)
        if _saved(cell) < cell.end and any(not child.folder.exists() for child in children):
            needed.append(cell)
    names = {cell.name for cell in needed}
    return [cell for cell in sweep.all_cells if cell.name in names]


def last_step(run: Path) -> tuple[int, float | None]:
    """Step and loss of a run's last training record; (0, None) where it has none."""
    try:
        with (run / FILE).open("rb") as file:
            file.seek(max((run / FILE).stat().st_size - _TAIL, 0))
            lines: Sequence[bytes] = file.read().split(b"\n")[:-1]
    except OSError:
        return 0, None
    for line in reversed(lines):
        if b'"kind":"train"' in line:
            record = json.loads(line)
            return int(record["step"]), record["loss"]
    return 0, None


def _saved(cell: Cell) -> int:
    """Finished steps of the latest checkpoint; 0 without a complete one."""
    try:
        checkpoint, _ = latest_checkpoint(cell.folder / "checkpoints")
        return int(read_info(checkpoint)["step"]) if checkpoint else 0
    except UserError:  # `megacode train` says what is wrong with it
        return 0
