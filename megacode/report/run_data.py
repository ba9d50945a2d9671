"""A run folder, read for the report: recipe, plan, metrics as arrays, environment, samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megacode.errors import UserError
from megacode.plan.summary import plan_summary
from megacode.plan.trajectory import recorded
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.evaluations import read_curve
from megacode.run.metrics import FILE, Record, read_metrics

Floats = NDArray[np.float64]

_NUMBERS = (
    *("step", "tokens", "loss", "grad_norm", "learning_rate", "batch_size", "seconds"),
    *("tokens_per_second", "tflops_per_device", "mfu", "memory_gb", "drift"),
    *("contrastive", "contrastive_accuracy", "weighted_tokens"),
)


@dataclass(frozen=True)
class Series:
    """Training records, one a step, as arrays of one length; NaN where a record has no such number.

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
        changes = (np.flatnonzero(self.phase[1:] != self.phase[:-1]) + 1).tolist()
        return [slice(a, b) for a, b in zip([0, *changes], [*changes, len(self)], strict=True)]


@dataclass(frozen=True)
class Run:
    """One run folder, with at least one finished step.

    Attributes:
        label: the folder's name; its path where several runs have one name.
        recipe_text: the recipe as resolved, YAML.
        plan: as `plan.json` has it; {} where it is missing and the corpora are not at hand.
        domains: those that the run reads or validates, in the recipe's order.
    """

    label: str
    recipe: Recipe
    recipe_text: str
    plan: dict[str, Any]
    train: Series
    validations: list[Record]
    scores: list[Record]
    events: list[Record]
    environment: dict[str, Any]
    samples: str
    domains: tuple[str, ...]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The plan's phases; empty without a plan."""
        return list(self.plan.get("phases", []))

    @property
    def steps_done(self) -> int:
        return int(self.train["step"][-1])

    def at(self, steps: ArrayLike, number: str) -> Floats:
        """`step` or `tokens` after so many finished steps, interpolated between records."""
        known, values = (np.append(0.0, self.train[name]) for name in ("step", number))
        return np.asarray(np.interp(np.asarray(steps), known, values), dtype=np.float64)

    def bands(self, number: str) -> list[tuple[str, float, float]]:
        """(phase, start, end) over finished steps or tokens (`number`: `step` or `tokens`)."""
        at, phase = np.append(0.0, self.train[number]), self.train.phase
        return [(str(phase[p.start]), at[p.start], at[p.stop]) for p in self.train.phase_slices()]

    def validation(self, group: str, name: str) -> tuple[Floats, Floats]:
        """(steps, losses) of a source (`group`: `loss_by_source`) or domain (`loss_by_domain`)."""
        losses = {record["step"]: record.get(group, {}).get(name) for record in self.validations}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return np.array(list(known), np.float64), np.array(list(known.values()), np.float64)

    def over_tokens(self, group: str, name: str) -> tuple[Floats, Floats]:
        """(tokens, values) of a name in a group of validations and of evaluated checkpoints."""
        values = {one["step"]: one.get(group, {}).get(name) for one in self._evaluations()}
        known = {step: value for step, value in sorted(values.items()) if value is not None}
        return self.at(list(known), "tokens"), np.array(list(known.values()), np.float64)

    def _evaluations(self) -> list[Record]:
        return [*self.validations, *self.scores]

    def task(self, name: str) -> dict[str, tuple[Floats, Floats]]:
        """group -> (tokens, accuracy) of a task of its own or of the harness; "" is all of it."""
        found: dict[str, dict[int, float]] = {"": {}}
        for record in self.scores:
            if numbers := record.get("tasks", {}).get(name):
                first = next(iter(numbers))
                own = {"": numbers.get("accuracy", numbers[first])} | numbers.get("groups", {})
                for group, value in own.items():
                    if value is not None:
                        found.setdefault(group, {})[record["step"]] = value
        return {
            group: (self.at(list(values), "tokens"), np.array(list(values.values()), np.float64))
            for group, values in found.items()
            if values
        }

    def chance(self, name: str) -> float | None:
        """Accuracy of a guess in a task; None where it is not known."""
        found = [record.get("tasks", {}).get(name, {}).get("chance") for record in self.scores]
        return next((one for one in reversed(found) if one is not None), None)

    def last_validation(self) -> dict[str, float]:
        """Domain -> loss in the last validation, where it is a number."""
        losses = self.validations[-1]["loss_by_domain"] if self.validations else {}
        return {d: losses[d] for d in self.domains if losses.get(d) is not None}


