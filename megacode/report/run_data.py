"""A run folder, read for the report: recipe, plan, metrics as arrays, environment, samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.plan.summary import plan_summary
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.metrics import FILE, Record, read_metrics

Floats = NDArray[np.float64]

_NUMBERS = (
    "step", "tokens", "loss", "grad_norm", "learning_rate", "batch_size", "seconds", "tokens_per_second", "tflops_per_device",
    "mfu", "memory_gb", "drift",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Training records as arrays of one length; NaN where a record has no such number.

    `tokens_by_source` is cumulative; `phase` has the phase's name of every record.
    """

    numbers: dict[str, Floats]
    phase: NDArray[np.str_]
    loss_by_source: dict[str, Floats]
    loss_by_domain: dict[str, Floats]
    ratio_by_domain: dict[str, Floats]
    tokens_by_source: dict[str, Floats]

    def __getitem__(self, name: str) -> Floats:
        return self.numbers[name]

    def __len__(self) -> int:
        return len(self.phase)

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.numbers[name]).any())

    def phase_slices(self) -> list[slice]:
        """Stretches of records in one phase, in order."""
        if not len(self):
            return []
        changes = (np.flatnonzero(self.phase[1:] != self.phase[:-1]) + 1).tolist()
        return [slice(a, b) for a, b in zip([0, *changes], [*changes, len(self)], strict=True)]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    label: str
    recipe: Recipe
    recipe_text: str
    plan: dict[str, Any] | None
    train: Series
    validations: list[Record]
    events: list[Record]
    environment: dict[str, Any]
    samples: str | None
    domains: tuple[str, ...] = field(default=())

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The plan's phases; empty without a plan."""
        return list(self.plan["phases"]) if self.plan else []

    @property
    def steps_done(self) -> int:
        return int(self.train["step"][-1]) if len(self.train) else 0

    def tokens_at(self, step: float) -> float:
        """Tokens seen after `step` finished steps, as measured (interpolated between records)."""
        return float(np.interp(step, [0.0, *self.train["step"]], [0.0, *self.train["tokens"]]))


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, or it has not trained a step yet.
    """
    recipe_path = folder / "recipe.yaml"
    if not folder.is_dir() or not recipe_path.exists():
        missing = "there is no such folder" if not folder.is_dir() else "has no recipe.yaml"
        raise UserError(f"{folder}: {missing}; give a run's folder, such as runs/crystal-tiny")
    records = read_metrics(folder / FILE)
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise UserError(f"{folder / FILE}: has no finished step yet; a report needs at least one")
    recipe = load_recipe(recipe_path)
    plan = _read_plan(folder, recipe)
    return Run(
        folder=folder,
        label=folder.resolve().name,
        recipe=recipe,
        recipe_text=recipe_path.read_text(encoding="utf-8"),
        plan=plan,
        train=_series(train),
        validations=[record for record in records if record["kind"] == "validation"],
        events=[record for record in records if record["kind"] == "event"],
        environment=_read_json(folder / "environment.json") or {},
        samples=(_read_text(folder / "samples.txt") or "").strip("\n") or None,
        domains=_domains(recipe, plan, train),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, with labels that differ."""
    runs = [read_run(folder) for folder in folders]
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        return [_relabelled(run, str(folder)) for run, folder in zip(runs, folders, strict=True)]
    return runs


def _relabelled(run: Run, label: str) -> Run:
    return replace(run, label=label)


def _read_plan(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The plan as the run's start wrote it (the data may have changed or gone since); made anew where that is missing."""
    plan = _read_json(folder / "plan.json")
    if plan and plan.get("phases") and all("curves" in phase for phase in plan["phases"]):
        return plan
    from megacode.data.planning import plan_with_data

    try:
        return plan_summary(plan_with_data(recipe))
    except UserError:
        return None  # the corpora are elsewhere: a report without planned curves is still a report


def _read_json(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    try:
        data = json.loads(text) if text else None
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _series(records: list[Record]) -> Series:
    return Series(
        numbers={name: _array([r.get(name) for r in records]) for name in _NUMBERS},
        phase=np.array([str(r.get("phase", "")) for r in records]),
        loss_by_source=_columns(records, "loss_by_source"),
        loss_by_domain=_columns(records, "loss_by_domain"),
        ratio_by_domain=_columns(records, "ratio_by_domain", absent=0.0),
        tokens_by_source=_columns(records, "tokens_by_source", absent=0.0),
    )


def _array(values: list[Any]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _columns(records: list[Record], key: str, absent: float = np.nan) -> dict[str, Floats]:
    names = dict.fromkeys(name for record in records for name in record.get(key) or {})
    return {
        name: _array(
            [
                absent if (value := (record.get(key) or {}).get(name)) is None else value
                for record in records
            ]
        )
        for name in names
    }


def _domains(recipe: Recipe, plan: dict[str, Any] | None, train: list[Record]) -> tuple[str, ...]:
    """Domains in the recipe's order of sources: those that the run reads or validates."""
    read = {
        stream["domain"]
        for phase in (plan or {"phases": []})["phases"]
        for stream in phase["streams"]
    }
    read |= {name for record in train for name in record.get("loss_by_domain") or {}}
    read |= {source.domain for source in recipe.sources.values() if source.validation}
    ordered = dict.fromkeys(source.domain for source in recipe.sources.values())
    return tuple(name for name in ordered if name in read)
