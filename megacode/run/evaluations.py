"""`RUN/evaluations`: what a run's checkpoints scored, and each item of each task.

- `checkpoints.jsonl`: a record for each evaluated checkpoint, by step; docs/metrics.md lists keys.
- `step_00000110/NAME.jsonl`: an item of task NAME a line, after step 110.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacode.files import write_text
from megacode.run.checkpoints import checkpoint_name

FOLDER = "evaluations"
_CURVE = "checkpoints.jsonl"


def items_folder(run: Path, step: int) -> Path:
    """Where the items' scores after `step` are."""
    return run / FOLDER / checkpoint_name(step)


def add_to_curve(run: Path, record: Mapping[str, Any]) -> None:
    """Write a checkpoint's record, in place of an earlier one of its step."""
    records = {one["step"]: one for one in read_curve(run)} | {record["step"]: record}
    lines = [json.dumps(records[step]) for step in sorted(records)]
    (run / FOLDER).mkdir(exist_ok=True)
    write_text(run / FOLDER / _CURVE, "".join(f"{line}\n" for line in lines))


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Records of evaluated checkpoints, by step; none where there are none or they are damaged."""
    try:
        text = (run / FOLDER / _CURVE).read_text(encoding="utf-8")
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError, TypeError):
        return []
