"""A sweep file -> its cells: recipes that differ in a few keys and in seeds, a run folder each.

    name: code-share
    recipe: base.yaml                  # paths are relative to this file
    seeds: [1, 2, 3]
    grid:
      code:                            # an axis: keys and their values, the first key's name them
        phases.main.mixture.domains.code.ratio: [0, 0.5, 1]
        phases.main.mixture.domains.text.ratio: [1, 0.5, 0]

Cells whose first phases are the same train these once: such a prefix is a cell of its own, and the
others are forks of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megacode.data.planning import plan_with_data
from megacode.errors import UserError
from megacode.plan.estimate import run_flops
from megacode.plan.fingerprint import fingerprint
from megacode.plan.plan import Plan
from megacode.plan.summary import vocabulary
from megacode.recipe.load import load_recipe, load_section
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe
from megacode.recipe.section import Section
from megacode.recipe.yaml_tree import Tree, read_yaml


class Seeds(Section):
    """Seeds of an arm's runs. `[1, 2, 3]` is short for these in both keys; a key that is left out
    keeps the recipe's."""

    model: list[int] = Field(default=[])
    data: list[int] = Field(default=[])
    cross: bool = False
    """Every model seed with every data seed; else the first with the first, and so on."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"model": value, "data": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _pairs_up(self) -> Seeds:
        if not (self.model or self.data):
            raise ValueError("name at least one seed")
        if self.model and self.data and not self.cross and len(self.model) != len(self.data):
            raise ValueError(
                f"{len(self.model)} model seeds and {len(self.data)} data seeds cannot be paired; "
                "give as many of both, or `cross: true`"
            )
        return self

    def overrides(self) -> list[list[str]]:
        """`KEY=VALUE` of each run."""
        model = [f"model_seed={seed}" for seed in self.model]
        data = [f"data_seed={seed}" for seed in self.data]
        if not (model and data):
            return [[one] for one in (*model, *data)]
        return [list(pair) for pair in (product if self.cross else zip)(model, data)]


class NamedCell(Section):
    """An arm that is written out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    recipe: str | None = None
    set: dict[str, Any] = Field(default={})


class Sweep(Section):
    """A sweep's YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    recipe: str | None = None
    """Of every cell that names none itself."""
    seeds: Seeds | None = None
    grid: dict[str, dict[str, list[Any]]] = Field(default={})
    """Axis -> keys of the recipe -> their values. The keys of an axis change together, axes each
    with each. The key `recipe` takes recipe files."""
    cells: list[NamedCell] = Field(default=[])
    """Arms one by one, instead of a grid."""
    axis: str | None = None
    """What the page draws metrics against; default: the first of the grid."""
    metrics: list[str] = Field(default=[])
    """Default: all validation losses by domain, and the accuracy of all tasks."""
    runs: str | None = None
    """Folder of the run folders, relative to the working directory; default: runs/NAME."""

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        if self.grid and self.cells:
            raise ValueError("a sweep has either `grid:` or `cells:`")
        for axis, keys in self.grid.items():
            lengths = {key: len(values) for key, values in keys.items()}
            if not keys or 0 in lengths.values():
                raise ValueError(f"grid.{axis}: give keys of the recipe, each with its values")
            if len(set(lengths.values())) > 1:
                shown = ", ".join(f"{count} of {key}" for key, count in lengths.items())
                raise ValueError(f"grid.{axis}: every key needs as many values; there are {shown}")
            if any(isinstance(value, dict | list) for value in next(iter(keys.values()))):
                raise ValueError(
                    f"grid.{axis}: the values of the first key name the arms, so they are numbers "
                    "or words; put such a key first"
                )
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError("cells: two have the same name; name each differently")
        if self.axis not in (None, *self.axes):
            raise ValueError(f"axis: there is no {self.axis!r}; there are: {', '.join(self.axes)}")
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes; `cell` where arms are written out."""
        return tuple(self.grid) or ("cell",)

    def arms(self) -> Iterator[tuple[dict[str, str], str | None, list[str]]]:
        """(label by axis, recipe, overrides) of each arm."""
        if not self.grid:
            for cell in self.cells or [NamedCell(name=self.name)]:
                changes = [f"{key}={_flow(value)}" for key, value in cell.set.items()]
                yield {"cell": cell.name}, cell.recipe or self.recipe, changes
            return
        for choice in product(*(range(len(next(iter(k.values())))) for k in self.grid.values())):
            labels, recipe, changes = {}, self.recipe, []
            for (axis, keys), index in zip(self.grid.items(), choice, strict=True):
                given = {key: values[index] for key, values in keys.items()}
                labels[axis] = _label(*next(iter(given.items())))
                recipe = given.pop("recipe", recipe)
                changes += [f"{key}={_flow(value)}" for key, value in given.items()]
            yield labels, recipe, changes


