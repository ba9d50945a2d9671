"""What is known of shares that are decided while training.

The data order of a run is a function of (recipe, recorded shares, step). The shares are recorded in
two places: RUN/mixture.jsonl has a line for every block, written before the block is trained; and
the recipe.yaml of a checkpoint has those of all blocks that begin before the checkpoint or at it,
in `online.shares`. A resumed run takes the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.plan.plan import Plan
from megacode.recipe.online import decides, known_shares, with_shares
from megacode.recipe.schema import Recipe

FILE = "mixture.jsonl"


def continued(plan: Plan, before: Recipe) -> Plan:
    """The plan with the shares that another recipe has of its phases, by their names.

    Raises:
        UserError: a phase with recorded shares is missing.
    """
    recipe = plan.recipe
    deciding = {phase.name for phase in recipe.phases if decides(phase)}
    for old in before.phases:
        online = decides(old)
        if online is None:
            continue
        if old.name in deciding:
            recipe = with_shares(recipe, old.name, shares=online.shares)
        elif online.shares and all(phase.name != old.name for phase in recipe.phases):
            raise UserError(
                f"phases.{old.name}: the run has recorded its shares, and the recipe has no phase "
                "of that name; keep the name"
            )
    return plan if recipe == plan.recipe else plan.again(recipe)


def next_boundary(plan: Plan, done: int) -> int:
    """Finished steps up to which all shares are known after `done`: a block's end, or the run's."""
    for phase, given in zip(plan.phases, plan.recipe.phases, strict=True):
        online = decides(given)
        if online and phase.end > done:
            began = phase.first_step - given.placed("mixture", phase.steps)[0]
            block = (max(done, phase.first_step) - began) // online.every
            return min(began + (block + 1) * online.every, phase.end)
    return plan.total_steps


def recorded(recipe: Recipe, run: Path) -> Recipe:
    """The recipe of a run with the shares that its mixture.jsonl records.

    Raises:
        UserError: the file does not fit the recipe.
    """
    for entry in read_entries(run):
        phase = next((one for one in recipe.phases if one.name == entry["phase"]), None)
        if phase is None or not decides(phase):
            continue
        shares = known_shares(phase.mixture)
        block, given = entry["block"], entry["shares"]
        if list(given) != list(shares) or block > len(next(iter(shares.values()))):
            raise UserError(
                f"{run / FILE}: block {block} of {phase.name} does not fit the run's recipe.yaml; "
                "copy both anew from where the run was"
            )
        rows = {name: [*known[:block], given[name]] for name, known in shares.items()}
        recipe = with_shares(recipe, phase.name, shares=rows)
    return recipe


def read_entries(run: Path) -> list[dict[str, Any]]:
    """Lines of RUN/mixture.jsonl, without a torn last one; none where there is no such file."""
    path = run / FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); remove the damaged line") from None


def entry_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"


def fixed(recipe: Recipe) -> Recipe:
    """The recipe that reads the recorded shares and decides none.

    Raises:
        UserError: none are recorded.
    """
    names = [p.name for p in recipe.phases if (online := decides(p)) and online.shares]
    if not names:
        raise UserError(
            "--fixed-mixture: no shares are recorded; give the folder of a run whose recipe has a "
            "phase with mixture.online"
        )
    for name in names:
        recipe = with_shares(recipe, name, algorithm="fixed")
    return recipe


def fixed_blocks(recipe: Recipe) -> Iterator[str]:
    """Of each phase with fixed shares, of how many blocks they are known."""
    for phase in recipe.phases:
        online = phase.mixture.online
        if online and online.algorithm == "fixed":
            known = len(next(iter(known_shares(phase.mixture).values())))
            yield f"; {phase.name}: {known:,} blocks of {online.every:,} steps, the last to its end"
