"""Mixtures by stage as a recipe: a phase cut into pieces, each with shares of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacode.errors import UserError
from megacode.files import write_text
from megacode.plan.plan import phase_steps
from megacode.recipe.load import load_recipe
from megacode.recipe.schedules import BatchSizes
from megacode.recipe.schema import BatchRamp, Phase, PhasePart, Within
from megacode.recipe.yaml_tree import dump_yaml


def write_phases(
    base: Path, name: str, stages: Sequence[tuple[float, Mapping[str, float]]], output: Path
) -> list[int]:
    """Write a recipe that extends `base` and trains phase `name` in stages.

    Rates, batch sizes and everything else stay those of the whole phase.

    Args:
        stages: (end as a share of the phase, share by domain or source) of each, in order; the last
            end is 1.

    Returns:
        Steps of each stage.

    Raises:
        UserError: there is no such phase, its length is not known before the data, or its mixture
            has other names.
    """
    recipe = load_recipe(base)
    phase = next((one for one in recipe.phases if one.name == name), None)
    if phase is None:
        there = ", ".join(one.name for one in recipe.phases)
        raise UserError(f"{base}: phases: there is no {name}; there are: {there}")
    steps = phase_steps(phase, BatchSizes.of(phase.batch_size))
    if steps is None or phase.within:
        what = "`within`" if phase.within else "`epochs`"
        raise UserError(f"{base}: phases.{name}: has {what}; give `steps` or `tokens` instead")
    known = phase.mixture.domains or phase.mixture.sources or {}
    if missing := {key for _, shares in stages for key in shares} ^ set(known):
        raise UserError(
            f"{base}: phases.{name}.mixture: has {', '.join(known)}, and the table has shares of "
            f"{', '.join(stages[0][1])}; name both alike ({', '.join(sorted(missing))} differ)"
        )
    ends = np.unique([max(round(end * steps), 1) for end, _ in stages])
    if len(ends) < len(stages):
        raise UserError(
            f"{base}: phases.{name}: {steps} steps are too few for {len(stages)} stages"
        )
    edges = [0, *ends.tolist()]
    pieces = [
        _piece(phase, number, shares, first, end - first, steps)
        for number, ((_, shares), first, end) in enumerate(
            zip(stages, edges[:-1], edges[1:], strict=True), 1
        )
    ]
    phases = [part for one in recipe.phases for part in (pieces if one is phase else [_plain(one)])]
    relative = os.path.relpath(base.resolve(), output.resolve().parent)
    tree = {"extends": relative, "name": f"{recipe.name}-mixed", "phases": phases}
    write_text(output, dump_yaml(tree))
    load_recipe(output)
    return np.diff(edges).tolist()


def _piece(
    phase: Phase, number: int, shares: Mapping[str, float], first: int, steps: int, whole: int
) -> dict[str, Any]:
    part = PhasePart(first=first, steps=whole)
    update: dict[str, Any] = {
        "name": f"{phase.name}-{number}",
        "steps": steps,
        "tokens": None,
        "within": Within(
            learning_rate=part,
            batch_size=part if isinstance(phase.batch_size, BatchRamp) else None,
        ),
    }
    if number > 1:  # what happens at the phase's first step happens once
        update |= {"optimizer_state": "keep", "cursor": "continue"}
    plain = _plain(phase.model_copy(update=update))
    kind, key = ("domains", "ratio") if phase.mixture.domains else ("sources", "weight")
    for name, share in shares.items():
        plain["mixture"][kind][name] = {**plain["mixture"][kind][name], key: round(share, 6)}
    return plain


def _plain(phase: Phase) -> dict[str, Any]:
    return phase.model_dump(exclude_defaults=True, exclude_none=True)