@dataclass(frozen=True)
class Cell:
    """A run of a sweep, or first phases that several of its runs share.

    Attributes:
        name: of its folder in `runs`.
        arm: axis -> label; empty for shared phases.
        until: the phase with whose end shared phases end.
        parent: shared phases that it goes on from.
    """

    name: str
    plan: Plan = field(repr=False)
    runs: Path
    arm: Mapping[str, str]
    until: str | None = None
    parent: Cell | None = field(default=None, repr=False)

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def recipe_file(self) -> Path:
        return self.runs / "recipes" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What its training prints."""
        return self.runs / "logs" / f"{self.name}.txt"

    @property
    def failure(self) -> Path:
        """Exists where its last start failed: one line that says how."""
        return self.runs / "logs" / f"{self.name}.failed"

    @property
    def first(self) -> int:
        """Finished steps of what it goes on from."""
        return self.parent.end if self.parent else 0

    @property
    def end(self) -> int:
        """Finished steps at its end."""
        return self.plan.phase_end(self.until)

    @property
    def ranks(self) -> int:
        """Processes that hold the model once."""
        parallel = self.recipe.parallel
        return parallel.tensor * parallel.pipeline * parallel.context

    def flops(self) -> float | None:
        """Of its own steps; None where the vocabulary is not known."""
        if (size := vocabulary(self.recipe)) is None:
            return None
        own = [p for p in self.plan.phases if self.first <= p.first_step < self.end]
        return run_flops(replace(self.plan, phases=tuple(own)), size)

    @property
    def tokens(self) -> int:
        """In its own steps."""
        return self.plan.tokens_before(self.end) - self.plan.tokens_before(self.first)


@dataclass(frozen=True)
class OpenSweep:
    """A sweep's file, its cells in the file's order, and first phases that several of them share,
    short ones first."""

    path: Path
    sweep: Sweep
    runs: Path
    cells: tuple[Cell, ...]
    shared: tuple[Cell, ...]

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """In an order in which they can be trained."""
        return (*self.shared, *self.cells)

    @property
    def axis(self) -> str:
        return self.sweep.axis or self.sweep.axes[0]

    @property
    def steps_saved(self) -> int:
        alone = sum(cell.end for cell in self.cells)
        return alone - sum(cell.end - cell.first for cell in self.all_cells)


def is_sweep(path: Path) -> bool:
    """Whether a YAML file is a sweep rather than a recipe."""
    if not path.is_file():
        return False
    tree = read_yaml(path)
    return not {"phases", "extends"} & set(tree) and bool({"recipe", "cells", "grid"} & set(tree))


def open_sweep(path: Path) -> OpenSweep:
    """The cells of a sweep file, each planned.

    Raises:
        UserError: the file or the recipe of a cell has mistakes, or two cells are the same run.
    """
    sweep = load_section(Sweep, path)
    runs = Path(sweep.runs or f"runs/{sweep.name}")
    found: dict[str, Cell] = {}
    for labels, recipe, changes in sweep.arms():
        if recipe is None:
            raise UserError(f"{path}: recipe: is missing; name the recipe that the cells change")
        for seeds in sweep.seeds.overrides() if sweep.seeds else [[]]:
            shown = ", ".join(f"{axis} {label}" for axis, label in labels.items())
            file = path.parent / Path(recipe).expanduser()
            try:
                made = load_recipe(file, [*changes, *seeds], path.parent)
                key = _hash(_identity(made, path.parent))
                if key in found:
                    raise UserError(
                        f"is the same run as {_prefix(found[key].arm)}; take one of them out"
                    )
                name = "_".join([_prefix(labels), *_seed_names(sweep, made), key])
                plan = plan_with_data(made.model_copy(update={"name": name}), file)
            except UserError as error:
                raise UserError(f"{path}: cell with {shown}: {error}") from None
            found[key] = Cell(name, plan, runs, labels)
    cells, shared = _with_shared(list(found.values()), path.parent)
    return OpenSweep(path, sweep, runs, tuple(cells), tuple(shared))


# ------------------------------------------------------------------------------------------- names


def _label(key: str, value: Any) -> str:
    if key == "recipe":
        return Path(value).stem
    return value if isinstance(value, str) else json.dumps(value)


def _prefix(labels: Mapping[str, str]) -> str:
    parts = (label if axis == "cell" else f"{axis}-{label}" for axis, label in labels.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(parts)).strip("-.") or "cell"


def _seed_names(sweep: Sweep, recipe: Recipe) -> list[str]:
    model, data = recipe.resolved_model_seed, recipe.resolved_data_seed
    same = model == data
    return [f"seed-{model}" if same else f"seed-{model}-{data}"] if sweep.seeds else []


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        text = ", ".join(f"{json.dumps(key)}: {_flow(item)}" for key, item in value.items())
        mark = "!replace " if isinstance(value, Tree) and value.replaces else ""
        return f"{mark}{{{text}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _identity(recipe: Recipe, folder: Path) -> Any:
    """What a recipe says, without its name. Paths are relative to `folder`: a checkout may move.
    Keys at their defaults are left out: a later version may have more of them."""

    def relative(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: relative(item) for key, item in value.items()}
        if isinstance(value, list):
            return [relative(item) for item in value]
        is_path = isinstance(value, str) and os.path.isabs(value)
        return os.path.relpath(value, folder.resolve()) if is_path else value

    return relative(recipe.model_dump(exclude_defaults=True, exclude={"name", "description"}))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# ------------------------------------------------------------------------------------ shared phases


def _with_shared(cells: Sequence[Cell], folder: Path) -> tuple[list[Cell], list[Cell]]:
    """Cells with their parents, and first phases that several cells share."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        for index in range(len(cell.plan.phases) - 1):
            groups[index, _hash(_past(cell, index, folder))].append(number)
    longest: dict[
        tuple[int, ...], tuple[int, str]
    ] = {}  # of several prefixes that the same cells share
    for (index, key), members in sorted(groups.items()):
        if len(members) > 1:
            longest[tuple(members)] = index, key
    shared: list[Cell] = []
    parent: dict[int, Cell] = {}
    for of, (index, key) in sorted(longest.items(), key=lambda one: (one[1][0], one[0])):
        plan = cells[of[0]].plan
        phase = plan.phases[index].name
        name = f"shared-{phase}_{key}"
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"name": name}))
        made = Cell(name, plan, cells[0].runs, {}, phase, parent.get(of[0]))
        shared.append(made)
        parent |= dict.fromkeys(of, made)
    return [replace(cell, parent=parent.get(n)) for n, cell in enumerate(cells)], shared


def _past(cell: Cell, index: int, folder: Path) -> Any:
    """Everything that decides the steps of a cell up to the end of phase number `index`, and what
    is evaluated there."""
    phase, phases = cell.plan.phases[index], cell.recipe.phases[: index + 1]
    read = {entry.source for one in phases for entry in mixture_entries(cell.recipe, one)}
    sources = {
        name: source
        for name, source in cell.recipe.sources.items()
        if name in read or source.validation
    }
    recipe = cell.recipe.model_copy(update={"phases": phases, "sources": sources})
    model = cell.recipe.model_in(phase.name).model_dump()
    return [_identity(recipe, folder), fingerprint(cell.plan, phase.end), model]