def read_run(folder: Path, until: int | None = None) -> Run:
    """Read a run folder, without records after step `until`.

    Raises:
        UserError: it is no run folder, or it has not trained a step yet.
    """
    recipe_path = folder / "recipe.yaml"
    if not recipe_path.exists():
        missing = "has no recipe.yaml" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder}: {missing}; give a run's folder, such as runs/crystal-tiny")
    kinds: dict[str, list[Record]] = {"train": [], "validation": [], "tasks": [], "event": []}
    for record in read_metrics(folder / FILE):
        if until is None or record["step"] <= until:
            kinds.setdefault(record["kind"], []).append(record)
    if not kinds["train"]:
        raise UserError(f"{folder / FILE}: has no finished step yet; a report needs at least one")
    recipe = load_recipe(recipe_path)
    plan = _read_plan(folder, recipe)
    train = _series(kinds["train"])
    samples = folder / "samples.txt"
    return Run(
        label=folder.resolve().name,
        recipe=recipe,
        recipe_text=recipe_path.read_text(encoding="utf-8"),
        plan=plan,
        train=train,
        validations=kinds["validation"],
        scores=_scores(folder, kinds["tasks"], until),
        events=kinds["event"],
        environment=_read_json(folder / "environment.json"),
        samples=samples.read_text(errors="replace").strip("\n") if samples.exists() else "",
        domains=_domains(recipe, plan, train),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, with labels that differ."""
    runs = [read_run(folder) for folder in folders]
    if len({run.label for run in runs}) == len(runs):
        return runs
    return [replace(run, label=str(folder)) for run, folder in zip(runs, folders, strict=True)]


def _read_plan(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The plan that the run's start wrote; made anew if it cannot be read, {} without corpora."""
    plan = _read_json(folder / "plan.json")
    if (known := recorded(recipe, folder)) != recipe:  # shares that this start has decided
        recipe, plan = known, {}
    if plan.get("phases") and all("curves" in phase for phase in plan["phases"]):
        return plan
    from megacode.data.planning import plan_with_data

    try:
        return plan_summary(plan_with_data(recipe))
    except UserError:  # without the corpora: a report without planned curves
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where it is missing or damaged, as a report can do without."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _series(records: list[Record]) -> Series:
    def column(values: list[Any]) -> Floats:
        return np.array(values, dtype=np.float64)  # None becomes NaN

    def columns(key: str, absent: float = np.nan) -> dict[str, Floats]:
        names = dict.fromkeys(name for record in records for name in record.get(key, {}))
        return {n: column([r.get(key, {}).get(n, absent) for r in records]) for n in names}

    return Series(
        numbers={name: column([r.get(name) for r in records]) for name in _NUMBERS},
        phase=np.array([record["phase"] for record in records]),
        loss_by_source=columns("loss_by_source"),
        loss_by_domain=columns("loss_by_domain"),
        ratio_by_domain=columns("ratio_by_domain", 0.0),
        tokens_by_source=columns("tokens_by_source", 0.0),
    )


def _scores(folder: Path, trained: list[Record], until: int | None) -> list[Record]:
    """Records with `tasks` or bits per byte, by step: scored while training, or a checkpoint's."""
    later = [one for one in read_curve(folder) if until is None or one["step"] <= until]
    found: dict[int, Record] = {}
    for record in (*trained, *later):
        found[record["step"]] = found.get(record["step"], {}) | record
    return [found[step] for step in sorted(found)]


def _domains(recipe: Recipe, plan: dict[str, Any], train: Series) -> tuple[str, ...]:
    streams = [stream for phase in plan.get("phases", []) for stream in phase["streams"]]
    read = {stream["domain"] for stream in streams} | set(train.loss_by_domain)
    sources = recipe.sources.values()
    read |= {source.domain for source in sources if source.validation}
    return tuple(dict.fromkeys(source.domain for source in sources if source.domain in read))
