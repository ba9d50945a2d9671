"""A new run that shares another's first steps and then takes a way of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from megacode.data.planning import plan_with_data
from megacode.errors import UserError
from megacode.files import write_json, write_text
from megacode.plan.plan import Plan
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Mixture, MixtureSource, Phase, PhasePart, Recipe, Within
from megacode.run.checkpoints import LATEST, checkpoint_name, complete_checkpoints, read_info
from megacode.run.history import past_changes
from megacode.run.metrics import FILE as METRICS
from megacode.run.metrics import MetricsWriter, read_metrics

_SAME = ("model", "tokenizer", "seed")
_ASPECTS: tuple[Literal["learning_rate", "batch_size", "mixture"], ...] = (
    "learning_rate",
    "batch_size",
    "mixture",
)


def fork(
    old: Path,
    step: int,
    new: Path,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """Make the run folder `new`, whose first `step` steps are those of the run `old`.

    Returns:
        lines that say what it will do.

    Raises:
        UserError: there is no checkpoint at `step`, `new` exists, nothing remains to be trained, or a change is to what
            lies before `step`.
    """
    checkpoint = _checkpoint(old, step)
    if new.exists():
        raise UserError(f"{new}: exists already; choose another folder with --to")
    source = old / "recipe.yaml"
    before = plan_with_data(load_recipe(source), source)
    changed = load_recipe(recipe_file or source, overrides or [])
    after = plan_with_data(changed, recipe_file or source)
    recipe = split(before, after, step)
    if _NAME.match(new.name) and changed.name == before.recipe.name:
        recipe = recipe.model_copy(update={"name": new.name})
    plan = plan_with_data(recipe, recipe_file or source)
    batches, others = past_changes(checkpoint, read_info(checkpoint), plan)
    # Keys that hold for the whole run change where the fork's own steps begin; rates of the past have places of their own.
    asked = [change for change in others if not change.key.startswith("phases.")]
    if past := [*batches, *(str(change) for change in others if change not in asked)]:
        raise UserError(
            f"{old}: its first {step:,} steps were not trained as this recipe says: {'; '.join(past[:6])}; a fork changes "
            "what follows"
        )
    if recipe.parallel.distributed_optimizer != read_info(checkpoint)["distributed_optimizer"]:
        raise UserError(
            f"parallel.distributed_optimizer: {checkpoint} was saved otherwise; leave it as it is"
        )
    _write(old, checkpoint, step, new, plan, overrides or [], [change.key for change in asked])
    return [
        f"{new}: {checkpoint_name(step)} of {old}, then {plan.total_steps - step:,} steps of its own",
        *(f"  {change}, from step {step + 1:,} on" for change in asked),
        *_told(plan, step),
    ]


_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


def _checkpoint(run: Path, step: int) -> Path:
    there = dict(complete_checkpoints(run / "checkpoints"))
    if step not in there:
        shown = ", ".join(f"{number}" for number in sorted(there)) or "none"
        raise UserError(f"{run}: has no checkpoint at step {step}; there are: {shown}")
    return there[step]


# --------------------------------------------------------------------------------------------------- the recipe


def split(before: Plan, after: Plan, step: int) -> Recipe:
    """The recipe that is `before`'s up to `step` and `after`'s from there on.

    Raises:
        UserError: `after` differs in what lies before `step`, or ends there.
    """
    old, new = before.recipe, after.recipe
    for key in _SAME:
        if getattr(old, key) != getattr(new, key):
            raise UserError(
                f"{key}: a fork goes on with the same {key}; leave it as it is, or start a run with `initialize_from`"
            )
    phases = list(new.phases)
    for index, phase in enumerate(before.phases):
        if phase.first_step >= step:
            break
        key, end, done = (
            f"phases.{phase.name}",
            phase.first_step + phase.steps,
            step - phase.first_step,
        )
        given = phases[index] if index < len(phases) else None
        if given is None or given.name != phase.name:
            raise UserError(
                f"{key}: was trained before step {step:,} and is missing in the new recipe; keep it"
            )
        if given == old.phases[index]:
            continue
        if end <= step:
            raise UserError(
                f"{key}: ended at step {end:,}, and a fork at {step:,} changes what follows; leave it as it is"
            )
        steps = after.phases[index].steps
        if steps <= done:
            raise UserError(
                f"{key}: has {steps:,} steps and the fork is {done:,} into it; make it longer"
            )
        names = [p.name for p in phases]
        phases[index : index + 1] = _pieces(before, index, given, done, steps - done, names)
    recipe = new.model_copy(update={"phases": phases})
    if sum(phase.steps for phase in after.phases) <= step:
        raise UserError(
            f"--at {step}: the recipe ends there; lengthen the last phase or add one, and go on in the same folder"
        )
    return recipe


def _pieces(
    before: Plan, index: int, given: Phase, done: int, left: int, names: list[str]
) -> tuple[Phase, Phase]:
    """A phase up to its step `done`, as it was, and `left` steps more of it as `given`."""
    old, steps = before.recipe.phases[index], before.phases[index].steps
    places = {aspect: old.placed(aspect, steps) for aspect in _ASPECTS}
    first = old.model_copy(
        update={
            "steps": done,
            "tokens": None,
            "within": Within(
                **{
                    aspect: PhasePart(first=start, steps=length)
                    for aspect, (start, length) in places.items()
                }
            ),
        }
    )
    kept = {
        aspect: PhasePart(first=start + done, steps=length)
        for aspect, (start, length) in places.items()
        if getattr(given, aspect) == getattr(old, aspect)
    }
    read = {
        (entry.source, entry.given.subset_range) for entry in mixture_entries(before.recipe, old)
    }
    second = given.model_copy(
        update={
            "name": _free_name(old.name, names),
            "steps": left,
            "tokens": None,
            "within": Within(**kept) if kept else None,
            # Both happened at the old phase's first step.
            "optimizer_state": "keep"
            if given.optimizer_state == old.optimizer_state
            else given.optimizer_state,
            "cursor": "continue" if given.cursor == old.cursor else given.cursor,
            "mixture": _continued(given.mixture, read),
        }
    )
    return first, second


def _continued(mixture: Mixture, read: set[tuple[str, tuple[float, float]]]) -> Mixture:
    """Without the restarts of streams that the old phase has restarted."""

    def sources(entries: Mapping[str, MixtureSource]) -> dict[str, MixtureSource]:
        return {
            name: entry.model_copy(update={"cursor": None})
            if (name, entry.subset_range) in read
            else entry
            for name, entry in entries.items()
        }

    if mixture.sources:
        return mixture.model_copy(update={"sources": sources(mixture.sources)})
    domains = {
        name: part.model_copy(update={"sources": sources(part.sources)}) if part.sources else part
        for name, part in (mixture.domains or {}).items()
    }
    return mixture.model_copy(update={"domains": domains})


def _free_name(name: str, taken: list[str]) -> str:
    base = re.sub(r"-fork\d*$", "", name)
    number = 1
    while (free := f"{base}-fork{number if number > 1 else ''}") in taken:
        number += 1
    return free


def _told(plan: Plan, step: int) -> Iterator[str]:
    for phase, given in zip(plan.phases, plan.recipe.phases, strict=True):
        if phase.first_step + phase.steps <= step:
            continue
        line = (
            f"  {phase.name}: steps {max(phase.first_step, step) + 1:,} to {phase.last_step + 1:,}"
        )
        if phase.first_step == step and given.within:
            kept = [
                aspect.replace("_", " ") for aspect in _ASPECTS if getattr(given.within, aspect)
            ]
            line += f"; {', '.join(kept)} go{'es' * (len(kept) == 1)} on as in the phase it is a piece of"
        yield line


# ----------------------------------------------------------------------------------------------------- the folder


def _write(
    old: Path,
    checkpoint: Path,
    step: int,
    new: Path,
    plan: Plan,
    overrides: list[str],
    accepted: list[str],
) -> None:
    """The new run folder, there whole or not at all."""
    partial = new.with_name(f".{new.name}.{secrets.token_hex(4)}.partial")
    try:
        shutil.copytree(checkpoint, partial / "checkpoints" / checkpoint.name, copy_function=_link)
        write_text(partial / "checkpoints" / LATEST, checkpoint.name + "\n")
        write_text(partial / "recipe.yaml", dump_recipe(plan.recipe))
        facts = {
            "run": str(old.resolve()),
            "step": step,
            "changes": overrides,
            "accepted": accepted,
            "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_json(partial / "fork.json", facts)
        if (old / METRICS).exists():
            with MetricsWriter(partial, plan.recipe.logging.tensorboard) as metrics:
                for record in read_metrics(old):
                    if record["step"] <= step and record.get("event") not in ("end", "phase end"):
                        metrics.write(record)
                metrics.event(step, "fork", run=str(old), changes=overrides)
        os.rename(partial, new)
    except OSError as error:
        raise UserError(
            f"{new}: cannot be made ({error.strerror}: {error.filename}); is the checkpoint still there?"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A hard link: a checkpoint's files never change. A copy where links cannot be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
