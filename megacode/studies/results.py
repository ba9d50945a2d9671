"""Finished cells -> a table: what each measured at its end, by metric.

A metric is `loss.NAME` or `bits_per_byte.NAME` of a domain (or of a source, where no domain has
that name), `tasks.NAME` (the accuracy), or `tasks.NAME/WHAT`: a group's accuracy, or another number
of the task's record, such as `answer_loss`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.files import write_text
from megacode.recipe.compose import did_you_mean
from megacode.run.evaluations import items_folder, read_curve
from megacode.run.metrics import read_metrics
from megacode.studies.state import state_of
from megacode.studies.sweep import Cell, OpenSweep

Seed = tuple[int, int]
"""Seeds of model and data."""


@dataclass(frozen=True)
class CellResult:
    """What a finished cell measured at its end.

    Attributes:
        metrics: name -> value; those that are not numbers are absent.
        items: task -> file of its items' scores; absent where the run wrote none.
        step: of the last validation or task scores; 0 without any.
    """

    cell: Cell
    metrics: Mapping[str, float]
    items: Mapping[str, Path]
    step: int

    @property
    def seed(self) -> Seed:
        return self.cell.recipe.resolved_model_seed, self.cell.recipe.resolved_data_seed


@dataclass(frozen=True)
class ItemScores:
    """Scores of a task's items, [n], in the order of its file, and the cluster of each."""

    scores: NDArray[np.float64]
    clusters: NDArray[np.str_]


def collect(sweep: OpenSweep) -> list[CellResult]:
    """What the finished cells measured, in the sweep's order.

    Raises:
        UserError: a metric that the sweep names is in no finished cell.
    """
    results = [_result(c) for c in sweep.cells if state_of(c).kind == "finished"]
    known = list(dict.fromkeys(name for result in results for name in result.metrics))
    for name in sweep.sweep.metrics if results else ():
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known) or 'none'}"
            raise UserError(f"{sweep.path}: metrics: no cell has measured {name!r}{hint}")
    return results


def metric_names(sweep: OpenSweep, results: Sequence[CellResult]) -> list[str]:
    """Those that the sweep names; else losses by domain and accuracies of tasks."""
    if sweep.sweep.metrics:
        return list(sweep.sweep.metrics)
    domains = {s.domain for cell in sweep.cells for s in cell.recipe.sources.values()}
    losses = {f"loss.{domain}" for domain in domains}
    known = dict.fromkeys(name for result in results for name in result.metrics)
    return [n for n in known if n in losses or (n.startswith("tasks.") and "/" not in n)]


def read_items(path: Path) -> ItemScores:
    """UserError: the file cannot be read."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines.sort(key=lambda line: line["item"])
        scores = np.array([line["score"] for line in lines], np.float64)
        clusters = [line.get("cluster") or str(line["item"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate the run again") from None
    return ItemScores(scores, np.array(clusters))


def write_results(sweep: OpenSweep, results: Sequence[CellResult]) -> list[Path]:
    """`RUNS/results.jsonl` and `.csv`, a line a finished cell."""
    rows = [_row(result) for result in results]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    flat: list[dict[str, Any]] = [
        {k: v for k, v in row.items() if not isinstance(v, dict)} | row["arm"] | row["metrics"]
        for row in rows
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    paths = [sweep.runs / "results.jsonl", sweep.runs / "results.csv"]
    for path, content in zip(paths, (text, table.getvalue()), strict=True):
        write_text(path, content)
    return paths


def _row(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    return {
        "run": cell.name,
        "model_seed": result.seed[0],
        "data_seed": result.seed[1],
        "steps": cell.end,
        "tokens": cell.plan.tokens_before(cell.end),
        "arm": dict(cell.arm),
        "metrics": dict(result.metrics),
        "items": {task: str(path.relative_to(cell.runs)) for task, path in result.items.items()},
    }


def _result(cell: Cell) -> CellResult:
    """The last of every number: of validations and tasks in the run, and of its checkpoints that
    were evaluated later."""
    metrics: dict[str, float | None] = {}
    items: dict[str, Path] = {}
    step = 0
    records = [r for r in read_metrics(cell.folder) if r["kind"] in ("validation", "tasks")]
    for record in sorted((*records, *read_curve(cell.folder)), key=lambda one: one["step"]):
        step = record["step"]
        for name in ("loss", "bits_per_byte"):
            for group in ("source", "domain"):  # a domain replaces a source of its name
                found = record.get(f"{name}_by_{group}", {})
                metrics |= {f"{name}.{key}": value for key, value in found.items()}
        for task, scores in record.get("tasks", {}).items():
            numbers = {k: v for k, v in scores.items() if isinstance(v, int | float)}
            if numbers:  # of the harness' the first is what the task is scored by
                first = numbers.get("accuracy", next(iter(numbers.values())))
                metrics[f"tasks.{task}"] = first
            numbers |= scores.get("groups", {})
            metrics |= {f"tasks.{task}/{key}": value for key, value in numbers.items()}
            if (path := items_folder(cell.folder, step) / f"{task}.jsonl").is_file():
                items[task] = path
    known = {name: value for name, value in metrics.items() if value is not None}
    return CellResult(cell, known, items, step)
